"""Gated attention with hard gates, for prefill and decoding: exact, and V is read only where a gate is open.

    Y = (softmax(S) * 1[S + bias > 0]) V

The softmax is over ALL allowed keys, so every score is needed for its denominator, however few gates are open:
q k^T and one exponential per entry remain. What goes is the reading of V and the product with it, and with them
the output's accumulator and its rescaling in the loop. Two ways to do it, both exact:

- "gather": a walk over all keys adds up the denominators and marks the keys that any query of its block opens;
  then K and V of the marked keys alone are gathered. The sparse SmolLM2 opens 39, 41 and 53 different keys per 64
  queries at T = 512, 1024 and 2048 (results/smollm2/open_tiles.json): less than one tile of 64.
- "skip": FlashAttention's walk, in which a tile without open gates skips V. Of the same model's 64 x 64 tiles
  66, 42 and 30 % have one, so the product is saved but partly, and its accumulator not at all.

With one bias per head the row maximum, which the softmax needs anyway, says whether a tile has an open gate.
Bounds on a block's scores (per-channel minima and maxima, as in Quest: Tang et al. 2024, arXiv:2406.10774; or
Cauchy-Schwarz around the block's mean) closed not one tile of the same model, and a closed tile still counts in
the denominator, where 0.1 % of the tiles weigh less than 2^-24: no tile can be left out unread. Decoding splits
the keys over programs (flash-decoding: Dao et al. 2023) and packs the queries that share a key/value head; it
reads all of K and the opened rows of V: at best half the bytes.

Shapes: B batch, H head, G key/value head, Q query, K key, E head width. The last query stands at the last key.
Nothing here has a gradient.
"""

import importlib
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fewedges.errors import ModelError
from fewedges.sparsify.attention.kernel import LOG2E, _heads_inside, _interpreted, _padded, _rows

ASKED = "hard-gated attention"
HINT = "the plain gated_attention of gate.py"


class Hard(NamedTuple):
    """What hard-gated attention returns."""

    output: Float[Tensor, "B H Q E"]
    open: Float[Tensor, "B H Q"]
    """Number of open gates per query."""


class Walk(NamedTuple):
    """How a kernel cuts the scores: query rows and keys per tile, gathered keys per tile, warps, pipeline depth."""

    rows: int
    keys: int
    gathered: int
    warps: int
    stages: int
    registers: int | None = None
    """Most registers per thread: what the compiler spills is mostly needed in tiles with open gates only."""


PREFILL = {  # (padded head width, bytes per number), the first row that is wide enough
    (64, 2): Walk(64, 64, 64, 4, 3),
    (128, 2): Walk(64, 64, 64, 4, 3),
    (256, 2): Walk(64, 64, 32, 8, 2),
    (64, 4): Walk(64, 32, 32, 8, 1),
    (256, 4): Walk(32, 32, 32, 8, 1),
}
DECODE = {
    (128, 2): Walk(16, 64, 0, 4, 3),
    (256, 2): Walk(16, 32, 0, 4, 2),
    (128, 4): Walk(16, 32, 0, 4, 2),
    (256, 4): Walk(16, 16, 0, 4, 2),
}
SPAN = 2048
"""Keys between two gatherings, a power of two: the list of a block of queries never holds more."""
CHUNK = 256
"""Fewest keys a program of the decoding walks over."""
MOST_SPLITS = 64
PACKED = 64
"""Most (query, head) rows per key/value head that decoding packs; more are a prefill."""


def hard_gated_attention(
    query: Float[Tensor, "B H Q E"],
    key: Float[Tensor, "B G K E"],
    value: Float[Tensor, "B G K E"],
    bias: Float[Tensor, "H"] | Float[Tensor, "B H K"],
    *,
    scaling: float,
    start: Int[Tensor, "B"] | None = None,
    stop: Int[Tensor, "B"] | None = None,
    softcap: float | None = None,
    way: Literal["gather", "skip"] = "gather",
) -> Hard:
    """Attend causally through hard gates; equals `gated_attention` with the mask of `causal_range`.

    Query i stands at key K - Q + i and sees the keys up to there within its batch row's [start, stop); queries
    outside of it are padding and give 0. `bias` as in `gated_attention`; `way`: how a prefill leaves V out.
    Raises ModelError for shapes, dtypes and devices that the kernel does not know, and where a gradient is due.
    """
    _check(query, key, value, bias, scaling, softcap)
    if (start is None) != (stop is None):
        raise ModelError(ASKED, "start without stop, or stop without start", "both or neither")
    limits = [None if x is None else x.to(query.device, torch.int32).contiguous() for x in (start, stop)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, bias)):
        raise ModelError(ASKED, "a gradient is asked for, and it has none", f"torch.no_grad(), or {HINT}")
    if way not in ("gather", "skip"):
        raise ModelError(ASKED, f"way={way!r}", "gather or skip")
    return Hard(*_attend_hard(query, key, value, bias.float(), *limits, scaling, way))


