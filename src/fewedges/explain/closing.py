"""Run a model with one attention edge closed, or keep what closing any one of them would change.

An attention edge is (layer, head, query, key) at which a head may read. To *close* it is

    in a gated model   its gate becomes 0: its softmax weight is gone, the other weights stay (the gated attention
                       never renormalises)                                   O_q - O'_q = p_qk v_k
    in a dense model   its key is removed from the softmax, so the other weights of the row grow; a query whose only
                       key is removed reads nothing                           O_q - O'_q = p_qk (v_k - O'_q)

with p the softmax weight, O the head's output before and O' after. These differences are exact. First order is only
what follows: dotted with the gradient g of the metric at O they say what closing one edge costs, of all edges at once.
Of a batch nothing larger than (B, H, Q, K) is made.

Shapes: B prompt (or copy of one), H head, G key/value head, Q query, K key, E head width, N edge.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

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
from fewedges.sparsify.attention.gate import Gating, gate_logits, gates, key_bias
from fewedges.sparsify.attention.interface import is_gated

CLOSING = "fewedges-closing"


class Read(NamedTuple):
    """What the heads of one layer read."""

    weights: Float[Tensor, "B H Q K"]
    """Attention weight after the gate."""
    open: Bool[Tensor, "B H Q K"]
    """Which edges there are to close: open gates, or every allowed key of a dense model."""
    value: Float[Tensor, "B G K E"]
    output: Float[Tensor, "B Q H E"]
    """The head outputs, in autograd's graph if gradients are on."""


@dataclass(kw_only=True)
class EdgePass:
    """What one forward pass closes and keeps: pass it as `edge_pass=`."""

    gated: bool
    through_gates: bool = True
    """Let gradients pass later gates as training does (straight through); else a gate is a constant."""
    closed: Int[Tensor, "B 4"] | None = None
    """Per row of the batch, the one edge (layer, head, query, key) that is closed in it; no gradients then."""
    keep: bool = False
    read: dict[int, Read] = field(default_factory=dict)

    def closed_in(self, layer: int) -> tuple[Tensor, ...]:
        """Where the closed edges of a layer are: rows, heads, queries, keys."""
        if self.closed is None:
            return ()
        rows = torch.nonzero(self.closed[:, 0] == layer)[:, 0]
        return (rows, *self.closed[rows, 1:].unbind(1))


def run_closing(
    model: Any, tokens: Int[Tensor, "B T"], last: Int[Tensor, "B"], edges: EdgePass
) -> Float[Tensor, "B V"]:
    """One forward pass of a dense or gated model; the logits at each prompt's `last`. Right padding is never seen."""
    register(CLOSING, closing_attention)
    kept, place = torch.unique(last, return_inverse=True)
    with attention_by(plain(model), CLOSING):
        found = model(input_ids=tokens, use_cache=False, logits_to_keep=kept, edge_pass=edges).logits  # (B, U, V)
    return found[torch.arange(len(last), device=last.device), place]


