"""When a mask changes: step -> what to do. A schedule holds no state; a resumed run asks it the same question.

`Moving` is a mask that follows one through a training loop; its kinds are in gradual.py, rewiring.py and lottery.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from fewedges.errors import RecipeError
from fewedges.fields import bad
from fewedges.sparsify.masks import Guard
from fewedges.weight_recipes import Gradual, Rewind, Rewire, Train


class Moment(NamedTuple):
    """What a schedule asks for at a step."""

    change: bool
    """Whether the mask is to be made anew now."""
    density: float
    """What it shall keep."""
    drop: float = 0.0
    """RigL: fraction of the kept entries to move."""
    rewind: bool = False
    """Lottery tickets: whether the survivors go back to their early weights."""


@runtime_checkable
class Schedule(Protocol):
    """Anything that answers `at(step)`."""

    def at(self, step: int) -> Moment:
        """What to do before optimiser step `step` (from 0)."""
        ...


@dataclass(frozen=True)
class Static:
    """A mask given once, never changed."""

    density: float

    def at(self, step: int) -> Moment:
        """Nothing to do."""
        return Moment(False, self.density)


@dataclass(frozen=True)
class OneShot:
    """Everything at one step."""

    density: float
    step: int = 0

    def at(self, step: int) -> Moment:
        """Dense before `step`, sparse from it on."""
        return Moment(step == self.step, self.density if step >= self.step else 1.0)


@dataclass(frozen=True)
class Cubic:
    """Gradual pruning: sparsity s_t = s_f (1 - (1 - (t - t0)/(n dt))^3) (Zhu and Gupta 2017, arXiv:1710.01878)."""

    density: float
    start: int
    end: int
    every: int = 100

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end or self.every < 1:
            found = f"start {self.start}, end {self.end}, every {self.every}"
            raise RecipeError("cubic schedule", found, "0 <= start < end, every >= 1")

    def at(self, step: int) -> Moment:
        """Fast at first, slow at the end; the last change is at `end` whatever `every`."""
        now = min(max(step, self.start), self.end)
        last = now if now == self.end else self.start + (now - self.start) // self.every * self.every
        done = (last - self.start) / (self.end - self.start)
        due = step == last and self.start <= step <= self.end
        return Moment(due, 1 - (1 - self.density) * (1 - (1 - done) ** 3))


@dataclass(frozen=True)
class Cosine:
    """RigL: every `every` steps until `end`, moving drop/2 (1 + cos(pi t / end)) of the kept entries."""

    density: float
    end: int
    every: int = 100
    drop: float = 0.3

    def __post_init__(self) -> None:
        if self.end < 1 or self.every < 1:
            raise RecipeError("RigL's schedule", f"end {self.end}, every {self.every}", "at least 1")

    def at(self, step: int) -> Moment:
        """Not at step 0: there is nothing learned to judge by."""
        due = 0 < step < self.end and step % self.every == 0
        return Moment(due, self.density, self.drop / 2 * (1 + math.cos(math.pi * step / self.end)) if due else 0.0)


@dataclass(frozen=True)
class Rewinding:
    """Iterative pruning: after every training of `steps` steps prune to (1 - rate)^round and go back to `rewind`."""

    rounds: int
    rate: float
    steps: int
    rewind: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rewind < self.steps or not 0 < self.rate < 1 or self.rounds < 1:
            raise RecipeError(
                "rewinding", str(self), "0 <= rewind < steps, 0 < rate < 1 (density below 1), rounds >= 1"
            )

    @property
    def total(self) -> int:
        """Steps of all trainings together."""
        return self.rewind + (self.rounds + 1) * (self.steps - self.rewind)

    def clock(self, step: int) -> int:
        """The step of its training that step number `step` of all is: going back is going back in data and rate too."""
        return step if step < self.rewind else self.rewind + (step - self.rewind) % (self.steps - self.rewind)

    def at(self, step: int) -> Moment:
        """`step` counts over all rounds; after the last pruning one more training follows."""
        done, over = divmod(max(step - self.rewind, 0), self.steps - self.rewind)
        due = done > 0 and over == 0 and done <= self.rounds
        return Moment(due, (1 - self.rate) ** min(done, self.rounds), rewind=due)


# -- of a recipe -------------------------------------------------------------------------------------------------------


def _cosine(recipe: Rewire) -> Cosine:
    end, every = max(1, round(recipe.until * recipe.steps)), _every(recipe)
    if every >= end:
        raise bad("every", every, f"below {end} for {recipe.steps} steps, or the mask never moves")
    return Cosine(recipe.density, end, every, recipe.drop)


def _cubic(recipe: Gradual) -> Cubic:
    if recipe.steps < 2:
        raise bad("steps", recipe.steps, "of 2 or more: the density is reached before the last step")
    end = min(recipe.steps - 1, max(1, round(recipe.until * recipe.steps)))
    return Cubic(recipe.density, 0, end, _every(recipe))


def _rewinding(recipe: Rewind) -> Rewinding:
    rate = 1 - recipe.density ** (1 / recipe.rounds)
    return Rewinding(recipe.rounds, rate, recipe.steps, recipe.rewind)


def _every(recipe: Rewire | Gradual) -> int:
    return min(100, max(1, recipe.steps // 10)) if recipe.every is None else recipe.every


SCHEDULES: dict[str, Callable[[Any], Schedule]] = {
    "once": lambda recipe: OneShot(recipe.density),
    "cubic": _cubic,
    "cosine": _cosine,
    "rewinding": _rewinding,
}
"""By the name that a method's row has."""


def schedule_of(recipe: Train) -> Schedule:
    """When this recipe's method changes its mask. Raises RecipeError where its steps leave no room for that."""
    return SCHEDULES[recipe.row.schedule](recipe)


# -- in a loop ---------------------------------------------------------------------------------------------------------


class Moving:
    """A mask that follows a schedule through a training loop; this one is held as it is.

    moving.prepare(step)
    loss(batch(step)).backward()
    if not moving.rewire_(step):
        optimizer.step()
        moving.prune_(step)
    """

    def __init__(self, guard: Guard, schedule: Schedule):
        self.guard, self.schedule = guard, schedule

    def prepare(self, step: int) -> None:
        """Call before step `step` does anything."""

    def rewire_(self, step: int) -> bool:
        """Call when it has gradients: True where the mask has moved, and the optimiser is to leave out its step."""
        return False

    def prune_(self, step: int) -> bool:
        """Call after its optimiser step: True where the mask has closed further."""
        return False

    @property
    def density(self) -> float:
        """Fraction now kept over all masked matrices."""
        kept = self.guard.kept.values()
        return sum(int(mask.sum()) for mask in kept) / max(1, sum(mask.numel() for mask in kept))


def drawn_at(seed: int, step: int) -> torch.Generator:
    """What a step draws from: a function of the two, so that a resumed run draws the same."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % (2**31 - 1))
