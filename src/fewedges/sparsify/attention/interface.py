"""Put gates into a transformers model, and run it through them.

`attach_` gives every attention module a `gate_bias` and switches the model to the attention function registered
here, with its mask. From then on any forward pass, `model.generate` included, uses hard gates. A forward pass
that wants more (sampled gates, counts, all gates open) is handed a `GatePass`:

    run = GatePass(sample=True, seed=7)
    model(input_ids, gate_pass=run)
    run.expected_edges()          # per query per head, differentiable

Shapes: B batch, T token, Q query, K key, H head, G key/value head, E head width, L layer.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fewedges.model.anatomy import Anatomy, plain
from fewedges.model.attention import (
    allowed_keys,
    attention_scores,
    attention_weights,
    check_plain,
    refuse_patterns,
    register,
    register_maskless,
)
from fewedges.model.capture import Maps, prompt_tokens
from fewedges.sparsify.attention.gate import OPEN_BIAS, Gated, Gating, gate_logits, gated_attention, key_bias

GATED = "fewedges-gated"
FUSED = "fewedges-fused"
"""The same without a (Q, K) mask: only for passes through the fused kernel, which is causal by itself."""
HARD = "fewedges-hard"
"""Hard gates through the inference kernel (serving.py)."""


@dataclass(kw_only=True)
class GatePass:
    """How gates are decided in one forward pass, and what they did: pass it as `gate_pass=`."""

    sample: bool = False
    """Draw the gates (training) instead of thresholding them (evaluation)."""
    straight_through: bool = False
    """Let gradients pass thresholded gates."""
    seed: int | Tensor = 0
    """Key of the noise; every layer derives its own."""
    offset: float | Tensor = 0.0
    """Added to every gate bias (annealing)."""
    open_all: bool = False
    """Every gate open: the dense model with the present weights."""
    kernel: Literal["reference", "triton"] = "reference"
    keep_maps: bool = False
    """Keep weights and gates of every layer (small inputs only: T x T)."""

    expected: dict[int, Float[Tensor, "B H Q"]] = field(default_factory=dict)
    open: dict[int, Float[Tensor, "B H Q"]] = field(default_factory=dict)
    maps: dict[int, tuple[Float[Tensor, "B H Q K"], Bool[Tensor, "B H Q K"]]] = field(default_factory=dict)

    def expected_edges(self) -> Float[Tensor, "L B H Q"]:
        """Expected open gates under sampling, layers stacked; differentiable."""
        return torch.stack([self.expected[layer] for layer in sorted(self.expected)])

    def open_edges(self) -> Float[Tensor, "L B H Q"]:
        """Gates that evaluation opens, layers stacked."""
        return torch.stack([self.open[layer] for layer in sorted(self.open)])

    def gating(self, layer: int) -> Gating:
        """The layer's share: its own noise key."""
        return Gating(sample=self.sample, straight_through=self.straight_through, seed=self.seed + 7919 * layer)


def attach_(
    model: Any, anatomy: Anatomy, *, bias_start: float = 0.0, learned: bool = True, gate_query: bool = False
) -> Any:
    """Give `model` gates in place: a float32 `gate_bias` (H,) per attention module, and the gated function.

    With `gate_query` also a float32 `gate_query` (H, E), 0 at the start, which always learns. Raises ModelError where
    fixed patterns are attached.
    """
    refuse_patterns("attach gates", model)
    register(GATED, gated_forward)
    register_maskless(FUSED, gated_forward)
    for module, layer in zip(anatomy.modules(model), anatomy.layers, strict=True):
        device = next(module.parameters()).device
        bias = torch.full((layer.heads,), bias_start, device=device)
        module.register_parameter("gate_bias", nn.Parameter(bias, requires_grad=learned))
        if gate_query:
            module.register_parameter("gate_query", nn.Parameter(torch.zeros(layer.heads, layer.width, device=device)))
    plain(model).set_attn_implementation(GATED)
    return model


