"""Products of a pixelated butterfly: how results are cut, which candidates are tried, and the launches.

`multiply` makes Y = gamma X S^T + (1 - gamma) T U^T + bias with T = X V^T, or dX with dY U in T's place, in two
launches. T is thin: cuBLAS makes it, or an own kernel that the next one overlaps (programmatic dependent launch: it
sums its cells meanwhile), in parts that the next one adds. Which is fastest is tried for both launches together.

Letters as in cell_kernel.py; P parts.
"""

import functools
from collections.abc import Callable, Sequence
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
        Tile(128, 128, 128, 8, 3), Tile(64, 128, 128, 4, 3), Tile(64, 64, 128, 4, 3), Tile(64, 128, 64, 4, 3),
    ),
    4: (Tile(64, 64, 32, 4, 2), Tile(64, 64, 16, 4, 3)),
}  # fmt: skip
THIN = {  # candidates for T and dY U, beside torch's; as wide as the rank, but at most `columns`
    2: (
        Tile(16, 64, 256, 4, 3), Tile(32, 64, 128, 4, 4), Tile(64, 64, 128, 4, 3), Tile(128, 64, 64, 4, 4),
        Tile(64, 256, 64, 8, 3), Tile(128, 256, 64, 8, 3), Tile(16, 64, 128, 4, 4), Tile(32, 64, 64, 4, 4),
    ),
    4: (Tile(64, 64, 32, 4, 2),),
}  # fmt: skip
PARTS = (1, 2, 4)
"""Of a thin product: each is one more pass over the low rank for who reads it."""


def multiply(
    x: Float[Tensor, "M C"], weight: Float[Tensor, "B h nw"], first: Tensor | None, second: Tensor | None,
    gamma: Tensor | None, bias: Tensor | None, index: Int[Tensor, "B n"], turned: bool,
    tile: Tile | None = None, low_tile: Tile | None = None,
) -> tuple[Tensor, Float[Tensor, "M r"] | None]:  # fmt: skip
    """Y and T by V (r, C) and U (R, r), or `turned` dX and dY U by U and V: through the columns of cells."""
    (grid, live), (height, width) = index.shape, cell_sides(weight, index)
    inner, outer = (height, width) if turned else (width, height)
    rank = 0 if second is None else second.shape[0 if turned else 1]
    y = x.new_empty(len(x), grid * outer)
    if not len(x):
        return y, None if first is None else x.new_empty(0, rank)
    what = "pixelated input gradient" if turned else "pixelated product"
    key = (len(x), grid * outer, grid * inner, grid, live, rank)
    launch = functools.partial(_launch_multiply, x, weight, second, gamma, bias, index, y, turned)
    tiles = functools.partial(_product_tiles, x, outer, inner, rank)
    if first is None:
        launch(fastest(what, key, x, tiles, lambda tile: launch(tile, None)) if tile is None else tile, None)
        return y, None

    def both(tile: Tile, low_tile: Tile) -> Float[Tensor, "M r"]:
        low = _launch_thin(x, first, turned, low_tile)
        return launch(tile, low, early=low_tile != BY_TORCH)

    if tile is None or low_tile is None:
        pair = functools.partial(_fastest_pair, what, key, x, tiles, both, first.shape[0 if turned else 1])
        tile, low_tile = fastest(f"{what}, both tiles", key, x, lambda: [pair()], lambda found: both(*found))
    return y, both(tile, low_tile)


def _fastest_pair(
    what: str, key: tuple[int, ...], x: Tensor, tiles: Callable[[], list[Tile]], both: Callable[..., Any], inner: int
) -> tuple[Tile, Tile]:
    """The product's tile behind torch's thin product, the thin product's before that one, and the product's again.

    Kernels that overlap share processors: the fastest pair is not that of the fastest alone.
    """
    behind = fastest(f"{what}, behind torch's low rank", key, x, tiles, lambda tile: both(tile, BY_TORCH))
    thin_tiles = functools.partial(_thin_tiles, x, inner, key[-1])
    low_tile = fastest(f"{what}, its low rank", key, x, thin_tiles, lambda low_tile: both(behind, low_tile))
    return fastest(f"{what}, with its low rank", key, x, tiles, lambda tile: both(tile, low_tile)), low_tile


def low_product(x: Float[Tensor, "M C"], basis: Tensor, turned: bool) -> Float[Tensor, "M r"]:
    """x V^T for V (r, C), or `turned` x U for U (C, r), alone."""
    return x @ (basis if turned else basis.T)