def key_range(mask: Bool[Tensor, "B K"]) -> tuple[Int[Tensor, "B"], Int[Tensor, "B"]]:
    """The [start, stop) of each row of a padding mask (True: a token), left, right or both.

    A hole between tokens cannot be said this way and is not looked for: that would wait for the GPU.
    """
    places = torch.arange(mask.shape[1], device=mask.device, dtype=torch.int32)
    start = torch.where(mask, places, mask.shape[1]).amin(1)
    return start, torch.where(mask, places + 1, 0).amax(1)


def causal_range(
    queries: int, keys: int, start: Int[Tensor, "B"] | None = None, stop: Int[Tensor, "B"] | None = None
) -> Bool[Tensor, "#B 1 Q K"]:
    """Which keys each query may see, written out: what `allowed` of gated_attention must be to give the same."""
    place = torch.arange(queries)[:, None] + keys - queries
    key = torch.arange(keys)
    if start is None or stop is None:
        return (key <= place)[None, None]
    first, last = start.cpu()[:, None, None, None], stop.cpu()[:, None, None, None]
    return ((key <= place) & (key >= first) & (place >= first) & (place < last)).to(start.device)


def _check(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float, softcap: float | None = None
) -> None:
    batch, heads, queries, width = query.shape
    keys = key.shape[2]
    found = ", ".join(str(tuple(x.shape)) for x in (query, key, value, bias))
    alike = tuple(key.shape) == tuple(value.shape) == (batch, key.shape[1], keys, width)
    biases = ((heads,), (batch, heads, keys))
    if not alike or heads % key.shape[1] or tuple(bias.shape) not in biases or not 1 <= queries <= keys:
        raise ModelError(ASKED, f"query, key, value, bias {found}", f"at least as many keys as queries, or {HINT}")
    if not query.dtype == key.dtype == value.dtype:
        raise ModelError(ASKED, f"dtypes {query.dtype}, {key.dtype}, {value.dtype}", "one dtype for all")
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ModelError(ASKED, f"dtype {query.dtype}", f"float32, bfloat16 or float16, or {HINT}")
    if width > 256 or not scaling > 0 or softcap is not None:
        found = f"head width {width}, scaling {scaling}, softcap {softcap}"
        raise ModelError(ASKED, found, f"a width up to 256, scaling > 0, no softcap, or {HINT}")


# ------------------------------------------------------------------------------------------------------------
# The operator: opaque to torch.compile, with shapes known before anything runs.
# ------------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "fewedges::hard_gated_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor bias, Tensor? start, Tensor? stop, float scaling, "
    "str way) -> (Tensor, Tensor)",
)
def _attend_hard(query, key, value, bias, start, stop, scaling, way):
    kernels = _kernels(query.device)
    query, key, value = _rows(query), _rows(key), _rows(value)
    results = _attend_hard_shapes(query, key, value, bias, start, stop, scaling, way)
    packed = query.shape[1] // key.shape[1] * query.shape[2]
    launch = _decode if packed <= PACKED and query.shape[2] < key.shape[2] else _prefill
    with torch.cuda.device_of(query):
        launch(kernels, query, key, value, bias, start, stop, scaling, way, *results)
    return results


@_attend_hard.register_fake
def _attend_hard_shapes(query, key, value, bias, start, stop, scaling, way):
    return _heads_inside(query), query.new_empty(query.shape[:3], dtype=torch.float32)


