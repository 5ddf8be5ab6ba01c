"""Run a model's attention through fixed patterns: any family, a rule for each layer and head.

`attend_` writes a rule on every attention module and switches the model to the function registered here, with its
mask. Two ways to run, chosen explicitly: `masked` is SDPA with a boolean mask, the reference, with a backward pass
on every device; `flex` is FlexAttention, which skips blocks without a kept entry (no backward pass on a CPU).

Rules are laid by a token's position in its text: padding on either side and a cache are seen in the mask. Layers with
one rule share what they lay: a forward pass lays it once for its mask, block mask included.

Shapes: B batch, H head, G key/value head, Q query, K key, E head width, L layer.
"""

import functools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fewedges.errors import ModelError, RecipeError
from fewedges.model.anatomy import Anatomy, plain
from fewedges.model.attention import (
    FIXED,
    allowed_keys,
    attention_scores,
    has_patterns,
    register,
    repeat_heads,
)
from fewedges.sparsify.attention.interface import GatePass, is_gated
from fewedges.sparsify.fixed_attention import Rule
from fewedges.sparsify.pattern import Pattern

Run = Literal["masked", "flex"]


BLOCK = 128
"""Side of FlexAttention's blocks."""
ROOM = 256
"""Positions laid beyond those asked for where tokens come one by one, so that not every token lays its own pattern."""


class Kept(NamedTuple):
    """What a layer keeps of one mask, in the order in which it is run."""

    mask: Bool[Tensor, "#B #H Q K"]
    order: Int[Tensor, "*H n"] | None
    """Positions in that order, one for all heads or one for each; None: as they come."""
    blocks: Any
    """FlexAttention's BlockMask; None where it is not run."""


@dataclass(eq=False)
class Laid:
    """A rule as layers of so many heads run it, the last pattern it gave, and what it kept of the masks in use."""

    rule: Any
    """A Rule, or a router: an object with `route(query, key, allowed)`."""
    heads: int
    length: int | None
    run: Run
    before: str = "sdpa"
    """What ran the model's attention before patterns were attached."""
    _last: Tensor | None = field(default=None, repr=False)
    _seen: dict[int, tuple[Any, Any, Kept]] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None, "_seen": {}}  # what is laid is laid again by a copy

    def kept(self, mask: Tensor | None, query: Tensor, key: Tensor) -> Kept:
        """What is kept of a forward pass's mask: found once for it, whichever layer asks first."""
        allowed = allowed_keys(mask, key.shape[-2])
        if hasattr(self.rule, "route"):
            routed = self.rule.route(query, repeat_heads(key, query.shape[1]), allowed).mask() & allowed
            return Kept(routed, None, None) if self.run == "masked" else blocked(routed)
        if mask is None:
            return self._keep(allowed)
        alive = {known: entry for known, entry in self._seen.items() if entry[0]() is not None}
        found = alive.get(id(mask))
        if found is None or not _unchanged(found[1], mask, allowed):
            state = allowed.clone() if mask.is_inference() else (mask._version, key.shape[-2])
            found = alive[id(mask)] = (weakref.ref(mask), state, self._keep(allowed))
        self._seen = alive
        return found[2]

    def _keep(self, allowed: Bool[Tensor, "B 1 Q K"]) -> Kept:
        mask, (queries, keys) = kept_keys(self, allowed), allowed.shape[-2:]
        if self.run == "masked":
            return Kept(mask, None, None)
        return blocked(mask, self.order(keys) if queries == keys else None)

    def pattern(self, n: int, device: torch.device | str = "cpu") -> Bool[Tensor, "h n n"]:
        """The mask over n positions, h = 1 or H. Where a shorter text sees the corner of a longer one's, it is cut."""
        corner = self.length is not None or not getattr(self.rule, "moves", True)
        last = 0 if self._last is None else self._last.shape[-1]
        device = torch.device(device)
        if self._last is None or self._last.device != device or not (last == n or (corner and last > n)):
            one_more = 0 < last < n <= last + 1
            self._last = self._lay(n + ROOM if corner and one_more and not self.length else n).to(device)
        return self._last[..., :n, :n]

    def order(self, n: int) -> Int[Tensor, "*H n"] | None:
        """The order of positions in which the pattern has the smaller cover, if the rule knows one, or each head's."""
        return self.rule.order(n) if hasattr(self.rule, "order") else None

    def _lay(self, n: int) -> Tensor:
        if hasattr(self.rule, "route"):
            raise ModelError(f"the pattern of {self.rule}", "it depends on the data", "rule.route(query, key, allowed)")
        if self.length is not None and n > self.length:
            raise ModelError(f"attend to {n} tokens", f"the pattern was laid for {self.length}", "a larger length")
        found = self.rule(self.length or n)
        if not isinstance(found, Pattern):
            raise RecipeError(f"attend by {self.rule}", f"it gives a {type(found).__name__}", "a rule n -> Pattern")
        mask = found.mask()
        mask = mask if mask.dim() == 3 else mask[None]
        if mask.shape[0] not in (1, self.heads):
            found = f"the rule has {mask.shape[0]} heads, the layer {self.heads}"
            raise RecipeError("attend", found, "one rule, or one for each head")
        return mask


