"""The pixelated butterfly in one kernel: a grouped GEMM over its large cells, low rank, gamma and bias included.

    Y = gamma X S^T + (1 - gamma) T U^T + bias,   T = X V^T
    dX = gamma dY S + (1 - gamma) (dY U) V,       dS = gamma dY^T X at the live cells

A row of cells of S is a dense (h, n w) matrix over n gathered pieces of X, so a tile of Y walks over the pieces of X
where they lie (nothing is gathered) and then over T, into one accumulator; dX is the same walk through the columns of
cells. T and dY U are thin dense products, for cuBLAS, as are dU, dV. No atomics: one tile, one program; dS of few
cells is cut over the tokens, and its float32 parts are added.

What an H100 could do: 4096 -> 11008, M = 8192, grid 16, 1 factor, rank 192 (density .195): 92 GFLOP of cells, 35 up
and 13 down, of 739 dense. 264 MB move, .09 ms at 3 TB/s; dense takes 1.0 ms at 734 TF/s. A (128, 256) tile asks
the L2 for 87 FLOP a byte and has 11 steps of 64; cells of 688 rows fill 2.7 tiles of 256, so 12 % more is
multiplied. At 500 TF/s of that: .28 ms, and .04 for T: 3.2 times dense. GPT-2 medium (1024 -> 4096, grid 16, 1
factor, rank 64): 3 steps a tile, 101 MB: memory decides, .035 to .05 ms against .099.

Shapes: M input vectors, R outputs, C inputs; B cells along a side, n live ones in a row, h x w a cell; r rank.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from fewedges.errors import ModelError
from fewedges.sparsify.launching import (
    aligned,
    described,
    device_functions,
    fastest,
    options,
    packed,
    power_above,
    precision,
    untraced,
)

ASKED, HINT = "a fused pixelated product", "kernel='reference'"


class Tile(NamedTuple):
    """How a kernel cuts its result, and how deep its steps are.

    `rows` and `columns` of a tile of the result: tokens and outputs, or h and w of a cell's gradient.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    band: int = 8
    """Token tiles that share what is read of the weights, before the next ones."""
    splits: int = 1
    """Parts into which the tokens of a gradient are cut."""
    persistent: int = 0
    """Of Y and dX: so many programs a processor, each with many tiles; 0: a program a tile."""


class Tiles(NamedTuple):
    """The three kernels of one training step."""

    forward: Tile
    input_grad: Tile
    weight_grad: Tile


PRODUCTS = {  # bytes a number: candidates for Y and dX
    2: (
        Tile(128, 256, 64, 8, 3), Tile(128, 256, 64, 8, 4), Tile(128, 256, 64, 8, 3, persistent=1),
        Tile(256, 128, 64, 8, 3), Tile(256, 128, 64, 8, 3, persistent=1), Tile(128, 128, 64, 4, 3),
        Tile(128, 128, 64, 8, 4), Tile(128, 64, 64, 4, 4), Tile(128, 64, 64, 4, 4, persistent=2),
        Tile(256, 64, 64, 4, 2), Tile(128, 256, 64, 8, 3, band=2), Tile(128, 128, 64, 4, 2, persistent=2),
    ),
    4: (Tile(64, 64, 32, 4, 2), Tile(64, 64, 16, 4, 3)),
}  # fmt: skip
GRADIENTS = {  # candidates for dS
    2: (
        Tile(128, 256, 64, 8, 3), Tile(256, 128, 64, 8, 3), Tile(128, 128, 64, 4, 3), Tile(64, 256, 64, 4, 3),
        Tile(128, 64, 64, 4, 4), Tile(64, 64, 128, 4, 3),
    ),
    4: (Tile(64, 64, 32, 4, 2),),
}  # fmt: skip


