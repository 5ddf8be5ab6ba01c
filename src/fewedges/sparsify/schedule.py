"""When a mask changes: step -> what to do. A schedule holds no state; a resumed run asks it the same question."""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from fewedges.errors import RecipeError


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
    """Iterative pruning: after every `steps` steps prune to (1 - rate)^round and go back."""

    rounds: int
    rate: float
    steps: int

    def at(self, step: int) -> Moment:
        """`step` counts over all rounds; after the last pruning one more training follows."""
        round_ = min(step // self.steps, self.rounds)
        due = step > 0 and step % self.steps == 0 and step // self.steps <= self.rounds
        return Moment(due, (1 - self.rate) ** round_, rewind=due)
