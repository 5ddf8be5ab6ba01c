"""Training with a mask that moves: to where the gradient is large (RigL), or anywhere (SET).

Evci et al. 2020 (arXiv:1911.11134), algorithm 1. Every `every` steps the mask changes instead of an optimiser step:
of a matrix's nnz kept entries the n smallest |w| are dropped and the n largest |dL/dw| among all that are then not
kept are grown, n = floor(nnz * drop/2 (1 + cos(pi t / end))). Truly new entries begin at 0 with no momentum; one
that is dropped and grown at once keeps its weight. With grow="random" the n are drawn instead: SET (Mocanu et al. 2018,
arXiv:1707.04780) on RigL's schedule, the control that says what the gradient is worth.

Shapes: R outputs, C inputs.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fewedges.errors import ModelError
from fewedges.sparsify import allocation
from fewedges.sparsify.masks import Guard, Masks, held
from fewedges.sparsify.matrices import Matrix, shapes_of
from fewedges.sparsify.schedule import Cosine, Schedule
from fewedges.sparsify.score import SCORES, Evidence
from fewedges.sparsify.select import select
from fewedges.weight_recipes import Rewire


def random_masks(matrices: dict[str, Matrix], density: float, rule: str = "erk", seed: int = 0) -> Masks:
    """A random mask of each matrix, densities by the rule: where RigL begins, and its static control."""
    share = {"uniform": allocation.uniform, "erk": allocation.erk}[rule](shapes_of(matrices), density)
    generator = torch.Generator().manual_seed(seed)
    scores = {n: SCORES["random"].of(m.weight, Evidence(generator=generator)) for n, m in matrices.items()}
    return Masks({name: select(scores[name], "unstructured", min(share[name], 1.0)) for name in matrices})


def moved(
    weight: Float[Tensor, "R C"], worth: Float[Tensor, "R C"], kept: Bool[Tensor, "R C"], drop: float
) -> Bool[Tensor, "R C"]:
    """The next mask of a matrix: as many entries, a fraction `drop` of them given up for those worth most."""
    nnz = int(kept.sum())
    count = math.floor(nnz * drop)
    strength = SCORES["magnitude"].of(weight, Evidence()).masked_fill(~kept, -torch.inf)
    stays = select(strength, "unstructured", nnz - count).mask()
    return stays | select(worth.masked_fill(stays, -torch.inf), "unstructured", count).mask()


class Rewiring:
    """The moving mask of one training run; see `rewired`."""

    def __init__(self, guard: Guard, schedule: Schedule, grow: str = "gradient", seed: int = 0):
        self.guard, self.schedule, self.grow, self.seed = guard, schedule, grow, seed

    def prepare(self, step: int) -> None:
        """Call before the backward pass of step `step`: the step that looks needs dense gradients."""
        self.guard.dense_gradients = self.schedule.at(step).change

    @torch.no_grad()
    def rewire_(self, step: int) -> bool:
        """Call after it, in place of the optimiser step where the answer is True: the mask has moved."""
        moment = self.schedule.at(step)
        if not moment.change:
            return False
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % (2**31 - 1))
        for name, matrix in self.guard.matrices.items():
            if matrix.parameter.grad is None:
                raise ModelError(f"rewire {name} at step {step}", "it has no gradient", "backward() before rewire_")
            seen = Evidence(gradient=matrix.oriented(matrix.parameter.grad), generator=generator)
            worth = SCORES[self.grow].of(matrix.weight, seen)
            self.guard.kept[name] = moved(matrix.weight, worth, self.guard.kept[name], moment.drop)
        self.guard.clear_()
        self.guard.dense_gradients = False
        return True


@contextmanager
def rewired(model: Any, masks: Masks, optimizer: torch.optim.Optimizer, recipe: Rewire) -> Iterator[Rewiring]:
    """Hold masks through training and let them move.

    with rewired(model, masks, optimizer, recipe) as rigl:
        for step in range(recipe.steps):
            rigl.prepare(step)
            loss(batch(step)).backward()
            if not rigl.rewire_(step):
                optimizer.step()
            optimizer.zero_grad()
    masks = rigl.guard.masks()
    """
    end = max(1, round(recipe.until * recipe.steps))
    with held(model, masks, optimizer) as guard:
        yield Rewiring(guard, Cosine(recipe.density, end, recipe.every, recipe.drop), recipe.grow, recipe.seed)
