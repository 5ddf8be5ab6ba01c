"""What runs on the GPU for matrices of kept blocks: the device functions of block_kernel.py.

Values are (blocks * b, b), row after row of blocks. Tensor descriptors (TMA) fetch whole tiles and give zeros
beyond an edge: a step that has run out of kept blocks fetches from beyond both operands.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false
# (Triton declares the compile-time numbers that callers pass as plain ones.)

import triton
import triton.language as tl

COUNTS = "tiles_m rows blocks beyond band tokens".split()
"""Plain numbers: a kernel of its own for every count that is 1, or divided by 16, would be compiled for nothing."""


@triton.jit
def _product(x, w, acc, SWAP: tl.constexpr, PRECISION: tl.constexpr):
    """acc + x w, for (b, rows) accumulators as (w^T x^T)^T: the wide side of a tile belongs in wgmma's N."""
    if SWAP:
        acc = tl.dot(tl.trans(w), tl.trans(x), acc, input_precision=PRECISION)
    else:
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _entry(Columns, Places, here, stop, beyond, blocks, TURNED: tl.constexpr):
    """Column of a kept block and its place in the values; beyond the end of both where the row has no more."""
    column = tl.load(Columns + here, mask=here < stop, other=beyond)
    if TURNED:  # noqa: SIM108  (Triton chooses at compile time between statements alone)
        place = tl.load(Places + here, mask=here < stop, other=blocks)
    else:
        place = tl.where(here < stop, here, blocks)
    return column, place


@triton.jit(do_not_specialize=COUNTS)
def multiply(
    X, Values, Y, Start, Columns, Places, tiles_m, rows, blocks, beyond, band,
    B: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TURNED: tl.constexpr, SWAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BM tokens of one row of blocks: Y[:, i] = sum over its kept blocks of X[:, column] block^T, BK columns a step.

    TURNED: of the gradient, the blocks of a column without transposing, found through `Places`. `beyond`: a column
    of blocks past the end. The index is read a step ahead, and the loop runs once where a row is empty: see
    cell_device.py.
    """
    program = tl.program_id(0)
    first = program // (band * rows) * band
    tall = tl.minimum(tiles_m - first, band)
    m, row = (first + program % (band * rows) % tall) * BM, program % (band * rows) // tall
    start, stop = tl.load(Start + row), tl.load(Start + row + 1)
    if SWAP:  # noqa: SIM108
        acc = tl.full((B, BM), 0.0, tl.float32)
    else:
        acc = tl.full((BM, B), 0.0, tl.float32)
    column, place = _entry(Columns, Places, start, stop, beyond, blocks, TURNED)
    for step in range(tl.maximum((stop - start) * (B // BK), 1)):
        k = step % (B // BK) * BK
        x = X.load([m, column * B + k])
        if TURNED:  # noqa: SIM108
            w = Values.load([place * B + k, 0])
        else:
            w = tl.trans(Values.load([place * B, k]))
        acc = _product(x, w, acc, SWAP, PRECISION)
        column, place = _entry(Columns, Places, start + (step + 1) // (B // BK), stop, beyond, blocks, TURNED)
    if SWAP:
        Y.store([m, row * B], tl.trans(acc).to(Y.dtype))
    else:
        Y.store([m, row * B], acc.to(Y.dtype))


@triton.jit(do_not_specialize=COUNTS)
def sample(
    G, X, Grad, Start, Columns, JobRows, JobFirsts, tokens, blocks, beyond,
    B: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """G^T X at up to four kept blocks of one row, which share what is read of G: the gradient of the values."""
    row, first = tl.load(JobRows + tl.program_id(0)), tl.load(JobFirsts + tl.program_id(0))
    stop = tl.load(Start + row + 1)
    column0, place0 = _entry(Columns, Columns, first, stop, beyond, blocks, False)
    column1, place1 = _entry(Columns, Columns, first + 1, stop, beyond, blocks, False)
    column2, place2 = _entry(Columns, Columns, first + 2, stop, beyond, blocks, False)
    column3, place3 = _entry(Columns, Columns, first + 3, stop, beyond, blocks, False)
    acc0 = tl.full((B, B), 0.0, tl.float32)
    acc1, acc2, acc3 = acc0, acc0, acc0
    for token in range(0, tokens, BK):
        g = tl.trans(G.load([token, row * B]))
        acc0 = tl.dot(g, X.load([token, column0 * B]), acc0, input_precision=PRECISION)
        if GROUP > 1:
            acc1 = tl.dot(g, X.load([token, column1 * B]), acc1, input_precision=PRECISION)
        if GROUP > 2:
            acc2 = tl.dot(g, X.load([token, column2 * B]), acc2, input_precision=PRECISION)
            acc3 = tl.dot(g, X.load([token, column3 * B]), acc3, input_precision=PRECISION)
    Grad.store([place0 * B, 0], acc0.to(Grad.dtype))
    if GROUP > 1:
        Grad.store([place1 * B, 0], acc1.to(Grad.dtype))
    if GROUP > 2:
        Grad.store([place2 * B, 0], acc2.to(Grad.dtype))
        Grad.store([place3 * B, 0], acc3.to(Grad.dtype))
