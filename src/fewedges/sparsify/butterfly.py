"""Pixelated butterfly: W = gamma B + (1 - gamma) U V, a flat block butterfly plus a low rank.

Chen, Dao et al. 2022 (arXiv:2112.00029). A product of butterfly factors (I + lambda B_1)(I + lambda B_2)... is, to
first order, I + lambda (B_1 + B_2 + ...): the *flat* butterfly, one sparse matrix whose support is the union of the
factors'. On a B x B grid of cells, cell (i, j) is on iff i = j or i xor j is a power of two below 2^k. The grid is
stretched over the R x C matrix, so a live cell is a large dense piece (R/B) x (C/B) and the layer is one batched
matrix product over gathered cells: nothing in it is sparse for the hardware.

Shapes: M input vectors, R outputs, C inputs; B cells along a side, k factors, n = 1 + k live cells in a row of
cells, h = R/B and w = C/B height and width of a cell, r rank.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fewedges.errors import RecipeError
from fewedges.sparsify.cell_kernel import pixelated_product
from fewedges.sparsify.launching import Kernel, as_autocast, choose_kernel
from fewedges.sparsify.pattern import Blocks, Pattern

GAMMA = 0.5
"""Where the learned weight of the two terms starts."""


def neighbours(grid: int, factors: int) -> Int[Tensor, "B n"]:
    """Columns of the live cells of every row of cells, rising: itself, and itself xor 1, 2, 4, ... 2^(factors - 1)."""
    _check_grid(grid, factors)
    flips = torch.tensor([0, *(2**t for t in range(factors))])
    return (torch.arange(grid)[:, None] ^ flips).sort(1).values


def random_neighbours(grid: int, live: int, seed: int = 0) -> Int[Tensor, "B n"]:
    """A control for the butterfly: as many live cells in every row and every column, at random places."""
    if not 0 < live <= grid:
        raise RecipeError(f"{live} live cells in a row of {grid}", "they do not fit", "1 to grid cells")
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(grid, generator=generator) for _ in range(2))
    shifts = torch.randperm(grid, generator=generator)[:live]
    return columns[(rows[:, None] + shifts) % grid]


def cells_of(columns: Int[Tensor, "B n"], grid: int | None = None) -> Bool[Tensor, "B B"]:
    """The grid of cells, on or off, from the columns of the live ones."""
    on = torch.zeros(len(columns), grid or len(columns), dtype=torch.bool, device=columns.device)
    return on.scatter(1, columns, True)


def flat_butterfly(rows: int, columns: int, grid: int, factors: int) -> Blocks:
    """The pattern stretched over a rows x columns matrix; its `cover(b)` passes its density where b divides no cell."""
    _check_divides(rows, columns, grid)
    return Blocks(cells_of(neighbours(grid, factors)), rows // grid, columns // grid)


def tiled_butterfly(rows: int, columns: int, block: int, factors: int) -> Pattern:
    """The variant that is not stretched: the square pattern of b x b blocks, repeated along the longer side."""
    short = min(rows, columns)
    return flat_butterfly(short, short, short // block, factors).tile(rows, columns)


@dataclass(frozen=True)
class Plan:
    """The structure of one layer. `factors` 0 is a block diagonal, `grid` 0 no butterfly, `rank` 0 no low rank."""

    grid: int
    factors: int
    rank: int
    layout: Literal["butterfly", "random"] = "butterfly"
    """Which cells are live; random is a control of the same cost."""
    seed: int = 0
    """Of the random layout."""

    def columns(self) -> Int[Tensor, "B n"]:
        """Columns of the live cells of every row of cells."""
        if self.layout == "random":
            return random_neighbours(self.grid, 1 + self.factors, self.seed)
        return neighbours(self.grid, self.factors)

    def pattern(self, rows: int, columns: int) -> Blocks:
        """The live cells, stretched over the matrix."""
        _check_divides(rows, columns, self.grid)
        return Blocks(cells_of(self.columns()), rows // self.grid, columns // self.grid)

    def parameters(self, rows: int, columns: int) -> int:
        """Numbers stored for a rows x columns matrix, without bias and gamma: also multiplications a vector."""
        live = rows * columns * (1 + self.factors) // self.grid if self.grid else 0
        return live + self.rank * (rows + columns)

    def density(self, rows: int, columns: int) -> float:
        """Parameters as a fraction of the dense matrix's."""
        return self.parameters(rows, columns) / (rows * columns)