def _prefill(kernels, query, key, value, bias, start, stop, scaling, way, output, opened) -> None:
    walk = _walk(PREFILL, query)
    programs = query.shape[0] * query.shape[1] * -(-query.shape[2] // walk.rows)
    span = min(SPAN, max(walk.keys, 1 << (key.shape[2] - 1).bit_length()))
    before = (query, key, value, bias, start, stop)
    after = (
        output, opened, *_strides(query, key, value, _by_key(bias, query, key), output),
        *_counts(query, key), scaling * LOG2E,
    )  # fmt: skip
    options = {"BY_KEY": bias.dim() == 3, "RANGED": start is not None, **_constants(query, walk)}
    if way == "skip":
        kernels.prefill_skip[(programs,)](*before, *after, **options)
    else:
        marks, listed = (query.new_empty((programs, span), dtype=kind) for kind in (torch.int8, torch.int16))
        kernels.prefill_gather[(programs,)](*before, marks, listed, *after, SPAN=span, C=walk.gathered, **options)


def _decode(kernels, query, key, value, bias, start, stop, scaling, way, output, opened) -> None:
    (batch, heads, queries, width), (groups, keys) = query.shape, key.shape[1:3]
    walk = _walk(DECODE, query)
    walk = walk._replace(rows=max(walk.rows, _padded(heads // groups * queries)))
    chunk, splits = _splits(keys, batch * groups, walk.keys, query.device)
    sizes = (batch * heads * queries, splits)
    parts = query.new_empty((*sizes, width), dtype=torch.float32)
    tops, totals, counts = (query.new_empty(sizes, dtype=torch.float32) for _ in range(3))
    kernels.decode[(batch * groups * splits,)](
        query, key, value, bias, start, stop, parts, tops, totals, counts,
        *_strides(query, key, value, _by_key(bias, query, key)), *_counts(query, key), chunk, splits,
        scaling * LOG2E, RANGED=start is not None, **_constants(query, walk),
    )  # fmt: skip
    kernels.combine[(batch * heads * queries,)](
        parts, tops, totals, counts, output, opened, *output.stride()[:3], heads, queries, splits,
        S=max(2, 1 << (splits - 1).bit_length()), E=width, W=_padded(width), num_warps=4,
    )  # fmt: skip


def _splits(keys: int, pairs: int, tile: int, device: torch.device) -> tuple[int, int]:
    """Keys per program and programs per (batch row, key/value head): about four programs per processor."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    splits = max(1, min(-(-keys // CHUNK), -(-4 * processors // pairs), MOST_SPLITS))
    chunk = -(-keys // (splits * tile)) * tile
    return chunk, -(-keys // chunk)


def _by_key(bias: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The bias seen as (B, H, K): strides of 0 where it is one number per head."""
    bias = bias[:, None] if bias.dim() == 1 else bias
    return bias.expand(query.shape[0], query.shape[1], key.shape[2])


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(s for x in tensors for s in x.stride()[:3])


def _counts(query: Tensor, key: Tensor) -> tuple[int, int, int, int]:
    return query.shape[1], key.shape[1], query.shape[2], key.shape[2]


def _walk(walks: dict[tuple[int, int], Walk], query: Tensor) -> Walk:
    size, width = query.element_size(), _padded(query.shape[3])
    return next(walk for (limit, bytes_), walk in walks.items() if bytes_ == size and width <= limit)


def _constants(query: Tensor, walk: Walk) -> dict[str, Any]:
    return {
        "E": query.shape[3],
        "W": _padded(query.shape[3]),
        "M": walk.rows,
        "N": walk.keys,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
        "num_warps": walk.warps,
        "num_stages": walk.stages,
        "maxnreg": walk.registers,
        "enable_fp_fusion": True,  # as in kernel.py
    }


def _kernels(device: torch.device) -> ModuleType:
    """The device functions, or why there are none."""
    if device.type != "cuda" and not _interpreted():
        hint = f"{HINT}, or TRITON_INTERPRET=1 to debug the kernel slowly"
        raise ModelError(ASKED, f"tensors on {device}, not on a GPU", hint)
    try:
        return importlib.import_module("fewedges.sparsify.attention.inference_device")
    except ImportError as error:
        raise ModelError(ASKED, f"no working triton ({error})", "pip install 'fewedges[kernel]'") from error
