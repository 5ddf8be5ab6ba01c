"""What runs on the GPU for the cells of a pixelated butterfly: the device functions of cell_kernel.py.

Operands are tensor descriptors: the copy engine (TMA) fetches whole tiles, gives zeros beyond an edge and writes
nothing there, so no tile is masked. A cell narrower than a tile is an edge too.
"""

# ruff: noqa: SIM102, SIM108
# (What the compiler knows, None and constants, is asked by itself; only then what the program finds.)
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# (Triton declares the compile-time numbers that callers pass as plain ones.)

import triton
import triton.language as tl

COUNTS = """tiles_m groups tiles_n size live steps low_steps parts band tokens tiles_h tiles_w tiles_u tiles_d share
    inner rank splits total dots""".split()
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
def _tile(
    tile, X, W, Low, Basis, Y, Bias, Gamma, Index, tiles_m, groups, tiles_n, size, live, steps, low_steps, parts, band,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One (BM, BN) tile of Y[g] = gamma sum_s X[index(g, s)] W[g, s]^T + (1 - gamma) Low Basis[g]^T + bias.

    TURNED: of the gradient, W[index(g, s)] without transposing; `index` then numbers cells row by row. The low
    rank, Low in `parts` that add up, is summed first and scaled by (1 - gamma) / gamma, so that one accumulator
    holds both terms.

    Two habits that the compiled code showed to matter (Triton 3.6, sm_90). The index is read a step ahead: read in
    its own step, the pipeliner spent a stage on it and buffered one tile fewer. Loops run at least once, and say so:
    where they might not, ptxas runs one wgmma after the other (C7515), the accumulator being set on the way around.
    """
    m, group, n = _place(tile, tiles_m, groups, tiles_n, band)
    m, n = m * BM, n * BN
    acc = tl.full((BM, BN), 0.0, tl.float32)
    if Low is not None:
        part, depth = 0, 0
        for _ in range(tl.maximum(low_steps * parts, 1)):
            low = Low.load([part, m, depth]).reshape(BM, BK)
            if TURNED:
                basis = Basis.load([group, depth, n]).reshape(BK, BN)
            else:
                basis = tl.trans(Basis.load([group, n, depth]).reshape(BN, BK))
            acc = tl.dot(low, basis, acc, input_precision=PRECISION)
            part += (depth == (low_steps - 1) * BK).to(tl.int32)
            depth = tl.where(depth == (low_steps - 1) * BK, 0, depth + BK)
    if Gamma is not None:
        gamma = tl.load(Gamma).to(tl.float32)
        acc *= (1.0 - gamma) / _safe(gamma)
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
        acc *= _safe(tl.load(Gamma).to(tl.float32))
    if Bias is not None:
        column = n + tl.arange(0, BN)
        acc += tl.load(Bias + group * size + column, mask=column < size, other=0.0).to(tl.float32)[None, :]
    Y.store([group, m, n], acc.to(Y.dtype).reshape(1, BM, BN))


@triton.jit(do_not_specialize=COUNTS)
def multiply(
    X, W, Low, Basis, Y, Bias, Gamma, Index, tiles_m, groups, tiles_n, size, live, steps, low_steps, parts, band,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TURNED: tl.constexpr, PERSISTENT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """All tiles: one a program, or a few programs a processor, each storing a tile while it fetches its next."""
    if PERSISTENT:
        for tile in tl.range(tl.program_id(0), tiles_m * groups * tiles_n, tl.num_programs(0), flatten=True):
            _tile(
                tile, X, W, Low, Basis, Y, Bias, Gamma, Index, tiles_m, groups, tiles_n, size, live, steps, low_steps,
                parts, band, BM, BN, BK, TURNED, PRECISION,
            )  # fmt: skip
    else:
        _tile(
            tl.program_id(0), X, W, Low, Basis, Y, Bias, Gamma, Index, tiles_m, groups, tiles_n, size, live, steps,
            low_steps, parts, band, BM, BN, BK, TURNED, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def thin(
    X, Basis, Low, tiles_m, share, parts,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One (BM, BR) tile of one of the `parts` of X Basis^T (TURNED: X Basis): `share` steps of the long inner side.

    Few outputs and much to read: without parts there is no work for all processors. Who reads Low adds them.
    """
    program = tl.program_id(0)
    m, rest = program % tiles_m * BM, program // tiles_m
    part, r = rest % parts, rest // parts * BR
    acc = tl.full((BM, BR), 0.0, tl.float32)
    for step in range(part * share, part * share + tl.maximum(share, 1)):
        x = X.load([m, step * BK])
        if TURNED:
            basis = Basis.load([step * BK, r])
        else:
            basis = tl.trans(Basis.load([r, step * BK]))
        acc = tl.dot(x, basis, acc, input_precision=PRECISION)
    Low.store([part, m, r], acc.to(Low.dtype).reshape(1, BM, BR))


@triton.jit
def _cell(
    rest, split, dot, G, X, W, Gamma, Index, Cells, Dots, groups, live, tiles_h, tiles_w, share,
    BH: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
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
    if Dots is not None:
        weight = W.load([group, place, h, w]).reshape(BH, BW)
        tl.store(Dots + dot, _sum(acc * weight.to(tl.float32)))
    if Gamma is not None:
        acc *= tl.load(Gamma).to(tl.float32)
    Cells.store([split, group, place, h, w], acc.to(Cells.dtype).reshape(1, 1, 1, BH, BW))


@triton.jit
def _up(
    rest, split, dot, G, Up, Low, Gamma, Ups, Dots, tiles_h, tiles_u, share,
    BH: tl.constexpr, BK: tl.constexpr, BU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A (BH, BU) tile of G^T T, times 1 - gamma; into Dots, before that, less its scalar product with U."""
    r, rest = rest % tiles_u * BU, rest // tiles_u
    h, group = rest % tiles_h * BH, rest // tiles_h
    acc = tl.full((BH, BU), 0.0, tl.float32)
    for token in range(split * share, split * share + tl.maximum(share, 1), BK):
        g = tl.trans(G.load([group, token, h]).reshape(BK, BH))
        acc = tl.dot(g, Low.load([token, r]), acc, input_precision=PRECISION)
    if Dots is not None:
        up = Up.load([group, h, r]).reshape(BH, BU)
        tl.store(Dots + dot, -_sum(acc * up.to(tl.float32)))
    if Gamma is not None:
        acc *= 1.0 - tl.load(Gamma).to(tl.float32)
    Ups.store([split, group, h, r], acc.to(Ups.dtype).reshape(1, 1, BH, BU))


@triton.jit
def _bias(rest, split, G, Biases, size, tiles_h, share, total, BH: tl.constexpr, BK: tl.constexpr):
    """BH sums of G's columns. (Beside a product, in its loop, they made ptxas run one wgmma after the other.)"""
    h, group = rest % tiles_h * BH, rest // tiles_h
    sums = tl.full((BH,), 0.0, tl.float32)
    for token in range(split * share, split * share + share, BK):
        sums += _column_sums(G.load([group, token, h]).reshape(BK, BH).to(tl.float32))
    row = h + tl.arange(0, BH)
    tl.store(Biases + split.to(tl.int64) * total + group * size + row, sums, mask=row < size)


@triton.jit
def _down(
    rest, split, X, Low, Gamma, Downs, tiles_w, tiles_d, share,
    BD: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A (BD, BW) tile of (dY U)^T X, times 1 - gamma."""
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
    PRECISION: tl.constexpr,
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
                BH, BW, BK, PRECISION,
            )  # fmt: skip
    if Ups is not None:
        if (rest >= cells) & (rest < ups):
            _up(
                rest - cells, split, dot, G, Up, Low, Gamma, Ups, Dots, tiles_h, tiles_u, share,
                BH, BK, BU, PRECISION,
            )  # fmt: skip
    if Downs is not None:
        if (rest >= ups) & (rest < downs):
            _down(rest - ups, split, X, Back, Gamma, Downs, tiles_w, tiles_d, share, BD, BW, BK, PRECISION)
    if Biases is not None:
        if rest >= downs:
            _bias(rest - downs, split, G, Biases, size, tiles_h, share, total, BH, BK)


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
