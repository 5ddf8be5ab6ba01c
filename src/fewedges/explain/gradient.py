"""The gradient of a task's metric at every destination's input, from one forward and backward pass of the model.

In an unablated run all query, key and value inputs of a layer are one residual stream x behind one norm. So the
gradient at a unit's own input is J^T W^T g: g the gradient at the unit's output channels, W its matrix, J the
Jacobian of the norm at x. No per-head copy of anything enters autograd, and nothing of size (batch, token, head,
width, width) exists.

Shapes: B prompt, T token, N = B * T, D width, E head width, U unit, n destination of one norm.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fewedges.explain.hooks import Reader, Wiring, keys_per_head
from fewedges.explain.running import Written, forward, keep_input, keep_output, reading_last
from fewedges.explain.tasks.prompts import Prompts


@dataclass(frozen=True, kw_only=True)
class Inserted:
    """Values to put in place of what one group of sources writes: the input, the heads of a layer, or its MLP."""

    kind: str
    """input, heads or mlp."""
    layer: int
    values: Tensor


@dataclass
class _Kept:
    inputs: list[Tensor] = field(default_factory=list)
    heads: list[Tensor] = field(default_factory=list)
    mlps: list[Tensor] = field(default_factory=list)
    streams: list[Tensor] = field(default_factory=list)
    """Residual streams before attention, per layer."""
    read: list[list[Tensor]] = field(default_factory=list)
    """Outputs of the reading matrices, per layer."""
    mlp_streams: list[Tensor] = field(default_factory=list)
    mlp_normed: list[Tensor] = field(default_factory=list)
    final: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, eq=False)
class Gradients:
    """Gradients of one pass, handed out reading point by reading point, so that few are in memory at once."""

    wiring: Wiring
    written: Written
    metric: Float[Tensor, "B"]
    kept: _Kept
    read: list[list[Tensor]]
    mlp_normed: list[Tensor]
    final: Tensor

    def points(self, first: int = 0) -> Iterator[tuple[slice, int, Float[Tensor, "n B T D"]]]:
        """(destinations, number of sources before them, gradient at their inputs), from layer `first` on."""
        graph = self.wiring.graph
        for layer in range(first, graph.layers):
            block, start = self.wiring.blocks[layer], graph.reader(layer)
            stream = self.kept.streams[layer]
            normed = self._attention(layer)  # (n, B, T, D)
            yield slice(start, start + graph.readers), graph.before_attention(layer), pull(block.norm, stream, normed)
            stream = self.kept.mlp_streams[layer].view_as(stream)
            index, gradient = graph.mlp_reader(layer), self.mlp_normed[layer].view_as(stream)[None]
            yield slice(index, index + 1), graph.before_mlp(layer), pull(block.mlp_norm, stream, gradient)
        yield slice(graph.logits, graph.logits + 1), graph.sources, self.final[None]

    def _attention(self, layer: int) -> Float[Tensor, "n B T D"]:
        """The gradients behind the norm: W^T g, summed over the units of a destination."""
        graph, block = self.wiring.graph, self.wiring.blocks[layer]
        stream, start = self.kept.streams[layer], graph.reader(layer)
        parts = list(zip(block.readers, self.read[layer], strict=True))
        rows = [[destination - start for destination in reader.destinations] for reader, _ in parts]
        if [n for row in rows for n in row] == list(range(graph.readers)):
            found = [_before_matrix(reader, gradient) for reader, gradient in parts]
            return (torch.cat(found) if len(found) > 1 else found[0]).view(-1, *stream.shape)
        total = stream.new_zeros(graph.readers, stream[..., 0].numel(), stream.shape[-1])
        for row, (reader, gradient) in zip(rows, parts, strict=True):
            total.index_add_(0, torch.tensor(row, device=total.device), _before_matrix(reader, gradient))
        return total.view(-1, *stream.shape)


def gradients(
    wiring: Wiring,
    tokens: Int[Tensor, "B T"],
    prompts: Prompts,
    options: dict[str, Any],
    inserted: Inserted | None = None,
) -> Gradients:
    """Run the model on these tokens and differentiate the prompts' metric, summed over prompts."""
    kept = _Kept()
    with torch.enable_grad(), keys_per_head(wiring), _keeping(wiring, kept, tokens, inserted):
        with reading_last(wiring, prompts.last):
            logits = forward(wiring, tokens, options)[:, 0]
        metric = prompts.measure_metric(logits)
        flat = [x for layer in kept.read for x in layer]
        found = torch.autograd.grad(metric.sum(), [*flat, *kept.mlp_normed, kept.final[0]], allow_unused=True)
    wanted = [*flat, *kept.mlp_normed, kept.final[0]]
    filled = [torch.zeros_like(x) if g is None else g for g, x in zip(found, wanted, strict=True)]
    stream = iter(filled)
    read = [[next(stream) for _ in layer] for layer in kept.read]
    mlp_normed = [next(stream) for _ in kept.mlp_normed]
    lists = {name: [x.detach() for x in getattr(kept, name)] for name in ("heads", "mlps", "streams", "mlp_streams")}
    return Gradients(
        wiring=wiring,
        written=Written(
            input=kept.inputs[0].detach(), heads=lists["heads"], mlps=lists["mlps"], logits=logits.detach()
        ),
        metric=metric.detach(),
        kept=_Kept(streams=lists["streams"], mlp_streams=lists["mlp_streams"]),
        read=read,
        mlp_normed=mlp_normed,
        final=next(stream),
    )