def pixelated_product(
    x: Float[Tensor, "*batch C"],
    weight: Float[Tensor, "B h nw"],
    columns: Int[Tensor, "B n"],
    sources: Int[Tensor, "B n"],
    up: Float[Tensor, "R r"] | None = None,
    down: Float[Tensor, "r C"] | None = None,
    gamma: Float[Tensor, ""] | None = None,
    bias: Float[Tensor, "R"] | None = None,
    *,
    tiles: Tiles | None = None,
) -> Float[Tensor, "*batch R"]:
    """gamma x S^T + (1 - gamma) x V^T U^T + bias; without gamma both terms count once.

    `weight`, `columns`, `sources` as `GatheredCells` holds them. Differentiable once. Without `tiles` the fastest
    are found at the first call. Under torch.compile a break in the graph. Raises ModelError for shapes, dtypes and
    devices the kernel does not know.
    """
    _check(x, weight, columns, up, down, gamma, bias)
    rows = x.reshape(-1, x.shape[-1])
    y = untraced(_Pixelated.apply, rows, weight, up, down, gamma, bias, columns, sources, tiles)
    return y.view(*x.shape[:-1], y.shape[1])


def _check(x: Tensor, weight: Tensor, columns: Tensor, *others: Tensor | None) -> None:
    up, down, gamma, bias = others
    (grid, height, wide), live = weight.shape, columns.shape[1]
    width = wide // live
    rank = 0 if up is None else up.shape[1]
    alike = x.shape[-1] == grid * width and columns.shape[0] == grid and wide % live == 0
    alike &= (up is None) == (down is None) and (gamma is None or up is not None) and (up is None or rank > 0)
    alike &= up is None or down is None or (up.shape, down.shape) == ((grid * height, rank), (rank, grid * width))
    alike &= (bias is None or bias.shape == (grid * height,)) and (gamma is None or gamma.dim() == 0)
    if not alike:
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, weight, columns, *others) if t is not None)
        raise ModelError(ASKED, f"inputs, cells, columns, up, down, gamma, bias {shapes}", "shapes that fit")
    dtypes = {t.dtype for t in (x, weight, up, down, bias) if t is not None}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16, torch.float16}:
        raise ModelError(ASKED, f"dtypes {sorted(map(str, dtypes))}", f"one of float32, bfloat16, float16, or {HINT}")
    step = 16 // x.element_size()
    if height % step or width % step or rank % step:
        found = f"cells of {height} x {width}, rank {rank}: the copy engine moves 16 bytes"
        raise ModelError(ASKED, found, f"multiples of {step}, or {HINT}")


class _Pixelated(torch.autograd.Function):
    """One launch forward; two backward, and the thin products of the low rank."""

    @staticmethod
    def forward(ctx: Any, x, weight, up, down, gamma, bias, columns, sources, tiles) -> Tensor:  # type: ignore[no-untyped-def]
        x, weight = aligned(x), packed(weight)
        low = None if up is None else x @ down.T  # (M, r)
        ctx.save_for_backward(x, weight, up, down, gamma, low, columns, sources)
        ctx.tiles = tiles
        basis = None if up is None else packed(up)
        return _multiply(x, weight, low, basis, gamma, bias, columns, False, tiles and tiles.forward)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor):  # type: ignore[no-untyped-def]
        x, weight, up, down, gamma, low, columns, sources = ctx.saved_tensors
        wanted, tiles, g = ctx.needs_input_grad, ctx.tiles, aligned(upstream)
        to_x = to_weight = to_up = to_down = to_gamma = to_bias = to_low = None
        rest = 1 if gamma is None else 1 - gamma
        if up is not None and (wanted[0] or wanted[3]):
            to_low = g @ up  # (M, r); without its factor `rest`
        if wanted[0]:
            basis = None if down is None else packed(down)
            to_x = _multiply(g, weight, to_low, basis, gamma, None, sources, True, tiles and tiles.input_grad)
        if wanted[1] or wanted[4]:
            to_weight, dots = _sample(g, x, weight, gamma, columns, tiles and tiles.weight_grad)
        if wanted[2] or wanted[4]:
            plain = g.T @ low
            if wanted[4]:
                to_gamma = (dots.sum() - (plain * up).sum(dtype=torch.float32)).to(gamma.dtype)  # type: ignore[union-attr]
            to_up = plain * rest
        if wanted[3]:
            to_down = (to_low.T @ x) * rest  # type: ignore[union-attr]
        if wanted[5]:
            to_bias = g.sum(0)
        return to_x, to_weight, to_up, to_down, to_gamma, to_bias, None, None, None


