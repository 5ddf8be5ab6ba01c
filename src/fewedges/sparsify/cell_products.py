"""Products of a pixelated butterfly: how results are cut, which candidates are tried, and the launches.

`multiply` makes Y and dX. `low_product` makes T and dY U: few outputs and much to read, so the inner side is cut into
parts, which `multiply` adds in its accumulator; or cuBLAS makes them, whole (the first candidate).

Letters as in cell_kernel.py; P parts.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewedges.sparsify.launching import described, device_functions, fastest, options, power_above, precision

ASKED, MODULE = "a fused pixelated product", "cell_device"


class Tile(NamedTuple):
    """How a kernel cuts its result, and how deep its steps are.

    `rows` and `columns` of a tile of the result: tokens and outputs, h and w of a cell's gradient, tokens and ranks.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    band: int = 8
    """Token tiles that share what is read of the weights, before the next ones."""
    splits: int = 1
    """Parts into which what is summed over is cut: tokens of a gradient, inputs of a thin product."""
    persistent: int = 0
    """Of Y and dX: so many programs a processor, each with many tiles; 0: a program a tile."""


class Tiles(NamedTuple):
    """The kernels of one training step."""

    forward: Tile
    input_grad: Tile
    weight_grad: Tile
    low: Tile
    low_grad: Tile


BY_TORCH = Tile(0, 0, 0, 0, 0)
"""Of a thin product: torch's own, which is cuBLAS."""

PRODUCTS = {  # bytes a number: candidates for Y and dX
    2: (
        Tile(128, 256, 64, 8, 3), Tile(128, 256, 64, 8, 4), Tile(128, 256, 64, 8, 3, persistent=1),
        Tile(256, 128, 64, 8, 3), Tile(256, 128, 64, 8, 3, persistent=1), Tile(128, 128, 64, 4, 3),
        Tile(128, 128, 64, 8, 4), Tile(128, 64, 64, 4, 4), Tile(128, 64, 64, 4, 4, persistent=2),
        Tile(256, 64, 64, 4, 2), Tile(128, 256, 64, 8, 3, band=2), Tile(128, 128, 64, 4, 2, persistent=2),
    ),
    4: (Tile(64, 64, 32, 4, 2), Tile(64, 64, 16, 4, 3)),
}  # fmt: skip
THIN = {  # candidates for T and dY U, beside torch's; as wide as the rank, but at most `columns`
    2: (Tile(128, 256, 64, 8, 3), Tile(64, 256, 64, 4, 3), Tile(64, 128, 128, 4, 3), Tile(128, 64, 128, 4, 3)),
    4: (Tile(64, 64, 32, 4, 2),),
}
PARTS = (1, 2, 4)
"""Of a thin product: each is one more pass over the low rank for who reads it."""


# ------------------------------------------------------------------------------------------------------------
# Y and dX
# ------------------------------------------------------------------------------------------------------------


def multiply(
    x: Float[Tensor, "M C"], weight: Float[Tensor, "B h nw"], low: Float[Tensor, "P M r"] | None,
    basis: Tensor | None, gamma: Tensor | None, bias: Tensor | None, index: Int[Tensor, "B n"], turned: bool,
    tile: Tile | None,
) -> Tensor:  # fmt: skip
    """Y, or dX through the columns of cells (`turned`: then h and w change places, and V is the basis)."""
    (grid, live), (height, width) = index.shape, cell_sides(weight, index)
    inner, outer = (height, width) if turned else (width, height)
    y = x.new_empty(len(x), grid * outer)
    if not len(x):
        return y
    launch = functools.partial(_launch_multiply, x, weight, low, basis, gamma, bias, index, y, turned)
    if tile is None:
        parts, rank = (0, 0) if low is None else (len(low), low.shape[2])
        shape = (len(x), grid * outer, grid * inner, grid, live, rank, parts)
        tiles = functools.partial(fitting, PRODUCTS[x.element_size()], len(x), outer, inner)
        tile = fastest("pixelated input gradient" if turned else "pixelated product", shape, x, tiles, launch)
    launch(tile)
    return y