def pull(norm: nn.Module, x: Float[Tensor, "B T D"], gradient: Float[Tensor, "n B T D"]) -> Float[Tensor, "n B T D"]:
    """Pull n gradients back through a norm at x: J^T gradient, whatever the norm computes."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(norm(x), x, gradient, is_grads_batched=True)[0]


def _before_matrix(reader: Reader, gradient: Float[Tensor, "B T UE"]) -> Float[Tensor, "U N D"]:
    units, _, width = reader.weight.shape
    return torch.bmm(gradient.reshape(-1, units, width).transpose(0, 1), reader.weight.mT)


@contextmanager
def _keeping(wiring: Wiring, kept: _Kept, tokens: Tensor, inserted: Inserted | None) -> Iterator[None]:
    """Hooks that keep, and that start autograd's graph at the residual stream before layer 0."""
    values = None if inserted is None or inserted.kind != "input" else inserted.values
    with ExitStack() as stack:
        start = wiring.blocks[0].layer
        stack.callback(start.register_forward_pre_hook(_start(kept, values), with_kwargs=True).remove)
        for layer, block in enumerate(wiring.blocks):
            given = inserted if inserted is not None and inserted.layer == layer else None
            hooks = [
                block.norm.register_forward_pre_hook(keep_input(kept.streams)),
                block.mlp_norm.register_forward_pre_hook(keep_input(kept.mlp_streams)),
                block.mlp_norm.register_forward_hook(keep_output(kept.mlp_normed, tokens.shape, as_is=True)),
            ]
            if given is not None and given.kind == "heads":
                hooks.append(block.writer.register_forward_pre_hook(lambda _, __, x=given.values: (x,)))
            if given is not None and given.kind == "mlp":
                hooks.append(block.mlp.register_forward_hook(_returning(given.values)))
            hooks.append(block.writer.register_forward_pre_hook(keep_input(kept.heads)))
            hooks.append(block.mlp.register_forward_hook(keep_output(kept.mlps, tokens.shape)))
            read: list[Any] = [None] * len(block.readers)  # in the order of readers, whatever the order of calls
            kept.read.append(read)
            hooks += [r.module.register_forward_hook(_reading(r, read, n)) for n, r in enumerate(block.readers)]
            for hook in hooks:
                stack.callback(hook.remove)
        stack.callback(wiring.final_norm.register_forward_pre_hook(keep_input(kept.final)).remove)
        yield


def _start(kept: _Kept, values: Tensor | None) -> Any:
    def start(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stream = (args[0] if values is None else values).detach().requires_grad_()
        kept.inputs.append(stream)
        return (stream, *args[1:]), kwargs

    return start


def _reading(reader: Reader, kept: list[Any], number: int) -> Any:
    """Keep the outputs of a reading matrix; where the graph reads keys once per head, repeat them here."""

    def read(_: nn.Module, __: Any, output: Tensor) -> Tensor | None:
        if reader.repeat is not None:
            width = reader.weight.shape[2]
            output = output.unflatten(-1, (-1, width))[..., list(reader.repeat), :].flatten(-2)
        kept[number] = output
        return output if reader.repeat is not None else None

    return read


def _returning(values: Tensor) -> Any:
    def replaced(_: nn.Module, __: Any, output: Any) -> Any:
        return (values, *output[1:]) if isinstance(output, tuple) else values.view_as(output)

    return replaced
