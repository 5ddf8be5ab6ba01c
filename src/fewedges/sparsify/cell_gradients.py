"""Gradients of all parameters of a pixelated butterfly in one launch; a second one adds what was cut over the tokens.

    dS = gamma dY^T X at the live cells      dU = (1 - gamma) dY^T T      dV = (1 - gamma) (dY U)^T X
    dgamma = <dY^T X, S> - <dY^T T, U>       dbias = sums of dY's columns

They read the same two large tensors, so they are made side by side from the same tokens, and land side by side in one
buffer. Letters as in cell_kernel.py; K parts into which the tokens are cut, N gradients.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewedges.sparsify.cell_products import (
    ASKED,
    MODULE,
    Tile,
    cell_sides,
    cells_seen,
    fitting,
    launched,
    overlaps,
    pieces_seen,
    processors,
    thin_seen,
)
from fewedges.sparsify.launching import described, device_functions, fastest, options, power_above, precision

BLOCK = 1024
"""Numbers that one program adds at the end."""

GRADIENTS = {  # bytes a number: candidates
    2: (
        Tile(128, 256, 64, 8, 3), Tile(256, 128, 64, 8, 3), Tile(128, 128, 64, 4, 3), Tile(64, 256, 64, 4, 3),
        Tile(128, 64, 64, 4, 4), Tile(64, 64, 128, 4, 3), Tile(64, 64, 64, 4, 4), Tile(64, 64, 64, 4, 3),
    ),
    4: (Tile(64, 64, 32, 4, 2),),
}  # fmt: skip


class Wanted(NamedTuple):
    """Whose gradients are asked for."""

    weight: bool
    up: bool
    down: bool
    gamma: bool
    bias: bool


class Gradients(NamedTuple):
    """In the shapes of the parameters; None where not asked for."""

    weight: Tensor | None = None
    up: Tensor | None = None
    down: Tensor | None = None
    gamma: Tensor | None = None
    bias: Tensor | None = None


class Given(NamedTuple):
    """What gradients are made of."""

    g: Float[Tensor, "M R"]
    x: Float[Tensor, "M C"]
    weight: Float[Tensor, "B h nw"]
    up: Float[Tensor, "R r"] | None
    gamma: Float[Tensor, ""] | None
    low: Float[Tensor, "M r"] | None
    """T."""
    back: Float[Tensor, "M r"] | None
    """dY U; None where dV is not wanted."""
    index: Int[Tensor, "B n"]


class _Sums(NamedTuple):
    """All gradients in one buffer, their parts in another, and where each lies."""

    grads: Float[Tensor, "N"]
    parts: Float[Tensor, "K N"]
    """float32, or `grads` itself where there is one part."""
    weight: slice | None
    up: slice | None
    down: slice | None
    bias: slice | None


def parameter_gradients(given: Given, wanted: Wanted, tile: Tile | None = None, early: bool = False) -> Gradients:
    """Those that are wanted. Gamma's asks for the sums behind dS and dU too.

    `early`: `multiply` was launched just before, and lets this begin before it ends.
    """
    if not any(wanted):
        return Gradients()
    if not len(given.x):
        sums = _laid(given, wanted, 1)
        return _shaped(sums._replace(grads=sums.grads.zero_()), given, wanted, given.x.new_zeros(1))
    launch = functools.partial(_launch, given, wanted)
    if tile is None:
        (grid, live), (height, width) = given.index.shape, cell_sides(given.weight, given.index)
        rank = 0 if given.up is None else given.up.shape[1]
        shape = (len(given.x), grid * height, grid * width, grid, live, rank, *map(int, wanted))
        tiles = functools.partial(_tiles, given.x, (height, width), given.index)
        tile = fastest("pixelated gradients", shape, given.x, tiles, launch)
    return launch(tile, early)


def _launch(given: Given, wanted: Wanted, tile: Tile, early: bool = False) -> Gradients:
    kernels, g, x = device_functions(ASKED, MODULE, given.x.device), given.g, given.x
    (grid, live), (height, width) = given.index.shape, cell_sides(given.weight, given.index)
    rank, box = 1 if given.up is None else given.up.shape[1], tile[:2]
    wide_u, wide_d = (min(power_above(rank), side) for side in (tile.columns, tile.rows))
    tiles_h, tiles_w, tiles_u, tiles_d = (
        -(-height // box[0]),
        -(-width // box[1]),
        -(-rank // wide_u),
        -(-rank // wide_d),
    )
    steps = -(-len(x) // tile.depth)
    share = -(-steps // tile.splits)
    splits = -(-steps // share)
    sums = _laid(given, wanted, splits)
    dotted = grid * tiles_h * (live * tiles_w * bool(sums.weight) + tiles_u * bool(sums.up))
    others = grid * (tiles_w * tiles_d * bool(sums.down) + tiles_h * bool(sums.bias))
    dots = x.new_empty(splits * dotted, dtype=torch.float32) if wanted.gamma else None
    s_shape, s_strides = [grid, live, height, width], [height * live * width, width, live * width]
    u_shape, u_strides, u_box = [grid, height, rank], [height * rank, rank], [1, box[0], wide_u]
    with torch.cuda.device_of(x):
        kernels.sample[(splits * (dotted + others),)](
            pieces_seen(g, grid, [tile.depth, box[0]]), pieces_seen(x, grid, [tile.depth, box[1]]),
            cells_seen(given.weight, live, box) if wanted.gamma else None,
            described(given.up, u_shape, [*u_strides, 1], u_box) if wanted.gamma and given.up is not None else None,
            thin_seen(given.low, [tile.depth, wide_u]) if sums.up else None,
            thin_seen(given.back, [tile.depth, wide_d]) if sums.down else None, given.gamma, given.index,
            _seen(sums, sums.weight, s_shape, s_strides, [1, 1, *box]), _seen(sums, sums.up, u_shape, u_strides, u_box),
            _seen(sums, sums.down, [rank, grid, width], [grid * width, width], [wide_d, 1, box[1]]),
            sums.parts[0, sums.bias] if sums.bias else None, dots,
            grid, height, live, tiles_h, tiles_w, tiles_u, tiles_d, share * tile.depth, sums.parts.shape[1],
            BH=box[0], BW=box[1], BK=tile.depth, BU=wide_u, BD=wide_d, EARLY=overlaps(x.device),
            PRECISION=precision(x), **options(tile.warps, tile.stages), **launched(x.device, early),
        )  # fmt: skip
    total = None if dots is None else dots.new_empty(1)
    if splits > 1 or dots is not None:
        _finish(sums.parts if splits > 1 else None, sums.grads, dots, total)
    return _shaped(sums, given, wanted, total)


def _laid(given: Given, wanted: Wanted, splits: int) -> _Sums:
    """Room for what is wanted, dS first, then dU, dV and the bias's."""
    outputs, rank = given.g.shape[1], 0 if given.up is None else given.up.shape[1]
    sizes = (
        given.weight.numel() * (wanted.weight or wanted.gamma),
        outputs * rank * (wanted.up or wanted.gamma),
        given.x.shape[1] * rank * wanted.down,
        outputs * wanted.bias,
    )
    ends = list(itertools.accumulate(sizes))
    places = [slice(end - size, end) if size else None for size, end in zip(sizes, ends, strict=True)]
    grads = given.x.new_empty(ends[-1])
    return _Sums(grads, grads[None] if splits == 1 else grads.new_empty(splits, ends[-1], dtype=torch.float32), *places)


