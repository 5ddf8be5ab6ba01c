"""What runs on the GPU for the cells of a pixelated butterfly: the device functions of cell_kernel.py.

Operands are tensor descriptors: the copy engine (TMA) fetches whole tiles, gives zeros beyond an edge and writes
nothing there, so no tile is masked. A cell narrower than a tile is an edge too.

EARLY (Hopper and later): kernels of one call overlap by programmatic dependent launch. One that will be waited for says
at its start that the next may come; the next does what does not depend on it, and waits before it reads what the first
made, or stores. Only kernels launched one right after the other do so (`launch_pdl`); elsewhere nothing waits.
"""

# ruff: noqa: SIM102, SIM108
# (What the compiler knows, None and constants, is asked by itself; only then what the program finds.)
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# (Triton declares the compile-time numbers that callers pass as plain ones.)

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

COUNTS = """tiles_m groups tiles_n size live steps low_steps parts band tiles_h tiles_w tiles_u tiles_d share splits
    total dots""".split()
"""Plain numbers: a kernel of its own for every count that is 1, or divided by 16, would be compiled for nothing."""


@triton.jit
def _column_sums(x):
    return tl.reduce(x, 0, tl.standard._sum_combine)


@triton.jit
def _sum(x):
    """Of all entries; tl.sum cannot be interpreted once triton was imported without TRITON_INTERPRET."""
    return tl.reduce(_column_sums(x), 0, tl.standard._sum_combine)


@triton.jit
def _place(program, tiles_m, groups, tiles_n, band):
    """Token tile, row of cells and output tile: bands of token tiles, all outputs of one before the next.

    The last tokens come first: the low rank has just read the inputs in order, and the L2 still holds their end.
    """
    whole = band * groups * tiles_n
    first = program // whole * band
    tall = tl.minimum(tiles_m - first, band)
    rest = program % whole
    column = rest // tall
    return tiles_m - 1 - first - rest % tall, column // tiles_n, column % tiles_n


@triton.jit
def _safe(gamma):
    """Far from zero: one divides by it and multiplies again; in float32 what it replaces is not seen."""
    return tl.where(tl.abs(gamma) < 8.67e-19, 8.67e-19, gamma)


