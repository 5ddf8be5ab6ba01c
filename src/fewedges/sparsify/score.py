"""What an entry is worth: larger is kept. A score says which evidence it needs besides the weight.

Shapes: R outputs, C inputs of a matrix (a slice of columns will do).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Evidence:
    """What was measured beside the weight; a score reads what it needs."""

    input_norm: Float[Tensor, "C"] | None = None
    """L2 norm of each input feature over the calibration tokens (any common factor will do)."""
    gradient: Float[Tensor, "R C"] | None = None
    """Mean dL/dW over the calibration batches."""
    pivots: Float[Tensor, "C"] | None = None
    """Diagonal of the upper Cholesky factor of the inverse Hessian."""
    generator: torch.Generator | None = None


@dataclass(frozen=True)
class Score:
    """A function of weight and evidence; `needs` names fields of Evidence that calibration must fill."""

    of: Callable[[Tensor, Evidence], Tensor]
    needs: str | None = None


def _magnitude(weight: Tensor, _: Evidence) -> Tensor:
    return weight.abs()


def _random(weight: Tensor, evidence: Evidence) -> Tensor:
    return torch.rand(weight.shape, generator=evidence.generator).to(weight.device)


def _wanda(weight: Tensor, evidence: Evidence) -> Tensor:
    """|w| ||x||."""
    assert evidence.input_norm is not None
    return weight.abs() * evidence.input_norm


def _snip(weight: Tensor, evidence: Evidence) -> Tensor:
    """|w dL/dw|: the loss's slope in a gate c that multiplies the weight, at c = 1."""
    assert evidence.gradient is not None
    return (weight * evidence.gradient).abs()


def _gradient(_: Tensor, evidence: Evidence) -> Tensor:
    assert evidence.gradient is not None
    return evidence.gradient.abs()


def _obs(weight: Tensor, evidence: Evidence) -> Tensor:
    """w^2 / U_jj^2: what the layer's squared error rises by when w goes and the columns after it make good."""
    assert evidence.pivots is not None
    return (weight / evidence.pivots) ** 2


SCORES: dict[str, Score] = {
    "magnitude": Score(_magnitude),
    "random": Score(_random),
    "wanda": Score(_wanda, needs="input_norm"),
    "snip": Score(_snip, needs="gradient"),
    "gradient": Score(_gradient, needs="gradient"),
    "obs": Score(_obs, needs="gram"),
}
