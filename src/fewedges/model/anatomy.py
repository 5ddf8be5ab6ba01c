"""Read a decoder's anatomy from one traced forward pass: no list of model names.

Every attention layer is found because it calls transformers' AttentionInterface; its readers (query, key, value
projections) are the matrices it used before that call, its writers (output projection) those it used after.

Shapes in this package: B batch, T token, Q query, K key, H head, G key/value head, D model width, E head width,
L layer, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fewedges.errors import ModelError
from fewedges.model.attention import attention_by, dense_attention, register

TRACE = "fewedges-trace"
HARMLESS = {"position_ids", "cache_position", "position_embeddings", "attention_mask"}
"""Tensors a model may hand to attention that do not change the scores we recompute."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One attention layer, as seen in a forward pass."""

    index: int
    module: str
    """Path of the attention module."""
    heads: int
    kv_heads: int
    width: int
    """E, per head."""
    scaling: float
    window: int | None
    softcap: float | None
    readers: tuple[str, ...]
    """Paths of the matrices that read the residual stream (query, key, value; fused or not)."""
    writers: tuple[str, ...]
    """Paths of the matrices that write to it."""


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """What a decoder is made of."""

    family: str
    layers: tuple[Layer, ...]
    width: int
    vocabulary: int
    positions: int | None
    """Longest context the config promises."""
    tied: bool
    parameters: int

    @property
    def heads(self) -> int:
        """H, the same in all layers."""
        return self.layers[0].heads

    def modules(self, model: Any) -> list[nn.Module]:
        """The attention modules in layer order, resolved in `model` (peft prefixes are looked through)."""
        base = plain(model)
        return [base.get_submodule(layer.module) for layer in self.layers]

    def __str__(self) -> str:
        first, last = self.layers[0], self.layers[-1]
        windows = sorted({layer.window for layer in self.layers if layer.window})
        rows = [
            ("family", self.family),
            ("L layers", len(self.layers)),
            ("H heads", f"{first.heads} ({first.kv_heads} key/value)"),
            ("D width, E head width", f"{self.width}, {first.width}"),
            ("V vocabulary", f"{self.vocabulary}{', tied' if self.tied else ''}"),
            ("parameters", f"{self.parameters:,}"),
            ("context", self.positions),
            ("sliding windows", ", ".join(map(str, windows)) or "none"),
            ("softcap", first.softcap or "none"),
            ("attention modules", f"{first.module} ... {last.module}"),
            ("readers", ", ".join(name.rpartition(".")[2] for name in first.readers)),
            ("writers", ", ".join(name.rpartition(".")[2] for name in first.writers)),
        ]
        return "\n".join(f"{name:24}{value}" for name, value in rows)


def anatomy(model: Any) -> Anatomy:
    """Trace a causal language model and return its anatomy; a model that cannot be gated is refused untouched.

    Raises ModelError for encoders, encoder-decoders and models that do not go through the AttentionInterface.
    """
    config = model.config.get_text_config()
    _refuse_by_config(model, config)
    calls = _trace(model)
    _refuse_by_calls(model, calls, config.num_hidden_layers)
    return Anatomy(
        family=config.model_type,
        layers=tuple(_layer(model, index, call) for index, call in enumerate(calls)),
        width=model.get_input_embeddings().weight.shape[1],
        vocabulary=model.get_input_embeddings().weight.shape[0],
        positions=getattr(config, "max_position_embeddings", None),
        tied=model.get_input_embeddings().weight is getattr(model.get_output_embeddings(), "weight", None),
        parameters=sum(p.numel() for p in model.parameters()),
    )


def plain(model: Any) -> Any:
    """The transformers model inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def example_tokens(vocabulary: int, length: int = 8, seed: int = 0) -> torch.Tensor:
    """A fixed pseudo-random prompt (1, length) that any vocabulary holds."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (1, length), generator=generator)


