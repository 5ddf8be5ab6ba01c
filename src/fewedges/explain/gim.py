"""GIM: change a backward pass so that self-repair does not hide what matters.

Three rules (Edin, Csordas, Ruotsalo, Wu, Maistro, Huang, Maaloe 2025, arXiv:2505.17630; constants of its reference
implementation): norms pass gradients with their scale held constant; the softmax passes them with its Jacobian at
temperature 2; queries, keys and values receive 0.25, 0.25 and 0.5 of theirs. Values of the forward pass do not
change. Where we differ: gated models keep their gates; a norm's mean is not held constant, only its scale.

Shapes: B batch, H head, G key/value head, Q query, K key, E head width, D width.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewedges.errors import ModelError
from fewedges.explain.hooks import Wiring, swapped
from fewedges.model.anatomy import plain
from fewedges.model.attention import (
    allowed_keys,
    attention_by,
    attention_scores,
    attention_weights,
    register,
    repeat_heads,
)
from fewedges.sparsify.attention.gate import OPEN_BIAS, gate_logits, gates, key_bias
from fewedges.sparsify.attention.interface import GatePass

GIM = "fewedges-gim"
TEMPERATURE = 2.0
SHARES = (0.25, 0.25, 0.5)
"""Of query, key and value gradients."""


@contextmanager
def gim_rules(wiring: Wiring) -> Iterator[None]:
    """Run the model with GIM's backward rules, forward values unchanged."""
    register(GIM, gim_attention)
    norms = [norm for block in wiring.blocks for norm in (block.norm, block.mlp_norm)]
    with ExitStack() as stack:
        for norm in [*norms, wiring.final_norm]:
            stack.enter_context(swapped(norm, frozen(norm)))
        stack.enter_context(attention_by(plain(wiring.model), GIM))
        yield


def frozen(norm: nn.Module) -> Any:
    """The same norm whose scale is a constant to gradients; ModelError if it is no layer or RMS norm."""
    compute = norm.forward

    def held(x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        with torch.no_grad():
            whole, shift = compute(x), compute(torch.zeros_like(x[..., :1, :]))
            gain = _gain(compute, x, shift)
            centred = torch.allclose(compute(x + 1), whole, rtol=1e-2, atol=1e-2 * float(whole.abs().max()))
            mean = x.mean(-1, keepdim=True) if centred else torch.zeros_like(x[..., :1])
            direction = (x - mean) * gain
            size = direction.square().sum(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)  # 0 for padding
            scale = ((whole - shift) * direction).sum(-1, keepdim=True) / size
            if not torch.allclose(direction * scale + shift, whole, rtol=1e-2, atol=1e-2 * float(whole.abs().max())):
                raise ModelError("gim", f"{type(norm).__name__} is neither a layer norm nor an RMS norm", "gim=False")
        mean = x.mean(-1, keepdim=True) if centred else 0
        linear = (x - mean) * gain * scale
        return whole + linear - linear.detach()

    return held


def gim_attention(
    module: nn.Module,
    query: Float[Tensor, "B H Q E"],
    key: Float[Tensor, "B G K E"],
    value: Float[Tensor, "B G K E"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    gate_pass: GatePass | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "B Q H E"], None]:
    """Softmax attention, gated where the module has gates, with GIM's gradients."""
    query, key, value = (_scaled(x, share) for x, share in zip((query, key, value), SHARES, strict=True))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = attention_scores(query, key, scale, softcap)  # (B, H, Q, K)
    allowed = allowed_keys(attention_mask, key.shape[-2])
    weights = attention_weights(scores.detach(), allowed)
    soft = TEMPERATURE * attention_weights(scores / TEMPERATURE, allowed)
    weights = weights + soft - soft.detach()
    if hasattr(module, "gate_bias"):
        weights = weights * _gates(module, key, scores, scale, gate_pass or GatePass())
    output = weights.to(value.dtype) @ repeat_heads(value, query.shape[1])  # (B, H, Q, E)
    return output.transpose(1, 2).contiguous(), None


def _gates(module: nn.Module, key: Tensor, scores: Tensor, scale: float, run: GatePass) -> Tensor:
    bias: Tensor = module.gate_bias + run.offset  # type: ignore[operator]
    bias = torch.full_like(bias, OPEN_BIAS) if run.open_all else bias
    bias = key_bias(bias, getattr(module, "gate_query", None), key, scale)
    return gates(gate_logits(scores, bias), run.gating(module.layer_idx))  # type: ignore[arg-type]


def _scaled(x: Tensor, share: float) -> Tensor:
    """The same values, a share of the gradient."""
    return x.detach() + share * (x - x.detach())


def _gain(compute: Any, like: Tensor, shift: Tensor) -> Float[Tensor, "1 D"]:
    """The norm's own weights: what it makes of a large vector of mean 0."""
    width = like.shape[-1]
    vector = torch.ones(width, device=like.device, dtype=like.dtype)
    vector[1::2] = -1
    vector = vector - vector.mean()
    shown = compute((1e3 * vector).expand(*like.shape[:-2], 1, width)) - shift
    return (shown * vector.square().mean().sqrt() / vector).reshape(-1, width)[:1]