def attend_(
    model: Any,
    anatomy: Anatomy,
    rules: Rule | Sequence[Rule],
    *,
    length: int | None = None,
    run: Run = "masked",
) -> Any:
    """Switch a model's attention to fixed patterns in place: one rule for all layers, or one for each.

    `length` lays every pattern for that many tokens and uses its corner, so that a rule that moves with n (BigBird)
    gives the same pattern while decoding as at once. Patterns are no part of the weights: what would lose them (saving
    a run, gates, pictures, circuits) is refused until `detach_patterns_`. Raises RecipeError when rules do not fit
    layers or heads, ModelError for a gated model.
    """
    each = _each(rules, len(anatomy.layers))
    _check_way(length, run)
    if is_gated(model):
        raise ModelError("attend by fixed patterns", "its gates would no longer run", "the dense model")
    before = attention_before(model, anatomy)
    known: dict[tuple[int, int], Laid] = {}
    laid = [
        known.setdefault((id(rule), layer.heads), Laid(rule, layer.heads, length, run, before))
        for rule, layer in zip(each, anatomy.layers, strict=True)
    ]
    for one in known.values():
        if not hasattr(one.rule, "route"):
            one._lay(1)  # heads that do not fit are refused before anything is changed
    register(FIXED, fixed_forward)
    for module, one in zip(anatomy.modules(model), laid, strict=True):
        module.fixed_attention = one  # type: ignore[assignment]
    plain(model).set_attn_implementation(FIXED)
    return model


def detach_patterns_(model: Any, anatomy: Anatomy) -> Any:
    """Take fixed patterns off in place: the attention of before `attend_` comes back. A copy of a model has its own."""
    if not has_patterns(model):
        raise ModelError("detach patterns", "none are attached", "a model after attend_")
    plain(model).set_attn_implementation(attention_before(model, anatomy))
    for module in anatomy.modules(model):
        del module.fixed_attention
    return model


def attention_before(model: Any, anatomy: Anatomy) -> str:
    """What ran the model's attention before patterns were attached; what runs it now where none are."""
    if has_patterns(model):
        return anatomy.modules(model)[0].fixed_attention.before  # type: ignore[union-attr]
    return plain(model).config._attn_implementation


@contextmanager
def attending(
    model: Any, anatomy: Anatomy, rules: Rule | Sequence[Rule], *, length: int | None = None, run: Run = "masked"
) -> Iterator[Any]:
    """`attend_` for a while; the old attention comes back."""
    before = plain(model).config._attn_implementation
    modules = anatomy.modules(model)
    laid = [getattr(module, "fixed_attention", None) for module in modules]
    try:
        yield attend_(model, anatomy, rules, length=length, run=run)
    finally:
        plain(model).set_attn_implementation(before)
        for module, one in zip(modules, laid, strict=True):
            if one is not None:
                module.fixed_attention = one  # type: ignore[assignment]
            elif hasattr(module, "fixed_attention"):
                del module.fixed_attention


def _each(rules: Any, layers: int) -> list[Any]:
    """A rule for each layer; RecipeError for what is no rule, or for too few."""
    each = list(rules) if isinstance(rules, Sequence) else [rules] * layers
    if len(each) != layers:
        raise RecipeError("attend", f"{len(each)} rules for {layers} layers", "one rule, or one for each layer")
    for rule in each:
        if isinstance(rule, type) or not (callable(rule) or hasattr(rule, "route")):
            raise RecipeError(f"attend by {rule!r}", "it is no rule", "a rule as Local(256), or one for each layer")
    return each


