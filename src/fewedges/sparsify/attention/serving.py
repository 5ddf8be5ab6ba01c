"""Run a gated model through the hard-gate kernel of inference.py: prefill, scoring and generation on a GPU.

    with fe.hard_kernel(sparse.model):
        sparse.model.generate(...)

An explicit choice, for the length of a `with`: outside of it nothing changes. What the kernel cannot do (sampled gates,
maps, gradients, softcaps, a sliding window shorter than the keys) is an error inside, never a silent fallback.
A cache must grow with the text (transformers' default); a preallocated StaticCache hides where the text ends.

Shapes: B batch, H head, G key/value head, Q query, K key, E head width.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fewedges.errors import ModelError
from fewedges.model.anatomy import plain
from fewedges.model.attention import attention_by, register_maskless
from fewedges.sparsify.attention.gate import OPEN_BIAS, key_bias
from fewedges.sparsify.attention.inference import hard_gated_attention, key_range
from fewedges.sparsify.attention.interface import HARD, GatePass, is_gated

log = logging.getLogger(__name__)


@contextmanager
def hard_kernel(model: Any) -> Iterator[None]:
    """Run the attention of a gated model through the hard-gate kernel; put the old function back at the end."""
    if not is_gated(model):
        raise ModelError("hard_kernel", f"{type(model).__name__} has no gates", "a sparse model")
    register_maskless(HARD, hard_forward)
    log.info("attention of %s: hard gates, fused kernel", type(plain(model)).__name__)
    with attention_by(plain(model), HARD):
        yield


def hard_forward(
    module: nn.Module,
    query: Float[Tensor, "B H Q E"],
    key: Float[Tensor, "B G K E"],
    value: Float[Tensor, "B G K E"],
    attention_mask: Bool[Tensor, "B K"] | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    gate_pass: GatePass | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "B Q H E"], None]:
    """Attend through hard gates, in the AttentionInterface's signature."""
    run = GatePass() if gate_pass is None else gate_pass
    _check(run, key, sliding_window)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    bias: Tensor = module.gate_bias + run.offset  # type: ignore[operator]
    bias = torch.full_like(bias, OPEN_BIAS) if run.open_all else bias
    bias = key_bias(bias, getattr(module, "gate_query", None), key, scale)
    start, stop = (None, None) if attention_mask is None else key_range(attention_mask)
    dtype = value.dtype
    result = hard_gated_attention(
        query.to(dtype), key.to(dtype), value, bias, scaling=scale, start=start, stop=stop, softcap=softcap
    )
    run.open[module.layer_idx] = result.open  # type: ignore[index]
    return result.output.transpose(1, 2).contiguous(), None


def _check(run: GatePass, key: Tensor, window: int | None) -> None:
    if run.sample or run.straight_through or run.keep_maps:
        raise ModelError("hard_kernel", "sampled gates, gradients or maps asked of it", "the model outside of it")
    if window is not None and window < key.shape[-2]:
        found = f"a layer with a sliding window of {window}, {key.shape[-2]} keys"
        raise ModelError("hard_kernel", found, "the model outside of it")