def closing_attention(
    module: nn.Module,
    query: Float[Tensor, "B H Q E"],
    key: Float[Tensor, "B G K E"],
    value: Float[Tensor, "B G K E"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    *,
    edge_pass: EdgePass,
    **_: Any,
) -> tuple[Float[Tensor, "B Q H E"], None]:
    """Attend as the model does, hard gates included, but for closed edges; in the AttentionInterface's signature."""
    layer: int = module.layer_idx  # type: ignore[assignment]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores, closed = attention_scores(query, key, scale, softcap), edge_pass.closed_in(layer)
    allowed = allowed_keys(attention_mask, key.shape[-2])  # (B, 1, Q, K)
    opened = allowed.expand_as(scores)
    if edge_pass.gated:
        gate = own_gates(module, scores, key, scale, through=edge_pass.through_gates)
        weights, opened = attention_weights(scores, allowed) * gate, opened & (gate > 0)
        weights = _with(weights, closed, 0.0)
    else:
        weights = attention_weights(_with(scores, closed, -torch.inf), allowed)
    output = (weights.to(value.dtype) @ repeat_heads(value, query.shape[1])).transpose(1, 2).contiguous()
    if edge_pass.keep:
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_()  # the first layer of a frozen model: autograd's graph starts here
        edge_pass.read[layer] = Read(weights.detach(), opened, value.detach(), output)
    return output, None


def own_gates(
    module: nn.Module, scores: Float[Tensor, "B H Q K"], key: Float[Tensor, "B G K E"], scale: float, *, through: bool
) -> Float[Tensor, "B H Q K"]:
    """The hard gates of a gated attention module; `through`: gradients pass them, straight through."""
    bias = key_bias(module.gate_bias, getattr(module, "gate_query", None), key, scale)  # type: ignore[arg-type]
    return gates(gate_logits(scores, bias), Gating(straight_through=through))


def first_order(read: Read, gradient: Float[Tensor, "B Q H E"], *, renormalised: bool) -> Float[Tensor, "B H Q K"]:
    """(O - O') . g for every edge: what closing it costs to first order. `renormalised`: the dense definition."""
    heads = gradient.shape[2]
    dots = gradient.transpose(1, 2) @ repeat_heads(read.value, heads).mT  # (B, H, Q, K): v_k . g_q
    dots = dots.to(read.weights.dtype)
    if renormalised:
        # O'_q is the mean of the other keys. Summed from both sides: 1 - p would be all rounding where p is nearly 1.
        rest = _others(read.weights)
        dots = dots - torch.where(rest > 0, _others(read.weights * dots) / rest, 0.0)
    return read.weights * dots


def _others(x: Float[Tensor, "B H Q K"]) -> Float[Tensor, "B H Q K"]:
    """The sum over all keys but this one."""
    before = torch.cumsum(x, -1).roll(1, -1)
    after = torch.cumsum(x.flip(-1), -1).roll(1, -1)
    before[..., 0] = after[..., 0] = 0
    return before + after.flip(-1)


def _with(x: Tensor, places: tuple[Tensor, ...], value: float) -> Tensor:
    return x.index_put(places, x.new_tensor(value)) if places and len(places[0]) else x


# -- over prompts --------------------------------------------------------------------------------------------------


class Edges(NamedTuple):
    """The attention edges of some prompts, in order."""

    rows: Int[np.ndarray, "N 5"]
    """(prompt, layer, head, query, key)."""
    weights: Float[np.ndarray, "N"]
    scores: Float[np.ndarray, "N"]
    """What closing costs to first order; 0 where no gradient was asked for."""
    metric: Float[np.ndarray, "B"]


def read_edges(
    model: Any, prompts: Prompts, heads: Bool[np.ndarray, "L H"], *, through: bool | None, size: int
) -> Edges:
    """Every edge of these heads up to each prompt's last token, with its first-order score; `size` prompts at a time.

    `through`: see EdgePass; None for no gradient at all.
    """
    parts = []
    for start in range(0, len(prompts), size):
        found = _read(model, prompts.subset(range(start, min(start + size, len(prompts)))), heads, through)
        found.rows[:, 0] += start
        parts.append(found)
    return Edges(*map(np.concatenate, zip(*parts, strict=True)))


def _read(model: Any, prompts: Prompts, heads: Bool[np.ndarray, "L H"], through: bool | None) -> Edges:
    device = plain(model).device
    some, wanted = prompts.to(device), torch.from_numpy(heads).to(device)
    run = EdgePass(gated=is_gated(model), through_gates=bool(through), keep=True)
    with torch.set_grad_enabled(through is not None):
        metric = some.measure_metric(run_closing(model, some.clean, some.last, run))
        reads = [run.read[layer] for layer in range(len(heads))]
        outputs = [read.output for read in reads]
        gradients = [None] * len(reads) if through is None else torch.autograd.grad(metric.sum(), outputs)
    found: list[tuple[Tensor, ...]] = []
    for layer, (read, gradient) in enumerate(zip(reads, gradients, strict=True)):
        places = torch.nonzero(read.open & some.mask[:, None, :, None] & wanted[layer][:, None, None])  # (N, 4)
        index, layers = tuple(places.unbind(1)), torch.full_like(places[:, :1], layer)
        weights = read.weights[index]
        zero = torch.zeros_like(weights)
        scores = zero if gradient is None else first_order(read, gradient, renormalised=not run.gated)[index]
        found.append((torch.cat([places[:, :1], layers, places[:, 1:]], 1), weights.double(), scores.double()))
    rows, weights, scores = (torch.cat(part).cpu().numpy() for part in zip(*found, strict=True))
    order = np.lexsort(rows.T[::-1])
    return Edges(rows[order], weights[order], scores[order], metric.detach().double().cpu().numpy())


@torch.no_grad()
def metric_without(model: Any, prompts: Prompts, rows: Int[np.ndarray, "N 5"], *, size: int) -> Float[np.ndarray, "N"]:
    """The metric when one edge alone is closed, for each edge: `size` copies of prompts in one pass."""
    found, device = np.zeros(len(rows)), plain(model).device
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        some = prompts.subset(part[:, 0].tolist()).to(device)
        run = EdgePass(gated=is_gated(model), closed=torch.from_numpy(part[:, 1:]).to(device))
        metric = some.measure_metric(run_closing(model, some.clean, some.last, run))
        found[start : start + size] = metric.double().cpu().numpy()
    return found