def _check_way(length: Any, run: Any) -> None:
    if run not in get_args(Run):
        raise RecipeError(f"attend with run={run!r}", "no such way to run", f"one of {', '.join(get_args(Run))}")
    if length is not None and (not isinstance(length, int) or length < 1):
        raise RecipeError(f"attend with length={length!r}", "no number of tokens", "1 or more, or None")


def _unchanged(state: Any, mask: Tensor, allowed: Bool[Tensor, "B 1 Q K"]) -> bool:
    """Whether a mask is as it was: by its version, or, made in inference mode and so without one, by its entries."""
    if mask.is_inference():
        return isinstance(state, Tensor) and state.shape == allowed.shape and torch.equal(state, allowed)
    return state == (mask._version, allowed.shape[-1])


def patterns(model: Any, anatomy: Anatomy, n: int) -> list[Pattern]:
    """Each layer's pattern over n tokens, cut to the causal triangle: (1 or H, n, n)."""
    return [Pattern(module.fixed_attention.pattern(n)).causal() for module in anatomy.modules(model)]  # type: ignore[union-attr]


def rules_of(model: Any, anatomy: Anatomy) -> list[Any]:
    """The rule that each layer attends by."""
    return [module.fixed_attention.rule for module in anatomy.modules(model)]  # type: ignore[union-attr]


def fixed_forward(
    module: nn.Module,
    query: Float[Tensor, "B H Q E"],
    key: Float[Tensor, "B G K E"],
    value: Float[Tensor, "B G K E"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    gate_pass: GatePass | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "B Q H E"], None]:
    """Attend through the module's pattern, in the AttentionInterface's signature; a `gate_pass` is told the edges."""
    laid: Laid = module.fixed_attention  # type: ignore[assignment]
    _refuse_cut_cache(query, key, sliding_window)
    kept = laid.kept(attention_mask, query, key)
    if gate_pass is not None:
        gate_pass.open[module.layer_idx] = edges_of(kept, query)  # type: ignore[index]
    if laid.run == "flex":
        output = flex_attention(query, key, value, kept, scaling, softcap)
    else:
        output = masked_attention(query, key, value, kept.mask, scaling, softcap)
    return output.transpose(1, 2).contiguous(), None


def edges_of(kept: Kept, query: Float[Tensor, "B H Q E"]) -> Float[Tensor, "B H Q"]:
    """How many keys each query attends to."""
    edges = kept.mask.sum(-1).float().expand(query.shape[:3])  # (B, H, Q)
    return edges if kept.order is None else edges.take_along_dim(kept.order.argsort(-1).expand_as(edges), -1)


def kept_keys(laid: Laid, allowed: Bool[Tensor, "B 1 Q K"]) -> Bool[Tensor, "B h Q K"]:
    """The pattern, laid by position: a query sits at the last key it may see, a text begins at its first."""
    keys = allowed.shape[-1]
    seen = allowed.any(-2)[:, 0]  # (B, K)
    begin = seen.int().argmax(-1)  # (B,)
    slot = keys - 1 - allowed[:, 0].flip(-1).int().argmax(-1)  # (B, Q)
    pattern = laid.pattern(keys, allowed.device)
    if not begin.any() and allowed.shape[-2] == keys:
        alike = torch.equal(allowed, allowed[:1].expand_as(allowed))  # no padding: one mask for the batch
        return pattern & (allowed[:1] if alike else allowed)
    rows = (slot - begin[:, None]).clamp(min=0)  # (B, Q)
    columns = (torch.arange(keys, device=allowed.device) - begin[:, None]).clamp(min=0)  # (B, K)
    moved = pattern[:, rows[:, :, None], columns[:, None, :]]  # (h, B, Q, K)
    return moved.transpose(0, 1) & allowed


def masked_attention(
    query: Float[Tensor, "B H Q E"],
    key: Float[Tensor, "B G K E"],
    value: Float[Tensor, "B G K E"],
    kept: Bool[Tensor, "#B #H Q K"],
    scaling: float | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "B H Q E"]:
    """Softmax over the kept keys; a query that keeps none gets 0."""
    empty = ~kept.any(-1, keepdim=True)  # (B, h, Q, 1)
    safe = kept | empty
    if softcap is None:
        key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
        query, key = query.to(value.dtype), key.to(value.dtype)
        output = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=safe, scale=scaling)
    else:
        scores = attention_scores(query, key, query.shape[-1] ** -0.5 if scaling is None else scaling, softcap)
        weights = torch.softmax(scores.masked_fill(~safe, -torch.inf), dim=-1)
        output = weights.to(value.dtype) @ repeat_heads(value, query.shape[1])
    return output.masked_fill(empty, 0)


