"""Watch one forward pass and say what each module is for: norms, reading matrices, writing modules, streams.

Shapes: B = 1 batch, T token, D model width, E head width, H head, G key/value head.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewedges.errors import ModelError
from fewedges.explain.graph import ROLES
from fewedges.model.anatomy import Anatomy, example_tokens, plain
from fewedges.model.attention import attention_by, dense_attention, register

TRACE = "fewedges-circuit-trace"


@dataclass(frozen=True, kw_only=True, eq=False)
class TracedLayer:
    """One layer: its modules, and what they read and wrote."""

    module: nn.Module
    attention: nn.Module
    heads: int
    width: int
    norm: nn.Module
    units: dict[nn.Module, list[tuple[str, int]]]
    """Per reading matrix, whose query, key or value its output channels are, E at a time."""
    writer: nn.Module
    mlp_norm: nn.Module
    mlp: nn.Module
    attention_input: Tensor
    normed: Tensor
    read: dict[nn.Module, Tensor]
    head_outputs: Tensor
    """(1, T, H*E)."""
    mlp_input: Tensor
    mlp_output: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Traced:
    """A whole forward pass."""

    layers: list[TracedLayer]
    final_norm: nn.Module
    start: Tensor
    """The residual stream before the first layer."""
    final_input: Tensor
    parallel: bool


@dataclass
class _Seen:
    """Calls in order, and the attention function's arguments per attention module."""

    calls: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)
    attention: dict[nn.Module, tuple[tuple[Tensor, Tensor, Tensor], Tensor]] = field(default_factory=dict)
    leaves: dict[nn.Module, Tensor] = field(default_factory=dict)


def refuse(model: Any, found: str, hint: str = "") -> ModelError:
    """The error for a model whose circuit graph cannot be drawn."""
    better = hint or "a pre-norm decoder whose parts add up (GPT-2, Llama, Mistral, Qwen, OLMo 1, GPT-NeoX, OPT, Phi-3)"
    return ModelError(f"a circuit graph of {type(plain(model)).__name__}", found, better)


@torch.enable_grad()
def trace(model: Any, anatomy: Anatomy) -> Traced:
    """Run a prompt of 8 tokens and sort the modules; ModelError where a part of a pre-norm decoder is missing."""
    seen, base = _watch(model, anatomy), plain(model)
    names = {module: name for name, module in base.named_modules()}
    layers = [_layer(base, names, seen, anatomy, index) for index in range(len(anatomy.layers))]
    holders = [base.get_submodule(layer.module.rpartition(".")[0]) for layer in anatomy.layers]
    order = list(seen.calls)
    after = order[order.index(holders[-1]) + 1 :]
    final = next(
        (m for m in after if _is_norm(m, seen) and not any(m is x for h in holders for x in h.modules())), None
    )
    if final is None:
        raise refuse(model, "no norm stands between the last layer and the logits")
    same = {_same(layer.attention_input, layer.mlp_input) for layer in layers}
    if len(same) > 1:
        raise refuse(model, "some layers are parallel (attention beside MLP) and some are not")
    final_input = seen.calls[final][0]
    return Traced(
        layers=layers,
        final_norm=final,
        start=layers[0].attention_input,
        final_input=final_input,
        parallel=same.pop(),
    )


def _layer(base: Any, names: dict[nn.Module, str], seen: _Seen, anatomy: Anatomy, index: int) -> TracedLayer:
    body = anatomy.layers[index]
    attention = base.get_submodule(body.module)
    holder = base.get_submodule(body.module.rpartition(".")[0])
    readers, (writer, *others) = [[base.get_submodule(p) for p in paths] for paths in (body.readers, body.writers)]
    if others:
        raise refuse(base, f"{len(body.writers)} matrices follow the attention of layer {index}")
    order = [m for m in seen.calls if any(m is child for child in holder.children()) and m is not attention]
    norms = [module for module in order if _is_norm(module, seen)]
    heavy = [module for module in order if _has_matrix(module)]
    normed = seen.calls[attention][0]
    norm = next((m for m in norms if _same(seen.calls[m][1], normed)), None)
    if norm is None:
        raise refuse(base, f"attention of layer {index} reads the residual stream without a norm before it (post-norm)")
    if not heavy:
        raise refuse(base, f"layer {index} has no MLP")
    first, last = order.index(heavy[0]), order.index(heavy[-1])
    before = [m for m in norms if order.index(m) < first and m is not norm]
    extra = [m for m in norms if order.index(m) > last] + before[:-1]
    if extra:
        found = f"{names[extra[0]]} normalises what a part of layer {index} writes (post-norm or sandwich norm)"
        raise refuse(base, f"{found}, so heads and MLPs do not add up")
    if not before:
        raise refuse(base, f"attention and MLP of layer {index} share one norm")
    _, outputs = seen.attention[attention]
    if not torch.equal(seen.calls[writer][0], outputs):
        raise refuse(base, f"something stands between the heads of layer {index} and their output projection")
    return TracedLayer(
        module=holder,
        attention=attention,
        heads=body.heads,
        width=body.width,
        norm=norm,
        units=_units(base, seen, attention, readers, index),
        writer=writer,
        mlp_norm=before[-1],
        mlp=heavy[-1],
        attention_input=seen.calls[norm][0],
        normed=normed,
        read={module: seen.calls[module][1] for module in readers},
        head_outputs=outputs,
        mlp_input=seen.calls[before[-1]][0],
        mlp_output=seen.calls[heavy[-1]][1],
    )


