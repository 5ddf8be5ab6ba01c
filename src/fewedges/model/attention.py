"""The one door into a model's attention: transformers' AttentionInterface, function and mask together.

Registering the function alone hands it `attention_mask=None` and the model is silently non-causal (its logits
moved by .08 to .51 on 11 models), so `register` always registers both, and `allowed_keys` refuses None.

Shapes: B batch, H head, G key/value head, Q query, K key, E head width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fewedges.errors import ModelError, ProbeError

CAUSAL = "fewedges-causal"
FIXED = "fewedges-fixed"
"""Fixed patterns, attached by sparsify.attending: known here, so that every stage can tell."""


def register(name: str, function: Callable[..., Any]) -> None:
    """Register an attention function and the boolean mask it needs under one name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, boolean_mask)


def register_maskless(name: str, function: Callable[..., Any]) -> None:
    """Register a function that is causal by itself: no (Q, K) mask is built, it is handed which keys are tokens."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, padding_mask)


def padding_mask(
    *_: Any, kv_length: int, attention_mask: Tensor | None = None, **__: Any
) -> Bool[Tensor, "B K"] | None:
    """Hand the padding mask through as it is, (B, K), True at tokens; None where there is no padding to know of."""
    return None if attention_mask is None else attention_mask[:, :kv_length].bool()


def register_causal() -> None:
    """Register `CAUSAL`: torch's causal attention, without softcap or sliding window."""
    register_maskless(CAUSAL, causal_attention)


def causal_attention(
    module: nn.Module,
    query: Float[Tensor, "B H T E"],
    key: Float[Tensor, "B G T E"],
    value: Float[Tensor, "B G T E"],
    attention_mask: Bool[Tensor, "B T"] | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "B T H E"], None]:
    """Flash attention over the whole causal triangle, in the interface's signature; padding costs a mask."""
    check_plain(query, key, softcap, sliding_window)
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    allowed = None
    if attention_mask is not None:
        length = query.shape[2]
        causal = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        allowed = causal & attention_mask[:, None, None]  # (B, 1, T, T)
    output = nn.functional.scaled_dot_product_attention(
        query.to(value.dtype), key.to(value.dtype), value, attn_mask=allowed, is_causal=allowed is None, scale=scaling
    )
    return output.transpose(1, 2).contiguous(), None


def check_plain(query: Tensor, key: Tensor, softcap: float | None, window: int | None) -> None:
    """Refuse what attention over the whole causal triangle cannot express."""
    length = query.shape[-2]
    if softcap is not None or key.shape[-2] != length or (window is not None and window < length):
        found = "this layer has a softcap, a cache or a sliding window shorter than the input"
        raise ModelError("kernel=triton", found, "kernel=reference")


def boolean_mask(*args: Any, **kwargs: Any) -> Bool[Tensor, "B 1 Q K"]:
    """Build the mask of transformers' SDPA path as booleans, and never leave it out."""
    from transformers.masking_utils import sdpa_mask

    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    kwargs.pop("dtype", None)
    return sdpa_mask(*args, **kwargs)  # type: ignore[return-value]  # None only where a skip is allowed


def has_patterns(model: Any) -> bool:
    """Whether the model attends through fixed patterns."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None) == FIXED


def refuse_patterns(asked: str, *models: Any) -> None:
    """Raise ModelError where one of the models has fixed patterns: for what would go on without them, unsaid."""
    if any(has_patterns(model) for model in models):
        found = "fixed attention patterns are attached (attend_): they are no part of the weights and would be lost"
        hint = "the same outside `attending`, or after `sparsify.attending.detach_patterns_`; attach them again later"
        raise ModelError(asked, found, hint)


@contextmanager
def attention_by(model: Any, name: str) -> Iterator[None]:
    """Run the model's attention through the function registered under `name`; put the old one back.

    Raises ModelError where fixed patterns are attached: they would not be run.
    """
    refuse_patterns(f"run attention by {name}", model)
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def allowed_keys(mask: Tensor | None, keys: int) -> Bool[Tensor, "B 1 Q K"]:
    """Turn what transformers hands over into booleans; a missing mask is an error, never "all allowed"."""
    if mask is None:
        raise ProbeError(
            "attention through fewedges",
            "no mask arrived, the model would not be causal",
            "a decoder that builds its masks with transformers.masking_utils",
        )
    allowed = mask if mask.dtype == torch.bool else mask >= 0
    return allowed[..., :keys]


def dense_attention(
    module: nn.Module,
    query: Float[Tensor, "B H Q E"],
    key: Float[Tensor, "B G K E"],
    value: Float[Tensor, "B G K E"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "B Q H E"], Float[Tensor, "B H Q K"]]:
    """Plain softmax attention in the interface's signature: what the probes compare a model with."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = attention_scores(query, key, scale, softcap)
    weights = attention_weights(scores, allowed_keys(attention_mask, key.shape[-2]))
    output = weights.to(value.dtype) @ repeat_heads(value, query.shape[1])  # (B, H, Q, E)
    return output.transpose(1, 2).contiguous(), weights


def attention_scores(
    query: Float[Tensor, "B H Q E"],
    key: Float[Tensor, "B G K E"],
    scaling: float,
    softcap: float | None = None,
) -> Float[Tensor, "B H Q K"]:
    """Scale and softcap the scores, in at least float32."""
    scores = (query @ repeat_heads(key, query.shape[1]).transpose(-1, -2)) * scaling
    scores = scores if scores.dtype == torch.float64 else scores.float()
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def attention_weights(scores: Float[Tensor, "B H Q K"], allowed: Bool[Tensor, "#B 1 Q K"]) -> Float[Tensor, "B H Q K"]:
    """Softmax over the allowed keys; 0 everywhere in a row that allows none."""
    masked = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    return torch.softmax(masked, dim=-1) * allowed


def repeat_heads(kv: Float[Tensor, "B G K E"], heads: int) -> Float[Tensor, "B H K E"]:
    """Give every query head its key/value head (GQA)."""
    return kv if kv.shape[1] == heads else kv.repeat_interleave(heads // kv.shape[1], dim=1)
