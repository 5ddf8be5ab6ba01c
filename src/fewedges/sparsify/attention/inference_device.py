"""What runs on the GPU: the device functions of inference.py, which holds the mathematics and the reasons.

As in device.py: M query rows and N keys per tile, W the head width E padded to a power of two, raw scores
unscaled, scale and bias in base 2, sums and maxima through tl.reduce. `limit` is the last key a query row may
see; -1 for rows that see none (padding, or beyond the last query).
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# (Triton declares compile-time numbers that callers pass as plain ones, reductions as tuples, tl.range as no range.)

import triton
import triton.language as tl

from fewedges.sparsify.attention.device import _load, _load_bias, _store, _sum


@triton.jit
def _max(x, AXIS: tl.constexpr):
    return tl.reduce(x, AXIS, tl.standard._elementwise_max)


@triton.jit
def _range(Start, Stop, b, KEYS, RANGED: tl.constexpr):
    """The keys [start, stop) of batch row b that are no padding."""
    if RANGED:
        start = tl.maximum(tl.load(Start + b), 0)
        stop = tl.minimum(tl.load(Stop + b), KEYS)
    else:
        start, stop = 0, KEYS
    return start, stop


@triton.jit
def _limits(i, QUERIES, KEYS, start, stop):
    """The last key each query row may see: its own place among the keys; -1 for padding and beyond the end."""
    place = i + (KEYS - QUERIES)
    return tl.where((i < QUERIES) & (place >= start) & (place < stop), place, -1)


@triton.jit
def _place(H, QUERIES, M: tl.constexpr):
    """Batch row, head and query rows of this program; the longest rows start first."""
    blocks = (QUERIES + M - 1) // M
    bh = tl.program_id(0) // blocks
    i = (blocks - 1 - tl.program_id(0) % blocks) * M + tl.arange(0, M)
    return (bh // H).to(tl.int64), (bh % H).to(tl.int64), i


@triton.jit
def _borders(Start, Stop, b, i, QUERIES, KEYS, RANGED: tl.constexpr, N: tl.constexpr):
    """Where a block's keys start, up to where nothing is masked, where they end, and each row's limit.

    Unmasked are whole tiles that all rows see. A block with a padding row has none; rows beyond the last query
    do not count, their gates are shut by their limit.
    """
    start, stop = _range(Start, Stop, b, KEYS, RANGED)
    limit = _limits(i, QUERIES, KEYS, start, stop)
    seen = tl.reduce(tl.where(i < QUERIES, limit, KEYS), 0, tl.standard._elementwise_min) + 1
    return start, start + tl.maximum(seen - start, 0) // N * N, _max(limit, 0) + 1, limit


@triton.jit
def _finite(top):
    """A maximum to subtract: 0 in rows that have seen no key, so that their p is 0 and not NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _scores(
    q, k_at, k_t, j, limit, KEYS, E: tl.constexpr, W: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr
):
    """Raw scores of a tile, (M, N); -inf where a row may not look."""
    raw = tl.dot(q, tl.trans(_load(k_at, j, k_t, KEYS, E, W, MASKED)), input_precision=PRECISION)
    if MASKED:
        raw = tl.where(j[None, :] <= limit[:, None], raw, float("-inf"))
    return raw


@triton.jit
def _add_up(raw, top, total, scale):
    """The running maximum and total of FlashAttention, without an output: also p of this tile."""
    new_top = tl.maximum(top, _max(raw, 1) * scale)
    finite = _finite(new_top)
    p = tl.exp2(raw * scale - finite[:, None])
    shrink = tl.exp2(top - finite)
    return p, shrink, new_top, total * shrink + _sum(p, 1)


@triton.jit
def _logits(raw, bias, limit, scale, BY_KEY: tl.constexpr):
    """The gates' logits G in base 2, (M, N); closed in rows that see no key."""
    logits = raw * scale + bias[None, :] if BY_KEY else raw * scale + bias
    return tl.where((limit >= 0)[:, None], logits, -1.0)


@triton.jit
def _opens_any(raw, bias, limit, scale, BY_KEY: tl.constexpr):
    """Whether any gate of the tile is open. With one bias per head the row maximum, known anyway, decides."""
    best = _max(raw * scale + bias[None, :], 1) if BY_KEY else _max(raw, 1) * scale + bias
    return _max(tl.where((best > 0.0) & (limit >= 0), 1, 0), 0) > 0