def _launch_thin(x: Tensor, basis: Tensor, turned: bool, tile: Tile) -> Float[Tensor, "P M r"]:
    if tile == BY_TORCH:
        return low_product(x, basis, turned)[None]
    kernels = device_functions(ASKED, MODULE, x.device)
    inner, rank = basis.shape if turned else basis.shape[::-1]
    steps = -(-inner // tile.depth)
    share = -(-steps // tile.splits)
    parts = -(-steps // share)
    low = x.new_empty(parts, len(x), rank)
    tiles_m, tiles_r = -(-len(x) // tile.rows), -(-rank // tile.columns)
    basis_seen = described(
        basis, basis.shape, basis.stride(), [tile.depth, tile.columns] if turned else [tile.columns, tile.depth]
    )
    with torch.cuda.device_of(x):
        kernels.thin[(tiles_m * parts * tiles_r,)](
            described(x, x.shape, x.stride(), [tile.rows, tile.depth]), basis_seen,
            described(low, low.shape, low.stride(), [1, *tile[:2]]), tiles_m, parts, share,
            BM=tile.rows, BR=tile.columns, BK=tile.depth, TURNED=turned, EARLY=overlaps(x.device),
            PRECISION=precision(x), **options(tile.warps, tile.stages),
        )  # fmt: skip
    return low


def _launch_multiply(
    x: Tensor, weight: Tensor, basis: Tensor | None, gamma: Tensor | None, bias: Tensor | None, index: Tensor,
    y: Tensor, turned: bool, tile: Tile, low: Tensor | None, early: bool = False,
) -> Any:  # fmt: skip
    """The thin product, its parts added. `early`: it was just launched, and lets this kernel begin before it ends."""
    kernels = device_functions(ASKED, MODULE, x.device)
    (grid, live), (height, width), tokens = index.shape, cell_sides(weight, index), len(x)
    inner, outer = (height, width) if turned else (width, height)
    flat = [tile.depth, tile.columns] if turned else [tile.columns, tile.depth]
    parts, rank, whole, low_seen, basis_seen = 0, 0, None, None, None
    if low is not None and basis is not None:
        parts, rank = len(low), low.shape[2]
        whole = low[0] if parts == 1 else torch.empty_like(low[0])
        low_seen = described(low, low.shape, low.stride(), [1, tile.rows, tile.depth])
        seen = [grid, rank, outer] if turned else [grid, outer, rank]
        basis_seen = described(basis, seen, [outer, grid * outer, 1] if turned else [outer * rank, rank, 1], [1, *flat])
    tiles_m, tiles_n = -(-tokens // tile.rows), -(-outer // tile.columns)
    programs = tiles_m * grid * tiles_n
    if tile.persistent:
        programs = min(programs, tile.persistent * processors(x.device))
    with torch.cuda.device_of(x):
        kernels.multiply[(programs,)](
            pieces_seen(x, grid, [tile.rows, tile.depth]), cells_seen(weight, live, flat), low_seen, basis_seen,
            thin_seen(whole, [tile.rows, tile.depth]) if parts > 1 else None,
            pieces_seen(y, grid, [tile.rows, tile.columns]), bias, gamma, index,
            tiles_m, grid, tiles_n, outer, live, -(-inner // tile.depth), -(-rank // tile.depth), parts, tile.band,
            BM=tile.rows, BN=tile.columns, BK=tile.depth, TURNED=turned, PERSISTENT=tile.persistent > 0,
            EARLY=overlaps(x.device), PRECISION=precision(x),
            **options(tile.warps, tile.stages), **launched(x.device, early),
        )  # fmt: skip
    return whole


# ------------------------------------------------------------------------------------------------------------
# Operands and candidates
# ------------------------------------------------------------------------------------------------------------


@functools.cache
def processors(device: torch.device) -> int:
    """How many programs a GPU runs at a time, at least."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether a kernel may begin before the one before it ends: Hopper and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launched(device: torch.device, early: bool) -> dict[str, bool]:
    """The launch option that lets it. Only right behind a kernel whose own inputs were complete when it began."""
    return {"launch_pdl": True} if early and overlaps(device) else {}


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


def thin_seen(low: Float[Tensor, "M r"] | None, box: Sequence[int]) -> Any:
    """A thin product."""
    return None if low is None else described(low, low.shape, low.stride(), box)


def fitting(tiles: Sequence[Tile], rows: int, columns: int, depth: int) -> list[Tile]:
    """The candidates, none wider or deeper than the problem; a larger one would only add zeros."""
    limits = (power_above(rows), power_above(columns), power_above(depth))
    cut = [tile._replace(rows=min(tile.rows, limits[0]), columns=min(tile.columns, limits[1])) for tile in tiles]
    whole = [tile for tile, old in zip(cut, tiles, strict=True) if tile[:2] == old[:2]]
    return list(dict.fromkeys(tile._replace(depth=min(tile.depth, limits[2])) for tile in whole or cut[:1]))


def _product_tiles(x: Tensor, outer: int, inner: int, rank: int) -> list[Tile]:
    """The candidates that fit; with a low rank a program a tile, for only its first tile could overlap."""
    found = fitting(PRODUCTS[x.element_size()], len(x), outer, inner)
    return [tile for tile in found if not (rank and tile.persistent)]


def _thin_tiles(x: Tensor, inner: int, rank: int) -> list[Tile]:
    """Torch's product and the candidates cut to the problem, each in several parts while a part has two steps."""
    wide, tall = power_above(rank), power_above(len(x))
    own = THIN[x.element_size()]
    fit = dict.fromkeys(t._replace(columns=min(t.columns, wide), rows=min(t.rows, tall)) for t in own)
    return [BY_TORCH, *(t._replace(splits=p) for t in fit for p in PARTS if p == 1 or 2 * p * t.depth <= inner)]
