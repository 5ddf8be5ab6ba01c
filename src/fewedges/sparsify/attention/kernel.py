"""Gated attention, fused: the mathematics of gate.py without ever storing a (T, T) tensor.

Causal self-attention only. A program owns a block of query rows (forward, dQ) or of keys (dK, dV) and walks
over the tiles of the causal triangle; tiles above the diagonal are never visited, those below are not masked.
The softmax is computed online over ALL causal keys (FlashAttention-2: Dao 2023, arXiv:2307.08691); gates
multiply its probabilities afterwards. Nothing random is stored: noise is a hash of (seed, b, h, i, j), drawn
again in both backward kernels. With p = softmax(S), D = rowsum(dO * O), z = G + noise and d = dO V^T,

    gate_grad = p * d * sigmoid'(z) + dExpected * sigmoid'(G)
    dS = gate_grad + p * (gate * d - D),   dBias[j] = sum_i gate_grad[i, j],   dV = (p * gate)^T dO,

where thresholded gates lose the first term, or keep it with z = G when straight-through. No atomics: the same
inputs give the same bits. Exponentials are base 2 with the scale folded in. With a = exp(G) and a uniform
number u no logarithm is left: sigmoid(G + logit(u)) = a u / (a u + 1 - u), open where (1 + a) u > 1.

Here: the operators and their launches. The device functions are in device.py; it and Triton are imported on
first use.
"""

import importlib
import os
from types import ModuleType
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fewedges.errors import ModelError
from fewedges.sparsify.attention.gate import Gated, _signed

LOG2E = 1.4426950408889634


