"""The product of kept blocks by torch's own matrix products: a linear map and both gradients, on any device.

Y = X W^T adds up x_j w^T for every kept block w, in row i and column j of blocks. Few tokens: all blocks in one batched
product of gathered inputs, then a sum by rows. Many: a product a block, added in place to a slice of Y, where BLAS
reads and writes the slices themselves; gathering would write every input once for every block of its column. dX is the
same walk with i and j exchanged, dW has a product a block. Blocks are added in one order: the same inputs give the same
bits. All products are written into given tensors: those are left alone by autocast, which would undo float32 sums. The
slow exact thing is `block_product(kernel="reference")`.

Shapes: M input vectors, R outputs, C inputs; N kept blocks of b x b, i rows and j columns of blocks.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

FEW = 32
"""Tokens up to which inputs are gathered. On one CPU thread (results/hardware/blocks-cpu.csv) a call one by one takes
0.95 to 3.4 times as long as gathered at 1 token; gathered takes 0.98 to 1.6 times as long as one by one at 64, 1.3 to
3.8 at 256, 1.3 to 6.7 at 1,024. torch's BSR takes 0.6 to 1.5, 1.0 to 3.4, 2.0 to 4.1 and 2.0 to 5.1 times as long as
the form that is taken."""


def batched_product(
    x: Float[Tensor, "M C"],
    values: Float[Tensor, "N b b"],
    rows: Int[Tensor, "N"],
    columns: Int[Tensor, "N"],
    outer: int,
) -> Float[Tensor, "M R"]:
    """x W^T, from the row and the column of blocks of every value; `outer` is R. Differentiable once.

    16 bits are multiplied and added in float32, and rounded at the end.
    """
    y: Any = _Batched.apply(x, values, rows, columns, outer)
    return y


class _Batched(torch.autograd.Function):
    """Backward is the same walk and a product a block."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, rows: Tensor, columns: Tensor, outer: int) -> Tensor:
        ctx.save_for_backward(x, values, rows, columns)
        return _multiply(_wide(x), _wide(values).transpose(1, 2), columns, rows, outer).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor):  # type: ignore[no-untyped-def]
        x, values, rows, columns = ctx.saved_tensors
        g, to_x, to_values = _wide(upstream), None, None
        if ctx.needs_input_grad[0]:
            to_x = _multiply(g, _wide(values), rows, columns, x.shape[1]).to(x.dtype)
        if ctx.needs_input_grad[1]:
            to_values = _sample(g, _wide(x), rows, columns, values.shape[1]).to(values.dtype)
        return to_x, to_values, None, None, None


def _wide(x: Tensor) -> Tensor:
    """In rows, float32 at least: added one after the other in 16 bits, every block would round once more."""
    return (x.float() if x.element_size() < 4 else x).contiguous()


def _multiply(x: Tensor, values: Tensor, source: Tensor, target: Tensor, outer: int) -> Tensor:
    """Add x_source w (N, b, b) to every target, both in blocks of columns."""
    b = values.shape[1]
    if _gathers(x):
        products = x.new_empty(len(values), b, len(x))  # (N, b, M)
        torch.bmm(values.transpose(1, 2), _cells(x, b)[source], out=products)
        sums = x.new_zeros(outer // b, b, len(x)).index_add_(0, target, products)
        return sums.permute(2, 0, 1).reshape(len(x), outer)
    y = x.new_zeros(len(x), outer)
    parts, sums = x.split(b, 1), y.split(b, 1)
    for s, t, value in zip(source.tolist(), target.tolist(), values.unbind(), strict=True):
        sums[t].addmm_(parts[s], value)
    return y


def _sample(g: Tensor, x: Tensor, rows: Tensor, columns: Tensor, b: int) -> Tensor:
    """dW at the kept blocks: g_i^T x_j."""
    grad, ups, parts = x.new_empty(len(rows), b, b), g.split(b, 1), x.split(b, 1)
    if _gathers(x):
        return torch.bmm(_cells(g, b)[rows], _cells(x, b)[columns].transpose(1, 2), out=grad)
    for i, j, one in zip(rows.tolist(), columns.tolist(), grad.unbind(), strict=True):
        torch.mm(ups[i].T, parts[j], out=one)
    return grad


def _gathers(x: Tensor) -> bool:
    """A GPU's index_add_ adds in any order, so that bits would not repeat."""
    return len(x) <= FEW and x.device.type == "cpu"


def _cells(x: Float[Tensor, "M C"], b: int) -> Float[Tensor, "j b M"]:
    return x.unflatten(1, (-1, b)).permute(1, 2, 0)
