"""Gradual magnitude pruning: the mask grows with training, by a schedule (Zhu and Gupta 2017, arXiv:1710.01878)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fewedges.sparsify import allocation
from fewedges.sparsify.masks import Guard, Masks, held
from fewedges.sparsify.matrices import Matrix, shapes_of
from fewedges.sparsify.pattern import dense
from fewedges.sparsify.schedule import Schedule
from fewedges.sparsify.score import SCORES, Evidence
from fewedges.sparsify.select import select


class Gradual:
    """The growing mask of one training run; see `gradually`."""

    def __init__(self, guard: Guard, schedule: Schedule, rule: str = "uniform"):
        self.guard, self.schedule, self.rule = guard, schedule, rule

    @torch.no_grad()
    def prune_(self, step: int) -> bool:
        """Call after optimiser step `step`; True when the mask has grown. What is pruned never comes back."""
        moment = self.schedule.at(step)
        if not moment.change or moment.density >= 1:
            return False
        matrices = self.guard.matrices
        share = {"uniform": allocation.uniform, "erk": allocation.erk}[self.rule](shapes_of(matrices), moment.density)
        for name, matrix in matrices.items():
            kept = self.guard.kept[name]
            score = SCORES["magnitude"].of(matrix.weight, Evidence()).masked_fill(~kept, -torch.inf)
            self.guard.kept[name] = kept & select(score, "unstructured", min(share[name], 1.0)).mask()
        self.guard.clear_()
        return True


@contextmanager
def gradually(
    model: Any,
    matrices: dict[str, Matrix],
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    rule: str = "uniform",
) -> Iterator[Gradual]:
    """Hold a mask that begins dense and follows the schedule, densities shared by the rule.

    with gradually(model, matrices, optimizer, Cubic(0.2, start=100, end=800)) as pruner:
        for step in range(1000):
            ...; optimizer.step(); optimizer.zero_grad(); pruner.prune_(step)
    masks = pruner.guard.masks()
    """
    start = Masks({name: dense(matrix.shape) for name, matrix in matrices.items()})
    with held(model, start, optimizer) as guard:
        yield Gradual(guard, schedule, rule)