@triton.jit
def _with_low(
    acc, Low, Basis, group, m, n, low_steps, parts,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + Low Basis[group]^T, all parts of Low."""
    part, r = 0, 0
    for _ in range(tl.maximum(low_steps * parts, 1)):
        low = Low.load([part, m, r]).reshape(BM, BK)
        if TURNED:
            basis = Basis.load([group, r, n]).reshape(BK, BN)
        else:
            basis = tl.trans(Basis.load([group, n, r]).reshape(BN, BK))
        acc = tl.dot(low, basis, acc, input_precision=PRECISION)
        part += (r == (low_steps - 1) * BK).to(tl.int32)
        r = tl.where(r == (low_steps - 1) * BK, 0, r + BK)
    return acc


@triton.jit
def _store_whole(Low, Whole, m, low_steps, parts, BM: tl.constexpr, BK: tl.constexpr):
    """A token tile of Low, its parts added."""
    for step in range(low_steps):
        total = tl.full((BM, BK), 0.0, tl.float32)
        for part in range(parts):
            total += Low.load([part, m, step * BK]).reshape(BM, BK).to(tl.float32)
        Whole.store([m, step * BK], total.to(Whole.dtype))


@triton.jit
def _tile(
    tile, X, W, Low, Basis, Whole, Y, Bias, Gamma, Index, tiles_m, groups, tiles_n, size, live, steps, low_steps,
    parts, band, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TURNED: tl.constexpr, WAIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One (BM, BN) tile of Y[g] = gamma sum_s X[index(g, s)] W[g, s]^T + (1 - gamma) Low Basis[g]^T + bias.

    TURNED: of the gradient, W[index(g, s)] without transposing; `index` then numbers cells row by row. The cells are
    summed first, while Low may still be made, and scaled by gamma / (1 - gamma): one accumulator holds both terms.
    Low comes in parts that add up here; the first output tile of every token tile also stores them added.

    Two habits that the compiled code showed to matter (Triton 3.6, sm_90). The index is read a step ahead: read in
    its own step, the pipeliner spent a stage on it and buffered one tile fewer. Loops run at least once, and say so:
    where they might not, ptxas runs one wgmma after the other (C7515), the accumulator being set on the way around.
    """
    m, group, n = _place(tile, tiles_m, groups, tiles_n, band)
    m, n = m * BM, n * BN
    acc = tl.full((BM, BN), 0.0, tl.float32)
    place, k = 0, 0
    cell = tl.load(Index + group * live).to(tl.int32)
    for _ in range(tl.maximum(live * steps, 1)):
        if TURNED:
            x = X.load([cell // live, m, k]).reshape(BM, BK)
            w = W.load([cell // live, cell % live, k, n]).reshape(BK, BN)
        else:
            x = X.load([cell, m, k]).reshape(BM, BK)
            w = tl.trans(W.load([group, place, n, k]).reshape(BN, BK))
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        place += (k == (steps - 1) * BK).to(tl.int32)
        k = tl.where(k == (steps - 1) * BK, 0, k + BK)
        cell = tl.load(Index + group * live + tl.minimum(place, live - 1)).to(tl.int32)
    if Gamma is not None:
        gamma = tl.load(Gamma).to(tl.float32)
        acc *= gamma / _safe(1.0 - gamma)
    if WAIT:
        gdc_wait()
    if Low is not None:
        acc = _with_low(acc, Low, Basis, group, m, n, low_steps, parts, BM, BN, BK, TURNED, PRECISION)
    if Gamma is not None:
        acc *= _safe(1.0 - tl.load(Gamma).to(tl.float32))
    if Bias is not None:
        column = n + tl.arange(0, BN)
        acc += tl.load(Bias + group * size + column, mask=column < size, other=0.0).to(tl.float32)[None, :]
    Y.store([group, m, n], acc.to(Y.dtype).reshape(1, BM, BN))
    if Whole is not None and Low is not None:
        if (group == 0) & (n == 0):
            _store_whole(Low, Whole, m, low_steps, parts, BM, BK)


@triton.jit(do_not_specialize=COUNTS)
def multiply(
    X, W, Low, Basis, Whole, Y, Bias, Gamma, Index, tiles_m, groups, tiles_n, size, live, steps, low_steps, parts, band,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TURNED: tl.constexpr, PERSISTENT: tl.constexpr,
    EARLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All tiles: one a program, or a few programs a processor, each storing a tile while it fetches its next."""
    if EARLY:
        gdc_launch_dependents()
    if PERSISTENT:
        if EARLY:
            gdc_wait()
        for tile in tl.range(tl.program_id(0), tiles_m * groups * tiles_n, tl.num_programs(0), flatten=True):
            _tile(
                tile, X, W, Low, Basis, Whole, Y, Bias, Gamma, Index, tiles_m, groups, tiles_n, size, live, steps,
                low_steps, parts, band, BM, BN, BK, TURNED, False, PRECISION,
            )  # fmt: skip
    else:
        _tile(
            tl.program_id(0), X, W, Low, Basis, Whole, Y, Bias, Gamma, Index, tiles_m, groups, tiles_n, size, live,
            steps, low_steps, parts, band, BM, BN, BK, TURNED, EARLY, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def thin(
    X, Basis, Low, tiles_m, parts, share,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, TURNED: tl.constexpr, EARLY: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One (BM, BR) tile of one of the parts of X Basis^T (TURNED: X Basis): `share` steps of the long inner side.

    Few outputs, much to read: to have work for all processors the inner side is cut into parts, and tiles have as few
    as 16 tokens. So it is made as its transpose, for a matrix instruction has 64 rows, which the rank fills.
    """
    if EARLY:
        gdc_launch_dependents()
    m, rest = tl.program_id(0) % tiles_m * BM, tl.program_id(0) // tiles_m
    part, r = rest % parts, rest // parts * BR
    acc = tl.full((BR, BM), 0.0, tl.float32)
    for step in range(part * share, part * share + tl.maximum(share, 1)):
        x = tl.trans(X.load([m, step * BK]))
        if TURNED:
            basis = tl.trans(Basis.load([step * BK, r]))
        else:
            basis = Basis.load([r, step * BK])
        acc = tl.dot(basis, x, acc, input_precision=PRECISION)
    Low.store([part, m, r], tl.trans(acc).to(Low.dtype).reshape(1, BM, BR))


@triton.jit
def _cell(
    rest, split, dot, G, X, W, Gamma, Index, Cells, Dots, groups, live, tiles_h, tiles_w, share,
    BH: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A (BH, BW) tile of a live cell of G^T X, times gamma; into Dots its scalar product with W, before that."""
    w, place = rest % tiles_w * BW, rest // tiles_w % live
    rest = rest // (tiles_w * live)
    h, group = rest % tiles_h * BH, rest // tiles_h % groups
    cell = tl.load(Index + group * live + place).to(tl.int32)
    acc = tl.full((BH, BW), 0.0, tl.float32)
    for token in range(split * share, split * share + tl.maximum(share, 1), BK):
        g = tl.trans(G.load([group, token, h]).reshape(BK, BH))
        x = X.load([cell, token, w]).reshape(BK, BW)
        acc = tl.dot(g, x, acc, input_precision=PRECISION)
    if EARLY:
        gdc_wait()
    if Dots is not None:
        weight = W.load([group, place, h, w]).reshape(BH, BW)
        tl.store(Dots + dot, _sum(acc * weight.to(tl.float32)))
    if Gamma is not None:
        acc *= tl.load(Gamma).to(tl.float32)
    Cells.store([split, group, place, h, w], acc.to(Cells.dtype).reshape(1, 1, 1, BH, BW))


@triton.jit
def _up(
    rest, split, dot, G, Up, Low, Gamma, Ups, Dots, tiles_h, tiles_u, share,
    BH: tl.constexpr, BK: tl.constexpr, BU: tl.constexpr, EARLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A (BH, BU) tile of G^T T, times 1 - gamma; into Dots, before that, less its scalar product with U."""
    r, rest = rest % tiles_u * BU, rest // tiles_u
    h, group = rest % tiles_h * BH, rest // tiles_h
    acc = tl.full((BH, BU), 0.0, tl.float32)
    for token in range(split * share, split * share + tl.maximum(share, 1), BK):
        g = tl.trans(G.load([group, token, h]).reshape(BK, BH))
        acc = tl.dot(g, Low.load([token, r]), acc, input_precision=PRECISION)
    if EARLY:
        gdc_wait()
    if Dots is not None:
        up = Up.load([group, h, r]).reshape(BH, BU)
        tl.store(Dots + dot, -_sum(acc * up.to(tl.float32)))
    if Gamma is not None:
        acc *= 1.0 - tl.load(Gamma).to(tl.float32)
    Ups.store([split, group, h, r], acc.to(Ups.dtype).reshape(1, 1, BH, BU))


@triton.jit
def _bias(
    rest, split, G, Biases, size, tiles_h, share, total,
    BH: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BH sums of G's columns, as a product with ones: so the copy engine fetches ahead.

    (Added up in registers beside another product they made ptxas run one wgmma after the other; alone, nothing was
    fetched ahead, and they took longer than the cells: 53 of 96 us, GPT-2 medium's shapes, M = 8,192, H100.)
    """
    h, group = rest % tiles_h * BH, rest // tiles_h
    ones = tl.full((BK, 16), 1.0, G.dtype)
    acc = tl.full((BH, 16), 0.0, tl.float32)
    for token in range(split * share, split * share + tl.maximum(share, 1), BK):
        g = tl.trans(G.load([group, token, h]).reshape(BK, BH))
        acc = tl.dot(g, ones, acc, input_precision=PRECISION)
    if EARLY:
        gdc_wait()
    row, sums = h + tl.arange(0, BH), tl.reduce(acc, 1, tl.standard._elementwise_max)  # all columns are alike
    tl.store(Biases + split.to(tl.int64) * total + group * size + row, sums, mask=row < size)


@triton.jit
def _down(
    rest, split, X, Low, Gamma, Downs, tiles_w, tiles_d, share,
    BD: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A (BD, BW) tile of (dY U)^T X, times 1 - gamma."""
    if EARLY:
        gdc_wait()
    r, rest = rest % tiles_d * BD, rest // tiles_d
    w, cell = rest % tiles_w * BW, rest // tiles_w
    acc = tl.full((BD, BW), 0.0, tl.float32)
    for token in range(split * share, split * share + tl.maximum(share, 1), BK):
        low = tl.trans(Low.load([token, r]))
        x = X.load([cell, token, w]).reshape(BK, BW)
        acc = tl.dot(low, x, acc, input_precision=PRECISION)
    if Gamma is not None:
        acc *= 1.0 - tl.load(Gamma).to(tl.float32)
    Downs.store([split, r, cell, w], acc.to(Downs.dtype).reshape(1, BD, 1, BW))


@triton.jit(do_not_specialize=COUNTS)
def sample(
    G, X, W, Up, Low, Back, Gamma, Index, Cells, Ups, Downs, Biases, Dots,
    groups, size, live, tiles_h, tiles_w, tiles_u, tiles_d, share, total,
    BH: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr, BU: tl.constexpr, BD: tl.constexpr,
    EARLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of every parameter in one launch: a tile of dS, dU, dV or the bias's, over `share` tokens.

    All read the same tokens of G and X at about the same time, so the L2 serves most of it. What is None is not wanted.
    """
    cells = groups * tiles_h * live * tiles_w if Cells is not None else 0
    ups = cells + (groups * tiles_h * tiles_u if Ups is not None else 0)
    downs = ups + (groups * tiles_w * tiles_d if Downs is not None else 0)
    each = downs + (groups * tiles_h if Biases is not None else 0)
    split, rest = tl.program_id(0) // each, tl.program_id(0) % each
    dot = split * ups + rest
    if Cells is not None:
        if rest < cells:
            _cell(
                rest, split, dot, G, X, W, Gamma, Index, Cells, Dots, groups, live, tiles_h, tiles_w, share,
                BH, BW, BK, EARLY, PRECISION,
            )  # fmt: skip
    if Ups is not None:
        if (rest >= cells) & (rest < ups):
            _up(
                rest - cells, split, dot, G, Up, Low, Gamma, Ups, Dots, tiles_h, tiles_u, share,
                BH, BK, BU, EARLY, PRECISION,
            )  # fmt: skip
    if Downs is not None:
        if (rest >= ups) & (rest < downs):
            _down(rest - ups, split, X, Back, Gamma, Downs, tiles_w, tiles_d, share, BD, BW, BK, EARLY, PRECISION)
    if Biases is not None:
        if rest >= downs:
            _bias(rest - downs, split, G, Biases, size, tiles_h, share, total, BH, BK, EARLY, PRECISION)


@triton.jit(do_not_specialize=COUNTS)
def finish(Parts, Grads, Dots, Gamma, splits, total, dots, BLOCK: tl.constexpr):
    """Parts added in float32, always in the same order; the last program adds the dots."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if Parts is not None:
        acc = tl.full((BLOCK,), 0.0, tl.float32)
        place = at.to(tl.int64)
        for _ in range(splits):
            acc += tl.load(Parts + place, mask=at < total, other=0.0)
            place += total
        tl.store(Grads + at, acc.to(Grads.dtype.element_ty), mask=at < total)
    if Dots is not None:
        if tl.program_id(0) == tl.num_programs(0) - 1:
            acc = tl.full((BLOCK,), 0.0, tl.float32)
            for first in range(0, dots, BLOCK):
                dot = first + tl.arange(0, BLOCK)
                acc += tl.load(Dots + dot, mask=dot < dots, other=0.0)
            tl.store(Gamma, _column_sums(acc))
