"""Milliseconds and bytes of one call, on CPU and GPU: several calls side by side, so that drift hits all alike.

A cold cache stands before every timed call (a buffer larger than it is written), so that weights come from memory
as they do in a model whose other layers ran in between. On a GPU the time is between two events on its stream.
"""

import random
import time
import weakref
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WARM_UPS = 3
SLOW_MS = 100.0
"""A call that takes this long is warm after one."""
LEAST = 5
"""Repeats of a call, however slow."""
FLUSH_MIB = {"cuda": 256, "cpu": 64}
"""What is written before a timed call: more than the last cache of an H100 (50 MiB), of most desktop CPUs (32)."""
CLOCKS = {"wall": time.perf_counter, "thread": time.thread_time, "graph": time.perf_counter}
"""What times a call on CPU. On a busy machine a long call is interrupted and a short one is not, so that wall time
favours whatever is fast; the thread's own CPU time counts neither (it needs a single thread, and no GPU). "graph" is
for GPUs, whose time is that of events: calls are to be replayed as CUDA graphs, so that launching is not in it."""
Run = Callable[[], Any]
Timed = Callable[[Run, Tensor], Callable[[], float]]


def interleaved(
    runs: Mapping[str, Run],
    device: torch.device,
    repeats: int = 30,
    *,
    seed: int = 0,
    warm_ups: int = WARM_UPS,
    clock: str = "wall",
    seconds: float | None = None,
    always: Collection[str] = (),
) -> dict[str, list[float]]:
    """Milliseconds of every call in every repeat; a repeat makes each call once, in an order drawn anew.

    `seconds` bounds what a call costs in all, warm-ups included: one that is too slow takes part in the first repeats
    only, as many as fit and LEAST at least, so that its times are fewer. Calls named in `always` take part in all. A
    bounded call has to have been made before: what only a first call does (compiling) is no measure of the next.
    """
    counts = dict.fromkeys(runs, repeats)
    for name, run in runs.items():
        if seconds is not None and name not in always:
            counts[name] = _fitting(run, device, warm_ups, 1e3 * seconds, CLOCKS[clock])
            continue
        for _ in range(warm_ups):
            run()
    cold = torch.empty(FLUSH_MIB[device.type] * 2**20, dtype=torch.int8, device=device)
    timed: Timed = _cuda_time if device.type == "cuda" else partial(_cpu_time, CLOCKS[clock])
    draw, found = random.Random(seed), {name: [] for name in runs}
    for repeat in range(repeats):
        takes_part = [name for name in runs if repeat < counts[name]]
        for name in draw.sample(takes_part, len(takes_part)):
            found[name].append(timed(runs[name], cold))
    _synchronize(device)
    return {name: [read() for read in times] for name, times in found.items()}


def peak_bytes(run: Run, device: torch.device) -> int:
    """The most bytes that a call holds beyond what was there before it, its result included.

    On a GPU the allocator says; on CPU the tensors that PyTorch's operators return are counted, and scratch space
    inside an operator is not.
    """
    run()
    if device.type != "cuda":
        with _Held() as held:
            run()
        return held.peak
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def peaks(device: torch.device, dtype: torch.dtype, quick: bool = False, clock: str = "wall") -> dict[str, float]:
    """What this device can do: FLOP/s of a large matrix product, bytes/s of a large copy (read plus written).

    The best of several runs: other work on the machine only takes away.
    """
    cuda = device.type == "cuda"
    side, entries = (8192, 2**29) if cuda else (1024, 2**25) if quick else (2048, 2**26)  # bytes copied: 512, 32, 64 M
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.randint(-128, 127, (entries,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Run] = {"product": lambda: torch.mm(a, b), "copy": lambda: target.copy_(source)}
    times = interleaved(calls, device, 5 if quick else 10, clock=clock)
    best = {name: min(times[name]) / 1e3 for name in calls}
    return {"flops": 2 * side**3 / best["product"], "bandwidth": 2 * entries / best["copy"]}


def _fitting(run: Run, device: torch.device, warm_ups: int, budget: float, now: Callable[[], float]) -> int:
    """Warm a call up, a slow one once, and say how often it fits into what is left of these milliseconds."""
    made, ms = 0, 0.0
    while made < max(1, warm_ups) and ms < SLOW_MS:
        _synchronize(device)
        start = now()
        run()
        _synchronize(device)
        made, ms = made + 1, 1e3 * (now() - start)
    return max(LEAST, int(budget / max(ms, 1e-3)) - made)


def _cpu_time(now: Callable[[], float], run: Run, cold: Tensor) -> Callable[[], float]:
    cold.fill_(1)
    start = now()
    run()
    found = 1e3 * (now() - start)
    return lambda: found


def _cuda_time(run: Run, cold: Tensor) -> Callable[[], float]:
    """Nothing waits here: the host may run ahead, as it does in a model."""
    cold.zero_()
    with torch.cuda.device(cold.device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
    return lambda: start.elapsed_time(end)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Held(TorchDispatchMode):
    """Counts the bytes of new tensors while they live; views of one storage count once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.owners: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if _counts(leaf)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if _counts(leaf) and (_key(leaf) in self.sizes or _key(leaf) not in given):
                self._hold(leaf)
        return out

    def _hold(self, tensor: Tensor) -> None:
        key = _key(tensor)
        self.sizes[key] = tensor.untyped_storage().nbytes()
        self.owners[key] = self.owners.get(key, 0) + 1
        self.peak = max(self.peak, sum(self.sizes.values()))
        weakref.finalize(tensor, self._release, key)

    def _release(self, key: int) -> None:
        self.owners[key] -= 1
        if not self.owners[key]:
            del self.owners[key], self.sizes[key]


def _counts(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout == torch.strided


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
