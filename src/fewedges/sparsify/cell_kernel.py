"""The pixelated butterfly in one kernel: a grouped GEMM over its large cells, low rank, gamma and bias included.

    Y = gamma X S^T + (1 - gamma) T U^T + bias,   T = X V^T
    dX = gamma dY S + (1 - gamma) (dY U) V,       dS = gamma dY^T X at the live cells

A row of cells of S is a dense (h, n w) matrix over n gathered pieces of X, so a tile of Y walks over the pieces of X
where they lie (nothing is gathered) and then over T, into one accumulator; dX is the same walk through the columns of
cells. One launch makes dS, dU, dV and the gradients of gamma and bias. No atomics: one tile, one program; what is cut
over the tokens is added in float32 by a last small launch. So a step is six launches, two forward and four back.

What an H100 could do: 4096 -> 11008, M = 8192, grid 16, 1 factor, rank 192 (density .195): 92 GFLOP of cells, 35 up
and 13 down, of 739 dense. 264 MB move, .09 ms at 3 TB/s; dense takes 1.0 ms at 734 TF/s. A (128, 256) tile asks
the L2 for 87 FLOP a byte and has 11 steps of 64; cells of 688 rows fill 2.7 tiles of 256, so 12 % more is
multiplied. At 500 TF/s of that: .28 ms, and .04 for T: 3.2 times dense. GPT-2 medium (1024 -> 4096, grid 16, 1
factor, rank 64): 3 steps a tile, 101 MB: memory decides, .035 to .05 ms against .099.

Shapes: M input vectors, R outputs, C inputs; B cells along a side, n live ones in a row, h x w a cell; r rank.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from fewedges.errors import ModelError
from fewedges.sparsify.cell_gradients import Given, Wanted, parameter_gradients
from fewedges.sparsify.cell_products import ASKED, Tiles, low_product, multiply
from fewedges.sparsify.launching import aligned, packed, untraced

HINT = "kernel='reference'"


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
    """Two launches forward, four backward; one and three without a low rank."""

    @staticmethod
    def forward(ctx: Any, x, weight, up, down, gamma, bias, columns, sources, tiles) -> Tensor:  # type: ignore[no-untyped-def]
        x, weight, up, down = aligned(x), packed(weight), _packed(up), _packed(down)
        given = (x, weight, down, up, gamma, bias, columns, False)
        y, low = multiply(*given, *((tiles.forward, tiles.low) if tiles else ()))
        ctx.save_for_backward(x, weight, up, down, gamma, low, columns, sources)
        ctx.tiles = tiles
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor):  # type: ignore[no-untyped-def]
        x, weight, up, down, gamma, low, columns, sources = ctx.saved_tensors
        tiles, g, wanted = ctx.tiles, aligned(upstream), Wanted(*ctx.needs_input_grad[1:6])
        to_x = back = None
        if ctx.needs_input_grad[0]:
            given = (g, weight, up, down, gamma, None, sources, True)
            to_x, back = multiply(*given, *((tiles.input_grad, tiles.low_grad) if tiles else ()))
        elif up is not None and wanted.down:
            back = low_product(g, up, True)  # (M, r); without its factor 1 - gamma
        given = Given(g, x, weight, up, gamma, low, back, columns)
        found = parameter_gradients(given, wanted, tiles and tiles.weight_grad, ctx.needs_input_grad[0])
        return to_x, *found, None, None, None


def _packed(x: Tensor | None) -> Tensor | None:
    return None if x is None else packed(x)
