"""Run a model with some of its attention edges read from another run, and differentiate by how much is.

An attention edge is (layer, head, query token, key token <= query). With a mask M in [0, 1] per edge a head's output is

    z_q = sum_k [ M_qk w_qk v_k + (1 - M_qk) w'_qk v'_k ]        w = softmax * gate (gate 1 in a dense model)

w and v are those of this very run: a gate is decided anew from what the run's own queries and keys have become. w' and
v' come from a run on the corrupt prompt ("counterfactual") or are nothing ("zero"). M = 1 is the model itself; M = 0
takes all attention from the corrupt prompt and leaves embeddings and MLPs alive. An edge is *live* if w or w' is not 0
in the two whole runs; the others (a gate closed in both) are no edges, and their mask is 0.

    score_e = mean over alpha = (s + 1/2) / S, s < S, of d metric / d M_e at M = alpha        integrated gradients

Scores of a dense model add up to metric(M = 1) - metric(M = 0) as S grows (Sundararajan et al. 2017, arXiv:1703.01365).
Hard gates flip on the way, and no gradient sees a flip: scores of a gated model do not add up. Of a batch nothing
larger than (B, H, Q, K) per layer is kept.

Shapes: B prompt (or copy of one), L layer, H head, G key/value head, Q query, K key, E head width, V vocabulary.
"""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fewedges.errors import RecipeError
from fewedges.explain.closing import own_gates
from fewedges.explain.tasks.prompts import Prompts
from fewedges.model.anatomy import plain
from fewedges.model.attention import (
    allowed_keys,
    attention_by,
    attention_scores,
    attention_weights,
    register,
    repeat_heads,
)
from fewedges.sparsify.attention.interface import is_gated

MASKING = "fewedges-masking"
EdgeAblation = Literal["counterfactual", "zero"]


class Carried(NamedTuple):
    """What one layer's edges carry in one run."""

    weights: Float[Tensor, "B H Q K"]
    """After the gate."""
    value: Float[Tensor, "B G K E"]


@dataclass(kw_only=True)
class MaskPass:
    """What one forward pass reads from elsewhere, and what it keeps: pass it as `mask_pass=`."""

    gated: bool
    through_gates: bool = False
    """Let gradients pass gates as training does (straight through)."""
    masks: dict[int, Float[Tensor, "B H Q K"]] = field(default_factory=dict)
    """By layer; a layer without one is not masked."""
    other: dict[int, Carried] = field(default_factory=dict)
    """By layer, what an edge carries as far as its mask is below 1; a layer without: nothing."""
    keep: bool = False
    kept: dict[int, Carried] = field(default_factory=dict)


def run_masked(
    model: Any, tokens: Int[Tensor, "B T"], last: Int[Tensor, "B"], masking: MaskPass, past: Any = None
) -> Float[Tensor, "B V"]:
    """One forward pass of a dense or gated model; the logits at each prompt's `last`.

    `past`: a cache of the tokens before these; it grows. `last` counts from the first of these tokens.
    """
    register(MASKING, masked_attention)
    kept, place = torch.unique(last, return_inverse=True)
    options: dict[str, Any] = {"use_cache": past is not None, "past_key_values": past, "logits_to_keep": kept}
    with attention_by(plain(model), MASKING):
        found = model(input_ids=tokens, mask_pass=masking, **options).logits  # (B, U, V)
    return found[torch.arange(len(last), device=last.device), place]


