"""Run a wired model: as it is, keeping what every source wrote, or as a circuit, every destination reading its own mix.

A circuit keeps edge j -> i with M[j, i] = 1. With s_j what source j writes in the circuit's own run, c_j what it is
ablated to, and d_j = s_j - c_j, destination i reads

    x_i = sum_j c_j + sum_j M[j, i] d_j        j written before i reads

and everything after (norm, projections, rotary embedding, softmax, gates, MLP) is the model's own code on that
input: nothing is linearised. The sums of c_j are ordinary residual streams, computed once for all circuits; the
mixing is one matrix product per reading point. Memory: the d_j take (sources x tokens x width) numbers per prompt, the
c_j and their streams about seven per layer; `prompts_at_once` turns a limit in bytes into a number of prompts.

Shapes: K circuit, B prompt, T token, N = B * T, D width, H head, E head width, J source, I destination, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fewedges.explain.hooks import Block, Reader, Wiring, head_writes, keys_per_head, project, swapped
from fewedges.model.anatomy import plain

MEMORY = {"cpu": 3 * 2**28, "cuda": 3 * 2**31}
"""Default limits, in bytes, of what a circuit run keeps beside the model; small enough for a CPU's neighbours."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Written:
    """What every source wrote in one run, or is to be ablated to; dimensions B and T may be 1 where all are alike."""

    input: Float[Tensor, "#B #T D"]
    """The residual stream before layer 0: embedding and positions."""
    heads: list[Float[Tensor, "#B #T HE"]]
    """Per layer, the head outputs in front of the output projection."""
    mlps: list[Float[Tensor, "#B #T D"]]
    logits: Float[Tensor, "#B V"] | None = None
    """At the `last` position of each prompt."""


def run(wiring: Wiring, tokens: Int[Tensor, "B T"], last: Int[Tensor, "B"], options: dict[str, Any]) -> Written:
    """One plain forward pass of the model, keeping what its sources wrote; logits at `last` only."""
    inputs: list[Tensor] = []
    heads: list[Tensor] = []
    mlps: list[Tensor] = []
    with ExitStack() as stack:
        stack.callback(wiring.blocks[0].norm.register_forward_pre_hook(keep_input(inputs)).remove)
        for block in wiring.blocks:
            stack.callback(block.writer.register_forward_pre_hook(keep_input(heads)).remove)
            stack.callback(block.mlp.register_forward_hook(keep_output(mlps, tokens.shape)).remove)
        stack.enter_context(reading_last(wiring, last))
        logits = forward(wiring, tokens, options)
    return Written(input=inputs[0], heads=heads, mlps=mlps, logits=logits[:, 0])


def forward(wiring: Wiring, tokens: Tensor, options: dict[str, Any]) -> Float[Tensor, "B T V"]:
    """Call the model on token ids, or on embeddings (B, T, D). Padding is on the right, so no mask is needed."""
    name = "inputs_embeds" if tokens.is_floating_point() else "input_ids"
    return wiring.model(**{name: tokens}, use_cache=False, **options).logits


@contextmanager
def reading_last(wiring: Wiring, last: Int[Tensor, "B"]) -> Iterator[None]:
    """Let the head over the vocabulary see one position of each prompt: logits (B, 1, V)."""
    head = plain(wiring.model).get_output_embeddings()
    compute = head.forward
    with swapped(head, lambda x: compute(at_last(x, last))):
        yield


def at_last(x: Float[Tensor, "B T D"], last: Int[Tensor, "B"]) -> Float[Tensor, "B 1 D"]:
    """One position of each prompt."""
    return x[torch.arange(len(last), device=x.device), last][:, None]


def memory_for(wiring: Wiring, memory: int | None) -> int:
    """`memory`, or where it is None the default limit on the device the model is on."""
    return MEMORY.get(wiring.device.type, MEMORY["cpu"]) if memory is None else memory


