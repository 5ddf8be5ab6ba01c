"""Lottery tickets: train, prune the smallest weights, go back to an early step, and train again.

Frankle and Carbin 2019 (arXiv:1803.03635); going back to a step after the first, Frankle et al. 2020
(arXiv:1912.05671). The claim under test is that the found mask with its early weights trains as well as the dense
model, and better than the same mask with new weights (`reinitialised_`) or a shuffled mask (`Masks.shuffled`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewedges.model.loading import Loaded
from fewedges.sparsify.masks import Guard, Masks
from fewedges.sparsify.matrices import Matrix, matrices_of
from fewedges.sparsify.pattern import dense
from fewedges.sparsify.schedule import Moving, Rewinding
from fewedges.sparsify.score import SCORES, Evidence
from fewedges.sparsify.select import select, select_global
from fewedges.weight_recipes import Structure, Tickets

Train = Callable[[Masks, int, int], Any]
"""train(masks, start, stop): train the model in place under the masks, optimiser steps start to stop - 1. What it
returns is kept beside the round. Learning rate and data must follow the step number, so that going back is going
back."""


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """What iterative pruning found."""

    masks: Masks
    early: dict[str, Tensor]
    """The model's weights at the step gone back to; with the masks applied, this is the ticket."""
    rounds: list[dict[str, Any]]
    """Density and what `train` returned, dense first."""

    def __str__(self) -> str:
        return f"ticket: density {self.masks.density:.4f} after {len(self.rounds) - 1} rounds"


def find_ticket(loaded: Loaded, recipe: Tickets, train: Train, keep_dense: tuple[str, ...] = ()) -> Ticket:
    """Find a ticket in a freshly initialised model; leaves the model trained under the last mask."""
    matrices = matrices_of(loaded, keep_dense)
    schedule = Rewinding(recipe.rounds, recipe.rate, recipe.steps, recipe.rewind)
    masks = Masks({name: dense(matrix.shape) for name, matrix in matrices.items()})
    train(masks, 0, recipe.rewind)
    early = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    rounds = [{"density": 1.0, "trained": train(masks, recipe.rewind, recipe.steps)}]
    step = recipe.steps
    while schedule.at(step).rewind:
        masks = smaller(matrices, masks, recipe.rate, recipe.scope)
        rewind_(loaded.model, early, masks)
        rounds.append({"density": masks.density, "trained": train(masks, recipe.rewind, recipe.steps)})
        masks.check(loaded.model, "training a ticket")
        step += recipe.steps - recipe.rewind
    return Ticket(masks=masks, early=early, rounds=rounds)


class Rounds(Moving):
    """The rounds of a ticket in one loop, step after step; equal to `find_ticket` with AdamW made anew at `rewind`."""

    def __init__(
        self, guard: Guard, schedule: Rewinding, model: Any, early: dict[str, Tensor], scope: str = "matrix", **how: Any
    ):
        super().__init__(guard, schedule)
        self.rounds, self.model, self.scope, self.how = schedule, model, scope, how
        self.early = early
        """Filled at the step gone back to; of a resumed run, what it was filled with."""

    def prepare(self, step: int) -> None:
        """Call before step `step`: keeps the early weights when they are there, prunes and goes back when due."""
        state = None if self.guard.optimizer is None else self.guard.optimizer.state
        due = self.rounds.at(step).rewind
        if step == self.rounds.rewind:
            self.early.update({name: value.clone() for name, value in self.model.state_dict().items()})
        if due:
            masks = self.guard.masks()
            masks.check(self.model, "training a ticket")
            masks = smaller(self.guard.matrices, masks, self.rounds.rate, self.scope, **self.how)
            self.guard.kept = {name: p.mask().to(self.guard.kept[name].device) for name, p in masks.patterns.items()}
            rewind_(self.model, self.early, masks)
        if state is not None and (due or step == self.rounds.rewind):
            state.clear()


@torch.no_grad()
def smaller(
    matrices: dict[str, Matrix],
    masks: Masks,
    rate: float,
    scope: str = "matrix",
    *,
    score: str = "magnitude",
    structure: str = "unstructured",
) -> Masks:
    """Prune a fraction `rate` of what is kept, lowest scores first, in every matrix or over all of them."""
    kind = Structure.parse(structure)
    gone = {name: ~masks.patterns[name].mask().to(matrix.weight.device) for name, matrix in matrices.items()}
    scores = {
        name: SCORES[score].of(matrix.weight, Evidence()).masked_fill(gone[name], -torch.inf)
        for name, matrix in matrices.items()
    }
    left = {name: masks.patterns[name].nnz // (kind.n * kind.m) for name in matrices}
    if scope == "global":
        return Masks(select_global(scores, kind, _less(sum(left.values()), rate)))
    return Masks({name: select(score, kind, _less(left[name], rate)) for name, score in scores.items()})


def rewind_(model: Any, early: dict[str, Tensor], masks: Masks) -> None:
    """Put the early weights back, masked."""
    model.load_state_dict(early)
    masks.apply_(model)


def reinitialised_(model: Any, seed: int) -> None:
    """New random weights as the model's class draws them: the control that keeps only the mask."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    fresh = type(model)(model.config)
    torch.set_rng_state(state)
    model.load_state_dict(fresh.state_dict())


def _less(count: int, rate: float) -> int:
    return count - math.floor(count * rate + 1e-9)
