"""The two losses every post-training here is built of: KL to the dense model, and next-token cross-entropy.

Shapes: B batch, T token, V vocabulary.
"""

import functools
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

CHUNK = 2**26
"""Largest number of float32 logits in flight at once (256 MiB)."""


class Losses(NamedTuple):
    """Means over counted predictions, in nats per token; only `objective` carries a gradient."""

    objective: Float[Tensor, ""]
    """kl_weight * kl + loss_weight * cross_entropy."""
    kl: Float[Tensor, ""]
    """KL(dense || student)."""
    cross_entropy: Float[Tensor, ""]
    dense_cross_entropy: Float[Tensor, ""]


def losses(
    student: Float[Tensor, "B T V"],
    dense: Float[Tensor, "B T V"],
    tokens: Int[Tensor, "B T"],
    counts: Bool[Tensor, "B T"],
    *,
    kl_weight: float = 1.0,
    loss_weight: float = 0.0,
    total: int | Float[Tensor, ""] | None = None,
    fused: bool = False,
) -> Losses:
    """Compare a student's logits with the dense model's and with the text.

    `total` is the number of counted predictions to divide by (a whole batch's, when this is one of its
    micro-batches). Gradients with respect to the student's logits are formed chunk by chunk in the forward pass, as
    kl_weight (q - p) + loss_weight (q - onehot), so no second float32 copy of the logits is ever kept. `fused`
    compiles that arithmetic (worth it on a GPU).
    """
    divisor = torch.as_tensor(counts[:, 1:].sum() if total is None else total).clamp(min=1)
    compare = _compiled() if fused else _compare
    return Losses(*_Losses.apply(student, dense, tokens, counts, kl_weight, loss_weight, divisor, compare))


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student, dense, tokens, counts, kl_weight, loss_weight, divisor, compare):  # type: ignore[no-untyped-def]
        windows = max(1, CHUNK // (student.shape[1] * student.shape[2]))
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        sums = torch.zeros(3, device=student.device, dtype=_wide(student[:0]).dtype)
        for start in range(0, student.shape[0], windows):
            rows = slice(start, start + windows)
            weight = counts[rows, 1:].to(sums.dtype) / divisor  # (b, T-1)
            part = (student[rows, :-1], dense[rows, :-1], tokens[rows, 1:], weight)
            if gradient is None:
                sums += _sums(*part)[0]
                continue
            now, slope = compare(*part, kl_weight, loss_weight)
            sums += now
            gradient[rows, :-1] = slope
            gradient[rows, -1] = 0
        ctx.save_for_backward(gradient)
        kl, cross_entropy, dense_cross_entropy = sums.unbind()
        objective = kl_weight * kl + loss_weight * cross_entropy
        ctx.mark_non_differentiable(kl, cross_entropy, dense_cross_entropy)
        return objective, kl, cross_entropy, dense_cross_entropy

    @staticmethod
    def backward(ctx: Any, upstream, *_):  # type: ignore[no-untyped-def]
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None, None, None, None, None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _sums(
    student: Tensor, dense: Tensor, targets: Tensor, weight: Tensor
) -> tuple[Float[Tensor, "3"], Float[Tensor, "B T V"], Float[Tensor, "B T V"]]:
    """Weighted sums of KL, cross-entropy and dense cross-entropy, and both models' log-probabilities."""
    log_q, log_p = torch.log_softmax(_wide(student), -1), torch.log_softmax(_wide(dense), -1)
    at = targets[..., None]
    kl = (weight * (log_p.exp() * (log_p - log_q)).sum(-1)).sum()
    cross_entropy = -(weight * log_q.gather(-1, at)[..., 0]).sum()
    dense_cross_entropy = -(weight * log_p.gather(-1, at)[..., 0]).sum()
    return torch.stack([kl, cross_entropy, dense_cross_entropy]), log_q, log_p


def _compare(
    student: Tensor, dense: Tensor, targets: Tensor, weight: Tensor, kl_weight: float, loss_weight: float
) -> tuple[Float[Tensor, "3"], Float[Tensor, "B T V"]]:
    """The sums, and the objective's slope in the student's logits."""
    sums, log_q, log_p = _sums(student, dense, targets, weight)
    q, p = log_q.exp(), log_p.exp()
    onehot = torch.arange(q.shape[-1], device=q.device) == targets[..., None]
    slope = (kl_weight + loss_weight) * q - kl_weight * p - loss_weight * onehot.to(q.dtype)
    return sums, (slope * weight[..., None]).to(student.dtype)


@functools.cache
def _compiled() -> Any:
    """`_compare` as one fused kernel: on an H100 the eager form moves a dozen (B, T, V) float32 arrays."""
    return torch.compile(_compare, dynamic=False)
