"""What launching a kernel takes: its device functions or why there are none, operands, and the fastest tile shapes.

Tile shapes are tried once for every (kernel, shape, dtype, device), on the real operands, and remembered until the
process ends; `trials` says what was found. A kernel told its tiles tries nothing. Other tiles add in another order:
where bits must repeat from run to run, tell the tiles.
"""

import functools
import importlib
import statistics
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from fewedges.errors import ModelError, RecipeError
from fewedges.sparsify.attention.kernel import _interpreted

Kernel = Literal["reference", "triton"]
WARM, TIMED, ROW = 2, 7, 10
"""Runs of every candidate before it is timed, replays that are timed, and runs in one of them."""

R = TypeVar("R")
T = TypeVar("T", bound=tuple[Any, ...])
Key = tuple[str, tuple[int, ...], str, str]


class Trial(NamedTuple):
    """One candidate: what it was tried for, and its median milliseconds, or why it does not run."""

    what: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    tile: Any
    ms: float
    why: str = ""


_FOUND: dict[Key, Any] = {}
_TRIALS: list[Trial] = []


def trials() -> list[dict[str, Any]]:
    """What was tried in this process, in order, one row a candidate; `chosen` is the fastest of its kind."""
    return [trial._asdict() | {"chosen": _FOUND.get(trial[:4]) == trial.tile} for trial in _TRIALS]


def forget() -> None:
    """Try again from here on."""
    _FOUND.clear()
    _TRIALS.clear()
    _named.cache_clear()


def fastest(
    what: str, shape: tuple[int, ...], like: Tensor, candidates: Callable[[], Sequence[T]], launch: Callable[[T], Any]
) -> T:
    """The tile with which `launch` is fastest on this device; the first one where there is no GPU to time.

    Candidates are asked for once a shape: the host has no time to make them at every call. Raises ModelError inside a
    CUDA graph's capture when nothing is known yet, and when no tile runs.
    """
    if like.device.type != "cuda":
        return candidates()[0]
    key = (what, shape, *_named(like.dtype, like.device))
    if key not in _FOUND:
        tiles = candidates()
        if len(tiles) == 1:
            return _FOUND.setdefault(key, tiles[0])
        if torch.cuda.is_current_stream_capturing():
            found = f"no tile is known for {shape}, and nothing can be timed while a graph is captured"
            raise ModelError(f"capture {what}", found, "one run of the same shape before the capture, or tiles=")
        tried = [Trial(*key, tile, *_time(launch, tile)) for tile in tiles]
        _TRIALS.extend(tried)
        best = min(tried, key=lambda trial: trial.ms)
        if best.ms == float("inf"):
            raise ModelError(f"{what} of {shape} on {key[3]}", f"no tile runs ({best.why})", "kernel='reference'")
        _FOUND[key] = best.tile
    return _FOUND[key]


@functools.cache
def _named(dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
    """As rows of results say it."""
    return str(dtype).removeprefix("torch."), torch.cuda.get_device_name(device)


def _time(launch: Callable[[T], Any], tile: T) -> tuple[float, str]:
    """Median milliseconds; infinite, with the reason, where the device has too little memory or registers.

    Runs are replayed as a CUDA graph: launching from Python takes longer than many of these kernels.
    """
    try:
        for _ in range(WARM):
            launch(tile)
        graph, _ = captured(lambda: [launch(tile) for _ in range(ROW)])
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(TIMED)]
        for start, end in events:
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
    except Exception as error:  # what a compiler throws has no common type; the reason is kept and shown
        return float("inf"), f"{type(error).__name__}: {str(error)[:200]}"
    return statistics.median(start.elapsed_time(end) for start, end in events) / ROW, ""


def captured(run: Callable[[], R]) -> tuple[torch.cuda.CUDAGraph, R]:
    """What `run` launches, as a CUDA graph, and what it returned, which replays fill again.

    torch.cuda.graph would also collect garbage and empty the cache.
    """
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        graph.capture_begin(capture_error_mode="thread_local")  # autograd has a thread of its own
        try:
            result = run()
        finally:
            graph.capture_end()
    torch.cuda.synchronize()
    return graph, result


def untraced(function: Callable[..., Tensor], *given: Any) -> Tensor:
    """function(*given), as a break in the graph where torch.compile is tracing: a launch is not for it to look into.

    (The decorator torch.compiler.disable does the same and imports all of dynamo, 1.8 s, for those who never compile.)
    """
    if torch.compiler.is_compiling():
        function = torch.compiler.disable(function)  # type: ignore[assignment]
    return function(*given)


def as_autocast(x: Tensor, *others: Tensor | None) -> Any:
    """Operands in the dtype that torch's own products would take under autocast; as they are without it."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, *others
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), *(None if t is None else t.to(dtype) for t in others)


def choose_kernel(kernel: str, known: Sequence[str] = get_args(Kernel)) -> Any:
    """`kernel`, or an error that says what there is."""
    if kernel not in known:
        hint = f"{', '.join(known[:-1])} or {known[-1]}"
        raise RecipeError(f"kernel={kernel!r}", "there is none of that name", hint)
    return kernel


def device_functions(asked: str, module: str, device: torch.device, instead: str = "reference") -> ModuleType:
    """The device functions of a kernel, or why there are none, and which kernel to take instead."""
    hint = f"kernel={instead!r}, or TRITON_INTERPRET=1 to debug the kernel slowly"
    if device.type != "cuda" and not _interpreted():
        raise ModelError(asked, f"tensors on {device}, not on a GPU", hint)
    try:
        importlib.import_module("triton.tools.tensor_descriptor")
        return importlib.import_module(f"fewedges.sparsify.{module}")
    except ImportError as error:
        raise ModelError(asked, f"no working triton ({error})", "pip install 'fewedges[kernel]'") from error


def described(x: Tensor, shape: Sequence[int], strides: Sequence[int], box: Sequence[int]) -> Any:
    """A tensor descriptor: x seen in a shape and strides, read and written a box at a time."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(shape), list(strides), list(box))


def aligned(x: Tensor) -> Tensor:
    """x (rows, columns), copied if the copy engine could not read it: numbers side by side, rows 16 bytes apart."""
    fits = x.stride(1) == 1 and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def packed(x: Tensor) -> Tensor:
    """x contiguous, on a 16-byte boundary: a parameter may be a slice of something larger."""
    return x.contiguous() if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def options(warps: int, stages: int) -> dict[str, Any]:
    """Compiler options, spelt out: multiply-adds in one instruction are from Triton 3.10 on not the default."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def precision(x: Tensor) -> str:
    """float32 is multiplied as such; the word does not matter for 16 bits."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def power_above(n: int) -> int:
    """The power of two that holds n; at least 16, the smallest side of a tile."""
    return max(16, 1 << (n - 1).bit_length())