def flex_attention(
    query: Float[Tensor, "B H Q E"],
    key: Float[Tensor, "B G K E"],
    value: Float[Tensor, "B G K E"],
    kept: Kept,
    scaling: float | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "B H Q E"]:
    """The same by FlexAttention: blocks of 128 x 128 without a kept entry are skipped.

    Where heads have orders of their own, each gets its key/value head in its order, also those that share one (GQA).
    """

    def cap(score: Tensor, *_: Tensor) -> Tensor:
        assert softcap is not None
        return torch.tanh(score / softcap) * softcap

    order = kept.order
    if order is not None:
        key, value = (x if order.dim() == 1 else repeat_heads(x, query.shape[1]) for x in (key, value))
        query, key, value = (_ordered(x, order) for x in (query, key, value))
    output = _flex(query.is_cuda)(
        query.to(value.dtype),
        key.to(value.dtype),
        value,
        score_mod=None if softcap is None else cap,
        block_mask=kept.blocks,
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return output if order is None else _ordered(output, order.argsort(-1))


def _ordered(x: Tensor, order: Int[Tensor, "*H n"]) -> Tensor:
    """The rows of (B, H, n, E) in one order, or each head's in its own."""
    return x[:, :, order] if order.dim() == 1 else x.take_along_dim(order[None, :, :, None], 2)


def blocked(mask: Bool[Tensor, "#B #H Q K"], order: Int[Tensor, "*H n"] | None = None) -> Kept:
    """A mask as FlexAttention runs it, queries and keys in this order, or each head's in its own."""
    if order is not None:
        order = order.to(mask.device)
        rows = _ordered(mask, order)
        mask = rows[..., order] if order.dim() == 1 else rows.take_along_dim(order[None, :, None], 3)
    return Kept(mask, order, block_mask(mask))


def block_mask(kept: Bool[Tensor, "#B #H Q K"]) -> Any:
    """FlexAttention's BlockMask of a boolean mask: blocks that are kept in part, and whole ones.

    `create_block_mask` evaluates a function at every entry, 10 ms and 8.6 GiB at n = 16k on an H100 for a kernel of
    0.1 ms (results/h100); the mask is there, so its blocks are counted.
    """
    from torch.nn.attention.flex_attention import BlockMask

    batch, heads, queries, keys = kept.shape
    padded = nn.functional.pad(kept, (0, -keys % BLOCK, 0, -queries % BLOCK))
    blocks = padded.unflatten(3, (-1, BLOCK)).unflatten(2, (-1, BLOCK))  # (B, H, q, 128, k, 128)
    some, whole = blocks.any(5).any(3), blocks.all(5).all(3)

    def keep(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return kept[b if batch > 1 else 0, h if heads > 1 else 0, q, k]

    lists = (*_listed(some & ~whole), *_listed(whole))
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=keep, seq_lengths=(queries, keys))


def _listed(layout: Bool[Tensor, "B H q k"]) -> tuple[Int[Tensor, "B H q"], Int[Tensor, "B H q k"]]:
    """How many blocks each row has, and their columns, those that are there first."""
    columns = layout.int().argsort(dim=-1, descending=True, stable=True)
    return layout.sum(-1, dtype=torch.int32), columns.int()


@functools.cache
def _flex(compiled: bool) -> Any:
    from torch.nn.attention import flex_attention as flex

    return torch.compile(flex.flex_attention, dynamic=False) if compiled else flex.flex_attention


def _refuse_cut_cache(query: Tensor, key: Tensor, window: int | None) -> None:
    """Where a sliding-window cache has dropped keys, positions can no longer be told from the mask."""
    queries, keys = query.shape[-2], key.shape[-2]
    if window is not None and queries != keys and keys >= window + queries - 1:
        found = f"a cache cut to a sliding window of {window}: positions are lost"
        raise ModelError("a fixed pattern while decoding", found, "use_cache=False")
