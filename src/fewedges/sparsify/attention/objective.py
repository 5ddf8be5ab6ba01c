"""One micro-batch: both models forward, the objective, and its gradient; eagerly, or replayed as a CUDA graph.

    objective = kl_weight * KL(dense || sparse) + loss_weight * cross-entropy + price * expected edges
                + head price * open heads, softly counted (where the recipe has a target for them)

All that changes from step to step comes in as tensors (`Inputs`), so that the same code can be captured once and
replayed. On an H200, SmolLM2-135M at T = 512 spent .23 to .27 s a step on launching kernels at batch 16 to 64;
a replay launches once.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fewedges.model.anatomy import Anatomy, plain
from fewedges.model.attention import register, register_maskless
from fewedges.recipes import SparseAttention
from fewedges.sparsify.attention.interface import FUSED, GATED, GatePass, gated_forward
from fewedges.sparsify.distilling import Losses, losses

NAMES = ("objective", "kl", "cross_entropy", "dense_cross_entropy", "edges", "expected")
"""What a micro-batch contributes to the step's record, in this order; after them the edges of every head."""


class Inputs(NamedTuple):
    """Everything one micro-batch depends on, on the device."""

    tokens: Int[Tensor, "B T"]
    counts: Bool[Tensor, "B T"]
    total: Float[Tensor, ""]
    """Counted predictions of the whole batch."""
    share: Float[Tensor, ""]
    """This micro-batch's part of the batch's windows."""
    price: Float[Tensor, ""]
    """Multiplier: nats per edge per query per head."""
    head_price: Float[Tensor, ""]
    """Second multiplier: nats for all heads being open; 0 without a target for heads."""
    offset: Float[Tensor, ""]
    """Annealing: added to every gate bias."""
    seed: Int[Tensor, ""]
    """Key of the gate noise."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The two models and the recipe; calling it accumulates gradients and returns what this adds to the record (n,)."""

    recipe: SparseAttention
    dense: Any
    student: Any
    gated: bool
    backward: Callable[[Tensor], None]

    def __call__(self, given: Inputs) -> Float[Tensor, "n"]:
        compared, gates = self._forward(given)
        now = (compared.objective.detach(), compared.kl, compared.cross_entropy, compared.dense_cross_entropy)
        if not self.gated:
            self.backward(compared.objective)
            return torch.stack([*now, *(torch.zeros_like(now[0]),) * 2]).float()
        expected, opened = gates.expected_edges(), gates.open_edges()
        cost = given.price * priced_edges(expected, self.recipe)
        if self.recipe.target_heads is not None:
            cost = cost + given.head_price * priced_heads(expected)
        self.backward(compared.objective + given.share * cost)
        by_head = opened.mean(dim=(1, 3))  # (L, H)
        edges = torch.cat([torch.stack([by_head.mean(), expected.detach().mean()]), by_head.flatten()])
        return torch.cat([torch.stack(now), given.share * edges]).float()

    def _forward(self, given: Inputs) -> tuple[Losses, GatePass]:
        recipe = self.recipe
        gates = GatePass(
            sample=recipe.sampling == "logistic",
            straight_through=True,
            seed=given.seed,
            offset=given.offset,
            kernel=recipe.kernel,
        )
        options = {"gate_pass": gates} if self.gated else {}
        with torch.autocast(given.tokens.device.type, dtype=torch.bfloat16, enabled=recipe.precision == "bf16"):
            with torch.no_grad():
                dense = self.dense(input_ids=given.tokens, use_cache=False).logits
            student = self.student(input_ids=given.tokens, use_cache=False, **options).logits
        weights = {"kl_weight": recipe.kl_weight, "loss_weight": recipe.loss_weight}
        fused = recipe.kernel == "triton" and given.tokens.is_cuda
        return losses(student, dense, given.tokens, given.counts, total=given.total, fused=fused, **weights), gates


RARE = 0.01
"""Edges per query added to every head before heads are compared: below it, a head counts as closed."""


