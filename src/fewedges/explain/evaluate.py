"""Measure circuits exactly: run each with all other edges ablated, many budgets with the ablated states shared.

For every chunk of prompts the full model runs once, the ablation values and their residual streams are computed
once, and then only the circuits run. On a CPU one circuit runs at a time unless the model is tiny (stacking made
large batches slower there); elsewhere as many as the memory limit allows.

Exact means: nothing is linearised, and the circuit of all edges is measured like any other, so that its distance from
the model itself shows what rounding costs. Without gates that is at most 1.3e-6 of the effect in the committed results
(float32). Behind gates a score at its threshold may be rounded to the other side, and that gate turns: see
docs/circuits.md.

Shapes: K circuit, B prompt, J source, I destination, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fewedges.errors import RecipeError
from fewedges.explain.ablation import Ablating, Ablation
from fewedges.explain.hooks import Wiring
from fewedges.explain.running import (
    Ablated,
    Stream,
    circuit_logits,
    memory_for,
    prompts_at_once,
    row_bytes,
    rows_per_prompt,
    run,
)
from fewedges.explain.tasks.prompts import Prompts

CPU_NUMBERS = 2**17
"""On a CPU circuits are stacked while a residual stream has at most this many numbers."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """What K circuits do on B prompts, beside the full model and the empty circuit."""

    metric: Float[np.ndarray, "K B"]
    """The task's own measure (`Prompts.measure_metric`)."""
    kl: Float[np.ndarray, "K B"]
    """KL(full model || circuit) of the next-token distribution, in nats."""
    correct: Bool[np.ndarray, "K B"]
    full: Float[np.ndarray, "B"]
    """The metric of the model itself, from a plain forward pass."""
    empty: Float[np.ndarray, "B"]
    """The metric with every edge ablated; for counterfactual ablation from a plain pass on the corrupt prompts."""
    full_correct: Bool[np.ndarray, "B"]

    @property
    def explained(self) -> Float[np.ndarray, "K"]:
        """Explained effect (normalised faithfulness): (circuit - empty) / (full - empty), means over prompts first."""
        return (self.metric.mean(1) - self.empty.mean()) / (self.full.mean() - self.empty.mean())

    @property
    def accuracy(self) -> Float[np.ndarray, "K"]:
        """Share of prompts the circuit gets right."""
        return self.correct.mean(1)


def evaluate(
    wiring: Wiring,
    prompts: Prompts,
    masks: Bool[np.ndarray, "K J I"] | Float[np.ndarray, "K J I"],
    *,
    ablation: Ablation = "counterfactual",
    reference: Prompts | None = None,
    seed: int = 0,
    options: dict[str, Any] | None = None,
    memory: int | None = None,
) -> Measured:
    """Run these circuits on the clean prompts and measure them, exactly.

    `masks` keep edges (numbers between 0 and 1 keep a part). `options` go to every forward pass of the model.
    `memory` bounds, in bytes, what is kept beside the model (None: `running.MEMORY`); one prompt is the least.
    RecipeError for masks that are not of this graph.
    """
    if masks.ndim != 3 or masks.shape[1:] != wiring.graph.real.shape or not len(masks):
        raise RecipeError(
            "evaluate", f"masks of shape {masks.shape}", f"(K, *{wiring.graph.real.shape}), K of 1 or more"
        )
    options = options or {}
    size = prompts_at_once(wiring, prompts.clean.shape[1], memory)
    with torch.no_grad():
        ablating = Ablating(wiring, prompts, ablation, reference=reference, seed=seed, options=options, memory=memory)
        parts = []
        for start in range(0, len(prompts), size):
            rows = list(range(start, min(start + size, len(prompts))))
            parts.append(_chunk(wiring, prompts.subset(rows), ablating.values(rows), masks, options, memory))
    joined = {name: np.concatenate([getattr(part, name) for part in parts], axis=-1) for name in vars(parts[0])}
    return Measured(**joined)


def as_masks(wiring: Wiring, masks: Bool[np.ndarray, "K J I"] | Float[np.ndarray, "K J I"]) -> Float[Tensor, "K J I"]:
    """Masks as the model's own kind of tensor, 0 outside the graph."""
    return torch.from_numpy(masks * wiring.graph.real).to(wiring.device, wiring.dtype)


def _chunk(
    wiring: Wiring, prompts: Prompts, values: Any, masks: np.ndarray, options: dict[str, Any], memory: int | None
) -> Measured:
    prompts = prompts.to(wiring.device)
    full = run(wiring, prompts.clean, prompts.last, options).logits
    assert full is not None  # run always keeps them
    ablated = Ablated(values=values, wiring=wiring, shape=(prompts.clean.shape[0], prompts.clean.shape[1]))
    empty = values.logits if ablated_by_run(values) else None
    if empty is None:
        nothing = np.zeros((1, *wiring.graph.real.shape), dtype=bool)
        empty = next(_circuits(wiring, prompts, ablated, nothing, options, memory))[0]
    rows = [_measure(prompts, full, logits) for logits in _circuits(wiring, prompts, ablated, masks, options, memory)]
    metric, kl, correct = (np.concatenate(column) for column in zip(*rows, strict=True))
    return Measured(
        metric=metric,
        kl=kl,
        correct=correct,
        full=_numbers(prompts.measure_metric(full)),
        empty=_numbers(prompts.measure_metric(empty)),
        full_correct=prompts.correct(full).cpu().numpy(),
    )


def ablated_by_run(values: Any) -> bool:
    """Whether the ablation values are one consistent run, whose logits are those of the empty circuit."""
    return values.logits is not None


def _circuits(
    wiring: Wiring, prompts: Prompts, ablated: Ablated, masks: np.ndarray, options: dict[str, Any], memory: int | None
) -> Iterator[Float[Tensor, "K B V"]]:
    """Logits of all circuits, as many at once as fit."""
    stack, room = circuits_at_once(wiring, ablated.shape, len(masks), memory), None
    for start in range(0, len(masks), stack):
        stream = Stream(ablated, as_masks(wiring, masks[start : start + stack]), room)
        yield circuit_logits(wiring, prompts.clean, prompts.last, stream, options)
        room = stream.differences


def circuits_at_once(wiring: Wiring, shape: tuple[int, int], count: int, memory: int | None) -> int:
    """How many circuits to run side by side on prompts of this shape."""
    batch, tokens = shape
    shared, each = rows_per_prompt(wiring, tokens)
    fits = (memory_for(wiring, memory) // (batch * row_bytes(wiring, tokens)) - shared) // each
    width = wiring.blocks[0].weight.shape[-1]
    best = CPU_NUMBERS // (batch * tokens * width) if wiring.device.type == "cpu" else fits
    return max(1, min(fits, best, count))


def _measure(prompts: Prompts, full: Tensor, logits: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    reference = torch.log_softmax(full.float() if full.dtype.itemsize < 4 else full, -1)
    found = torch.log_softmax(logits.to(reference.dtype), -1)
    kl = (reference.exp() * (reference - found)).sum(-1).clamp_min(0)  # (K, B)
    return _numbers(prompts.measure_metric(logits)), _numbers(kl), prompts.correct(logits).cpu().numpy()


def _numbers(x: Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy()