def _multiply(
    x: Tensor, weight: Tensor, low: Tensor | None, basis: Tensor | None, gamma: Tensor | None, bias: Tensor | None,
    index: Tensor, turned: bool, tile: Tile | None,
) -> Tensor:  # fmt: skip
    """Y, or dX through the columns of cells (`turned`: then h and w change places, and V is the basis)."""
    (grid, live), (height, width) = index.shape, _cell(weight, index)
    inner, outer = (height, width) if turned else (width, height)
    y = x.new_empty(len(x), grid * outer)
    if not len(x):
        return y
    launch = functools.partial(_launch_product, x, weight, low, basis, gamma, bias, index, y, turned)
    if tile is None:
        shape = (len(x), grid * outer, grid * inner, grid, live, 0 if low is None else low.shape[1])
        tiles = functools.partial(_fitting, PRODUCTS[x.element_size()], len(x), outer, inner)
        tile = fastest("pixelated input gradient" if turned else "pixelated product", shape, x, tiles, launch)
    launch(tile)
    return y


def _launch_product(
    x: Tensor, weight: Tensor, low: Tensor | None, basis: Tensor | None, gamma: Tensor | None, bias: Tensor | None,
    index: Tensor, y: Tensor, turned: bool, tile: Tile,
) -> None:  # fmt: skip
    kernels = device_functions(ASKED, "cell_device", x.device)
    (grid, live), (height, width), tokens = index.shape, _cell(weight, index), len(x)
    inner, outer = (height, width) if turned else (width, height)
    flat = [tile.depth, tile.columns] if turned else [tile.columns, tile.depth]
    rank, low_seen, basis_seen = 0 if low is None else low.shape[1], None, None
    if low is not None and basis is not None:
        seen = [grid, rank, outer] if turned else [grid, outer, rank]
        basis_seen = described(basis, seen, [outer, grid * outer, 1] if turned else [outer * rank, rank, 1], [1, *flat])
        low_seen = described(low, [tokens, rank], [rank, 1], [tile.rows, tile.depth])
    tiles_m, tiles_n = -(-tokens // tile.rows), -(-outer // tile.columns)
    programs = tiles_m * grid * tiles_n
    if tile.persistent:
        programs = min(programs, tile.persistent * _processors(x.device))
    with torch.cuda.device_of(x):
        kernels.multiply[(programs,)](
            _pieces(x, grid, [tile.rows, tile.depth]), _cells(weight, live, flat), low_seen, basis_seen,
            _pieces(y, grid, [tile.rows, tile.columns]), bias, gamma, index,
            tiles_m, grid, tiles_n, outer, live, -(-inner // tile.depth), -(-rank // tile.depth), tile.band,
            BM=tile.rows, BN=tile.columns, BK=tile.depth, TURNED=turned, PERSISTENT=tile.persistent > 0,
            PRECISION=precision(x), **options(tile.warps, tile.stages),
        )  # fmt: skip


def _sample(
    g: Tensor, x: Tensor, weight: Tensor, gamma: Tensor | None, index: Tensor, tile: Tile | None
) -> tuple[Tensor, Tensor | None]:
    """dS as `weight` is stored; with gamma also parts of the scalar product of dY^T X and S."""
    if not len(x):
        return torch.zeros_like(weight), None if gamma is None else weight.new_zeros(1, dtype=torch.float32)
    launch = functools.partial(_launch_sample, g, x, weight, gamma, index)
    if tile is None:
        (grid, live), (height, width) = index.shape, _cell(weight, index)
        tiles = functools.partial(_gradient_tiles, x, (height, width), index)
        shape = (len(x), grid * height, grid * width, grid, live)
        tile = fastest("pixelated weight gradient", shape, x, tiles, launch)
    return launch(tile)


def _launch_sample(
    g: Tensor, x: Tensor, weight: Tensor, gamma: Tensor | None, index: Tensor, tile: Tile
) -> tuple[Tensor, Tensor | None]:
    kernels = device_functions(ASKED, "cell_device", x.device)
    (grid, live), (height, width), tokens = index.shape, _cell(weight, index), len(x)
    share = -(-tokens // (tile.splits * tile.depth)) * tile.depth
    splits = -(-tokens // share)
    parts = weight.new_empty((splits, *weight.shape), dtype=weight.dtype if splits == 1 else torch.float32)
    tiles_h, tiles_w = -(-height // tile.rows), -(-width // tile.columns)
    programs = splits * grid * tiles_h * live * tiles_w
    dots = None if gamma is None else x.new_empty(programs, dtype=torch.float32)
    box = [tile.rows, tile.columns]
    with torch.cuda.device_of(x):
        kernels.sample[(programs,)](
            _pieces(g, grid, [tile.depth, tile.rows]), _pieces(x, grid, [tile.depth, tile.columns]),
            None if gamma is None else _cells(weight, live, box), gamma, index, _cells(parts, live, box), dots,
            tokens, grid, live, tiles_h, tiles_w, share,
            BH=tile.rows, BW=tile.columns, BK=tile.depth, PRECISION=precision(x), **options(tile.warps, tile.stages),
        )  # fmt: skip
    return parts[0] if splits == 1 else parts.sum(0).to(weight.dtype), dots


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _cell(weight: Tensor, index: Tensor) -> tuple[int, int]:
    return weight.shape[1], weight.shape[2] // index.shape[1]


def _pieces(x: Float[Tensor, "M C"], grid: int, box: Sequence[int]) -> Any:
    """x as (B, M, w): one piece for each column of cells; beyond its end there is nothing."""
    width = x.shape[1] // grid
    return described(x, [grid, x.shape[0], width], [width, x.stride(0), 1], [1, *box])


def _cells(weight: Float[Tensor, "*splits B h nw"], live: int, box: Sequence[int]) -> Any:
    """Stored cells as (B, n, h, w); parts of a gradient one after the other."""
    height, wide = weight.shape[-2:]
    width = wide // live
    shape = [weight.numel() // (height * wide), live, height, width]
    return described(weight, shape, [height * wide, width, wide, 1], [1, 1, *box])


def _fitting(tiles: Sequence[Tile], rows: int, columns: int, depth: int) -> list[Tile]:
    """The candidates, none wider or deeper than the problem; a larger one would only add zeros."""
    limits = (power_above(rows), power_above(columns), power_above(depth))
    cut = [tile._replace(rows=min(tile.rows, limits[0]), columns=min(tile.columns, limits[1])) for tile in tiles]
    whole = [tile for tile, old in zip(cut, tiles, strict=True) if tile[:2] == old[:2]]
    return list(dict.fromkeys(tile._replace(depth=min(tile.depth, limits[2])) for tile in whole or cut[:1]))


def _gradient_tiles(x: Tensor, cell: tuple[int, int], index: Tensor) -> list[Tile]:
    """The candidates that fit, each with its tokens cut in several ways."""
    whole = _fitting(GRADIENTS[x.element_size()], *cell, len(x))
    return [cut for tile in whole for cut in _cuts(tile, cell, index)]


def _cuts(tile: Tile, cell: tuple[int, int], index: Tensor) -> list[Tile]:
    """The tile with its tokens cut so that there is work for all processors, and twice that."""
    processors = _processors(index.device)
    programs = index.numel() * -(-cell[0] // tile.rows) * -(-cell[1] // tile.columns)
    cuts = {min(16, 1 << (per * processors // programs).bit_length()) for per in (1, 2)}
    return [tile._replace(splits=cut) for cut in sorted(cuts)]
