"""What runs on the GPU: the device functions of kernel.py, which holds the mathematics.

M query rows and N keys per tile, W the head width E padded to a power of two. Scores stay unscaled ("raw"):
then scaling, shift and bias are one fused multiply-add each; scale, bias and LogTotal are in base 2. Sums and
maxima go through tl.reduce, because tl.sum cannot be interpreted once triton was imported without
TRITON_INTERPRET.
"""

# pyright: reportArgumentType=false
# (Triton declares the compile-time numbers that callers pass as plain ones.)

import triton
import triton.language as tl


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _uniform(row, column):
    """`uniform_noise` bit for bit: 23 bits of the hash as mantissa of a number in [1, 2), less 1 - 2^-24."""
    x = row + column
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    bits = ((x >> 9) ^ (x >> 25)) | 0x3F800000
    return bits.to(tl.float32, bitcast=True) - 0.999999940395355224609375


@triton.jit
def _sum(x, AXIS: tl.constexpr):
    return tl.reduce(x, AXIS, tl.standard._sum_combine)


@triton.jit
def _reciprocal(x, NATIVE: tl.constexpr):
    """1 / x for normal x in one instruction; Triton's own division takes several."""
    if NATIVE:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        y = 1.0 / x
    return y


@triton.jit
def _load(base, at, stride, T, E: tl.constexpr, W: tl.constexpr, CHECK: tl.constexpr):
    """Rows `at` of one head, (len(at), W); 0 beyond T (where checked) and beyond E."""
    wide = tl.arange(0, W)
    where = base + at[:, None] * stride + wide[None, :]
    if E == W and not CHECK:
        x = tl.load(where)
    elif E == W:
        x = tl.load(where, mask=(at < T)[:, None], other=0.0)
    else:
        x = tl.load(where, mask=(at < T)[:, None] & (wide < E)[None, :], other=0.0)
    return x


@triton.jit
def _store(base, at, stride, x, T, E: tl.constexpr, W: tl.constexpr):
    wide = tl.arange(0, W)
    kept = (at < T)[:, None] & (wide < E)[None, :]
    tl.store(base + at[:, None] * stride + wide[None, :], x.to(base.dtype.element_ty), mask=kept)


@triton.jit
def _load_bias(at, j, stride, T, CHECK: tl.constexpr):
    """The gate bias of keys `j` in base 2, (len(j),); finite, because -inf masks; NaN where a key is padding."""
    if CHECK:  # noqa: SIM108  (Triton chooses at compile time between statements alone)
        bias = tl.load(at + j * stride, mask=j < T, other=0.0)
    else:
        bias = tl.load(at + j * stride)
    clamped = tl.minimum(tl.maximum(bias * 1.4426950408889634, -1e30), 1e30)
    return tl.where(bias == bias, clamped, bias)


