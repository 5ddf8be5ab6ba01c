"""Wire a circuit graph to an unmodified Hugging Face decoder: which module reads, which writes, measured.

No list of model names: one traced forward pass shows the norm in front of attention, the matrices it feeds, the
norm in front of the MLP and the module that writes; a gradient through each attention layer shows which output
channels of which matrix belong to which head's query, key or value (fused or not, any order). Then the guards:
what the sources write must sum to the residual stream that every norm was seen to read, and a matrix cut into
heads must give what the whole matrix gave. A model whose parts are not additive (post-norm, sandwich norm, a
query/key norm across heads, scaled residuals) fails one of these and is refused by a ModelError that names it.

Gated models (`gate_bias`, see sparsify.attention) need nothing of their own: their attention function computes its
gates from the queries and keys it is given, and these come from the patched projections, so a circuit edge can open
or close an attention edge.

Shapes: B batch, T token, D model width, E head width, H head, G key/value head, U unit: E output channels of a
reading matrix that are one head's query, key or value.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewedges.explain.graph import ROLES, Graph
from fewedges.explain.tracing import Traced, refuse, trace
from fewedges.model.anatomy import Anatomy, plain

KeyReaders = Literal["group", "head"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Reader:
    """A matrix that reads for attention, cut into units in the order of its output channels."""

    module: nn.Module
    destinations: tuple[int, ...]
    """Per unit, the destination in the graph that feeds it."""
    weight: Tensor
    """(U, D, E), a view of the model's own weight where it can be one."""
    bias: Tensor | None
    """(U, 1, E)."""
    repeat: tuple[int, ...] | None
    """Which original unit each unit repeats, where key/value heads are read once per query head."""

    def only(self, units: list[int]) -> "Reader":
        """Some of its units."""
        bias = None if self.bias is None else self.bias[units]
        return replace(
            self, destinations=tuple(self.destinations[u] for u in units), weight=self.weight[units], bias=bias
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """One layer: where it reads, where it writes."""

    layer: nn.Module
    attention: nn.Module
    norm: nn.Module
    readers: tuple[Reader, ...]
    writer: nn.Module
    weight: Tensor
    """(H, E, D): what each head writes with."""
    bias: Tensor | None
    """(D,), written whatever the heads say: it belongs to no source."""
    mlp_norm: nn.Module
    mlp: nn.Module
    """The module whose output the MLP writes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Wiring:
    """A model with its circuit graph. Made by `wire`; the model itself stays as it is."""

    model: Any
    graph: Graph
    blocks: tuple[Block, ...]
    final_norm: nn.Module
    residual_error: float
    """Largest relative difference between residual stream and sum of sources that `wire` measured."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.embedding.weight.device  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the residual stream."""
        return self.blocks[0].weight.dtype

    @property
    def embedding(self) -> nn.Module:
        """The token embedding."""
        return plain(self.model).get_input_embeddings()

    def __str__(self) -> str:
        return f"{type(plain(self.model)).__name__}: {self.graph}"


def wire(model: Any, anatomy: Anatomy, *, split: bool = True, key_readers: KeyReaders = "group") -> Wiring:
    """Find readers and writers of a model and check that its parts are additive.

    `key_readers`: with fewer key/value heads than heads, read keys and values once per key/value "group" (true to
    the weights) or once per query "head" (as EAP-IG and MIB do). Without `split` it is always per head.
    Raises ModelError for a model that the graph cannot express.
    """
    seen = trace(model, anatomy)
    first = anatomy.layers[0]
    per_head = key_readers == "head" or not split
    graph = Graph(
        layers=len(anatomy.layers),
        heads=first.heads,
        key_readers=first.heads if per_head else first.kv_heads,
        split=split,
        parallel=seen.parallel,
    )
    blocks = tuple(_block(model, graph, seen, layer) for layer in range(graph.layers))
    error = _check_sums(model, blocks, seen)
    return Wiring(model=model, graph=graph, blocks=blocks, final_norm=seen.final_norm, residual_error=error)


def _block(model: Any, graph: Graph, seen: Traced, index: int) -> Block:
    layer = seen.layers[index]
    heads, width = layer.heads, layer.width
    readers = tuple(_reader(model, graph, index, module, units, width) for module, units in layer.units.items())
    weight, bias = affine(layer.writer, heads * width)
    return Block(
        layer=layer.module,
        attention=layer.attention,
        norm=layer.norm,
        readers=readers,
        writer=layer.writer,
        weight=weight.view(heads, width, -1)
        if weight.is_contiguous()
        else weight.mT.view(-1, heads, width).permute(1, 2, 0),
        bias=bias,
        mlp_norm=layer.mlp_norm,
        mlp=layer.mlp,
    )


def _reader(
    model: Any, graph: Graph, layer: int, module: nn.Module, units: list[tuple[str, int]], width: int
) -> Reader:
    """Cut a reading matrix into units; repeat key/value units where the graph reads them once per head."""
    weight, bias = affine(module, _input_width(model))
    count = len(units)
    cut = (
        weight.view(-1, count, width).transpose(0, 1) if weight.is_contiguous() else weight.mT.view(count, width, -1).mT
    )
    cut_bias = None if bias is None else bias.view(count, 1, width)
    present = {role: sum(unit[0] == role for unit in units) for role in ROLES}
    share = {
        role: graph.heads // present[role] if present[role] and graph.key_readers == graph.heads else 1
        for role in ROLES
    }
    if max(share.values()) == 1:
        return Reader(
            module=module,
            destinations=tuple(graph.reader(layer, role, index) for role, index in units),
            weight=cut,
            bias=cut_bias,
            repeat=None,
        )
    if len({role for role, _ in units}) > 1:
        raise refuse(model, "its fused projection holds fewer key/value heads than heads", "key_readers='group'")
    repeat = tuple(u for u, (role, _) in enumerate(units) for _ in range(share[role]))
    heads = [(role, index * share[role] + n) for role, index in units for n in range(share[role])]
    return Reader(
        module=module,
        destinations=tuple(graph.reader(layer, role, index) for role, index in heads),
        weight=cut[list(repeat)],
        bias=None if cut_bias is None else cut_bias[list(repeat)],
        repeat=repeat,
    )


def affine(module: nn.Module, width: int) -> tuple[Tensor, Tensor | None]:
    """Weight (in, out) and bias of a module that is an affine map of `width` inputs.

    A view for Linear and Conv1D; anything else (LoRA, quantised) is measured on the identity matrix: a copy.
    """
    from transformers.pytorch_utils import Conv1D

    if type(module) is nn.Linear:
        return module.weight.detach().mT, None if module.bias is None else module.bias.detach()
    if type(module) is Conv1D:
        return module.weight.detach(), module.bias.detach()
    parameter = next(module.parameters())
    with torch.no_grad():
        eye = torch.eye(width, device=parameter.device, dtype=parameter.dtype)
        bias = module(torch.zeros_like(eye[:1]))
        return (module(eye) - bias).contiguous(), bias[0] if bool(bias.any()) else None


# -- guards --------------------------------------------------------------------------------------------------------


def _check_sums(model: Any, blocks: tuple[Block, ...], seen: Traced) -> float:
    """Compare every residual stream that a norm read with the sum of what was written before it."""
    stream, worst = seen.start, 0.0
    for index, (block, layer) in enumerate(zip(blocks, seen.layers, strict=True)):
        worst = max(worst, _gap(model, stream, layer.attention_input, f"before attention of layer {index}"))
        _check_readers(model, block, layer.normed, layer.read, index)
        written = head_writes(block, layer.head_outputs.flatten(0, 1)).sum(0).view_as(stream)
        after = stream + written + (0 if block.bias is None else block.bias)
        here = stream if seen.parallel else after
        worst = max(worst, _gap(model, here, layer.mlp_input.view_as(stream), f"before the MLP of layer {index}"))
        stream = after + layer.mlp_output.view_as(stream)
    return max(worst, _gap(model, stream, seen.final_input, "before the final norm"))


def _check_readers(model: Any, block: Block, normed: Tensor, read: dict[nn.Module, Tensor], index: int) -> None:
    for reader in block.readers:
        units = project(reader, normed.flatten(0, 1)[None].expand(len(reader.destinations), -1, -1))  # (U, BT, E)
        whole = read[reader.module].view(units.shape[1], -1, units.shape[2])
        whole = whole if reader.repeat is None else whole[:, list(reader.repeat)]
        _gap(model, units.transpose(0, 1), whole, f"in the attention projections of layer {index}")


def _gap(model: Any, sum_: Tensor, found: Tensor, where: str) -> float:
    """The relative difference; ModelError beyond 1e-4 (float32: measured below 2e-6 on tiny and real models)."""
    gap = float((sum_.double() - found.double()).norm() / found.double().norm().clamp_min(1e-30))
    limit = 1e-4 if found.dtype.itemsize >= 4 else 16 * torch.finfo(found.dtype).eps
    if not gap <= limit:
        reason = f"the sum of what its parts write differs {where} by {gap:.1e} of its size: its parts are not additive"
        raise refuse(model, reason)
    return gap


# -- the arithmetic of one block -----------------------------------------------------------------------------------


def head_writes(block: Block, heads: Tensor, out: Tensor | None = None) -> Tensor:
    """What each head adds to the residual stream, (H, N, D), from its outputs (N, H*E)."""
    count, width, _ = block.weight.shape
    return torch.bmm(
        heads.view(-1, count, width).transpose(0, 1), block.weight, **({} if out is None else {"out": out})
    )


def project(reader: Reader, inputs: Tensor) -> Tensor:
    """Apply each unit's matrix to its own input: (U, N, D) -> (U, N, E)."""
    if reader.bias is None:
        return torch.bmm(inputs, reader.weight)
    return torch.baddbmm(reader.bias, inputs, reader.weight)


# -- changing a model for a while ----------------------------------------------------------------------------------


@contextmanager
def swapped(module: nn.Module, forward: Any) -> Iterator[None]:
    """Let a module compute something else; put it back."""
    had, before = "forward" in module.__dict__, module.forward
    module.forward = forward
    try:
        yield
    finally:
        if had:
            module.forward = before
        else:
            del module.forward


@contextmanager
def keys_per_head(wiring: Wiring) -> Iterator[None]:
    """Tell attention that keys and values arrive once per query head, where the graph reads them so."""
    changed = [block.attention for block in wiring.blocks if any(reader.repeat for reader in block.readers)]
    with ExitStack() as stack:
        for module in changed:
            if hasattr(module, "num_key_value_groups"):
                stack.callback(setattr, module, "num_key_value_groups", module.num_key_value_groups)
                module.num_key_value_groups = 1  # type: ignore[assignment]
        yield


def _input_width(model: Any) -> int:
    return plain(model).get_input_embeddings().weight.shape[1]