def _units(
    base: Any, seen: _Seen, attention: nn.Module, readers: list[nn.Module], index: int
) -> dict[nn.Module, list[tuple[str, int]]]:
    """Whose query, key or value is each output channel of the reading matrices? Ask gradients, one bit at a time.

    Unit number n (queries, then keys, then values) enters objective b if bit b of n + 1 is set: the channels with a
    gradient spell the number. A channel that also moves a unit without the bit couples heads, and is refused.
    """
    arguments, _ = seen.attention[attention]
    names = [(role, head) for role, x in zip(ROLES, arguments, strict=True) for head in range(x.shape[1])]
    parts = [head for x in arguments for head in x.unbind(1)]
    generator = torch.Generator(device=parts[0].device).manual_seed(0)
    sums = [(x * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)).sum() for x in parts]
    leaves = [seen.leaves[module] for module in readers]
    codes = [torch.zeros(leaf.shape[-1], dtype=torch.long, device=leaf.device) for leaf in leaves]
    for bit in range(len(names).bit_length()):
        chosen = [n for n in range(len(names)) if (n + 1) >> bit & 1]
        others = [n for n in range(len(names)) if n not in chosen]
        moves = [_moves([sums[n] for n in numbers], leaves) for numbers in (chosen, others)]
        if any(bool((a & b).any()) for a, b in zip(*moves, strict=True)):
            raise refuse(base, f"the heads of layer {index} share a norm of queries or keys (full-width QK norm)")
        codes = [code + (move.long() << bit) for code, move in zip(codes, moves[0], strict=True)]
    return {m: _spell(base, code, names, arguments[0].shape[-1], index) for m, code in zip(readers, codes, strict=True)}


def _moves(sums: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Which channels of the leaves these sums depend on."""
    if not sums:
        return [torch.zeros(leaf.shape[-1], dtype=torch.bool, device=leaf.device) for leaf in leaves]
    grads = torch.autograd.grad(sum(sums), leaves, retain_graph=True, allow_unused=True)  # type: ignore[arg-type]
    found = [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(grads, leaves, strict=True)]
    return [(grad != 0).flatten(0, -2).any(0) for grad in found]


def _spell(base: Any, code: Tensor, names: list[tuple[str, int]], width: int, index: int) -> list[tuple[str, int]]:
    """Unit names of a matrix, E channels each."""
    whole = code.numel() % width == 0
    rows = code.view(-1, width) if whole else code[None]
    if not whole or not bool((rows == rows[:, :1]).all()) or not bool((rows > 0).all()):
        raise refuse(base, f"the projections of layer {index} also compute something that is no query, key or value")
    return [names[int(row[0]) - 1] for row in rows]


# -- watching ------------------------------------------------------------------------------------------------------


def _watch(model: Any, anatomy: Anatomy) -> _Seen:
    """One forward pass with every module's first input and output, and the attention function's arguments."""
    seen, base = _Seen(), plain(model)
    readers = [base.get_submodule(path) for layer in anatomy.layers for path in layer.readers]

    def spy(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        output, _ = dense_attention(module, query.detach(), key.detach(), value.detach(), *args, **kwargs)
        seen.attention[module] = ((query, key, value), output.flatten(2))
        return output, None

    register(TRACE, spy)
    tokens = example_tokens(anatomy.vocabulary).to(base.device)
    with _noting(base, readers, seen), attention_by(base, TRACE):
        model(input_ids=tokens, use_cache=False)
    return seen


@contextmanager
def _noting(base: nn.Module, readers: list[nn.Module], seen: _Seen) -> Iterator[None]:
    """Hooks that fill `seen`; the output of each reader becomes a leaf, so that gradients stay in one layer."""

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        inputs = [x for x in (*args, *kwargs.values()) if torch.is_tensor(x) and x.is_floating_point()]
        first = output[0] if isinstance(output, tuple) and output else output
        if not inputs or not torch.is_tensor(first):
            return None
        seen.calls.pop(module, None)
        seen.calls[module] = (inputs[0].detach(), first.detach())
        if any(module is reader for reader in readers):
            seen.leaves[module] = first.detach().requires_grad_()
            return seen.leaves[module]
        return None

    with ExitStack() as stack:
        for module in base.modules():
            stack.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        yield


def _is_norm(module: nn.Module, seen: _Seen) -> bool:
    """A module without matrices that changes what it is given and keeps its shape."""
    given, returned = seen.calls[module]
    return not _has_matrix(module) and given.shape == returned.shape and not _same(given, returned)


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters())


def _same(a: Tensor, b: Tensor) -> bool:
    """The same memory (all tensors of the trace are alive, so addresses are not used twice)."""
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel()
