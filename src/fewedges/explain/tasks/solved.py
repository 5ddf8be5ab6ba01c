"""Does the model do the task at all? The question before any search for a circuit.

Shapes: B prompt, T token, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewedges.errors import DataError
from fewedges.explain.tasks.prompts import Prompts
from fewedges.model.anatomy import plain

SURE = 3.0  # standard errors above chance, and of the metric above that of the corrupt prompts
SHARE = 0.2  # of the way from chance to always right: the least accuracy, however many prompts


@dataclass(frozen=True, kw_only=True)
class Solved:
    """How well one model does a task."""

    task: str
    prompts: int
    accuracy: float
    """Fraction of prompts on which the answer beats every wrong token (prob_diff: all answers all wrong ones)."""
    first: float
    """Fraction on which an answer is the most probable token of the whole vocabulary."""
    chance: float
    """The accuracy of guessing."""
    clean: float
    """Mean metric on the clean prompts."""
    corrupt: float
    """Mean metric on the corrupt prompts, with the clean prompts' answers: what an empty circuit gives."""
    gap_error: float
    """Standard error of the mean of clean - corrupt over prompts."""

    def __str__(self) -> str:
        metric = f"metric {self.clean:.3f} clean, {self.corrupt:.3f} corrupt"
        return f"accuracy {self.accuracy:.1%} (chance {self.chance:.1%}), first {self.first:.1%}, {metric}"

    @property
    def least(self) -> float:
        """The accuracy below which it counts as near chance; always right is never near it, however few the prompts."""
        error = (self.chance * (1 - self.chance) / self.prompts) ** 0.5
        return min(1.0, self.chance + max(SURE * error, SHARE * (1 - self.chance)))

    @property
    def trouble(self) -> str:
        """Why there is nothing for a circuit to explain; empty if there is."""
        if self.accuracy < self.least:
            return f"accuracy {self.accuracy:.1%} is near chance ({self.chance:.1%}; it takes {self.least:.1%})"
        if not self.clean - self.corrupt > SURE * self.gap_error:  # NaN fails too
            gap = f"{self.clean:.3g} on clean and {self.corrupt:.3g} on corrupt prompts"
            return f"the metric hardly tells them apart: {gap}, standard error {self.gap_error:.2g}"
        return ""

    def describe(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self)


def accuracy(model: Any, prompts: Prompts, *, batch: int = 32) -> Solved:
    """Run a model, dense or gated, on clean and corrupt prompts, `batch` at a time."""
    right, first, clean, corrupt = [], [], [], []
    for start in range(0, len(prompts), batch):
        some = prompts.subset(range(start, min(start + batch, len(prompts))))
        logits = last_logits(model, some.clean, some.last)
        right.append(some.correct(logits))
        first.append(some.first(logits))
        clean.append(some.measure_metric(logits))
        corrupt.append(some.measure_metric(last_logits(model, some.corrupt, some.last)))
    before, after = torch.cat(clean).double(), torch.cat(corrupt).double()  # (B,)
    spread = float((before - after).std()) if len(prompts) > 1 else float("inf")
    return Solved(
        task=prompts.name,
        prompts=len(prompts),
        accuracy=float(torch.cat(right).double().mean()),
        first=float(torch.cat(first).double().mean()),
        chance=prompts.chance,
        clean=float(before.mean()),
        corrupt=float(after.mean()),
        gap_error=spread / len(prompts) ** 0.5,
    )


def check_solved(models: Mapping[str, Any], prompts: Prompts, *, batch: int = 32) -> dict[str, Solved]:
    """Measure each of the models, label -> model. DataError naming those that do not do the task.

    A model does it if its accuracy is clearly above chance (3 standard errors, and a fifth of the way from chance
    to 1) and its metric on clean prompts is clearly above that on corrupt ones (3 standard errors).
    """
    found = {label: accuracy(model, prompts, batch=batch) for label, model in models.items()}
    failed = [f"{label}: {solved.trouble}" for label, solved in found.items() if solved.trouble]
    if failed:
        hint = "another task, more prompts, or a model that does it: there is no circuit to find for what is not done"
        raise DataError(f"a circuit for {prompts.name} ({len(prompts)} prompts)", "; ".join(failed), hint)
    return found


@torch.no_grad()
def last_logits(model: Any, tokens: Int[Tensor, "B T"], last: Int[Tensor, "B"]) -> Float[Tensor, "B V"]:
    """The logits at each prompt's `last`; no others are computed. Padding comes after and is never seen."""
    device = plain(model).device
    kept, place = torch.unique(last.to(device), return_inverse=True)
    found = model(input_ids=tokens.to(device), use_cache=False, logits_to_keep=kept).logits  # (B, U, V)
    return found[torch.arange(len(last), device=device), place].float()
