"""What a removed edge carries instead: the values c_j of every source.

    counterfactual   the source's own value on the corrupt prompt                 (the default; EAP-IG, MIB)
    resample         its value on another clean prompt of the same length, drawn by seed
    mean             its mean over the reference prompts and all their tokens
    mean-position    its mean over the reference prompts, token position by token position
    zero             0; position embeddings and output biases, which belong to no source, stay

`mean`, `mean-position` and `resample` take their values from the clean prompts of `reference` (the evaluated
prompts themselves unless others are given). Shapes: B prompt, T token, D width, H head, E head width.
"""

from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from fewedges.errors import DataError, RecipeError
from fewedges.explain.hooks import Wiring, swapped
from fewedges.explain.running import Written, forward, prompts_at_once, run
from fewedges.explain.tasks.prompts import Prompts

Ablation = Literal["counterfactual", "resample", "mean", "mean-position", "zero"]


class Ablating:
    """The ablation values of a set of prompts, made ready once and handed out in chunks."""

    def __init__(
        self,
        wiring: Wiring,
        prompts: Prompts,
        kind: Ablation = "counterfactual",
        *,
        reference: Prompts | None = None,
        seed: int = 0,
        options: dict[str, Any] | None = None,
        memory: int | None = None,
    ):
        if kind not in get_args(Ablation):
            raise RecipeError(f"ablation {kind!r}", "no such ablation", f"one of {', '.join(get_args(Ablation))}")
        self.wiring, self.prompts, self.kind, self.options = wiring, prompts, kind, options or {}
        source = prompts if reference is None else reference
        self.other = _other_prompts(prompts, source, seed) if kind == "resample" else None
        self.fixed = self._fixed(source, memory) if kind in ("mean", "mean-position", "zero") else None

    def values(self, rows: list[int]) -> Written:
        """The values for these prompts; only counterfactual ones come with logits, those of the empty circuit."""
        prompts = self.prompts.subset(rows)
        if self.fixed is not None:
            return _cut(self.fixed, prompts.clean.shape[1])
        tokens, last = prompts.corrupt, prompts.last
        if self.other is not None:
            tokens = self.other[rows, : tokens.shape[1]]
        device = self.wiring.device
        return run(self.wiring, tokens.to(device), last.to(device), self.options)

    def _fixed(self, reference: Prompts, memory: int | None) -> Written:
        length = max(reference.clean.shape[1], self.prompts.clean.shape[1])
        places = position_part(self.wiring, length, self.options)
        if self.kind == "zero":
            graph, block = self.wiring.graph, self.wiring.blocks[0]
            nothing = places.new_zeros(1, 1, graph.heads * block.weight.shape[1])
            none = places.new_zeros(1, 1, places.shape[-1])
            return Written(input=places, heads=[nothing] * graph.layers, mlps=[none] * graph.layers)
        total = _sums(self.wiring, reference, places, self.options, memory)
        counts = reference.mask.sum(0).to(places.device, places.dtype)  # (T,)
        if self.kind == "mean":
            means = _each(total, lambda x: x.sum(1, keepdim=True) / counts.sum())
        elif int(counts.min()) == 0 or len(counts) < length:
            found = f"no reference prompt has {length} tokens"
            raise DataError("ablation mean-position", found, "reference prompts as long as the evaluated ones")
        else:
            means = _each(total, lambda x: x / counts[:, None])
        return replace(means, input=means.input + places)


def position_part(wiring: Wiring, length: int, options: dict[str, Any]) -> Float[Tensor, "1 T D"]:
    """What enters the residual stream whatever the tokens are: position embeddings, 0 for rotary models."""
    width = wiring.embedding.weight.shape[1]  # type: ignore[union-attr]
    zeros = torch.zeros(1, length, int(width), device=wiring.device, dtype=wiring.dtype)  # type: ignore[arg-type]
    kept: list[Tensor] = []

    class _Enough(Exception):
        pass

    def stop(x: Tensor) -> Tensor:
        kept.append(x)
        raise _Enough

    with swapped(wiring.blocks[0].norm, stop), suppress(_Enough):
        forward(wiring, zeros, options)
    return kept[0]


def _sums(wiring: Wiring, prompts: Prompts, places: Tensor, options: dict[str, Any], memory: int | None) -> Written:
    """Sum over prompts of what every source wrote on the clean ones, (1, T, ...), padding left out."""
    total: Written | None = None
    size = prompts_at_once(wiring, prompts.clean.shape[1], memory)
    mask = prompts.mask.to(places.device)[..., None]
    for start in range(0, len(prompts), size):
        rows = slice(start, start + size)
        written = run(wiring, prompts.clean[rows].to(places.device), prompts.last[rows].to(places.device), options)
        written = replace(written, input=written.input - places[:, : written.input.shape[1]])
        part = _each(written, lambda x, m=mask[rows]: (x * m).sum(0, keepdim=True))
        total = part if total is None else _both(total, part)
    assert total is not None  # Prompts are never empty
    return total


def _other_prompts(prompts: Prompts, source: Prompts, seed: int) -> Tensor:
    """For every prompt another clean one with the same number of tokens, drawn by seed."""
    generator = torch.Generator().manual_seed(seed)
    chosen = prompts.clean.cpu().clone()  # (B, T)
    clean, lengths = source.clean.cpu(), source.last.cpu() + 1
    for row, length in enumerate((prompts.last + 1).tolist()):
        same = torch.nonzero(lengths == length)[:, 0]
        others = same[(clean[same, :length] != chosen[row, :length]).any(1)]
        if not len(others):
            found = f"no other prompt has the {length} tokens of prompt {row}"
            raise DataError("ablation resample", found, "more prompts, or ablation counterfactual")
        pick = int(torch.randint(len(others), (1,), generator=generator))
        chosen[row, :length] = clean[others[pick], :length]
    return chosen


def _each(written: Written, change: Any) -> Written:
    return Written(
        input=change(written.input), heads=[change(x) for x in written.heads], mlps=[change(x) for x in written.mlps]
    )


def _both(a: Written, b: Written) -> Written:
    heads = [x + y for x, y in zip(a.heads, b.heads, strict=True)]
    return Written(input=a.input + b.input, heads=heads, mlps=[x + y for x, y in zip(a.mlps, b.mlps, strict=True)])


def _cut(written: Written, length: int) -> Written:
    return _each(written, lambda x: x[:, :length])