def _seen(sums: _Sums, place: slice | None, shape: Sequence[int], strides: Sequence[int], box: Sequence[int]) -> Any:
    """The parts of one gradient, one after the other."""
    if place is None:
        return None
    splits, total = sums.parts.shape
    return described(sums.parts.view(-1)[place.start :], [splits, *shape], [total, *strides, 1], [1, *box])


def _finish(parts: Tensor | None, whole: Tensor, dots: Tensor | None, total: Tensor | None) -> None:
    """Parts added into `whole`, dots into `total`."""
    kernels, numbers = device_functions(ASKED, MODULE, whole.device), whole.numel()
    with torch.cuda.device_of(whole):
        kernels.finish[(1 if parts is None else -(-numbers // BLOCK),)](
            parts, whole, dots, total, 0 if parts is None else len(parts), numbers, 0 if dots is None else dots.numel(),
            BLOCK=BLOCK,
        )  # fmt: skip


def _shaped(sums: _Sums, given: Given, wanted: Wanted, total: Tensor | None) -> Gradients:
    """Views of the buffer in the shapes of the parameters."""

    def view(ask: bool, place: slice | None, *shape: int) -> Tensor | None:
        return sums.grads[place].view(shape) if ask and place is not None else None

    rank = 0 if given.up is None else given.up.shape[1]
    return Gradients(
        view(wanted.weight, sums.weight, *given.weight.shape),
        view(wanted.up, sums.up, -1, rank),
        view(wanted.down, sums.down, rank, given.x.shape[1]),
        total.to(given.gamma.dtype)[0] if wanted.gamma and total is not None and given.gamma is not None else None,
        view(wanted.bias, sums.bias, -1),
    )


def _tiles(x: Tensor, cell: tuple[int, int], index: Tensor) -> list[Tile]:
    """The candidates that fit, each with its tokens cut in several ways."""
    whole = fitting(GRADIENTS[x.element_size()], *cell, len(x))
    return [cut for tile in whole for cut in _cuts(tile, cell, index)]


def _cuts(tile: Tile, cell: tuple[int, int], index: Tensor) -> list[Tile]:
    """The tile with its tokens cut so that there is work for all processors, half of that and twice."""
    count = processors(index.device)
    programs = index.numel() * -(-cell[0] // tile.rows) * -(-cell[1] // tile.columns)
    once = min(16, 1 << (count // programs).bit_length())
    cuts = {max(1, once // 2), once, min(16, 2 * once)}
    return [tile._replace(splits=cut) for cut in sorted(cuts)]
