"""Training with a mask that moves: to where the gradient is large (RigL), or anywhere (SET).

Evci et al. 2020 (arXiv:1911.11134), algorithm 1. Every `every` steps the mask changes instead of an optimiser step:
of a matrix's nnz kept entries the n smallest |w| are dropped and the n largest |dL/dw| among all that are then not
kept are grown, n = floor(nnz * drop/2 (1 + cos(pi t / end))). Truly new entries begin at 0 with no momentum; one
that is dropped and grown at once keeps its weight. With grow="random" the n are drawn instead: SET (Mocanu et al. 2018,
arXiv:1707.04780) on RigL's schedule, the control that says what the gradient is worth.

Below it, what every method has in common whose mask is made in training: the masks it begins with, the one of the
kinds of moving mask that its row asks for, and the masks it ends with.

Shapes: R outputs, C inputs.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fewedges.errors import ModelError, RecipeError
from fewedges.model.loading import Loaded
from fewedges.sparsify.gradual import Thinning, picked
from fewedges.sparsify.lottery import Rounds
from fewedges.sparsify.masks import Guard, Masks, held
from fewedges.sparsify.matrices import Matrix, chosen, matrices_of
from fewedges.sparsify.pattern import dense, of_kind_if_so
from fewedges.sparsify.schedule import Moving, Rewinding, Schedule, drawn_at, schedule_of
from fewedges.sparsify.score import SCORES, Evidence
from fewedges.sparsify.select import select
from fewedges.weight_recipes import Rewire, Structure, Train, Training

NEAR = 0.01
"""How far the density of a model already pruned may be from that of a recipe that keeps its number of entries."""


def random_masks(matrices: dict[str, Matrix], density: float, rule: str = "erk", seed: int = 0, **how: Any) -> Masks:
    """A random mask of each matrix, densities by the rule: where RigL begins, and its static control.

    `how` is structure and price, as `gradual.picked` has them.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = {n: SCORES["random"].of(m.weight, Evidence(generator=generator)) for n, m in matrices.items()}
    return Masks(picked(scores, density, rule, **how))


def moved(
    weight: Float[Tensor, "R C"],
    worth: Float[Tensor, "R C"],
    kept: Bool[Tensor, "R C"],
    drop: float,
    structure: str = "unstructured",
) -> Bool[Tensor, "R C"]:
    """The next mask of a matrix: as many entries, a fraction `drop` of them given up for those worth most.

    In blocks it is whole blocks that go and come, by their sums.
    """
    kind = Structure.parse(structure)
    units = int(kept.sum()) // (kind.n * kind.m)
    count = math.floor(units * drop)
    strength = SCORES["magnitude"].of(weight, Evidence()).masked_fill(~kept, -torch.inf)
    stays = select(strength, kind, units - count).mask()
    return stays | select(worth.masked_fill(stays, -torch.inf), kind, count).mask()


class Rewiring(Moving):
    """The moving mask of one training run; see `rewired`."""

    def __init__(
        self,
        guard: Guard,
        schedule: Schedule,
        grow: str = "gradient",
        seed: int = 0,
        *,
        score: str = "magnitude",
        structure: str = "unstructured",
    ):
        super().__init__(guard, schedule)
        self.grow, self.seed, self.score, self.structure = grow, seed, score, structure

    def prepare(self, step: int) -> None:
        """Call before the backward pass of step `step`: the step that looks needs dense gradients."""
        self.guard.dense_gradients = self.schedule.at(step).change

    @torch.no_grad()
    def rewire_(self, step: int) -> bool:
        """Call after it, in place of the optimiser step where the answer is True: the mask has moved."""
        moment = self.schedule.at(step)
        if not moment.change:
            return False
        generator = drawn_at(self.seed, step)
        for name, matrix in self.guard.matrices.items():
            if matrix.parameter.grad is None:
                raise ModelError(f"rewire {name} at step {step}", "it has no gradient", "backward() before rewire_")
            seen = Evidence(gradient=matrix.oriented(matrix.parameter.grad), generator=generator)
            worth = SCORES[self.grow].of(matrix.weight, seen)
            strength = SCORES[self.score].of(matrix.weight, seen)
            self.guard.kept[name] = moved(strength, worth, self.guard.kept[name], moment.drop, self.structure)
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
    with held(model, masks, optimizer) as guard:
        yield _rewiring(recipe, guard, schedule_of(recipe))


