"""Calibration, block after block: what flows into each matrix, measured on the already pruned model before it.

For each block the consumer gets the statistics of its inputs, prunes it, and asks for the next; only then are the
block's outputs computed, with its new weights. One block's statistics are in memory at a time, however many blocks
there are. Beside them the hidden states between two blocks stay on the model's device: 4 N T D bytes in float32, half
of that where the model is in 16 bits (128 x 2048 x 576: 604 MB; x 4096: 4.3 GB), the price of not running the whole
model for every block; fewer calibration windows cost less.

Shapes: N windows, T tokens, D model width, C inputs of a matrix.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fewedges.errors import DataError, ModelError
from fewedges.model.loading import Loaded
from fewedges.sparsify.matrices import Block, Matrix, blocks_of

STRIP = 256
"""Columns of the Gram matrix computed at once; what lies below the diagonal is mirrored, not computed."""


@dataclass(eq=False)
class Inputs:
    """Sums over the inputs of a matrix; matrices that read the same tensor share one."""

    width: int
    tokens: int = 0
    squares: Float[Tensor, "C"] | None = None
    """Sum of squares of each feature."""
    upper: Float[Tensor, "C C"] | None = None
    """Upper triangle of the sum of x x^T."""

    def add_(self, x: Float[Tensor, "*batch C"], gram: bool) -> None:
        """Add a batch of inputs (in float32, or float64 where they are)."""
        rows = x.reshape(-1, self.width)
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if not gram:
            now = rows.square().sum(0)
            self.squares = now if self.squares is None else self.squares + now
        else:
            if self.upper is None:
                self.upper = rows.new_zeros(self.width, self.width)
            for start in range(0, self.width, STRIP):
                self.upper[start : start + STRIP, start:].addmm_(rows[:, start : start + STRIP].T, rows[:, start:])
        self.tokens += len(rows)

    @property
    def gram(self) -> Float[Tensor, "C C"]:
        """Sum of x x^T over all tokens."""
        assert self.upper is not None
        return self.upper.triu() + self.upper.triu(1).T

    @property
    def norm(self) -> Float[Tensor, "C"]:
        """L2 norm of each feature over all tokens."""
        squares = self.upper.diagonal() if self.squares is None else self.squares  # type: ignore[union-attr]
        return squares.sqrt()


@dataclass(frozen=True)
class _Call:
    """How the model calls a block, beside the hidden states: the same for every window of one length."""

    rest: tuple[Any, ...]
    options: dict[str, Any]


@torch.no_grad()
def calibrated(
    loaded: Loaded,
    tokens: Int[Tensor, "N T"],
    *,
    gram: bool = False,
    micro_batch: int = 4,
    precision: str = "fp32",
) -> Iterator[tuple[Block, dict[str, Inputs]]]:
    """Walk over the blocks; yield each with its matrices' inputs by name, measured on the blocks as they now are.

    `gram` asks for sums of x x^T instead of squares only. Raises ModelError when the model is more than a chain of
    blocks, DataError when a matrix sees no token. The dictionary is empty once the next block is asked for.
    """
    blocks = blocks_of(loaded)

    device = loaded.model.device

    def arithmetic() -> torch.autocast:  # entered anew for each piece of work: never left on for the consumer
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")

    pieces = tokens.to(device).split(micro_batch)
    calls = _calls(loaded.model, blocks, pieces[0][:1])
    with arithmetic():
        hidden = [_entry(loaded.model, blocks[0], piece) for piece in pieces]
    for number, (block, call) in enumerate(zip(blocks, calls, strict=True)):
        with arithmetic():
            seen = _measure(block, call, hidden, gram)
        yield block, seen
        seen.clear()  # the consumer's loop variable is this dictionary: two blocks' sums would be in memory below
        if number + 1 < len(blocks):
            with arithmetic():
                for index, x in enumerate(hidden):
                    hidden[index] = _run(block, call, x)


class _Seen(Exception):
    """Everything wanted has been seen: the rest of this forward pass is not needed."""


def _measure(block: Block, call: _Call, hidden: list[Tensor], gram: bool) -> dict[str, Inputs]:
    """Sums over the inputs of every matrix of a block."""
    found: dict[str, Inputs] = {}
    for x in hidden:
        with _listening(block.matrices, found, gram), suppress(_Seen):
            _run(block, call, x)
    if unseen := [matrix.name for matrix in block.matrices if matrix.name not in found]:
        raise DataError(f"calibrate {unseen[0]}", "no token of the data reached it", "more calibration windows")
    return found


@contextmanager
def _listening(matrices: tuple[Matrix, ...], found: dict[str, Inputs], gram: bool) -> Iterator[None]:
    """Add what the matrices read during one forward pass; end the pass when all have read."""
    added: dict[int, tuple[Tensor, Inputs]] = {}  # by input tensor, kept alive so that its id stays its own
    waiting = {matrix.name for matrix in matrices}

    def listen(matrix: Matrix, x: Tensor) -> None:
        mine = found.get(matrix.name)
        shared = added.get(id(x))
        if mine is None:
            mine = found[matrix.name] = shared[1] if shared else Inputs(matrix.shape[1])
        if shared is None or shared[1] is not mine:
            mine.add_(x, gram)
            added[id(x)] = (x, mine)
        waiting.discard(matrix.name)
        if not waiting:
            raise _Seen

    with ExitStack() as stack:
        for matrix in matrices:
            hook = matrix.module.register_forward_pre_hook(partial(_heard, listen, matrix))
            stack.callback(hook.remove)
        yield


def _heard(listen: Callable[[Matrix, Tensor], None], matrix: Matrix, _: nn.Module, args: tuple[Any, ...]) -> None:
    listen(matrix, args[0])


def _run(block: Block, call: _Call, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
    return _first(block.module(x, *call.rest, **call.options))


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _entry(model: Any, first: Block, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
    """The hidden states that enter the first block."""
    caught: list[Tensor] = []

    def catch(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        caught.append(args[0] if args else options["hidden_states"])
        raise _Seen

    hook = first.module.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        with suppress(_Seen):
            model(input_ids=tokens, use_cache=False)
    finally:
        hook.remove()
    return caught[0]


def _calls(model: Any, blocks: list[Block], tokens: Int[Tensor, "1 T"]) -> list[_Call]:
    """How each block is called (masks and positions differ between them), from one window through the whole model."""
    calls: list[_Call] = []
    ends: list[Tensor | None] = []  # only the last is kept: of all blocks they would be L T D numbers
    broken: list[str] = []

    def enter(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        options = dict(options)
        x, rest = (args[0], args[1:]) if args else (options.pop("hidden_states"), ())
        end = ends[-1] if ends else x
        if len(ends) != len(calls) or end is None or not torch.equal(end, x):
            broken.append(blocks[min(len(calls), len(blocks) - 1)].name)
        calls.append(_Call(rest, options))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        ends[:] = [*[None] * len(ends), _first(output)]
        if len(ends) == len(blocks):
            raise _Seen  # no logits: at 49,152 words a window of 2,048 tokens would be 400 MB of them

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(block.module.register_forward_hook(leave).remove)
        stack.enter_context(suppress(_Seen))
        model(input_ids=tokens, use_cache=False)
    if broken or len(calls) != len(blocks):
        found = f"{len(calls)} calls of {len(blocks)} blocks" + (f", {broken[0]} takes another input" if broken else "")
        raise ModelError("calibrate block by block", found, "a decoder in which each block reads the one before")
    return calls