def _launch_multiply(
    x: Tensor, weight: Tensor, low: Tensor | None, basis: Tensor | None, gamma: Tensor | None, bias: Tensor | None,
    index: Tensor, y: Tensor, turned: bool, tile: Tile,
) -> None:  # fmt: skip
    kernels = device_functions(ASKED, MODULE, x.device)
    (grid, live), (height, width), tokens = index.shape, cell_sides(weight, index), len(x)
    inner, outer = (height, width) if turned else (width, height)
    flat = [tile.depth, tile.columns] if turned else [tile.columns, tile.depth]
    parts, rank, thin, basis_seen = 0, 0, None, None
    if low is not None and basis is not None:
        parts, rank = len(low), low.shape[2]
        seen = [grid, rank, outer] if turned else [grid, outer, rank]
        basis_seen = described(basis, seen, [outer, grid * outer, 1] if turned else [outer * rank, rank, 1], [1, *flat])
        thin = low_seen(low, [1, tile.rows, tile.depth])
    tiles_m, tiles_n = -(-tokens // tile.rows), -(-outer // tile.columns)
    programs = tiles_m * grid * tiles_n
    if tile.persistent:
        programs = min(programs, tile.persistent * processors(x.device))
    with torch.cuda.device_of(x):
        kernels.multiply[(programs,)](
            pieces_seen(x, grid, [tile.rows, tile.depth]), cells_seen(weight, live, flat), thin, basis_seen,
            pieces_seen(y, grid, [tile.rows, tile.columns]), bias, gamma, index,
            tiles_m, grid, tiles_n, outer, live, -(-inner // tile.depth), -(-rank // tile.depth), parts, tile.band,
            BM=tile.rows, BN=tile.columns, BK=tile.depth, TURNED=turned, PERSISTENT=tile.persistent > 0,
            PRECISION=precision(x), **options(tile.warps, tile.stages),
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# T and dY U
# ------------------------------------------------------------------------------------------------------------


def low_product(
    x: Float[Tensor, "M C"], basis: Tensor, turned: bool, tile: Tile | None = None
) -> Float[Tensor, "P M r"]:
    """x V^T for V (r, C), or `turned` x U for U (C, r); in parts that add up."""
    inner, rank = basis.shape if turned else basis.shape[::-1]
    launch = functools.partial(_launch_thin, x, basis, turned)
    if not len(x):
        return x.new_empty(1, 0, rank)
    if tile is None:
        tiles = functools.partial(_thin_tiles, x, inner, rank)
        what = "gradient before the low rank" if turned else "low rank's inner product"
        tile = fastest(what, (len(x), inner, rank), x, tiles, launch)
    return launch(tile)


def _launch_thin(x: Tensor, basis: Tensor, turned: bool, tile: Tile) -> Float[Tensor, "P M r"]:
    if tile == BY_TORCH:
        return (x @ (basis if turned else basis.T))[None]
    kernels = device_functions(ASKED, MODULE, x.device)
    (inner, rank), tokens = basis.shape if turned else basis.shape[::-1], len(x)
    share, parts = shares(-(-inner // tile.depth), tile.splits)
    low = x.new_empty(parts, tokens, rank)
    tiles_m, tiles_r = -(-tokens // tile.rows), -(-rank // tile.columns)
    box = [tile.depth, tile.columns] if turned else [tile.columns, tile.depth]
    seen = [
        described(x, x.shape, x.stride(), [tile.rows, tile.depth]),
        described(basis, basis.shape, basis.stride(), box),
    ]
    with torch.cuda.device_of(x):
        kernels.thin[(tiles_m * parts * tiles_r,)](
            *seen, low_seen(low, [1, tile.rows, tile.columns]), tiles_m, share, parts,
            BM=tile.rows, BR=tile.columns, BK=tile.depth, TURNED=turned,
            PRECISION=precision(x), **options(tile.warps, tile.stages),
        )  # fmt: skip
    return low


# ------------------------------------------------------------------------------------------------------------
# Operands and candidates
# ------------------------------------------------------------------------------------------------------------


@functools.cache
def processors(device: torch.device) -> int:
    """How many programs a GPU runs at a time, at least."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def shares(steps: int, splits: int) -> tuple[int, int]:
    """Steps of one part, and how many parts that makes; at least one each."""
    share = max(1, -(-steps // splits))
    return share, max(1, -(-steps // share))


def cell_sides(weight: Tensor, index: Tensor) -> tuple[int, int]:
    """h and w of a cell."""
    return weight.shape[1], weight.shape[2] // index.shape[1]


def pieces_seen(x: Float[Tensor, "M C"], grid: int, box: Sequence[int]) -> Any:
    """x as (B, M, w): one piece for each column of cells; beyond its end there is nothing."""
    width = x.shape[1] // grid
    return described(x, [grid, x.shape[0], width], [width, x.stride(0), 1], [1, *box])


def cells_seen(weight: Float[Tensor, "B h nw"], live: int, box: Sequence[int]) -> Any:
    """Stored cells as (B, n, h, w)."""
    grid, height, wide = weight.shape
    return described(weight, [grid, live, height, wide // live], [height * wide, wide // live, wide, 1], [1, 1, *box])


def low_seen(low: Float[Tensor, "*P M r"] | None, box: Sequence[int]) -> Any:
    """A thin product, or its parts."""
    return None if low is None else described(low, low.shape, low.stride(), box)


def fitting(tiles: Sequence[Tile], rows: int, columns: int, depth: int) -> list[Tile]:
    """The candidates, none wider or deeper than the problem; a larger one would only add zeros."""
    limits = (power_above(rows), power_above(columns), power_above(depth))
    cut = [tile._replace(rows=min(tile.rows, limits[0]), columns=min(tile.columns, limits[1])) for tile in tiles]
    whole = [tile for tile, old in zip(cut, tiles, strict=True) if tile[:2] == old[:2]]
    return list(dict.fromkeys(tile._replace(depth=min(tile.depth, limits[2])) for tile in whole or cut[:1]))


def _thin_tiles(x: Tensor, inner: int, rank: int) -> list[Tile]:
    """Torch's product, and the candidates cut to the rank, in so many parts that each has two steps."""
    own = THIN[x.element_size()]
    fit = dict.fromkeys(t._replace(columns=min(t.columns, power_above(rank))) for t in own)
    cut = [t._replace(splits=p) for t in fit for p in PARTS if p == 1 or 2 * p * t.depth <= inner]
    return [BY_TORCH, *cut]