@triton.jit
def _head_bias(bias_at):
    return tl.minimum(tl.maximum(tl.load(bias_at) * 1.4426950408889634, -1e30), 1e30)  # finite: -inf masks


@triton.jit
def _bias(head_bias, bias_at, bias_t, j, KEYS, MASKED: tl.constexpr, BY_KEY: tl.constexpr):
    """One number per key, or the head's."""
    return _load_bias(bias_at, j, bias_t, KEYS, MASKED) if BY_KEY else head_bias


@triton.jit
def _scan(
    top, total, q, k_at, k_t, head_bias, bias_at, bias_t, marks_at, limit, scale, origin, start, stop, KEYS,
    MASKED: tl.constexpr, BY_KEY: tl.constexpr, E: tl.constexpr, W: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Denominators over the keys from `start` to `stop`; keys that any row opens are marked."""
    for j0 in range(start, stop, N):
        j = j0 + tl.arange(0, N)
        raw = _scores(q, k_at, k_t, j, limit, KEYS, E, W, MASKED, PRECISION)
        bias = _bias(head_bias, bias_at, bias_t, j, KEYS, MASKED, BY_KEY)
        if _opens_any(raw, bias, limit, scale, BY_KEY):
            opens = _logits(raw, bias, limit, scale, BY_KEY) > 0.0
            tl.store(marks_at + (j - origin)[None, :] + limit[:, None] * 0, 1, mask=opens)
        _, _, top, total = _add_up(raw, top, total, scale)
    return top, total


@triton.jit
def _listed(marks_at, list_at, SPAN: tl.constexpr):
    """Turn the marks of a span into the list of its marked keys; how many."""
    at = tl.arange(0, SPAN)
    marks = tl.load(marks_at + at).to(tl.int32)
    tl.store(list_at + tl.associative_scan(marks, 0, tl.standard._sum_combine) - marks, at.to(tl.int16), mask=marks > 0)
    return _sum(marks, 0)


@triton.jit
def _gather(
    acc, opened, q, k_at, v_at, k_t, v_t, head_bias, bias_at, bias_t, list_at, limit, top, scale, origin, count, KEYS,
    BY_KEY: tl.constexpr, E: tl.constexpr, W: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what the listed keys say: their K and V rows are read from wherever they are, C at a time."""
    for first in tl.range(0, count, C, num_stages=1):  # mostly one tile: nothing to pipeline
        at = first + tl.arange(0, C)
        j = tl.load(list_at + at, mask=at < count, other=0).to(tl.int32) + origin
        j = tl.where(at < count, j, KEYS)  # beyond every limit
        v = _load(v_at, j, v_t, KEYS, E, W, True)
        raw = _scores(q, k_at, k_t, j, limit, KEYS, E, W, True, PRECISION)
        bias = _bias(head_bias, bias_at, bias_t, j, KEYS, True, BY_KEY)
        opens = _logits(raw, bias, limit, scale, BY_KEY) > 0.0
        opened += _sum(tl.where(opens, 1.0, 0.0), 1)
        p = tl.where(opens, tl.exp2(raw * scale - _finite(top)[:, None]), 0.0)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, opened


@triton.jit
def prefill_gather(
    Q, K, V, Bias, Start, Stop, Marks, List, Out, Opened,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, bias_b, bias_h, bias_t, o_b, o_h, o_t, H, G, QUERIES, KEYS, scale,
    SPAN: tl.constexpr, RANGED: tl.constexpr, BY_KEY: tl.constexpr, E: tl.constexpr, W: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """M rows of one head, span by span: denominators of all keys, then the output of the open ones."""
    b, h, i = _place(H, QUERIES, M)
    g = h // (H // G)
    start, full, end, limit = _borders(Start, Stop, b, i, QUERIES, KEYS, RANGED, N)
    q = _load(Q + b * q_b + h * q_h, i, q_t, QUERIES, E, W, True)
    k_at, v_at, bias_at = K + b * k_b + g * k_h, V + b * v_b + g * v_h, Bias + b * bias_b + h * bias_h
    head_bias = _head_bias(bias_at)
    marks_at = Marks + tl.program_id(0).to(tl.int64) * SPAN
    list_at = List + tl.program_id(0).to(tl.int64) * SPAN
    acc = tl.full((M, W), 0.0, tl.float32)
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.full((M,), 0.0, tl.float32)
    opened = tl.full((M,), 0.0, tl.float32)
    for origin in range(start, end, SPAN):
        border = tl.minimum(tl.maximum(full, origin), origin + SPAN)
        before = top
        tl.store(marks_at + tl.arange(0, SPAN), tl.full((SPAN,), 0, tl.int8))
        tl.debug_barrier()  # marks and list are written by some threads and read by others
        top, total = _scan(
            top, total, q, k_at, k_t, head_bias, bias_at, bias_t, marks_at, limit, scale, origin, origin, border, KEYS,
            False, BY_KEY, E, W, N, PRECISION,
        )  # fmt: skip
        top, total = _scan(
            top, total, q, k_at, k_t, head_bias, bias_at, bias_t, marks_at, limit, scale, origin, border,
            tl.minimum(end, origin + SPAN), KEYS, True, BY_KEY, E, W, N, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()
        count = _listed(marks_at, list_at, SPAN)
        tl.debug_barrier()
        acc = acc * tl.exp2(before - _finite(top))[:, None]
        acc, opened = _gather(
            acc, opened, q, k_at, v_at, k_t, v_t, head_bias, bias_at, bias_t, list_at, limit, top, scale, origin, count,
            KEYS, BY_KEY, E, W, C, PRECISION,
        )  # fmt: skip
    _finish(acc, total, opened, limit, Out + b * o_b + h * o_h, Opened + (b * H + h) * QUERIES, i, o_t, QUERIES, E, W)


@triton.jit
def _finish(acc, total, opened, limit, out_at, opened_at, i, o_t, QUERIES, E: tl.constexpr, W: tl.constexpr):
    """Write output and counts; rows that see no key are 0."""
    seen = limit >= 0
    share = tl.where(seen, 1.0 / tl.where(seen, total, 1.0), 0.0)
    _store(out_at, i, o_t, acc * share[:, None], QUERIES, E, W)
    tl.store(opened_at + i, opened, mask=i < QUERIES)


@triton.jit
def _skip(
    acc, top, total, opened, q, k_at, v_at, k_t, v_t, head_bias, bias_at, bias_t, limit, scale, start, stop, KEYS,
    MASKED: tl.constexpr, BY_KEY: tl.constexpr, E: tl.constexpr, W: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """FlashAttention's walk, in which a tile with no open gate neither loads V nor multiplies by it."""
    for j0 in range(start, stop, N):
        j = j0 + tl.arange(0, N)
        raw = _scores(q, k_at, k_t, j, limit, KEYS, E, W, MASKED, PRECISION)
        bias = _bias(head_bias, bias_at, bias_t, j, KEYS, MASKED, BY_KEY)
        p, shrink, top, total = _add_up(raw, top, total, scale)
        acc = acc * shrink[:, None]
        if _opens_any(raw, bias, limit, scale, BY_KEY):
            opens = _logits(raw, bias, limit, scale, BY_KEY) > 0.0
            opened += _sum(tl.where(opens, 1.0, 0.0), 1)
            v = _load(v_at, j, v_t, KEYS, E, W, MASKED)
            acc = tl.dot(tl.where(opens, p, 0.0).to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, top, total, opened


@triton.jit
def prefill_skip(
    Q, K, V, Bias, Start, Stop, Out, Opened,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, bias_b, bias_h, bias_t, o_b, o_h, o_t, H, G, QUERIES, KEYS, scale,
    RANGED: tl.constexpr, BY_KEY: tl.constexpr, E: tl.constexpr, W: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """M rows of one head in one walk."""
    b, h, i = _place(H, QUERIES, M)
    g = h // (H // G)
    start, full, end, limit = _borders(Start, Stop, b, i, QUERIES, KEYS, RANGED, N)
    q = _load(Q + b * q_b + h * q_h, i, q_t, QUERIES, E, W, True)
    k_at, v_at, bias_at = K + b * k_b + g * k_h, V + b * v_b + g * v_h, Bias + b * bias_b + h * bias_h
    head_bias = _head_bias(bias_at)
    acc = tl.full((M, W), 0.0, tl.float32)
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.full((M,), 0.0, tl.float32)
    acc, top, total, opened = _skip(
        acc, top, total, total, q, k_at, v_at, k_t, v_t, head_bias, bias_at, bias_t, limit, scale, start, full, KEYS,
        False, BY_KEY, E, W, N, PRECISION,
    )  # fmt: skip
    acc, top, total, opened = _skip(
        acc, top, total, opened, q, k_at, v_at, k_t, v_t, head_bias, bias_at, bias_t, limit, scale, full, end,
        KEYS, True, BY_KEY, E, W, N, PRECISION,
    )  # fmt: skip
    _finish(acc, total, opened, limit, Out + b * o_b + h * o_h, Opened + (b * H + h) * QUERIES, i, o_t, QUERIES, E, W)


@triton.jit
def decode(
    Q, K, V, Bias, Start, Stop, Acc, Top, Total, Opened,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, bias_b, bias_h, bias_t, H, G, QUERIES, KEYS, chunk, splits, scale,
    RANGED: tl.constexpr, E: tl.constexpr, W: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The few queries of all heads that share one key/value head, over one chunk of the keys."""
    split = tl.program_id(0) % splits
    bg = tl.program_id(0) // splits
    b, g = (bg // G).to(tl.int64), (bg % G).to(tl.int64)
    r = tl.arange(0, M)
    valid = r < H // G * QUERIES
    h, i = g * (H // G) + r // QUERIES, r % QUERIES
    start, stop = _range(Start, Stop, b, KEYS, RANGED)
    limit = tl.where(valid, _limits(i, QUERIES, KEYS, start, stop), -1)
    wide = tl.arange(0, W)
    q_at = Q + b * q_b + h[:, None] * q_h + i[:, None] * q_t + wide[None, :]
    q = tl.load(q_at, mask=valid[:, None] & (wide < E)[None, :], other=0.0)
    k_at, v_at = K + b * k_b + g * k_h, V + b * v_b + g * v_h
    bias_at = Bias + b * bias_b + tl.where(valid, h, 0)[:, None] * bias_h
    first = start + split * chunk
    acc = tl.full((M, W), 0.0, tl.float32)
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.full((M,), 0.0, tl.float32)
    opened = tl.full((M,), 0.0, tl.float32)
    for j0 in range(first, tl.minimum(first + chunk, _max(limit, 0) + 1), N):
        j = j0 + tl.arange(0, N)
        raw = _scores(q, k_at, k_t, j, limit, KEYS, E, W, True, PRECISION)
        bias = tl.load(bias_at + j[None, :] * bias_t, mask=(j < KEYS)[None, :], other=0.0) * 1.4426950408889634
        logits = raw * scale + tl.minimum(tl.maximum(bias, -1e30), 1e30)
        p, shrink, top, total = _add_up(raw, top, total, scale)
        acc = acc * shrink[:, None]
        best = _max(logits, 0)  # (N,)
        if _max(best, 0) > 0.0:
            opened += _sum(tl.where(logits > 0.0, 1.0, 0.0), 1)
            v = _load(v_at, tl.where(best > 0.0, j, KEYS), v_t, KEYS, E, W, True)  # only rows that a gate opens
            acc = tl.dot(tl.where(logits > 0.0, p, 0.0).to(v.dtype), v, acc, input_precision=PRECISION)
    at = ((b * H + h) * QUERIES + i) * splits + split
    tl.store(Acc + at[:, None] * E + wide[None, :], acc, mask=valid[:, None] & (wide < E)[None, :])
    tl.store(Top + at, top, mask=valid)
    tl.store(Total + at, total, mask=valid)
    tl.store(Opened + at, opened, mask=valid)


@triton.jit
def combine(
    Acc, Top, Total, Opened, Out, Count, o_b, o_h, o_t, H, QUERIES, splits,
    S: tl.constexpr, E: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """One query of one head: its chunks brought to one maximum and added."""
    row = tl.program_id(0).to(tl.int64)
    b, h, i = row // (H * QUERIES), row // QUERIES % H, row % QUERIES
    split, wide = tl.arange(0, S), tl.arange(0, W)
    there = split < splits
    at = row * splits + split
    tops = tl.load(Top + at, mask=there, other=float("-inf"))
    top = _max(tops, 0)
    share = tl.exp2(tops - _finite(top))
    total = _sum(share * tl.load(Total + at, mask=there, other=0.0), 0)
    opened = _sum(tl.load(Opened + at, mask=there, other=0.0), 0)
    accs = tl.load(Acc + at[:, None] * E + wide[None, :], mask=there[:, None] & (wide < E)[None, :], other=0.0)
    out = _sum(accs * share[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    where = Out + b * o_b + h * o_h + i * o_t + wide
    tl.store(where, out.to(Out.dtype.element_ty), mask=wide < E)
    tl.store(Count + row, opened)