@dataclass
class _Call:
    module: nn.Module
    shape: tuple[int, int, int]  # heads, kv heads, width
    scaling: float | None
    kwargs: dict[str, Any]
    before: list[nn.Module]
    after: list[nn.Module] = field(default_factory=list)


def _trace(model: Any) -> list[_Call]:
    """Run one short prompt and list the calls of the attention interface, with the matrices around each."""
    calls: list[_Call] = []
    used: list[nn.Module] = []

    def spy(module, query, key, value, attention_mask, scaling=None, **kwargs):  # type: ignore[no-untyped-def]
        mine = [m for m in module.modules() if m in used]
        used.clear()
        calls.append(_Call(module, (query.shape[1], key.shape[1], query.shape[3]), scaling, kwargs, mine))
        return dense_attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    register(TRACE, spy)
    tokens = example_tokens(model.config.get_text_config().vocab_size).to(model.device)
    with torch.no_grad(), _watching(model, calls, used), attention_by(model, TRACE):
        model(input_ids=tokens, use_cache=False)
    return calls


@contextmanager
def _watching(model: nn.Module, calls: list[_Call], used: list[nn.Module]) -> Iterator[None]:
    """Note every matrix as it is used: into `used`, and into the last call's `after` if it belongs there."""

    def note(module: nn.Module, *_: Any) -> None:
        used.append(module)
        if calls and any(module is child for child in calls[-1].module.modules()):
            calls[-1].after.append(module)

    matrices = [m for m in model.modules() if torch.is_tensor(w := getattr(m, "weight", None)) and w.dim() == 2]
    with ExitStack() as stack:
        for module in matrices:
            stack.callback(module.register_forward_hook(note).remove)
        yield


def _layer(model: nn.Module, index: int, call: _Call) -> Layer:
    names = {module: name for name, module in model.named_modules()}
    heads, kv_heads, width = call.shape
    return Layer(
        index=index,
        module=names[call.module],
        heads=heads,
        kv_heads=kv_heads,
        width=width,
        scaling=width**-0.5 if call.scaling is None else float(call.scaling),
        window=call.kwargs.get("sliding_window"),
        softcap=call.kwargs.get("softcap"),
        readers=tuple(names[m] for m in call.before),
        writers=tuple(names[m] for m in call.after),
    )


def _refuse_by_config(model: Any, config: Any) -> None:
    asked = f"the attention of {type(model).__name__}"
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            asked, "the model is an encoder-decoder", "a decoder-only causal language model (Llama, GPT-2, ...)"
        )
    if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
        raise ModelError(asked, "the model has no language-model head", "the ...ForCausalLM class of this checkpoint")
    if not hasattr(config, "num_attention_heads"):
        raise ModelError(asked, "the config names no attention heads", "a transformer with softmax attention")
    if not model._can_set_attn_implementation():
        raise ModelError(
            asked,
            "it is hard-wired and ignores transformers' AttentionInterface: it would stay dense and unexplained",
            "a family that goes through the interface (Llama, Mistral, Qwen, Gemma, Phi-3, OLMo, GPT-2, NeoX, OPT)",
        )


def _refuse_by_calls(model: Any, calls: list[_Call], layers: int) -> None:
    asked = f"the attention of {type(model).__name__}"
    if len(calls) != layers or len({id(call.module) for call in calls}) != layers:
        found = f"{len(calls)} calls of the attention interface for {layers} layers"
        raise ModelError(asked, found, "a decoder in which every layer has softmax attention")
    if len({call.shape for call in calls}) > 1 and len({call.shape[0] for call in calls}) > 1:
        raise ModelError(asked, "layers differ in their number of heads", "a model with equal layers")
    for call in calls:
        extra = [name for name, x in call.kwargs.items() if torch.is_tensor(x) and name not in HARMLESS]
        if extra:
            found = f"it also takes {', '.join(extra)}, which gates do not know"
            raise ModelError(asked, found, "a model without attention sinks or position biases")