def is_gated(model: Any) -> bool:
    """Whether forward passes of this model go through gates."""
    return plain(model).config._attn_implementation in (GATED, FUSED, HARD)


def gate_biases(model: Any, anatomy: Anatomy) -> Float[Tensor, "L H"]:
    """All gate biases of a gated model, layers stacked."""
    return torch.stack([module.gate_bias.detach() for module in anatomy.modules(model)])  # type: ignore[arg-type]


def gate_queries(model: Any, anatomy: Anatomy) -> Float[Tensor, "L H E"] | None:
    """All gate queries of a gated model, layers stacked; None where it has none."""
    found = [module.gate_query.detach() for module in anatomy.modules(model) if hasattr(module, "gate_query")]  # type: ignore[operator, union-attr]
    return torch.stack(found) if found else None  # type: ignore[arg-type]


def gated_forward(
    module: nn.Module,
    query: Float[Tensor, "B H Q E"],
    key: Float[Tensor, "B G K E"],
    value: Float[Tensor, "B G K E"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    gate_pass: GatePass | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "B Q H E"], None]:
    """Attend through gates, in the AttentionInterface's signature; without a `gate_pass`, hard gates."""
    run = GatePass() if gate_pass is None else gate_pass
    layer: int = module.layer_idx  # type: ignore[assignment]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    bias: Tensor = module.gate_bias + run.offset  # type: ignore[operator]  # (H,)
    bias = torch.full_like(bias, OPEN_BIAS) if run.open_all else bias
    bias = key_bias(bias, getattr(module, "gate_query", None), key, scale)  # (H,) or (B, H, K)
    if run.kernel == "triton":
        tokens = None if attention_mask is None else _tokens(attention_mask)
        result = _fused(query, key, value, bias, run.gating(layer), scale, softcap, sliding_window, tokens)
    else:
        allowed = allowed_keys(attention_mask, key.shape[-2])
        options: dict[str, Any] = {"scaling": scale, "softcap": softcap}
        result = gated_attention(query, key, value, bias, allowed, **options, gating=run.gating(layer))
        if run.keep_maps:
            run.maps[layer] = _maps(query, key, bias, allowed, options)
    run.expected[layer], run.open[layer] = result.expected, result.open
    return result.output.transpose(1, 2).contiguous(), None


def gated_maps(model: Any, tokenizer: Any, prompt: str) -> Maps:
    """Attention weights and hard gates of a gated model on a prompt."""
    ids, words = prompt_tokens(tokenizer, prompt, plain(model).device)
    run = GatePass(keep_maps=True)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False, gate_pass=run)
    weights, opened = zip(*(run.maps[layer] for layer in sorted(run.maps)), strict=True)
    return Maps(words, torch.cat(weights).float().cpu().numpy(), torch.cat(opened).cpu().numpy())


def _maps(query: Tensor, key: Tensor, bias: Tensor, allowed: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What hard gates let through: weights after the gate, and the gates, both (B, H, Q, K)."""
    scores = attention_scores(query, key, **options)
    gate = (gate_logits(scores, bias) > 0) & allowed
    return (attention_weights(scores, allowed) * gate).detach(), gate


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    gating: Gating,
    scaling: float,
    softcap: float | None,
    window: int | None,
    tokens: Tensor | None,
) -> Gated:
    """The fused kernel: causal attention, with padding where `tokens` are given."""
    from fewedges.sparsify.attention.kernel import fused_gated_attention

    check_plain(query, key, softcap, window)
    options: dict[str, Any] = {"sample": gating.sample, "straight_through": gating.straight_through, "tokens": tokens}
    return fused_gated_attention(query, key, value, bias, gating.seed, scaling=scaling, **options)


def _tokens(mask: Bool[Tensor, "B T"] | Bool[Tensor, "B 1 Q K"]) -> Bool[Tensor, "B K"]:
    """Which keys are tokens: the padding mask, or the last query's row of a whole mask."""
    return mask if mask.dim() == 2 else mask[:, 0, -1]