def priced_edges(expected: Float[Tensor, "L B H Q"], recipe: SparseAttention) -> Float[Tensor, ""]:
    """The regulariser: expected edges per query per head, weighted by layer and head, meaned over all of them.

    Three weights come from the edges themselves, e_lh of a head and e_l, their sum over a layer's heads; they are those
    of this micro-batch, and held constant in the gradient (reweighting, as Candes, Wakin, Boyd 2008, arXiv:0711.1612,
    do for l1).

    - `head_closing` c: ((mean e_lh + RARE) / (e_lh + RARE)) ** c; c = 1 descends the sum of log(e_lh + RARE).
    - `path_closing` p: ((mean e_l + 1) / (e_l + 1)) ** p; p = 1 descends the sum over layers of log(1 + e_l). That is
      the logarithm of the number of paths into a query, which stays in the residual stream in a layer or takes one
      of its e_l edges.
    - `layer_budgets` b: layer l's share of all edges over b_l's share of all budgets.
    """
    by_head = expected.mean(dim=(1, 3))  # (L, H)
    now = by_head.detach()
    in_layer = now.sum(dim=1, keepdim=True)  # (L, 1)
    if recipe.head_closing:
        by_head = by_head * ((now.mean() + RARE) / (now + RARE)) ** recipe.head_closing
    if recipe.path_closing:
        by_head = by_head * ((in_layer.mean() + 1) / (in_layer + 1)) ** recipe.path_closing
    if recipe.layer_budgets:
        budgets = _constant(recipe.layer_budgets, by_head.dtype, by_head.device)[:, None]
        by_head = by_head * (in_layer / (in_layer.sum() + RARE)) * (budgets.sum() / budgets)
    if recipe.layer_weights:
        by_head = by_head * _constant(recipe.layer_weights, by_head.dtype, by_head.device)[:, None]
    if recipe.head_weights:
        by_head = by_head * _constant(recipe.head_weights, by_head.dtype, by_head.device)
    return by_head.mean()


@cache
def _constant(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Float[Tensor, "n"]:
    """A recipe's numbers on the device, copied once: while a CUDA graph is captured nothing may be."""
    return torch.tensor(numbers, dtype=dtype, device=device)


def priced_heads(expected: Float[Tensor, "L B H Q"]) -> Float[Tensor, ""]:
    """The share of heads that are open, softly: log(1 + e / RARE) / log(1 + 1 / RARE), meaned over all of them.

    A head with no edge counts 0, one with an edge per query 1, one with ten 1.5. The pull on a head, 1 / (e + RARE), is
    strongest where it is nearly closed and hardly felt where it reads much. The edges are those of this micro-batch.
    """
    by_head = expected.mean(dim=(1, 3))  # (L, H)
    return torch.log1p(by_head / RARE).mean() / math.log1p(1 / RARE)


@contextmanager
def compiled_layers(models: list[Any], anatomy: Anatomy, backend: str = "inductor") -> Iterator[None]:
    """Compile the decoder layers of `models`, all but their attention calls; put the plain ones back at the end.

    Layer by layer, because the layers of a model share their code: it is compiled once, not once per layer. Gated
    attention stays outside: it is one kernel already, and it knows its layer's number, which must not be compiled in.
    """
    layers = [plain(model).get_submodule(x.module.rpartition(".")[0]) for model in models for x in anatomy.layers]
    outside = torch.compiler.disable(gated_forward)
    register(GATED, outside)
    register_maskless(FUSED, outside)
    for layer in layers:
        layer.compile(dynamic=False, backend=backend)
    try:
        yield
    finally:
        register(GATED, gated_forward)
        register_maskless(FUSED, gated_forward)
        for layer in layers:
            layer._compiled_call_impl = None


class Graph:
    """An Objective captured once as a CUDA graph: a call copies its inputs in and replays.

    Gradients land in the tensors that `grad` of each parameter named at capture, overwritten at every call: do not
    set them to None, and do not accumulate.
    """

    def __init__(self, objective: Objective, example: Inputs, parameters: list[Tensor]):
        self.inputs = Inputs(*(x.clone() for x in example))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compile, choose kernels, allocate
                _forget(parameters)
                objective(self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        _forget(parameters)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = objective(self.inputs)

    def __call__(self, given: Inputs) -> Float[Tensor, "n"]:
        for mine, new in zip(self.inputs, given, strict=True):
            mine.copy_(new, non_blocking=True)
        self.graph.replay()
        return self.result.clone()


def _forget(parameters: list[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None
