"""Six self-checks of a model in memory: called, causal, padding, decode, dense-equal, finite.

They run after load, after sparsify and after reload, on prompts of a few tokens, because each fault they look for
is silent: a gated model that never calls its gates, a mask that did not arrive, a cache that sees the future.
A probe that fails raises ProbeError with the number it measured; `check` returns those numbers when all pass.

A hard gate may flip when rounding moves its score across 0, and then the logits jump. That is rare (in float32) and
not a fault, so each comparison is made on several prompts and its median counts: a fault shows on all of them.
"""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fewedges.errors import ProbeError
from fewedges.model.anatomy import Anatomy, example_tokens, plain
from fewedges.model.attention import attention_by, dense_attention, register

DENSE = "fewedges-dense"
PROMPTS = 5
LENGTH = 9

Forward = Callable[..., Any]


def check(
    model: Any, anatomy: Anatomy, *, options: dict[str, Any] | None = None, calls: int | None = None
) -> dict[str, float]:
    """Run all probes; return what each measured (largest difference of logits), or raise ProbeError.

    `options` are passed to every forward pass (a gated model's way to open all gates). `calls` is the number of
    gated layers a gated model reported, to compare with the anatomy.
    """
    found = {"finite": finite(model)}
    with torch.no_grad():
        found["called"] = called(model, anatomy, calls)
        forward = _with(model, options or {})
        for probe in (causal, padding, decode):
            found[probe.__name__] = probe(model, anatomy, forward)
        found["dense_equal"] = dense_equal(model, anatomy, forward)
    return found


def finite(model: nn.Module) -> float:
    """Scan every parameter and buffer for NaN and inf (CPU attention can turn a NaN into clean zeros)."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        bad = tensor.isnan() if name.endswith("gate_bias") else ~tensor.isfinite()  # an infinite bias is a choice
        if bool(bad.any()):
            raise ProbeError("probe finite", f"{name} holds NaN or inf", "a fresh copy of the checkpoint")
    return 0.0


def called(model: Any, anatomy: Anatomy, calls: int | None) -> float:
    """Every layer goes through the attention function: none silently stays dense."""
    layers = len(anatomy.layers)
    seen = _count_calls(model, anatomy) if calls is None else calls
    if seen != layers:
        raise ProbeError("probe called", f"{seen} of {layers} layers called the attention function", "fe.load again")
    return float(seen)


def causal(model: Any, anatomy: Anatomy, forward: Forward) -> float:
    """Changing the last tokens leaves the logits before them alone."""

    def difference(tokens: Int[Tensor, "1 T"]) -> float:
        changed = tokens.clone()
        changed[:, -3:] = (changed[:, -3:] + 1) % anatomy.vocabulary
        before, after = forward(tokens), forward(changed)
        return _gap(before[:, :-3], after[:, :-3])

    return _judge("causal", model, anatomy, difference, "the model is not a causal decoder")


def padding(model: Any, anatomy: Anatomy, forward: Forward) -> float:
    """Left and right padding leave the logits of the real tokens alone."""

    def difference(tokens: Int[Tensor, "1 T"]) -> float:
        plain_logits = forward(tokens)
        left = _padded(forward, tokens, left=True)[:, -LENGTH:]
        right = _padded(forward, tokens, left=False)[:, :LENGTH]
        return max(_gap(plain_logits, left), _gap(plain_logits, right))

    return _judge("padding", model, anatomy, difference, "padding leaks into attention")


def decode(model: Any, anatomy: Anatomy, forward: Forward) -> float:
    """Decoding token by token through the key-value cache equals one full forward pass."""

    def difference(tokens: Int[Tensor, "1 T"]) -> float:
        full = forward(tokens)
        first = forward(tokens[:, :4], raw=True, use_cache=True)
        logits, cache = [first.logits], first.past_key_values
        for t in range(4, LENGTH):
            step = forward(tokens[:, t : t + 1], raw=True, use_cache=True, past_key_values=cache)
            logits, cache = [*logits, step.logits], step.past_key_values
        return _gap(full, torch.cat(logits, dim=1))

    return _judge("decode", model, anatomy, difference, "the key-value cache disagrees with the full pass")


def dense_equal(model: Any, anatomy: Anatomy, forward: Forward) -> float:
    """`forward` (gates all open, if there are any) equals plain softmax attention in every layer."""
    register(DENSE, dense_attention)
    base = plain(model)

    def difference(tokens: Int[Tensor, "1 T"]) -> float:
        mine = forward(tokens)
        with attention_by(base, DENSE):
            reference = model(input_ids=tokens, use_cache=False).logits
        return _gap(mine, reference)

    return _judge("dense_equal", model, anatomy, difference, "its attention is more than softmax(q k) v")


def allowance(logits_scale: float, dtype: torch.dtype) -> float:
    """How far rounding alone may move logits of this scale: 256 eps in float32, 8 in half precision.

    Measured: SmolLM2-135M (30 layers) moves by 15 eps of its logits' scale, 33, on a CPU. On an H200 a sparse one
    moved by about 120 eps under padding, at the same scale; that was taken for rounding and not looked into. A lost
    mask moves logits by .08 and more (facts gathered for the project, 11 models).
    """
    eps = torch.finfo(dtype).eps
    return (256 if eps < 1e-6 else 8) * eps * max(1.0, logits_scale)


def _judge(
    name: str, model: Any, anatomy: Anatomy, difference: Callable[[Int[Tensor, "1 T"]], float], meaning: str
) -> float:
    prompts = [example_tokens(anatomy.vocabulary, LENGTH, seed).to(model.device) for seed in range(PROMPTS)]
    found = median(difference(tokens) for tokens in prompts)
    scale = float(model(input_ids=prompts[0], use_cache=False).logits.abs().max())
    limit = allowance(scale, next(model.parameters()).dtype)
    if not found <= limit:
        hint = "float32 weights, or report this model's family"
        raise ProbeError(f"probe {name}", f"logits differ by {found:.2e} (allowed {limit:.1e}): {meaning}", hint)
    return found


def _with(model: Any, options: dict[str, Any]) -> Forward:
    def forward(tokens: Int[Tensor, "B T"], *, raw: bool = False, **kwargs: Any) -> Any:
        output = model(input_ids=tokens, **({"use_cache": False} | options | kwargs))
        return output if raw else output.logits

    return forward


def _padded(forward: Forward, tokens: Int[Tensor, "1 T"], *, left: bool) -> Float[Tensor, "1 T+3 V"]:
    """Logits of the prompt with three padding tokens before or after it."""
    pad, one = torch.zeros_like(tokens[:, :3]), torch.ones_like(tokens)
    order = (lambda real, fill: [fill, real]) if left else (lambda real, fill: [real, fill])
    mask = torch.cat(order(one, torch.zeros_like(pad)), dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return forward(torch.cat(order(tokens, pad), dim=1), attention_mask=mask, position_ids=positions)


def _count_calls(model: Any, anatomy: Anatomy) -> int:
    seen = []

    def spy(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(module)
        return dense_attention(module, *args, **kwargs)

    register("fewedges-count", spy)
    base = plain(model)
    with attention_by(base, "fewedges-count"):
        model(input_ids=example_tokens(anatomy.vocabulary, LENGTH).to(model.device), use_cache=False)
    return len({id(module) for module in seen})


def _gap(a: Tensor, b: Tensor) -> float:
    gap = (a.float() - b.float()).abs().max()
    return float(gap) if torch.isfinite(gap) else float("inf")
