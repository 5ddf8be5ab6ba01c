"""What every source of training data gives: tokens, and which of them count in the loss."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """A batch of token windows. `counts[b, t]` says whether predicting token t is part of the loss."""

    tokens: Int[Tensor, "B T"]
    counts: Bool[Tensor, "B T"]
    """Column 0 is always False: nothing stands before it."""


@runtime_checkable
class Batches(Protocol):
    """A source of batches that is a pure function of (seed, step), so that a resumed run reads the same data."""

    def at(self, step: int, size: int) -> Batch:
        """Give the batch of `size` windows that belongs to optimiser step `step` (from 0)."""
        ...

    def describe(self) -> dict[str, Any]:
        """Say what is read, as plain data for the manifest: name, tokens, sha256."""
        ...
