"""A linear map of kept b x b blocks: Y = X W^T and both gradients, any block pattern, b = 32, 64 or 128.

Values are (blocks, b, b), row after row of blocks, found by compressed rows. dX = dY W is the same walk through the
compressed columns; dW = dY^T X only at the kept blocks. A program owns a tile of tokens and one row of blocks and
walks along its kept blocks. No atomics: the same inputs give the same bits.

What an H100 could do: a (256 tokens, b) tile asks the L2 for 2 * 256 b / (2 (256 + b)) FLOP a byte: 28, 51 and 85
for b = 32, 64 and 128. Triton's dense products, at 85 and some 600 TF/s, draw 7 TB/s from it; so the limits are near
200, 370 and 600 TF/s, at density .25 against dense at 734: 1.1, 2.0 and 3.3 times. dW shares what it reads of dY
between the kept blocks of a row, four of b = 64 or two of 128: again 51 and 85 FLOP a byte. wgmma also reads its
operands from shared memory: m64n64 needs 128 bytes a clock for them alone, all there is; with tokens as its N
(`swap`), m64n256, it is 80.

Shapes: M input vectors, R outputs, C inputs; N kept blocks, i rows and j columns of blocks.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from fewedges.errors import ModelError, RecipeError
from fewedges.sparsify.block_batched import batched_product
from fewedges.sparsify.launching import (
    aligned,
    choose_kernel,
    described,
    device_functions,
    fastest,
    options,
    packed,
    power_above,
    precision,
    untraced,
)
from fewedges.sparsify.pattern import Pattern

BlockKernel = Literal["reference", "batched", "triton"]
ASKED = "a product of kept blocks"
KERNELS: tuple[BlockKernel, ...] = get_args(BlockKernel)
BLOCKS = (32, 64, 128)
SHARING = (1, 2, 4)
"""How many kept blocks of a row a program of dW may hold."""


class BlockTile(NamedTuple):
    """How a kernel cuts Y and dX: tokens a tile, columns of a block a step."""

    rows: int
    depth: int
    warps: int
    stages: int
    swap: bool = False
    """Accumulate the tile transposed: needs b >= 64."""
    band: int = 1
    """Token tiles that share what is read of the values, before the next ones."""


class SampleTile(NamedTuple):
    """How a kernel cuts dW: kept blocks a program, tokens a step."""

    blocks: int
    depth: int
    warps: int
    stages: int


class BlockTiles(NamedTuple):
    """The three kernels of one training step."""

    forward: BlockTile
    input_grad: BlockTile
    weight_grad: SampleTile


PRODUCTS = {  # (b, bytes a number): candidates for Y and dX
    (32, 2): (BlockTile(256, 32, 4, 6), BlockTile(256, 32, 8, 6), BlockTile(128, 32, 4, 6)),
    (64, 2): (
        BlockTile(256, 64, 4, 2, True), BlockTile(256, 64, 8, 4, True), BlockTile(256, 64, 8, 4),
        BlockTile(128, 64, 4, 4), BlockTile(512, 64, 8, 3, True), BlockTile(256, 64, 4, 2, True, band=4),
    ),
    (128, 2): (
        BlockTile(256, 64, 8, 4, True), BlockTile(256, 64, 8, 4), BlockTile(256, 128, 8, 2, True),
        BlockTile(128, 64, 4, 3, True), BlockTile(256, 64, 8, 3, True, band=4),
    ),
    (32, 4): (BlockTile(64, 32, 4, 2),),
    (64, 4): (BlockTile(64, 32, 4, 2),),
    (128, 4): (BlockTile(64, 32, 8, 2),),
}  # fmt: skip
GRADIENTS = {  # candidates for dW
    (32, 2): (SampleTile(4, 64, 4, 4), SampleTile(2, 128, 4, 3), SampleTile(4, 128, 4, 3)),
    (64, 2): (SampleTile(4, 64, 4, 3), SampleTile(2, 64, 4, 4), SampleTile(4, 64, 4, 2), SampleTile(2, 128, 4, 2)),
    (128, 2): (SampleTile(2, 64, 8, 4), SampleTile(2, 64, 8, 3), SampleTile(1, 64, 4, 3)),
    (32, 4): (SampleTile(1, 32, 4, 2),),
    (64, 4): (SampleTile(1, 32, 4, 2),),
    (128, 4): (SampleTile(1, 16, 8, 2),),
}


@dataclass(frozen=True, eq=False)
class BlockIndex:
    """Where the kept blocks of an R x C matrix lie: compressed rows, and the same by columns."""

    shape: tuple[int, int]
    block: int
    start: Int[Tensor, "i_and_1"] = field(repr=False)
    columns: Int[Tensor, "N"] = field(repr=False)
    """Column of blocks of every value."""
    rows: Int[Tensor, "N"] = field(repr=False)
    """Row of blocks of every value."""
    turned_start: Int[Tensor, "j_and_1"] = field(repr=False)
    turned_rows: Int[Tensor, "N"] = field(repr=False)
    """Column after column, the row of blocks of every value."""
    places: Int[Tensor, "N"] = field(repr=False)
    """Column after column, where its values are."""
    jobs: dict[int, tuple[Tensor, Tensor]] = field(repr=False)
    """For 1, 2 and 4 blocks a program: its row of blocks, and the first of its values."""

    @property
    def blocks(self) -> int:
        """Number of kept blocks."""
        return len(self.columns)

    @property
    def density(self) -> float:
        """Fraction of the matrix in kept blocks."""
        return self.blocks * self.block**2 / (self.shape[0] * self.shape[1])

    def to(self, device: torch.device | str) -> "BlockIndex":
        """The same on another device."""
        names = ("start", "columns", "rows", "turned_start", "turned_rows", "places")
        jobs = {n: (rows.to(device), firsts.to(device)) for n, (rows, firsts) in self.jobs.items()}
        return replace(self, jobs=jobs, **{name: getattr(self, name).to(device) for name in names})


def index_blocks(pattern: Pattern, block: int) -> BlockIndex:
    """Find the b x b blocks that a pattern touches. Raises RecipeError where they do not tile the matrix."""
    rows, columns = pattern.shape[-2:]
    if len(pattern.shape) != 2 or rows % block or columns % block or block not in BLOCKS:
        found = f"a pattern {pattern.shape}"
        raise RecipeError(f"index its blocks of {block}", found, f"one matrix, whole blocks, b one of {BLOCKS}")
    layout = pattern.layout(block).cpu()
    at, to = layout.nonzero(as_tuple=True)
    order = to.argsort(stable=True)  # column after column, rows rising
    start, turned = (torch.cat([n.new_zeros(1), n.cumsum(0)]) for n in (layout.sum(1), layout.sum(0)))
    jobs = {n: _jobs(start, n) for n in SHARING}
    placed = (start.int(), to.int(), at.int(), turned.int(), at[order].int(), order.int())
    return BlockIndex((rows, columns), block, *placed, jobs)


def _jobs(start: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Cut every row of kept blocks into programs of so many."""
    counts = -(-start.diff() // blocks)
    rows = torch.arange(len(counts)).repeat_interleave(counts)
    within = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    return rows.int(), (start[rows] + within * blocks).int()


def gather_blocks(weight: Float[Tensor, "R C"], index: BlockIndex) -> Float[Tensor, "N b b"]:
    """The values of a dense matrix at the kept blocks."""
    b = index.block
    cells = weight.unflatten(0, (-1, b)).unflatten(-1, (-1, b)).transpose(1, 2)  # (i, j, b, b)
    return cells[index.rows, index.columns]


def scatter_blocks(values: Float[Tensor, "N b b"], index: BlockIndex) -> Float[Tensor, "R C"]:
    """The dense matrix with its zeros; differentiable."""
    b = index.block
    cells = values.new_zeros(index.shape[0] // b, index.shape[1] // b, b, b)
    return cells.index_put((index.rows, index.columns), values).transpose(1, 2).reshape(index.shape)


def block_product(
    x: Float[Tensor, "*batch C"],
    values: Float[Tensor, "N b b"],
    index: BlockIndex,
    *,
    kernel: BlockKernel = "reference",
    tiles: BlockTiles | None = None,
) -> Float[Tensor, "*batch R"]:
    """x W^T. `reference` writes the dense matrix out and multiplies by it: the slow oracle, any device.

    `batched` multiplies kept blocks alone by torch's products: any device, made for a CPU. `triton` is the kernel of
    this file: a GPU. These two are differentiable once, and under torch.compile a break in the graph. Without `tiles`
    (triton) the fastest are found at the first call. Raises ModelError for shapes, dtypes and devices the kernel does
    not know.
    """
    _check(x, values, index)
    if choose_kernel(kernel, KERNELS) == "reference":
        return torch.nn.functional.linear(x, scatter_blocks(values, index))
    rows = x.reshape(-1, x.shape[-1])
    if kernel == "batched":
        y = untraced(_batched, rows, values, index)
    else:
        y = untraced(_BlockProduct.apply, rows, values, index, tiles)
    return y.view(*x.shape[:-1], y.shape[1])


def _batched(x: Tensor, values: Tensor, index: BlockIndex) -> Tensor:
    return batched_product(x, values, index.rows, index.columns, index.shape[0])


def _check(x: Tensor, values: Tensor, index: BlockIndex) -> None:
    if x.shape[-1] != index.shape[1] or values.shape != (index.blocks, index.block, index.block):
        found = f"inputs {tuple(x.shape)} and values {tuple(values.shape)}"
        raise ModelError(ASKED, found, f"inputs of {index.shape[1]}, and {index.blocks} blocks of {index.block}")
    if x.dtype != values.dtype or not x.device == values.device == index.start.device:
        found = f"{x.dtype} on {x.device}, {values.dtype} on {values.device}, the index on {index.start.device}"
        raise ModelError(ASKED, found, "one dtype and one device; index.to(device)")


class _BlockProduct(torch.autograd.Function):
    """One launch forward, two backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, index: BlockIndex, tiles: BlockTiles | None) -> Tensor:
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ModelError(ASKED, f"dtype {x.dtype}", "float32, bfloat16 or float16, or kernel='batched'")
        x, values = aligned(x), packed(values)
        ctx.save_for_backward(x, values)
        ctx.index, ctx.tiles = index, tiles
        return _multiply(x, values, index, False, tiles and tiles.forward)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor):  # type: ignore[no-untyped-def]
        (x, values), index, tiles = ctx.saved_tensors, ctx.index, ctx.tiles
        g, to_x, to_values = aligned(upstream), None, None
        if ctx.needs_input_grad[0]:
            to_x = _multiply(g, values, index, True, tiles and tiles.input_grad)
        if ctx.needs_input_grad[1]:
            to_values = _sample(g, x, index, tiles and tiles.weight_grad)
        return to_x, to_values, None, None


def _multiply(x: Tensor, values: Tensor, index: BlockIndex, turned: bool, tile: BlockTile | None) -> Tensor:
    """Y, or dX through the columns (`turned`)."""
    outer, inner = index.shape[::-1] if turned else index.shape
    y = x.new_empty(len(x), outer)
    if not len(x) or not index.blocks:
        return y.zero_()
    launch = functools.partial(_launch_product, x, values, index, y, turned)
    if tile is None:
        what = "block input gradient" if turned else "block product"
        tiles = functools.partial(_fitting, PRODUCTS[index.block, x.element_size()], len(x))
        tile = fastest(what, (len(x), outer, inner, index.block, index.blocks), x, tiles, launch)
    launch(tile)
    return y


def _fitting(tiles: Sequence[BlockTile], tokens: int) -> list[BlockTile]:
    """The candidates, those with more rows than there are tokens cut to them."""
    return list(dict.fromkeys(tile._replace(rows=min(tile.rows, power_above(tokens))) for tile in tiles))


def _launch_product(x: Tensor, values: Tensor, index: BlockIndex, y: Tensor, turned: bool, tile: BlockTile) -> None:
    kernels, b = device_functions(ASKED, "block_device", x.device, "batched"), index.block
    start, columns = (index.turned_start, index.turned_rows) if turned else (index.start, index.columns)
    tiles_m, box = -(-len(x) // tile.rows), [tile.depth, b] if turned else [b, tile.depth]
    with torch.cuda.device_of(x):
        kernels.multiply[(tiles_m * (len(start) - 1),)](
            _matrix(x, [tile.rows, tile.depth]), _matrix(values.flatten(0, 1), box), _matrix(y, [tile.rows, b]),
            start, columns, index.places, tiles_m, len(start) - 1, index.blocks, x.shape[1] // b, tile.band,
            B=b, BM=tile.rows, BK=tile.depth, TURNED=turned, SWAP=tile.swap, PRECISION=precision(x),
            **options(tile.warps, tile.stages),
        )  # fmt: skip


def _sample(g: Tensor, x: Tensor, index: BlockIndex, tile: SampleTile | None) -> Tensor:
    """dW at the kept blocks."""
    grad = x.new_empty(index.blocks, index.block, index.block)
    if not len(x) or not index.blocks:
        return grad.zero_()
    launch = functools.partial(_launch_sample, g, x, index, grad)
    if tile is None:
        shape = (len(x), *index.shape, index.block, index.blocks)
        tiles = GRADIENTS[index.block, x.element_size()]
        tile = fastest("block weight gradient", shape, x, lambda: tiles, launch)
    launch(tile)
    return grad


def _launch_sample(g: Tensor, x: Tensor, index: BlockIndex, grad: Tensor, tile: SampleTile) -> None:
    kernels, b = device_functions(ASKED, "block_device", x.device, "batched"), index.block
    rows, firsts = index.jobs[tile.blocks]
    with torch.cuda.device_of(x):
        kernels.sample[(len(rows),)](
            _matrix(g, [tile.depth, b]), _matrix(x, [tile.depth, b]), _matrix(grad.flatten(0, 1), [b, b]),
            index.start, index.columns, rows, firsts, len(x), index.blocks, x.shape[1] // b,
            B=b, BK=tile.depth, GROUP=tile.blocks, PRECISION=precision(x), **options(tile.warps, tile.stages),
        )  # fmt: skip


def _matrix(x: Float[Tensor, "rows columns"], box: list[int]) -> Any:
    return described(x, x.shape, x.stride(), box)