class Tile(NamedTuple):
    """How one kernel cuts the triangle: query rows and keys per tile, warps, depth of the load pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """The three kernels of one training step."""

    forward: Tile
    query_grad: Tile
    key_grad: Tile


TILES = {  # (padded head width, bytes per number), the first row that is wide enough
    (64, 2): Tiles(Tile(64, 64, 4, 3), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)),
    (128, 2): Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 128, 8, 2)),
    (256, 2): Tiles(Tile(64, 32, 8, 1), Tile(64, 32, 8, 1), Tile(32, 64, 8, 1)),
    (64, 4): Tiles(Tile(64, 32, 8, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    (256, 4): Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
}


def fused_gated_attention(
    query: Float[Tensor, "B H T E"],
    key: Float[Tensor, "B G T E"],
    value: Float[Tensor, "B G T E"],
    bias: Float[Tensor, "H"] | Float[Tensor, "B H T"],
    seed: int | Int[Tensor, ""],
    *,
    scaling: float,
    sample: bool,
    straight_through: bool = False,
    tokens: Bool[Tensor, "B T"] | None = None,
) -> Gated:
    """Attend causally through gates; equals `gated_attention` with a causal `allowed` and the same seed.

    `tokens` says which keys are tokens, not padding (left, right, holes): no query sees the others.

    A `seed` tensor is read on the device: a new one neither recompiles nor waits. `scaling` is positive.
    Under autocast the inputs are cast as torch's own attention casts them. `sample` and `straight_through` as
    in `Gating`. Raises ModelError for shapes, dtypes and devices that the kernel does not know.
    """
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    _check(query, key, value, bias, scaling)
    if isinstance(seed, int):
        seed = torch.full((), _signed(seed), dtype=torch.int32, device=query.device)
    seed = seed.to(query.device, torch.int32)
    bias = (bias[:, None] if bias.dim() == 1 else bias).float().expand(query.shape[:3])  # no copy: strides of 0
    if tokens is not None:
        bias = bias.masked_fill(~tokens[:, None], torch.nan)  # no gradient there
    given = (query, key, value, bias, seed, scaling, sample, straight_through, tokens is not None)
    output, expected, opened, _ = _attend(*given)
    return Gated(output, expected, opened.detach())


def _check(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float) -> None:
    batch, heads, length, width = query.shape
    found = ", ".join(str(tuple(x.shape)) for x in (query, key, value, bias))
    asked, hint = "fused gated attention", "the plain gated_attention of gate.py"
    alike = tuple(key.shape) == tuple(value.shape) == (batch, key.shape[1], length, width)
    if not alike or heads % key.shape[1] or tuple(bias.shape) not in ((heads,), (batch, heads, length)):
        raise ModelError(asked, f"query, key, value, bias {found}: not self-attention of equal lengths", hint)
    if not query.dtype == key.dtype == value.dtype:
        raise ModelError(asked, f"dtypes {query.dtype}, {key.dtype}, {value.dtype}", "one dtype for all")
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ModelError(asked, f"dtype {query.dtype}", f"float32, bfloat16 or float16, or {hint}")
    if width > 256 or not scaling > 0:
        hint = f"a width up to 256, scaling > 0, or {hint}"
        raise ModelError(asked, f"head width {width}, scaling {scaling}", hint)


# ------------------------------------------------------------------------------------------------------------
# Operators: opaque to torch.compile, differentiable, with shapes known before anything runs.
# ------------------------------------------------------------------------------------------------------------

_SHARED = "Tensor query, Tensor key, Tensor value, Tensor bias, Tensor seed"
"""`bias` is NaN at keys that are padding, where the call is `padded`."""


@torch.library.custom_op(
    "fewedges::gated_attention",
    mutates_args=(),
    schema=f"({_SHARED}, float scaling, bool sample, bool straight, bool padded) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _attend(query, key, value, bias, seed, scaling, sample, straight, padded):
    """Output, expected and open gates, and the base-2 logsumexp that the backward pass needs."""
    kernels = _kernels(query.device)
    query, key, value = _rows(query), _rows(key), _rows(value)
    results = _attend_shapes(query, key, value, bias, seed, scaling, sample, straight, padded)
    tile = _tiles(query).forward
    with torch.cuda.device_of(query):
        kernels.forward[_grid(query, query, tile.rows)](
            query, key, value, bias, seed, *results, *bias.stride(),
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *results[0].stride()[:3],
            *_scalars(query, key), scaling * LOG2E, PADDED=padded, SAMPLE=sample, **_constants(query, tile),
        )  # fmt: skip
    return results


@_attend.register_fake
def _attend_shapes(query, key, value, bias, seed, scaling, sample, straight, padded):
    rows = (query.new_empty(query.shape[:3], dtype=torch.float32) for _ in range(3))
    return _heads_inside(query), *rows


@torch.library.custom_op(
    "fewedges::gated_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor grad_expected, {_SHARED}, Tensor output, Tensor log_total, float scaling, "
    "bool sample, bool straight, bool padded) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _pull_back(
    grad, grad_expected, query, key, value, bias, seed, output, log_total, scaling, sample, straight, padded
):
    """Gradients of query, key, value, bias. `query_grad` runs first: it leaves D and half the hash."""
    kernels = _kernels(query.device)
    query, key, value, grad, output = (_rows(x) for x in (query, key, value, grad, output))
    grad_query, grad_key, grad_value = _heads_inside(query), _heads_inside(key), _heads_inside(value)
    for_rows, for_keys = _tiles(query)[1:]
    delta, row_hash = torch.empty_like(log_total), torch.empty_like(log_total, dtype=torch.int32)
    grad_bias = torch.empty_like(log_total)
    inputs = (query, key, value, bias, seed, grad, grad_expected.contiguous(), log_total)
    strides = (s for x in (bias, query, key, value, grad) for s in x.stride()[:3])
    shared = (*strides, *_scalars(query, key), scaling * LOG2E, scaling)
    with torch.cuda.device_of(query):
        kernels.query_grad[_grid(query, query, for_rows.rows)](
            *inputs, delta, row_hash, output, grad_query,
            *output.stride()[:3], *grad_query.stride()[:3], *shared,
            PADDED=padded, SAMPLE=sample, STRAIGHT=straight, **_constants(query, for_rows),
        )  # fmt: skip
        kernels.key_grad[_grid(query, key, for_keys.keys)](
            *inputs, delta, row_hash, grad_key, grad_value, grad_bias,
            *grad_key.stride()[:3], *grad_value.stride()[:3], *shared,
            PADDED=padded, SAMPLE=sample, STRAIGHT=straight, **_constants(query, for_keys),
        )  # fmt: skip
    return grad_query, grad_key, grad_value, grad_bias


@_pull_back.register_fake
def _pull_back_shapes(
    grad, grad_expected, query, key, value, bias, seed, output, log_total, scaling, sample, straight, padded
):
    return _heads_inside(query), _heads_inside(key), _heads_inside(value), torch.empty_like(log_total)


def _save(ctx, inputs, output):
    *tensors, ctx.scaling, ctx.sample, ctx.straight, ctx.padded = inputs
    ctx.save_for_backward(*tensors, output[0], output[3])


def _differentiate(ctx, grad, grad_expected, _open, _log_total):
    options = ctx.scaling, ctx.sample, ctx.straight, ctx.padded
    return *_pull_back(grad, grad_expected, *ctx.saved_tensors, *options), *(None,) * 5


_attend.register_autograd(_differentiate, setup_context=_save)


def _heads_inside(x: Float[Tensor, "B H T E"]) -> Float[Tensor, "B H T E"]:
    """Allocate (B, T, H, E) seen as (B, H, T, E): the layout that transformers makes of it next, for free."""
    return x.new_empty((x.shape[0], x.shape[2], x.shape[1], x.shape[3])).transpose(1, 2)


def _rows(x: Float[Tensor, "B H T E"]) -> Float[Tensor, "B H T E"]:
    """Any strides will do, as long as the numbers of one head stand side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _padded(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def _tiles(query: Tensor) -> Tiles:
    size, width = query.element_size(), _padded(query.shape[3])
    return next(tiles for (limit, bytes_), tiles in TILES.items() if bytes_ == size and width <= limit)


def _grid(query: Tensor, owners: Tensor, block: int) -> tuple[int]:
    """One program per block of rows (or keys) of every head that owns them."""
    return (query.shape[0] * owners.shape[1] * -(-query.shape[2] // block),)


def _scalars(query: Tensor, key: Tensor) -> tuple[int, int, int]:
    return query.shape[1], key.shape[1], query.shape[2]


def _constants(query: Tensor, tile: Tile) -> dict[str, Any]:
    return {
        "E": query.shape[3],
        "W": _padded(query.shape[3]),
        "M": tile.rows,
        "N": tile.keys,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
        "NATIVE": not _interpreted(),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,  # multiply-adds in one instruction: from Triton 3.10 on not the default
    }


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _kernels(device: torch.device) -> ModuleType:
    """The device functions, or why there are none."""
    asked = "fused gated attention"
    if device.type != "cuda" and not _interpreted():
        hint = "gated_attention of gate.py, or TRITON_INTERPRET=1 to debug the kernel slowly"
        raise ModelError(asked, f"tensors on {device}, not on a GPU", hint)
    try:
        return importlib.import_module("fewedges.sparsify.attention.device")
    except ImportError as error:
        raise ModelError(asked, f"no working triton ({error})", "pip install 'fewedges[kernel]'") from error