def masked_attention(
    module: nn.Module,
    query: Float[Tensor, "B H Q E"],
    key: Float[Tensor, "B G K E"],
    value: Float[Tensor, "B G K E"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    *,
    mask_pass: MaskPass,
    **_: Any,
) -> tuple[Float[Tensor, "B Q H E"], None]:
    """Attend as the model does, hard gates included, but for masked edges; in the AttentionInterface's signature."""
    layer: int = module.layer_idx  # type: ignore[assignment]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = attention_scores(query, key, scale, softcap)
    weights = attention_weights(scores, allowed_keys(attention_mask, key.shape[-2]))  # (B, H, Q, K)
    if mask_pass.gated:
        weights = weights * own_gates(module, scores, key, scale, through=mask_pass.through_gates)
    if mask_pass.keep:
        mask_pass.kept[layer] = Carried(weights.detach(), value.detach())
    mask, other = mask_pass.masks.get(layer), mask_pass.other.get(layer)
    weights = weights if mask is None else mask * weights
    output = weights.to(value.dtype) @ repeat_heads(value, query.shape[1])  # (B, H, Q, E)
    if mask is not None and other is not None:
        elsewhere = (1 - mask) * other.weights
        output = output + elsewhere.to(value.dtype) @ repeat_heads(other.value, query.shape[1])
    return output.transpose(1, 2).contiguous(), None


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """The whole runs on clean and corrupt prompts, made once: what every masked run of these prompts needs."""

    model: Any
    prompts: Prompts
    gated: bool
    logits: Float[Tensor, "B V"]
    """Of the model itself on the clean prompts."""
    other: dict[int, Carried]
    live: Bool[Tensor, "L B H Q K"]
    same: int
    """So many first tokens are the same in every clean prompt and its corrupt one: no mask changes what happens there,
    and masked runs start behind them."""
    past: Any
    """The keys and values of these tokens; None if there are none."""

    def run(self, masks: Iterable[Tensor], *, rows: Tensor | None = None, through_gates: bool = False) -> Tensor:
        """Logits (B, V) with these masks, (B, H, Q, K) for each layer and 0 where no edge is live.

        With `rows` the batch is made of these prompts, repeats allowed.
        """
        rows = torch.arange(len(self.prompts), device=self.prompts.last.device) if rows is None else rows
        behind = {layer: mask[:, :, self.same :] for layer, mask in enumerate(masks)}
        other = {n: Carried(one.weights[rows][:, :, self.same :], one.value[rows]) for n, one in self.other.items()}
        past = deepcopy(self.past)
        if past is not None:
            past.batch_select_indices(rows)
        run = MaskPass(gated=self.gated, through_gates=through_gates, masks=behind, other=other)
        tokens, last = self.prompts.clean[rows, self.same :], self.prompts.last[rows] - self.same
        return run_masked(self.model, tokens, last, run, past)

    def metric(self, logits: Float[Tensor, "B V"]) -> Float[Tensor, "B"]:
        """The prompts' own measure."""
        return self.prompts.measure_metric(logits)


@torch.no_grad()
def pair(model: Any, prompts: Prompts, ablation: EdgeAblation | str = "counterfactual", *, skip: bool = True) -> Pair:
    """Run the clean and the corrupt prompts. RecipeError for an ablation that edges do not have.

    `skip` lets masked runs leave out the tokens before the first difference: the same numbers, sooner.
    """
    if ablation not in get_args(EdgeAblation):
        hint = f"one of {', '.join(get_args(EdgeAblation))}"
        raise RecipeError(f"ablation {ablation!r} of attention edges", "no such ablation", hint)
    some, gated = prompts.to(plain(model).device), is_gated(model)
    clean, corrupt = MaskPass(gated=gated, keep=True), MaskPass(gated=gated, keep=True)
    logits = run_masked(model, some.clean, some.last, clean)
    if ablation == "counterfactual":
        run_masked(model, some.corrupt, some.last, corrupt)
    used = [clean.kept[layer].weights > 0 for layer in sorted(clean.kept)]
    for layer, one in corrupt.kept.items():
        used[layer] |= one.weights > 0
    live = torch.stack(used) & some.mask[:, None, :, None]  # (L, B, H, Q, K)
    same = _same_start(some) if skip and ablation == "counterfactual" else 0
    past = _past(model, some.clean[:, :same], gated) if same else None
    return Pair(
        model=model, prompts=some, gated=gated, logits=logits, other=corrupt.kept, live=live, same=same, past=past
    )


def _same_start(prompts: Prompts) -> int:
    """How many first tokens all prompts have in common with their corrupt ones; fewer than any prompt has."""
    differs = (prompts.clean != prompts.corrupt).any(0)
    first = int(differs.int().argmax()) if bool(differs.any()) else len(differs)
    return min(first, int(prompts.last.min()))


def _past(model: Any, tokens: Int[Tensor, "B T"], gated: bool) -> Any:
    """The keys and values of these tokens, of all of them also in layers that see a window."""
    from transformers import DynamicCache

    cache = DynamicCache()
    last = torch.full((len(tokens),), tokens.shape[1] - 1, device=tokens.device)
    run_masked(model, tokens, last, MaskPass(gated=gated), cache)
    return cache


def edge_scores(both: Pair, steps: int = 8, *, through_gates: bool = False) -> Float[Tensor, "L B H Q K"]:
    """Integrated gradients of the metric over the masks, all edges of all prompts; 0 where no edge is live.

    `through_gates`: let gradients pass a gated model's gates straight through. `steps` forward and backward passes.
    """
    live = both.live.to(next(iter(both.other.values())).weights.dtype if both.other else torch.float32)
    total = torch.zeros_like(live)
    for step in range(steps):
        masks = [((step + 0.5) / steps * one).requires_grad_() for one in live]
        with torch.enable_grad():
            metric = both.metric(both.run(masks, through_gates=through_gates)).sum()
            total += torch.stack(torch.autograd.grad(metric, masks))
    return total * live / steps


@torch.no_grad()
def patched_scores(both: Pair, edges: Int[np.ndarray, "N 5"], *, size: int = 64) -> Float[np.ndarray, "N"]:
    """The slow oracle: metric of the model - metric with one edge (prompt, layer, head, query, key) alone ablated."""
    full, found = both.metric(both.logits), np.zeros(len(edges))
    for start in range(0, len(edges), size):
        part = torch.from_numpy(np.asarray(edges[start : start + size])).to(full.device)
        rows, number = part[:, 0], torch.arange(len(part), device=full.device)
        masks = both.live[:, rows].to(full.dtype)
        masks[part[:, 1], number, part[:, 2], part[:, 3], part[:, 4]] = 0
        without = both.prompts.subset(rows.tolist()).measure_metric(both.run(masks, rows=rows))
        found[start : start + size] = (full[rows] - without).double().cpu().numpy()
    return found
