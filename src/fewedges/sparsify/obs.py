"""SparseGPT: prune a matrix column by column, each column's error made good by the columns after it.

Frantar and Alistarh 2023 (arXiv:2301.00774), algorithm 1: the optimal brain surgeon's update in a fixed column
order, so that one Cholesky factor serves every row. Like the authors' program, an unstructured mask is chosen in
blocks of columns over all rows and prunes one entry more than (1 - density) * entries of a block.

Shapes: R outputs, C inputs.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fewedges.errors import ModelError
from fewedges.sparsify.rounding import round_to, scales_of
from fewedges.sparsify.score import SCORES, Evidence
from fewedges.sparsify.select import kept_units, select
from fewedges.weight_recipes import Structure


@dataclass(frozen=True, eq=False)
class Factor:
    """What a matrix's inputs say about pruning it; matrices with the same inputs share it."""

    upper: Float[Tensor, "C C"]
    """U, upper triangular, U^T U = (H + damping)^-1."""
    dead: Bool[Tensor, "C"]
    """Inputs that were always zero: their weights go."""


@dataclass(frozen=True, eq=False)
class Solved:
    """A pruned matrix."""

    weight: Float[Tensor, "R C"]
    mask: Bool[Tensor, "R C"]
    error: float
    """Sum of (w - q)^2 / (2 U_jj^2), in units of H."""
    scales: Float[Tensor, "R g"] | None
    """Of the grid that the weights lie on, when quantised."""


def factorise(gram: Float[Tensor, "C C"], windows: int, damping: float, name: str = "a matrix") -> Factor:
    """Invert the damped Hessian H = 2/n X X^T in float64, n the number of windows.

    Raises ModelError when it is not positive definite; nothing is pruned by another method instead.
    """
    hessian = gram.double() * (2 / windows)
    dead = hessian.diagonal() == 0
    if dead.all():
        raise ModelError(f"SparseGPT of {name}", "all its inputs were zero", "calibration text that is not padding")
    hessian.diagonal()[dead] = 1
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(hessian)
    noise = 4 * torch.finfo(gram.dtype).eps * hessian.diagonal()
    failed = failed.bool() | (lower.diagonal().square() <= noise).any()  # a pivot of rounding may come out positive
    if not failed:
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed or not torch.isfinite(upper).all():
        found = f"its Hessian ({len(gram)} inputs) is not positive definite" if failed else "its inverse is not finite"
        hint = f"more damping than {damping:g}, more calibration windows, precision fp32, or method wanda"
        raise ModelError(f"SparseGPT of {name}", found, hint)
    return Factor(upper, dead)


@torch.no_grad()
def prune_columns(
    weight: Float[Tensor, "R C"],
    factor: Factor,
    *,
    density: float = 0.5,
    structure: str = "unstructured",
    block: int = 128,
    bits: int | None = None,
    group_size: int | None = None,
    allowed: Bool[Tensor, "R C"] | None = None,
) -> Solved:
    """Prune (and, with `bits`, quantise) a matrix; the result is new, `weight` is left alone.

    Works in float64 where the weight is, else in float32. `allowed` is a mask of entries that may be kept.
    """
    kind = Structure.parse(structure)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    w = weight.T.to(dtype, copy=True, memory_format=torch.contiguous_format)  # (C, R): a column is one piece of memory
    w[factor.dead] = 0
    upper = factor.upper.to(w)
    kept = torch.ones_like(w, dtype=torch.bool)
    error = torch.zeros((), dtype=torch.float64, device=w.device)
    grid = _Grid(w.T, bits, group_size)
    for start in range(0, len(w), block):
        here = slice(start, start + block)
        part, pivots = w[here], upper[here, here]
        free = None if allowed is None else allowed[:, here]
        step = kind.m if kind.kind == "n:m" else len(part)
        errors = torch.empty_like(part)  # (n, R)
        for j in range(len(part)):
            if j % step == 0:
                group = slice(j, j + step)
                some = None if free is None else free[:, group]
                chosen = _choose(part[group].T, pivots.diagonal()[group], kind, density, some)
                kept[start + j : start + j + step] = chosen.T
            new = torch.where(kept[start + j], grid.nearest(w.T, part[j], start + j), 0)
            torch.div(part[j] - new, pivots[j, j], out=errors[j])
            part[j + 1 :].addr_(pivots[j, j + 1 :], errors[j], alpha=-1)
            part[j] = new
        error += errors.double().square().sum() / 2
        w[here.stop :].addmm_(upper[here, here.stop :].T, errors, alpha=-1)
    return Solved(w.T.to(weight.dtype), kept.T, float(error), grid.scales)


def _choose(part: Tensor, pivots: Tensor, structure: Structure, density: float, allowed: Tensor | None) -> Tensor:
    """The mask of a block of columns, by w^2 / U_jj^2 of the weights as they now are."""
    score = SCORES["obs"].of(part, Evidence(pivots=pivots))
    if allowed is not None:
        score = score.masked_fill(~allowed, -torch.inf)
    budget: int | float = density
    if structure.kind == "unstructured" and density < 1:
        budget = max(kept_units(score.numel(), density) - 1, 0)
    mask = select(score, structure, budget).mask()
    return mask if allowed is None else mask & allowed


class _Grid:
    """The levels a column may take: any without `bits`; scales are set where a group of columns begins."""

    def __init__(self, w: Tensor, bits: int | None, group_size: int | None):
        self.bits, self.size = bits, group_size or w.shape[1]
        self.scales = None if bits is None else scales_of(w, bits, self.size)

    def nearest(self, w: Tensor, column: Tensor, index: int) -> Tensor:
        if self.bits is None or self.scales is None:
            return column
        group, inside = divmod(index, self.size)
        if inside == 0 and index:  # the weights of a later group have moved since
            self.scales[:, group] = scales_of(w[:, index : index + self.size], self.bits)[:, 0]
        return round_to(column[:, None], self.scales[:, group, None], self.bits)[:, 0]
