"""Gradual magnitude pruning: the mask closes with training, by a schedule (Zhu and Gupta 2017, arXiv:1710.01878).

And what every mask that trains begins with: `picked`, the best of all matrices under one budget.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fewedges.sparsify.allocation import shares
from fewedges.sparsify.masks import Guard, Masks, held
from fewedges.sparsify.matrices import Matrix
from fewedges.sparsify.pattern import Pattern, dense
from fewedges.sparsify.schedule import Moving, Schedule, drawn_at
from fewedges.sparsify.score import SCORES, Evidence
from fewedges.sparsify.select import select, select_global


def picked(
    scores: dict[str, Tensor],
    density: float,
    rule: str = "uniform",
    *,
    structure: str = "unstructured",
    group: str = "matrix",
    price: Sequence[str] = (),
) -> dict[str, Pattern]:
    """The highest scores of each matrix (R, C), the budget shared by the rule."""
    if rule == "global":
        return dict(select_global(scores, structure, density))
    sizes = {name: (score.shape[0], score.shape[1]) for name, score in scores.items()}
    share = shares(rule, sizes, density, price)
    return {name: select(score, structure, min(share[name], 1.0), group) for name, score in scores.items()}


class Thinning(Moving):
    """The closing mask of one training run; see `gradually`."""

    def __init__(
        self,
        guard: Guard,
        schedule: Schedule,
        rule: str = "uniform",
        *,
        score: str = "magnitude",
        seed: int = 0,
        **how: Any,
    ):
        super().__init__(guard, schedule)
        self.rule, self.score, self.seed = rule, score, seed
        self.how = how
        """structure, group and price, as `picked` has them."""

    @torch.no_grad()
    def prune_(self, step: int) -> bool:
        """Call after optimiser step `step`; True when the mask has closed. What is pruned never comes back."""
        moment = self.schedule.at(step)
        if not moment.change or moment.density >= 1:
            return False
        seen = Evidence(generator=drawn_at(self.seed, step))
        scores = {
            name: SCORES[self.score].of(matrix.weight, seen).masked_fill(~self.guard.kept[name], -torch.inf)
            for name, matrix in self.guard.matrices.items()
        }
        for name, pattern in picked(scores, moment.density, self.rule, **self.how).items():
            self.guard.kept[name] = self.guard.kept[name] & pattern.mask()
        self.guard.clear_()
        return True


@contextmanager
def gradually(
    model: Any,
    matrices: dict[str, Matrix],
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    rule: str = "uniform",
) -> Iterator[Thinning]:
    """Hold a mask that begins dense and follows the schedule, densities shared by the rule.

    with gradually(model, matrices, optimizer, Cubic(0.2, start=100, end=800)) as pruner:
        for step in range(1000):
            ...; optimizer.step(); optimizer.zero_grad(); pruner.prune_(step)
    masks = pruner.guard.masks()
    """
    start = Masks({name: dense(matrix.shape) for name, matrix in matrices.items()})
    with held(model, start, optimizer) as guard:
        yield Thinning(guard, schedule, rule)