class GatheredCells(nn.Module):
    """The sparse term: one dense piece for every live cell, all multiplied in one batched product."""

    columns: Tensor
    sources: Tensor
    pairs: Tensor | None

    def __init__(self, rows: int, columns: int, plan: Plan):
        super().__init__()
        _check_divides(rows, columns, plan.grid)
        live, width = 1 + plan.factors, columns // plan.grid
        self.weight = nn.Parameter(torch.empty(plan.grid, rows // plan.grid, live * width))
        """(B, h, n w): the rows of a row of cells over their live inputs."""
        self.register_buffer("columns", plan.columns(), persistent=False)
        self.register_buffer("sources", _sources(self.columns), persistent=False)
        paired = live == 2 and torch.equal(self.columns, neighbours(plan.grid, 1))
        self.register_buffer("pairs", torch.arange(plan.grid // 2)[:, None] if paired else None, persistent=False)

    def forward(self, x: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch R"]:
        """x B^T."""
        x, weight = as_autocast(x, self.weight)
        rows = x.reshape(-1, x.shape[-1])
        y: Any = _GatheredProduct.apply(rows, *self.joined(weight))
        return y.view(*x.shape[:-1], y.shape[1])

    def joined(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The weight, and columns and sources of its cells, as they are multiplied.

        A butterfly of one factor is block diagonal: rows of cells 2i and 2i + 1 both read the columns 2i and 2i + 1, so
        these four are one cell, and nothing is gathered.
        """
        if self.pairs is None:
            return weight, self.columns, self.sources
        grid, height, wide = weight.shape
        return weight.view(grid // 2, 2 * height, wide), self.pairs, self.pairs

    def dense(self) -> Float[Tensor, "R C"]:
        """The matrix with its zeros; differentiable."""
        (grid, live), height = self.columns.shape, self.weight.shape[1]
        pieces = self.weight.unflatten(-1, (live, -1)).transpose(1, 2)  # (B, n, h, w)
        rows = torch.arange(grid, device=self.columns.device)[:, None].expand_as(self.columns)
        cells = pieces.new_zeros(grid, grid, height, pieces.shape[-1]).index_put((rows, self.columns), pieces)
        return cells.transpose(1, 2).flatten(2).flatten(0, 1)


class LowRank(nn.Module):
    """The low-rank term: x -> (x V^T) U^T."""

    def __init__(self, rows: int, columns: int, rank: int):
        super().__init__()
        self.up = nn.Parameter(torch.empty(rows, rank))
        """U, (R, r)."""
        self.down = nn.Parameter(torch.empty(rank, columns))
        """V, (r, C)."""

    def forward(self, x: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch R"]:
        """x (U V)^T."""
        return nn.functional.linear(nn.functional.linear(x, self.down), self.up)

    def dense(self) -> Float[Tensor, "R C"]:
        """U V."""
        return self.up @ self.down


class PixelatedLinear(nn.Module):
    """A linear layer with W = gamma B + (1 - gamma) U V; with one term alone there is no gamma.

    gamma is the paper's learned scalar (the public code gates by an input-dependent sigmoid instead). `kernel`:
    reference, batched products on any device, or triton, both terms and the bias in one kernel on a GPU. A low rank
    alone is two dense products either way. It is no part of the state and may be set at any time.
    """

    def __init__(
        self, in_features: int, out_features: int, plan: Plan, bias: bool = True, kernel: Kernel = "reference"
    ):
        super().__init__()
        self.kernel = choose_kernel(kernel)
        if not plan.grid and not plan.rank:
            raise RecipeError(f"a layer of {plan}", "it has no weights", "a grid, a rank, or both")
        self.in_features, self.out_features, self.plan = in_features, out_features, plan
        self.sparse = GatheredCells(out_features, in_features, plan) if plan.grid else None
        self.low = LowRank(out_features, in_features, plan.rank) if plan.rank else None
        self.gamma = nn.Parameter(torch.tensor(GAMMA)) if plan.grid and plan.rank else None
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.reset_()

    @torch.no_grad()
    def reset_(self, std: float | None = None) -> None:
        """Draw the weights so that outputs, and gradients of inputs, vary as those of a dense matrix of this `std`.

        Default: torch's own for Linear, 1 / sqrt(3 C). Each term carries half the variance. (The public code keeps
        the live part of a dense draw times sqrt(B / n), draws both factors alike and halves their sum: a third of
        the dense variance.) The bias is torch's, uniform within 1 / sqrt(C).
        """
        inputs = self.in_features
        std = (3 * inputs) ** -0.5 if std is None else std
        both = self.gamma is not None
        if self.sparse is not None:
            live = self.sparse.weight.shape[-1]
            spread = std * (inputs / live) ** 0.5 * (math.sqrt(0.5) / self.gamma.item() if both else 1)  # type: ignore[union-attr]
            self.sparse.weight.normal_(0, spread)
        if self.low is not None:
            spread = std * (inputs / self.plan.rank) ** 0.5
            self.low.up.normal_(0, spread * (math.sqrt(0.5) / (1 - self.gamma.item()) if both else 1))  # type: ignore[union-attr]
            self.low.down.normal_(0, inputs**-0.5)
        if self.bias is not None:
            self.bias.uniform_(-(inputs**-0.5), inputs**-0.5)

    def forward(self, x: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch R"]:
        """x W^T + bias."""
        if self.sparse is not None and self.kernel == "triton":
            return self._fused(x, self.sparse)
        if self.sparse is None or self.low is None:
            y = self.low(x) if self.sparse is None else self.sparse(x)  # type: ignore[misc]
        else:
            sparse, low = self.sparse(x), self.low(x)
            y = torch.lerp(low, sparse, self.gamma.to(low.dtype))  # type: ignore[union-attr]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _fused(self, x: Tensor, cells: GatheredCells) -> Tensor:
        x, weight, up, down, bias = as_autocast(
            x, cells.weight, self.low and self.low.up, self.low and self.low.down, self.bias
        )
        return pixelated_product(x, *cells.joined(weight), up, down, self.gamma, bias)

    @property
    def weight(self) -> Float[Tensor, "R C"]:
        """W, computed: what a dense layer would hold. Differentiable; writing into it changes nothing."""
        if self.sparse is None or self.low is None:
            return self.low.dense() if self.sparse is None else self.sparse.dense()  # type: ignore[union-attr]
        return torch.lerp(self.low.dense(), self.sparse.dense(), self.gamma)  # type: ignore[arg-type]

    def flops(self, tokens: int) -> int:
        """Multiplications and additions for so many input vectors."""
        return 2 * tokens * self.plan.parameters(self.out_features, self.in_features)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        density = self.plan.density(self.out_features, self.in_features)
        return f"{self.in_features}, {self.out_features}, {self.plan}, density={density:.4f}"


class _GatheredProduct(torch.autograd.Function):
    """x W^T over live cells; backward is two more batched products, with no scatter, so it is deterministic."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, columns: Tensor, sources: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, columns, sources)
        y = torch.bmm(_gathered(x, columns), weight.transpose(1, 2))  # (B, M, h)
        return y.transpose(0, 1).flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor):  # type: ignore[no-untyped-def]
        x, weight, columns, sources = ctx.saved_tensors
        grid, live = columns.shape
        to_x = to_weight = None
        if ctx.needs_input_grad[0]:
            pieces = weight.unflatten(-1, (live, -1)).transpose(1, 2).flatten(0, 1)  # (B n, h, w)
            turned = pieces[sources].flatten(1, 2)  # (B, n h, w): the live rows of a column of cells
            to_x = torch.bmm(_gathered(upstream, sources // live), turned).transpose(0, 1).reshape(x.shape)
        if ctx.needs_input_grad[1]:
            down = upstream.unflatten(1, (grid, -1)).permute(1, 2, 0)  # (B, h, M)
            to_weight = torch.bmm(down, _gathered(x, columns))
        return to_x, to_weight, None, None


def _gathered(x: Float[Tensor, "M C"], columns: Int[Tensor, "B n"]) -> Float[Tensor, "B M nw"]:
    """The inputs of every row of cells side by side: one copy, then only strides."""
    cells = x.unflatten(1, (len(columns), -1))  # (M, B, w)
    return cells[:, columns].flatten(2).transpose(0, 1)


def _sources(columns: Int[Tensor, "B n"]) -> Int[Tensor, "B n"]:
    """For every column of cells its live cells, numbered row by row: (row of cells) * n + place in it."""
    order = columns.flatten().argsort(stable=True)
    counts = columns.flatten().bincount(minlength=len(columns))
    if (counts != columns.shape[1]).any():
        raise RecipeError("gathered cells", "columns of cells differ in their live cells", "a regular layout")
    return order.view_as(columns)


def _check_grid(grid: int, factors: int) -> None:
    power = grid > 0 and grid & (grid - 1) == 0
    if not power or not 0 <= factors <= grid.bit_length() - 1:
        found = "a grid is a power of two and has at most log2(grid) factors"
        raise RecipeError(f"a butterfly of grid {grid} with {factors} factors", found, "grid 16, factors 2")


def _check_divides(rows: int, columns: int, grid: int) -> None:
    if grid < 1 or rows % grid or columns % grid:
        found = f"{grid} divides not both sides"
        raise RecipeError(f"a {grid} x {grid} grid over {rows} x {columns}", found, "a grid that does")
