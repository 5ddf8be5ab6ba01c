"""Fit a pixelated butterfly to a pretrained matrix: alternate between its two terms, each time exactly.

Minimises |(W - S - U V) X|, S on the live cells, by alternating least squares over S, U and V: every step solves its
part exactly, so the error never rises. Without inputs X the sparse step copies what the low rank leaves over, and
the low rank has only to fit what lies off the cells (matrix completion by hard imputation; Mazumder et al. 2010).
The paper trains from scratch; this start is ours, to be followed by distillation.

Shapes: R outputs, C inputs, r rank; B cells along a side, h x w a cell, n live cells in a row of cells.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewedges.errors import ModelError, RecipeError
from fewedges.sparsify.butterfly import GAMMA, PixelatedLinear, Plan

EXTRA = 8
"""Columns more than the rank in the random start of the low rank."""


@dataclass(frozen=True, eq=False)
class Projection:
    """The fitted terms; W is near sparse + up down."""

    pieces: Float[Tensor, "B h nw"] | None
    up: Float[Tensor, "R r"] | None
    down: Float[Tensor, "r C"] | None
    errors: tuple[float, ...]
    """Relative error |(W - fit) X| / |W X| after every round; falls."""

    @property
    def error(self) -> float:
        """The relative error at the end."""
        return self.errors[-1]


@torch.no_grad()
def project(
    weight: Float[Tensor, "R C"],
    plan: Plan,
    gram: Float[Tensor, "C C"] | None = None,
    *,
    rounds: int = 20,
    damping: float = 0.01,
    seed: int = 0,
) -> Projection:
    """Fit a plan's terms to a matrix, in the norm of its inputs when their `gram` X X^T is given.

    `damping` is added to the Gram's diagonal, as a fraction of its mean. Works in float32, or float64 where the
    weight is. Raises ModelError when the damped Gram is not positive definite.
    """
    w = weight if weight.dtype == torch.float64 else weight.float()
    if plan.rank > min(w.shape):
        raise RecipeError(f"project {tuple(w.shape)}", f"rank {plan.rank} is above a side", "a plan of lower rank")
    metric = _Metric(w, gram, damping)
    columns = plan.columns().to(w.device) if plan.grid else None
    sparse = torch.zeros_like(w)
    up, down = _start(metric.into(w - _sparse_step(w, columns, metric)), plan.rank, seed)
    size, errors = metric.into(w).norm().clamp(min=torch.finfo(w.dtype).tiny), []
    for _ in range(rounds if columns is not None and plan.rank else 1):
        if plan.rank:
            up, down = _low_rank_step(metric.into(w - sparse), down)
        low = metric.back(up @ down)
        sparse = _sparse_step(w - low, columns, metric)
        errors.append(float(metric.into(w - sparse - low).norm() / size))
    pieces = None if columns is None else _pieces(sparse, columns)
    return Projection(pieces, up if plan.rank else None, metric.back(down) if plan.rank else None, tuple(errors))


@torch.no_grad()
def fill_(layer: PixelatedLinear, fit: Projection) -> None:
    """Write a projection into a layer: gamma goes back to its start, and the terms are scaled to it."""
    both = layer.gamma is not None
    if layer.gamma is not None:
        layer.gamma.fill_(GAMMA)
    if layer.sparse is not None and fit.pieces is not None:
        layer.sparse.weight.copy_(fit.pieces / (GAMMA if both else 1))
    if layer.low is not None and fit.up is not None and fit.down is not None:
        balance = (fit.down.norm() / fit.up.norm().clamp(min=1e-30)).sqrt()  # equal norms: equal steps
        layer.low.up.copy_(fit.up * balance / ((1 - GAMMA) if both else 1))
        layer.low.down.copy_(fit.down / balance.clamp(min=1e-30))


class _Metric:
    """The norm |D X| as a plain one: |D L| with X X^T = L L^T; without inputs, L = 1."""

    def __init__(self, w: Tensor, gram: Tensor | None, damping: float):
        self.gram = self.root = None
        if gram is None:
            return
        self.gram = gram.to(w, copy=True)
        self.gram.diagonal().add_(damping * self.gram.diagonal().mean())
        self.root, failed = torch.linalg.cholesky_ex(self.gram)
        if failed:
            hint = f"more damping than {damping:g}, or more calibration windows"
            raise ModelError(f"project {tuple(w.shape)}", "the Gram of its inputs is not positive definite", hint)

    def into(self, d: Tensor) -> Tensor:
        return d if self.root is None else d @ self.root

    def back(self, d: Tensor) -> Tensor:
        return d if self.root is None else torch.linalg.solve_triangular(self.root, d, upper=False, left=False)


def _start(rest: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Factors near the largest directions of what the cells leave: a random sketch, refined twice."""
    generator = torch.Generator().manual_seed(seed)
    wide = min(rank + EXTRA, *rest.shape) if rank else 0
    basis = torch.randn(rest.shape[1], wide, generator=generator).to(rest)
    for _ in range(3):
        basis = torch.linalg.qr(rest.T @ torch.linalg.qr(rest @ basis).Q).Q if rank else basis
    u, s, v = torch.linalg.svd(rest @ basis, full_matrices=False)
    return u[:, :rank], s[:rank, None] * (v @ basis.T)[:rank]


def _low_rank_step(target: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Best factor on the left for the one on the right, made orthonormal; then the best one on the right."""
    up = torch.linalg.qr(target @ down.T).Q  # spans target V^T (V V^T)^-1
    return up, up.T @ target


def _sparse_step(rest: Tensor, columns: Int[Tensor, "B n"] | None, metric: _Metric) -> Tensor:
    """The matrix on the live cells nearest to `rest`: its entries there, or a least-squares fit a row of cells."""
    if columns is None:
        return torch.zeros_like(rest)
    height, width = rest.shape[0] // len(columns), rest.shape[1] // len(columns)
    result = torch.zeros_like(rest)
    for i, live in enumerate(columns):
        rows = slice(i * height, (i + 1) * height)
        inputs = (live[:, None] * width + torch.arange(width, device=rest.device)).flatten()
        if metric.gram is None:
            result[rows, inputs] = rest[rows, inputs]
        else:
            mine, factor = rest[rows] @ metric.gram[:, inputs], torch.linalg.cholesky(metric.gram[inputs][:, inputs])
            result[rows, inputs] = torch.cholesky_solve(mine.T, factor).T
    return result


def _pieces(sparse: Tensor, columns: Int[Tensor, "B n"]) -> Float[Tensor, "B h nw"]:
    """The live cells as GatheredCells stores them."""
    grid = len(columns)
    cells = sparse.unflatten(0, (grid, -1)).unflatten(-1, (grid, -1)).transpose(1, 2)  # (B, B, h, w)
    live = cells[torch.arange(grid, device=columns.device)[:, None], columns]  # (B, n, h, w)
    return live.transpose(1, 2).flatten(2)
