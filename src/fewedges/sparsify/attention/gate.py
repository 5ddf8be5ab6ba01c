"""Gated attention in plain PyTorch: the mathematics, and the reference every kernel is checked against.

    S    = scaling * q k^T                       (softcapped where the model softcaps)
    G    = S + bias[head]                        the gate's logit: the same scores, no new projection
           + scaling * w[head] k^T               (optional: a learned query that every query adds, in the gate alone)
    gate = 1[G + Logistic(0, 1) > 0]             sampled: training, gradient of sigmoid(G + noise)
    gate = 1[G > 0]                              hard: evaluation and generation
    Y    = (softmax(S) * gate) V                 softmax over all allowed keys; never renormalised
    edges = sum of sigmoid(G)                    expected open gates: what training minimises

Source: Draye, Lei, Pan, Posner, Schoelkopf 2025, arXiv:2512.05865; the gate is that of SPARTAN,
arXiv:2411.06890. Ours is the bias: theirs is one constant, ours may be learned per head, and by key through w. The
softmax needs a large score for its sink (the first token, mostly); without w the gate of that key could not close.
A row with no open gate gives output 0: a head that says nothing costs nothing.

Shapes: B batch, H head, Q query, K key, E head width; keys and values may have fewer heads (GQA).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fewedges.model.attention import attention_scores, attention_weights, repeat_heads

OPEN_BIAS = torch.inf  # every allowed gate open: exactly the dense model


@dataclass(frozen=True, kw_only=True)
class Gating:
    """How gates are decided in one forward pass."""

    sample: bool = False
    """Draw the gates (training) instead of thresholding them (evaluation)."""
    straight_through: bool = False
    """Let gradients of sigmoid(G) pass thresholded gates; sampled gates always do."""
    seed: int | Tensor = 0
    """Key of the counter-based noise; one per layer and step."""


class Gated(NamedTuple):
    """What gated attention returns; edges are per query, so that padding can be left out of any mean."""

    output: Float[Tensor, "B H Q E"]
    expected: Float[Tensor, "B H Q"]
    """Sum of sigmoid(G) over allowed keys: differentiable."""
    open: Float[Tensor, "B H Q"]
    """Number of keys with G > 0, the gates evaluation opens, also while sampling: what is reported."""


def gated_attention(
    query: Float[Tensor, "B H Q E"],
    key: Float[Tensor, "B G K E"],
    value: Float[Tensor, "B G K E"],
    bias: Float[Tensor, "H"] | Float[Tensor, "B H K"],
    allowed: Bool[Tensor, "#B 1 Q K"],
    *,
    scaling: float,
    softcap: float | None = None,
    gating: Gating = Gating(),
) -> Gated:
    """Attend through gates. `allowed` says which keys a query may see (causal, window, padding).

    A bias of +inf opens every gate and gives the dense model to the last bit the softmax allows.
    """
    scores = attention_scores(query, key, scaling, softcap)  # (B, H, Q, K)
    logits = gate_logits(scores, bias)  # (B, H, Q, K)
    weights = attention_weights(scores, allowed) * gates(logits, gating)
    output = weights.to(value.dtype) @ repeat_heads(value, query.shape[1])  # (B, H, Q, E)
    expected = (torch.sigmoid(logits) * allowed).sum(-1)
    return Gated(output, expected, ((logits.detach() > 0) & allowed).sum(-1).to(expected.dtype))


def key_bias(
    bias: Float[Tensor, "H"], extra: Float[Tensor, "H E"] | None, key: Float[Tensor, "B G K E"], scaling: float
) -> Float[Tensor, "H"] | Float[Tensor, "B H K"]:
    """The gate bias as a key sees it: its head's, and scaling * w k where the head has a gate query w (`extra`)."""
    if extra is None:
        return bias
    batch, groups, keys, width = key.shape
    with torch.autocast(key.device.type, enabled=False):
        exact = torch.promote_types(key.dtype, extra.dtype)
        shift = key.to(exact) @ extra.to(exact).view(groups, -1, width).mT  # (B, G, K, H/G)
    return bias[:, None] + scaling * shift.transpose(2, 3).reshape(batch, -1, keys)  # (B, H, K)


def gate_logits(
    scores: Float[Tensor, "B H Q K"], bias: Float[Tensor, "H"] | Float[Tensor, "B H K"]
) -> Float[Tensor, "B H Q K"]:
    """G: the scores plus a bias per head, or per head and key."""
    bias = bias.to(scores.dtype)
    return scores + (bias[:, None, None] if bias.dim() == 1 else bias[:, :, None, :])


def gates(logits: Float[Tensor, "B H Q K"], gating: Gating) -> Float[Tensor, "B H Q K"]:
    """The 0/1 gates of these logits G; straight-through: their gradient is that of sigmoid(G + noise)."""
    if gating.sample:
        uniform = uniform_noise(gating.seed, logits.shape, logits.device)
        logits = logits + logistic_noise(uniform).to(logits.dtype)
    hard = (logits > 0).to(logits.dtype)
    if not (gating.sample or gating.straight_through):
        return hard
    soft = torch.sigmoid(logits)
    return hard + (soft - soft.detach())


# ------------------------------------------------------------------------------------------------------------
# Noise from a counter: a function of (seed, b, h, i, j) alone, so that the backward pass of a kernel can draw
# it again, a resumed run sees the same gates, and reference and kernel agree bit for bit.
# ------------------------------------------------------------------------------------------------------------

GOLDEN = 0x9E3779B9
HASH_1, HASH_2 = 0x7FEB352D, 0x846CA68B  # "lowbias32" multipliers (C. Wellons, 2018, public domain)


def uniform_noise(seed: int | Tensor, shape: Sequence[int], device: torch.device) -> Float[Tensor, "B H Q K"]:
    """Uniform (0, 1) numbers with 23 bits, never 0 or 1, for entry (b, h, i, j) of `shape` = (B, H, Q, K).

    row = mix(mix(seed) ^ ((b * H + h) * Q + i)),   u = (mix(row + j * GOLDEN) >> 9 + 1/2) / 2^23,
    all in wrapping 32-bit integers, where mix is lowbias32.
    """
    batch, heads, queries, keys = shape
    row = torch.arange(batch * heads * queries, device=device, dtype=torch.int32).view(batch, heads, queries, 1)
    column = torch.arange(keys, device=device, dtype=torch.int32) * _signed(GOLDEN)
    start = torch.as_tensor(_signed(seed) if isinstance(seed, int) else seed, dtype=torch.int32, device=device)
    bits = _mix(_mix(_mix(start) ^ row) + column)
    return (_shift(bits, 9).float() + 0.5) * 2.0**-23


def logistic_noise(uniform: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """The logit of uniform numbers: Logistic(0, 1)."""
    return torch.log(uniform) - torch.log1p(-uniform)


def _mix(x: Int[Tensor, "*N"]) -> Int[Tensor, "*N"]:
    x = (x ^ _shift(x, 16)) * _signed(HASH_1)
    x = (x ^ _shift(x, 15)) * _signed(HASH_2)
    return x ^ _shift(x, 16)


def _shift(x: Int[Tensor, "*N"], by: int) -> Int[Tensor, "*N"]:
    """Logical right shift of 32-bit integers that torch keeps signed."""
    return (x >> by) & ((1 << (32 - by)) - 1)


def _signed(x: int) -> int:
    """The same 32 bits as a signed integer."""
    return ((x + 2**31) % 2**32) - 2**31