def _rewiring(recipe: Rewire, guard: Guard, schedule: Schedule) -> Rewiring:
    grow = str(recipe.row.grow) if recipe.grow == "method" else recipe.grow
    return Rewiring(guard, schedule, grow, recipe.seed, score=recipe.row.score, structure=recipe.structure)


# -- any method that trains ----------------------------------------------------------------------------------------


def check_pruned(masks: Masks, recipe: Train, schedule: Schedule) -> None:
    """Raise RecipeError for a model already pruned (it has masks) from which the recipe cannot go on."""
    now, sparse = masks.density, schedule.at(0).density < 1
    fits = abs(now - recipe.density) < NEAR if sparse else now >= recipe.density
    plain = not recipe.keep_dense and recipe.structure == "unstructured" and recipe.row.update != "rewind"
    if masks.patterns and not (fits and plain):
        found = f"the model is already pruned, to density {now:.4f}"
        hint = "the dense model; or that density (gradual: a lower one), unstructured, without keep_dense, no tickets"
        raise RecipeError(f"method {recipe.method} at density {recipe.density}", found, hint)
    score = SCORES[_first_score(recipe)]
    if sparse and not masks.patterns and score.needs is not None:
        found = f"it begins by a score that needs {score.needs}, which nothing has measured"
        raise RecipeError(f"method {recipe.method}", found, "Prune by that score, then a stage that trains")


def first_masks(loaded: Loaded, masks: Masks, recipe: Train, schedule: Schedule) -> Masks:
    """The masks before the first step: the model's own; else as dense as the schedule begins, by the method's score.

    A method in which entries come as others go begins anywhere.
    """
    if masks.patterns:
        return masks
    matrices, density = chosen(matrices_of(loaded), recipe.keep_dense), schedule.at(0).density
    if density >= 1:
        return Masks({name: dense(matrix.shape) for name, matrix in matrices.items()})
    seen = Evidence(generator=torch.Generator().manual_seed(recipe.seed))
    scores = {name: SCORES[_first_score(recipe)].of(matrix.weight, seen) for name, matrix in matrices.items()}
    return Masks(picked(scores, density, recipe.rule, **_how(recipe)))


def moving_of(
    recipe: Training, guard: Guard, schedule: Schedule, model: Any, early: dict[str, Tensor] | None = None
) -> Moving:
    """The moving mask that a recipe's row asks for; `early` is filled with the weights that tickets go back to."""
    if not isinstance(recipe, Train) or recipe.row.schedule == "once":
        return Moving(guard, schedule)
    if isinstance(recipe, Rewire):
        return _rewiring(recipe, guard, schedule)
    if isinstance(schedule, Rewinding):
        how = {"score": recipe.row.score, "structure": recipe.structure}
        scope = "global" if recipe.rule == "global" else "matrix"
        return Rounds(guard, schedule, model, {} if early is None else early, scope, **how)
    return Thinning(guard, schedule, recipe.rule, score=recipe.row.score, seed=recipe.seed, **_how(recipe))


def final_masks(recipe: Training, masks: Masks, guard: Guard) -> Masks:
    """The masks in the end: those it began with where they were held, else as they now are, of the recipe's kind."""
    if not isinstance(recipe, Train) or recipe.row.schedule == "once":
        return masks
    return Masks({name: of_kind_if_so(kept.clone(), recipe.structure) for name, kept in guard.kept.items()})


def _first_score(recipe: Train) -> str:
    return "random" if recipe.row.grow else recipe.row.score


def _how(recipe: Train) -> dict[str, Any]:
    return {"structure": recipe.structure, "group": recipe.row.group, "price": recipe.price}
