"""What runs on the GPU for the cells of a pixelated butterfly: the device functions of cell_kernel.py.

Operands are tensor descriptors: the copy engine (TMA) fetches whole tiles, gives zeros beyond an edge and writes
nothing there, so no tile is masked. A cell narrower than a tile is an edge too.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# (Triton declares the compile-time numbers that callers pass as plain ones.)

import triton
import triton.language as tl

COUNTS = "tiles_m groups tiles_n size live steps low_steps band tokens tiles_h tiles_w share".split()
"""Plain numbers: a kernel of its own for every count that is 1, or divided by 16, would be compiled for nothing."""


@triton.jit
def _sum(x):
    """Of all entries; tl.sum cannot be interpreted once triton was imported without TRITON_INTERPRET."""
    return tl.reduce(tl.reduce(x, 1, tl.standard._sum_combine), 0, tl.standard._sum_combine)


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
    tile, X, W, Low, Basis, Y, Bias, Gamma, Index, tiles_m, groups, tiles_n, size, live, steps, low_steps, band,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One (BM, BN) tile of Y[g] = gamma sum_s X[index(g, s)] W[g, s]^T + (1 - gamma) Low Basis[g]^T + bias.

    TURNED: of the gradient, W[index(g, s)] without transposing; `index` then numbers cells row by row. The low
    rank is summed first and scaled by (1 - gamma) / gamma, so that one accumulator holds both terms.

    Two habits that the compiled code showed to matter (Triton 3.6, sm_90). The index is read a step ahead: read in
    its own step, the pipeliner spent a stage on it and buffered one tile fewer. Loops run at least once, and say so:
    where they might not, ptxas runs one wgmma after the other (C7515), the accumulator being set on the way around.
    """
    m, group, n = _place(tile, tiles_m, groups, tiles_n, band)
    m, n = m * BM, n * BN
    acc = tl.full((BM, BN), 0.0, tl.float32)
    if Low is not None:
        for step in range(tl.maximum(low_steps, 1)):
            low = Low.load([m, step * BK])
            if TURNED:
                basis = Basis.load([group, step * BK, n]).reshape(BK, BN)
            else:
                basis = tl.trans(Basis.load([group, n, step * BK]).reshape(BN, BK))
            acc = tl.dot(low, basis, acc, input_precision=PRECISION)
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
    X, W, Low, Basis, Y, Bias, Gamma, Index, tiles_m, groups, tiles_n, size, live, steps, low_steps, band,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TURNED: tl.constexpr, PERSISTENT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """All tiles: one a program, or a few programs a processor, each storing a tile while it fetches its next."""
    if PERSISTENT:
        for tile in tl.range(tl.program_id(0), tiles_m * groups * tiles_n, tl.num_programs(0), flatten=True):
            _tile(
                tile, X, W, Low, Basis, Y, Bias, Gamma, Index, tiles_m, groups, tiles_n, size, live, steps, low_steps,
                band, BM, BN, BK, TURNED, PRECISION,
            )  # fmt: skip
    else:
        _tile(
            tl.program_id(0), X, W, Low, Basis, Y, Bias, Gamma, Index, tiles_m, groups, tiles_n, size, live, steps,
            low_steps, band, BM, BN, BK, TURNED, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def sample(
    G, X, W, Gamma, Index, Grad, Dots, tokens, groups, live, tiles_h, tiles_w, share,
    BH: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One (BH, BW) tile of a live cell of G^T X over `share` tokens: the gradient of W, times gamma.

    With gamma, `Dots` gets the tile's part of the scalar product of G^T X and W: the gradient of gamma.
    """
    program = tl.program_id(0)
    w, place = program % tiles_w * BW, program // tiles_w % live
    rest = program // (tiles_w * live)
    h, group, split = rest % tiles_h * BH, rest // tiles_h % groups, rest // (tiles_h * groups)
    cell = tl.load(Index + group * live + place).to(tl.int32)
    acc = tl.full((BH, BW), 0.0, tl.float32)
    for token in range(split * share, tl.minimum((split + 1) * share, tokens), BK):
        g = tl.trans(G.load([group, token, h]).reshape(BK, BH))
        x = X.load([cell, token, w]).reshape(BK, BW)
        acc = tl.dot(g, x, acc, input_precision=PRECISION)
    if Gamma is not None:
        weight = W.load([group, place, h, w]).reshape(BH, BW)
        tl.store(Dots + program, _sum(acc * weight.to(tl.float32)))
        acc *= tl.load(Gamma).to(tl.float32)
    Grad.store([split * groups + group, place, h, w], acc.to(Grad.dtype).reshape(1, 1, BH, BW))