@triton.jit
def _forward_tiles(
    acc, top, total, expected, opened, q, k_at, v_at, bias_at, k_t, v_t, bias_t, row, i, scale, start, stop, T,
    MASKED: tl.constexpr, PADDED: tl.constexpr, SAMPLE: tl.constexpr, E: tl.constexpr, W: tl.constexpr,
    N: tl.constexpr, PRECISION: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Walk over the keys from `start` to `stop`, carrying FlashAttention's running maximum and total."""
    for j0 in range(start, stop, N):
        j = j0 + tl.arange(0, N)
        k = _load(k_at, j, k_t, T, E, W, MASKED)
        raw = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (M, N)
        if MASKED:
            raw = tl.where(i[:, None] >= j[None, :], raw, float("-inf"))
        bias = _load_bias(bias_at, j, bias_t, T, MASKED)
        if PADDED:
            raw = tl.where((bias == bias)[None, :], raw, float("-inf"))
            bias = tl.where(bias == bias, bias, 0.0)
        new_top = tl.maximum(top, tl.reduce(raw, 1, tl.standard._elementwise_max) * scale)
        shift = new_top
        if PADDED:
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen padding alone
        p = tl.exp2(raw * scale - shift[:, None])
        shrink = tl.exp2(top - shift)
        logits = raw * scale + bias[None, :]
        a = tl.exp2(tl.minimum(logits, 60.0))  # sigmoid is 1 to the last bit long before
        odds = 1.0 + a
        column = j.to(tl.uint32) * 0x9E3779B9
        opens = logits > 0.0
        opened += _sum(tl.where(opens, 1.0, 0.0), 1)
        if SAMPLE:
            opens = odds * _uniform(row[:, None], column[None, :]) > 1.0
        total = total * shrink + _sum(p, 1)
        expected += _sum(a * _reciprocal(odds, NATIVE), 1)
        v = _load(v_at, j, v_t, T, E, W, MASKED)
        acc = tl.dot(tl.where(opens, p, 0.0).to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return acc, top, total, expected, opened


@triton.jit
def forward(
    Q, K, V, Bias, Seed, Out, Expected, Opened, LogTotal,
    bias_b, bias_h, bias_t, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t, H, G, T, scale,
    PADDED: tl.constexpr, SAMPLE: tl.constexpr, E: tl.constexpr, W: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """M rows of one head; the longest rows start first."""
    blocks = (T + M - 1) // M
    start = (blocks - 1 - tl.program_id(0) % blocks) * M
    bh = tl.program_id(0) // blocks
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    g = h // (H // G)
    i = start + tl.arange(0, M)
    q = _load(Q + b * q_b + h * q_h, i, q_t, T, E, W, True)
    row = _mix(_mix(tl.load(Seed).to(tl.uint32, bitcast=True)) ^ (bh * T + i).to(tl.uint32))
    acc = tl.full((M, W), 0.0, tl.float32)
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.full((M,), 0.0, tl.float32)
    k_at, v_at, bias_at = K + b * k_b + g * k_h, V + b * v_b + g * v_h, Bias + b * bias_b + h * bias_h
    diagonal = start // N * N
    acc, top, total, expected, opened = _forward_tiles(
        acc, top, total, total, total, q, k_at, v_at, bias_at, k_t, v_t, bias_t, row, i, scale, 0, diagonal, T,
        False, PADDED, SAMPLE, E, W, N, PRECISION, NATIVE,
    )  # fmt: skip
    acc, top, total, expected, opened = _forward_tiles(
        acc, top, total, expected, opened, q, k_at, v_at, bias_at, k_t, v_t, bias_t, row, i, scale,
        diagonal, tl.minimum(start + M, T), T, True, PADDED, SAMPLE, E, W, N, PRECISION, NATIVE,
    )  # fmt: skip
    if PADDED:  # a row that saw padding alone gives 0, and p = 0 in the backward pass
        top = tl.where(total > 0.0, top, float("inf"))
        total = tl.where(total > 0.0, total, 1.0)
    _store(Out + b * o_b + h * o_h, i, o_t, acc / total[:, None], T, E, W)
    at = bh.to(tl.int64) * T + i
    tl.store(Expected + at, expected, mask=i < T)
    tl.store(Opened + at, opened, mask=i < T)
    tl.store(LogTotal + at, top + tl.log2(total), mask=i < T)


@triton.jit
def _gradients(
    raw, d, log_total, delta, grad_expected, row, column, scale, bias,
    SAMPLE: tl.constexpr, STRAIGHT: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """One tile's p * gate, dS and gate_grad (see kernel.py), in either orientation; d = dO V^T.

    Both sigmoids share one reciprocal: 1 / (x y) with x = 1 + a, y = a u + 1 - u, both under 2^61.
    """
    p = tl.exp2(raw * scale - log_total)
    logits = raw * scale + bias
    a = tl.exp2(tl.minimum(logits, 60.0))
    x = 1.0 + a
    if SAMPLE:
        u = _uniform(row, column)
        opens = x * u > 1.0
        rest = 1.0 - u
        y = a * u + rest
        both = _reciprocal(x * y, NATIVE)
        closed, noisy = both * y, both * x
        kept = tl.where(opens, p, 0.0)
        gate_grad = (a * closed) * (closed * grad_expected) + (a * u * noisy) * (rest * noisy) * (p * d)
    else:
        closed = _reciprocal(x, NATIVE)
        kept = tl.where(logits > 0.0, p, 0.0)
        pull = grad_expected + p * d if STRAIGHT else grad_expected
        gate_grad = (a * closed) * (closed * pull)
    return kept, gate_grad + (kept * d - p * delta), gate_grad


@triton.jit
def _query_grad_tiles(
    dq, q, do, k_at, v_at, bias_at, k_t, v_t, bias_t, log_total, delta, grad_expected, row, i, scale, start, stop, T,
    MASKED: tl.constexpr, PADDED: tl.constexpr, SAMPLE: tl.constexpr, STRAIGHT: tl.constexpr, E: tl.constexpr,
    W: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Walk over the keys from `start` to `stop`, adding to dQ."""
    for j0 in range(start, stop, N):
        j = j0 + tl.arange(0, N)
        k = _load(k_at, j, k_t, T, E, W, MASKED)
        v = _load(v_at, j, v_t, T, E, W, MASKED)
        raw = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (M, N)
        if MASKED:
            raw = tl.where(i[:, None] >= j[None, :], raw, float("-inf"))
        d = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        column = j.to(tl.uint32) * 0x9E3779B9
        bias = _load_bias(bias_at, j, bias_t, T, MASKED)
        if PADDED:
            raw = tl.where((bias == bias)[None, :], raw, float("-inf"))
            bias = tl.where(bias == bias, bias, 0.0)
        _, ds, _ = _gradients(
            raw, d, log_total[:, None], delta[:, None], grad_expected[:, None], row[:, None], column[None, :],
            scale, bias[None, :], SAMPLE, STRAIGHT, NATIVE,
        )  # fmt: skip
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def query_grad(
    Q, K, V, Bias, Seed, DO, GradExpected, LogTotal, Delta, RowHash, Out, DQ,
    o_b, o_h, o_t, dq_b, dq_h, dq_t, bias_b, bias_h, bias_t,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t, H, G, T, scale, scaling,
    PADDED: tl.constexpr, SAMPLE: tl.constexpr, STRAIGHT: tl.constexpr, E: tl.constexpr, W: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """dQ of M rows, and their D = rowsum(dO * O). Rows beyond T: p = 0 through +inf."""
    blocks = (T + M - 1) // M
    block = blocks - 1 - tl.program_id(0) % blocks
    bh = tl.program_id(0) // blocks
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    g = h // (H // G)
    start = block * M
    i = start + tl.arange(0, M)
    at = bh.to(tl.int64) * T + i
    q = _load(Q + b * q_b + h * q_h, i, q_t, T, E, W, True)
    do = _load(DO + b * do_b + h * do_h, i, do_t, T, E, W, True)
    out = _load(Out + b * o_b + h * o_h, i, o_t, T, E, W, True)
    delta = _sum(do.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(Delta + at, delta, mask=i < T)
    log_total = tl.load(LogTotal + at, mask=i < T, other=float("inf"))
    grad_expected = tl.load(GradExpected + at, mask=i < T, other=0.0)
    row = _mix(_mix(tl.load(Seed).to(tl.uint32, bitcast=True)) ^ (bh * T + i).to(tl.uint32))
    tl.store(RowHash + at, row.to(tl.int32, bitcast=True), mask=i < T)
    dq = tl.full((M, W), 0.0, tl.float32)
    k_at, v_at, bias_at = K + b * k_b + g * k_h, V + b * v_b + g * v_h, Bias + b * bias_b + h * bias_h
    diagonal = start // N * N
    dq = _query_grad_tiles(
        dq, q, do, k_at, v_at, bias_at, k_t, v_t, bias_t, log_total, delta, grad_expected, row, i, scale,
        0, diagonal, T, False, PADDED, SAMPLE, STRAIGHT, E, W, N, PRECISION, NATIVE,
    )  # fmt: skip
    dq = _query_grad_tiles(
        dq, q, do, k_at, v_at, bias_at, k_t, v_t, bias_t, log_total, delta, grad_expected, row, i, scale,
        diagonal, tl.minimum(start + M, T), T, True, PADDED, SAMPLE, STRAIGHT, E, W, N, PRECISION, NATIVE,
    )  # fmt: skip
    _store(DQ + b * dq_b + h * dq_h, i, dq_t, dq * scaling, T, E, W)


@triton.jit
def _key_grad_tiles(
    dk, dv, dbias, k, v, q_at, do_at, q_t, do_t, GradExpected, LogTotal, Delta, RowHash, first, j, seen, scale, bias,
    start, stop, T,
    MASKED: tl.constexpr, PADDED: tl.constexpr, SAMPLE: tl.constexpr, STRAIGHT: tl.constexpr, E: tl.constexpr,
    W: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Walk down the rows from `start` to `stop`, adding to dK and dV; tiles are transposed, (N, M)."""
    column = j.to(tl.uint32) * 0x9E3779B9
    for i0 in range(start, stop, M):
        i = i0 + tl.arange(0, M)
        at = first + i
        q = _load(q_at, i, q_t, T, E, W, True)
        do = _load(do_at, i, do_t, T, E, W, True)
        log_total = tl.load(LogTotal + at, mask=i < T, other=float("inf"))
        delta = tl.load(Delta + at, mask=i < T, other=0.0)
        grad_expected = tl.load(GradExpected + at, mask=i < T, other=0.0)
        row = tl.load(RowHash + at, mask=i < T, other=0).to(tl.uint32, bitcast=True)
        raw = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # (N, M)
        if MASKED:
            raw = tl.where(i[None, :] >= j[:, None], raw, float("-inf"))
        if PADDED:
            raw = tl.where(seen[:, None], raw, float("-inf"))
        d = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        kept, ds, gate_grad = _gradients(
            raw, d, log_total[None, :], delta[None, :], grad_expected[None, :], row[None, :], column[:, None],
            scale, bias[:, None], SAMPLE, STRAIGHT, NATIVE,
        )  # fmt: skip
        dbias += _sum(gate_grad, 1)
        dv = tl.dot(kept.to(do.dtype), do, dv, input_precision=PRECISION)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv, dbias


@triton.jit
def key_grad(
    Q, K, V, Bias, Seed, DO, GradExpected, LogTotal, Delta, RowHash, DK, DV, DBias,
    dk_b, dk_h, dk_t, dv_b, dv_h, dv_t, bias_b, bias_h, bias_t,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t, H, G, T, scale, scaling,
    PADDED: tl.constexpr, SAMPLE: tl.constexpr, STRAIGHT: tl.constexpr, E: tl.constexpr, W: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """dK and dV of N keys of one key/value head, summed over the query heads that share it (GQA), and dBias of each."""
    blocks = (T + N - 1) // N
    start = tl.program_id(0) % blocks * N
    bg = tl.program_id(0) // blocks
    b, g = (bg // G).to(tl.int64), (bg % G).to(tl.int64)
    j = start + tl.arange(0, N)
    k = _load(K + b * k_b + g * k_h, j, k_t, T, E, W, True)
    v = _load(V + b * v_b + g * v_h, j, v_t, T, E, W, True)
    dk = tl.full((N, W), 0.0, tl.float32)
    dv = tl.full((N, W), 0.0, tl.float32)
    top = start // M * M
    below = top + max(M, N)  # from here on every row sees every key of the block
    for member in range(H // G):
        h = g * (H // G) + member
        first = (b * H + h) * T
        q_at, do_at = Q + b * q_b + h * q_h, DO + b * do_b + h * do_h
        bias = _load_bias(Bias + b * bias_b + h * bias_h, j, bias_t, T, True)
        seen = bias == bias
        if PADDED:
            bias = tl.where(seen, bias, 0.0)
        dbias = tl.full((N,), 0.0, tl.float32)
        dk, dv, dbias = _key_grad_tiles(
            dk, dv, dbias, k, v, q_at, do_at, q_t, do_t, GradExpected, LogTotal, Delta, RowHash, first, j, seen,
            scale, bias, top, tl.minimum(below, T), T, True, PADDED, SAMPLE, STRAIGHT, E, W, M, PRECISION, NATIVE,
        )  # fmt: skip
        dk, dv, dbias = _key_grad_tiles(
            dk, dv, dbias, k, v, q_at, do_at, q_t, do_t, GradExpected, LogTotal, Delta, RowHash, first, j, seen,
            scale, bias, below, T, T, False, PADDED, SAMPLE, STRAIGHT, E, W, M, PRECISION, NATIVE,
        )  # fmt: skip
        tl.store(DBias + first + j, dbias, mask=j < T)
    _store(DK + b * dk_b + g * dk_h, j, dk_t, dk * scaling, T, E, W)
    _store(DV + b * dv_b + g * dv_h, j, dv_t, dv, T, E, W)