def prompts_at_once(wiring: Wiring, tokens: int, memory: int | None = None, *, gradients: bool = False) -> int:
    """How many prompts of this many tokens fit into `memory` bytes, at least 1; with gradients, or with one circuit."""
    shared, each = rows_per_prompt(wiring, tokens)
    graph = wiring.graph
    rows = graph.sources + 4 * graph.readers + 42 * graph.layers + 2 if gradients else shared + each
    return max(1, memory_for(wiring, memory) // (rows * row_bytes(wiring, tokens)))


def row_bytes(wiring: Wiring, tokens: int) -> int:
    """One (tokens x width) of a prompt."""
    return tokens * wiring.blocks[0].weight.shape[-1] * wiring.dtype.itemsize


def rows_per_prompt(wiring: Wiring, tokens: int) -> tuple[int, int]:
    """What a prompt needs while circuits run, in rows of (tokens x width): once, and again for every circuit.

    Once: what every source is ablated to (the input, heads and MLP of every layer), the streams and projections made
    of it, and logits. For every circuit: the differences of all sources, what the attention inputs of one layer read,
    normed (torch's layer norm makes 2 copies of it, one written out 4), and the scores or the MLP of one layer or the
    logits, whatever is most. A gated model's attention is counted, the largest.
    """
    graph, first = wiring.graph, wiring.blocks[0]
    heads, head_width, width = first.weight.shape
    vocabulary = -(-wiring.model.get_output_embeddings().weight.shape[0] // (tokens * width))
    units = sum(len(reader.destinations) * reader.weight.shape[2] for reader in first.readers)
    attention = -(-(2 * units + 8 * heads * tokens) // width)
    written = -(-heads * head_width // width) + 1
    shared = graph.layers * (written + 2 + -(-units // width)) + 2 + 5 * vocabulary
    copies = 2 if type(first.norm) is nn.LayerNorm else 4
    wide = max(1, 4 // wiring.dtype.itemsize)  # half precision: norms, softmax and logits are float32
    at_once = max(copies * graph.readers, graph.readers + max(attention, 20, 4 * vocabulary))
    return shared, graph.sources + wide * at_once


# -- circuits ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Ablated:
    """Ablation values with the residual streams they sum to, for B prompts of T tokens."""

    values: Written
    shape: tuple[int, int]
    wiring: Wiring

    @cached_property
    def streams(self) -> list[Float[Tensor, "B T D"]]:
        """sum_j c_j before attention and MLP of every layer in turn, and before the final norm."""
        stream = self.values.input.expand(*self.shape, -1).contiguous()
        streams = []
        for block, heads, mlp in zip(self.wiring.blocks, self.values.heads, self.values.mlps, strict=True):
            written = head_writes(block, heads.reshape(-1, heads.shape[-1])).sum(0).view(*heads.shape[:2], -1)
            after = stream + written + (0 if block.bias is None else block.bias)
            streams += [stream, stream if self.wiring.graph.parallel else after]
            stream = after + mlp
        return [*streams, stream]

    @cached_property
    def projected(self) -> list[list[Float[Tensor, "N U E"]]]:
        """What the reading matrices of every layer make of the ablated stream: for heads that read nothing else."""
        found = []
        for layer, block in enumerate(self.wiring.blocks):
            normed = block.norm(self.streams[2 * layer]).flatten(0, 1)  # (N, D)
            found.append([_units(reader, reader.module(normed)) for reader in block.readers])
        return found


class Stream:
    """The residual stream of K circuits run side by side, as differences from the ablation, source by source."""

    normed: Float[Tensor, "K n N D"] | None = None
    """What the attention inputs of the layer at hand read, normed."""

    def __init__(self, ablated: Ablated, masks: Float[Tensor, "K J I"], room: Tensor | None = None):
        self.ablated, self.masks, self.circuits = ablated, masks, masks.shape[0]
        self.reading = (masks != 0).any(0).any(0).tolist()
        """Per destination, whether any circuit lets it read anything; the others are not computed again."""
        (batch, tokens), width = ablated.shape, ablated.values.input.shape[-1]
        shape = (self.circuits, masks.shape[1], batch * tokens * width)
        if room is None or room.shape != shape:  # `room`: an earlier stream's memory, to be written over
            room = torch.empty(shape, device=masks.device, dtype=masks.dtype)
        self.differences: Tensor = room
        self.written = 0

    def add(self, values: Float[Tensor, "*KBT D"], ablated: Float[Tensor, "B T D"]) -> None:
        """One source (input or MLP) has written."""
        target = self.differences[:, self.written].view(self.circuits, *self.ablated.shape, -1)
        torch.sub(values.view_as(target), ablated, out=target)
        self.written += 1

    def add_heads(self, block: Block, outputs: Float[Tensor, "*KBT HE"], ablated: Float[Tensor, "B T HE"]) -> None:
        """All heads of a layer have written."""
        count = block.weight.shape[0]
        changes = outputs.view(self.circuits, *self.ablated.shape, -1) - ablated
        for circuit, change in enumerate(changes.flatten(1, 2)):  # (N, HE)
            rows = self.differences[circuit, self.written : self.written + count]
            head_writes(block, change, out=rows.view(count, change.shape[0], -1))
        self.written += count

    def mix(
        self, destinations: slice | list[int], before: int, ablated: Float[Tensor, "B T D"]
    ) -> Float[Tensor, "K n B T D"]:
        """What these destinations read."""
        kept = self.masks[:, :before, destinations].mT  # (K, n, before)
        start = ablated.reshape(1, -1)
        mixed = [torch.addmm(start, m, d[:before]) for m, d in zip(kept, self.differences, strict=True)]
        return _stacked(mixed).view(*kept.shape[:2], *ablated.shape)


def circuit_logits(
    wiring: Wiring,
    tokens: Int[Tensor, "B T"],
    last: Int[Tensor, "B"],
    stream: Stream,
    options: dict[str, Any],
) -> Float[Tensor, "K B V"]:
    """Logits at `last` of the circuits of a fresh `stream`, all in one forward pass of the model."""
    count = stream.circuits
    with keys_per_head(wiring), _rewired(wiring, stream, last), reading_last(wiring, last.repeat(count)):
        logits = forward(wiring, tokens.repeat(count, 1), options)
    return logits.view(count, len(tokens), -1)


@contextmanager
def _rewired(wiring: Wiring, stream: Stream, last: Int[Tensor, "B"]) -> Iterator[None]:
    """Let every destination read its own mix, and every source write to `stream`."""
    values, streams, _ = stream.ablated.values, stream.ablated.streams, stream.ablated.projected  # made before the swap
    with ExitStack() as stack:
        for layer, block in enumerate(wiring.blocks):
            wires = _Wires(wiring, block, layer, stream)
            stack.enter_context(swapped(block.norm, wires.read_attention(block.norm.forward, streams[2 * layer])))
            for number, reader in enumerate(block.readers):
                stack.enter_context(swapped(reader.module, wires.project(number)))
            stack.enter_context(swapped(block.writer, wires.write_heads(values.heads[layer])))
            stack.enter_context(swapped(block.mlp_norm, wires.read_mlp(block.mlp_norm.forward, streams[2 * layer + 1])))
            hook = wires.write_mlp(values.mlps[layer])
            stack.callback(block.mlp.register_forward_hook(hook).remove)
        stack.enter_context(swapped(wiring.final_norm, _read_logits(wiring, stream, streams[-1], last)))
        yield


class _Wires:
    """The replaced computations of one layer, for one pass."""

    def __init__(self, wiring: Wiring, block: Block, layer: int, stream: Stream):
        self.graph, self.block, self.layer, self.stream = wiring.graph, block, layer, stream
        self.first = self.graph.reader(layer)
        self.rows = [n for n in range(self.graph.readers) if stream.reading[self.first + n]]
        """Attention inputs that read something, counted from the layer's first."""

    def read_attention(self, norm: Any, ablated: Tensor) -> Any:
        whole = len(self.rows) == self.graph.readers
        inputs = [self.first + row for row in self.rows]

        def read(x: Tensor) -> Tensor:
            if self.layer == 0:
                self.stream.add(x, self.stream.ablated.values.input)
            if self.rows:
                self.stream.normed = None  # the last layer's, or there would be two
                chosen = slice(self.first, self.first + len(inputs)) if whole else inputs
                mixed = self.stream.mix(chosen, self.graph.before_attention(self.layer), ablated)
                self.stream.normed = norm(mixed).flatten(2, 3)  # (K, n, N, D)
            return x

        return read

    def project(self, number: int) -> Any:
        reader = self.block.readers[number]
        place = {row: n for n, row in enumerate(self.rows)}
        wanted = [place.get(destination - self.first) for destination in reader.destinations]
        units = [unit for unit, row in enumerate(wanted) if row is not None]
        rows = [row for row in wanted if row is not None]

        def projected(x: Tensor) -> Tensor:
            ablated = self.stream.ablated.projected[self.layer][number]  # (N, U, E)
            if not units:
                return ablated.expand(self.stream.circuits, *ablated.shape).reshape(*x.shape[:-1], -1)
            some = reader if len(units) == len(wanted) else reader.only(units)
            assert self.stream.normed is not None  # a norm comes before its matrices
            found = [project(some, _rows(one, rows)).transpose(0, 1) for one in self.stream.normed]  # (N, U', E)
            if some is not reader:
                found = [_filled(ablated, units, one) for one in found]
            return _stacked([one.reshape(len(one), -1) for one in found]).view(*x.shape[:-1], -1)

        return projected

    def write_heads(self, ablated: Tensor) -> Any:
        def written(outputs: Tensor) -> Tensor:
            self.stream.add_heads(self.block, outputs, ablated)
            return outputs.new_zeros(1).expand(*outputs.shape[:-1], self.block.weight.shape[-1])

        return written

    def read_mlp(self, norm: Any, ablated: Tensor) -> Any:
        index = self.graph.mlp_reader(self.layer)

        def read(x: Tensor) -> Tensor:
            mixed = self.stream.mix(slice(index, index + 1), self.graph.before_mlp(self.layer), ablated)
            return norm(mixed.view_as(x))

        return read

    def write_mlp(self, ablated: Tensor) -> Any:
        def written(_: nn.Module, __: Any, output: Any) -> None:
            values = output[0] if isinstance(output, tuple) else output
            self.stream.add(values, ablated)

        return written


def _read_logits(wiring: Wiring, stream: Stream, ablated: Tensor, last: Tensor) -> Any:
    norm, index = wiring.final_norm.forward, wiring.graph.logits

    def read(x: Tensor) -> Tensor:
        mixed = stream.mix(slice(index, index + 1), wiring.graph.sources, ablated)  # (K, 1, B, T, D)
        normed = norm(at_last(mixed.flatten(0, 2), last.repeat(stream.circuits)))  # (KB, 1, D)
        return normed.expand_as(x)  # only `last` will be read

    return read


def _rows(normed: Float[Tensor, "n N D"], rows: list[int]) -> Float[Tensor, "U N D"]:
    """The inputs of a reader's units; a view where they lie side by side."""
    beside = rows == list(range(rows[0], rows[0] + len(rows)))
    return normed[rows[0] : rows[0] + len(rows)] if beside else normed[rows]


def _units(reader: Reader, whole: Float[Tensor, "N UE"]) -> Float[Tensor, "N U E"]:
    units = whole.view(len(whole), -1, reader.weight.shape[2])
    return units if reader.repeat is None else units[:, list(reader.repeat)]


def _filled(ablated: Float[Tensor, "N U E"], units: list[int], found: Tensor) -> Float[Tensor, "N U E"]:
    filled = ablated.clone()
    filled[:, units] = found
    return filled


def _stacked(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts) if len(parts) > 1 else parts[0][None]


def keep_input(kept: list[Tensor]) -> Any:
    """A forward pre-hook that keeps what a module is given."""
    return lambda _, args: kept.append(args[0])


def keep_output(kept: list[Tensor], shape: torch.Size, *, as_is: bool = False) -> Any:
    """A forward hook that keeps what a module returns, as (B, T, ...) or as it is."""

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        values = output[0] if isinstance(output, tuple) else output
        kept.append(values if as_is else values.view(*shape[:2], -1))

    return keep
