"""Is the fused kernel right on this GPU, and how fast is it?

    python benchmarks/attention.py out.csv            # errors, then times, written to out.csv
    python benchmarks/attention.py out.csv --tiles    # first try a few tile shapes, and time with the best

Errors are relative 2-norms against gate.py in float64, root mean square over five draws (a bias gradient of two heads
is two numbers: one draw says little); beside them those of gate.py in the same dtype. Times
are forward + backward by CUDA events, the gradient through the expected edges included; peak memory includes
the inputs. `sdpa` is torch's flash attention without gates: the floor.
"""

import argparse
import csv
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewedges.sparsify.attention import kernel
from fewedges.sparsify.attention.gate import Gating, gated_attention

CHECKS = [  # B, H, G, T, E, dtype, sample; every second one with a bias per key
    *((b, h, g, t, e, torch.bfloat16, sample)
      for b, h, g, t, e in ((1, 4, 4, 1024, 64), (2, 9, 3, 515, 64), (1, 8, 2, 129, 32), (1, 4, 2, 700, 128),
                            (2, 4, 4, 333, 96), (1, 2, 1, 130, 256), (3, 3, 1, 64, 48))
      for sample in (True, False)),
    (1, 4, 4, 1000, 64, torch.float16, True),
    (1, 4, 2, 333, 96, torch.float16, False),
    (1, 4, 4, 257, 64, torch.float32, True),
    (2, 6, 2, 301, 32, torch.float32, False),
    (1, 2, 1, 100, 128, torch.float32, True),
    (2, 4, 2, 211, 64, torch.float32, True),
]  # fmt: skip
SHAPES = {  # B, H, G, T, E
    "B16 H12 T1024 E64": (16, 12, 12, 1024, 64),
    "B2 H32 T4096 E64": (2, 32, 32, 4096, 64),
    "B32 H9 G3 T512 E64": (32, 9, 3, 512, 64),
}
NAMES = ("output", "expected", "open", "query", "key", "value", "bias")
PLAIN_BYTES = 11 * 4  # what gate.py keeps per entry of the (T, T) triangle and its mirror, about
FORWARD = [(64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 3), (128, 64, 8, 3), (128, 32, 8, 3), (64, 128, 4, 2)]
QUERY_GRAD = [
    (64, 32, 4, 2),
    (64, 32, 4, 3),
    (64, 64, 4, 2),
    (128, 32, 8, 2),
    (128, 64, 8, 2),
    (64, 16, 4, 2),
]
KEY_GRAD = [(32, 64, 4, 2), (32, 64, 4, 3), (64, 64, 4, 2), (32, 128, 8, 2), (64, 128, 8, 2), (16, 64, 4, 3)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--tiles", action="store_true", help="time tile shapes, use the fastest")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--draws", type=int, default=5, help="of the inputs, for the errors")
    parser.add_argument("--checks", default=":", help="slice of the checks, as 0:7 (several processes share them)")
    parser.add_argument("--no-times", action="store_true")
    options = parser.parse_args()
    first, _, last = options.checks.partition(":")
    worst = check(options.draws, slice(int(first) if first else None, int(last) if last else None))
    if options.tiles:
        choose_tiles()
    if not options.no_times:
        write_rows(options.csv, (row for s in SHAPES.items() for row in time_shape(*s, options.repeats)))
    sys.exit(0 if worst <= 2 else f"the kernel is {worst:.1f} times as wrong as gate.py in the same dtype")


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """Write each row as it comes: what runs out of time keeps what it has."""
    writer = None
    with path.open("w", newline="") as file:
        for each in rows:
            if writer is None:
                writer = csv.DictWriter(file, list(each))
                writer.writeheader()
            writer.writerow(each)
            file.flush()


# ------------------------------------------------------------------------------------------------------------
# Right?
# ------------------------------------------------------------------------------------------------------------


def check(draws: int, part: slice) -> float:
    """Print errors of kernel and plain reference; return their worst ratio, errors under 2e-6 forgiven."""
    worst = 0.0
    for number, (*shape, dtype, sample) in list(enumerate(CHECKS))[part]:
        ours, same = [], []
        for seed in range(draws):
            tensors = inputs(*shape, dtype=dtype, by_key=number % 2 == 1, seed=seed)
            b, h, _, t, e = shape
            pulls = [torch.randn(size, device="cuda") for size in ((b, h, t, e), (b, h, t))]
            exact = gradients(plain(sample), [x.detach().double().requires_grad_() for x in tensors], pulls)
            ours.append(errors(gradients(fused(sample), tensors, pulls), exact))
            same.append(errors(gradients(plain(sample), tensors, pulls), exact))
        ours, same = (
            [statistics.mean(x**2 for x in xs) ** 0.5 for xs in zip(*rows, strict=True)] for rows in (ours, same)
        )
        print(*shape, str(dtype).removeprefix("torch."), "sampled" if sample else "hard")
        print("   kernel", *(f"{n} {e:.1e}" for n, e in zip(NAMES, ours, strict=True)))
        print("   plain ", *(f"{n} {e:.1e}" for n, e in zip(NAMES, same, strict=True)), flush=True)
        first, again = (gradients(fused(sample), tensors, pulls) for _ in range(2))
        print("   same bits twice:", all(torch.equal(a, b) for a, b in zip(first, again, strict=True)))
        worst = max(worst, *(a / max(b, 2e-6) for a, b in zip(ours, same, strict=True)))
    return worst


def gradients(attend: Callable, tensors: list[Tensor], pulls: list[Tensor]) -> list[Tensor]:
    """Results, and gradients through output and expected edges."""
    result = attend(*tensors)
    grads = torch.autograd.grad(result[:2], tensors, [p.to(r.dtype) for p, r in zip(pulls, result, strict=False)])
    return [x.detach() for x in (*result, *grads)]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    pairs = zip(found, exact, strict=True)
    return [((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in pairs]


def inputs(
    b: int, h: int, g: int, t: int, e: int, dtype: torch.dtype = torch.bfloat16, by_key: bool = False, seed: int = 0
) -> list[Tensor]:
    """Query, key, value as transposed views, and a bias per head, or per head and key."""
    torch.manual_seed(seed)
    qkv = [torch.randn(b, t, n, e, device="cuda").to(dtype).transpose(1, 2) for n in (h, g, g)]
    bias = torch.linspace(-4, 1, h, device="cuda")
    bias = bias[:, None] + torch.randn(b, h, t, device="cuda") if by_key else bias
    return [x.requires_grad_() for x in (*qkv, bias)]


def fused(sample: bool) -> Callable:
    seed = torch.tensor(7, dtype=torch.int32, device="cuda")
    return lambda q, k, v, bias: kernel.fused_gated_attention(
        q, k, v, bias, seed, scaling=q.shape[-1] ** -0.5, sample=sample
    )


def plain(sample: bool) -> Callable:
    def attend(q, k, v, bias):
        causal = torch.ones(1, 1, q.shape[2], q.shape[2], dtype=torch.bool, device="cuda").tril()
        gating = Gating(sample=sample, seed=7)
        return gated_attention(q, k, v, bias, causal, scaling=q.shape[-1] ** -0.5, gating=gating)

    return attend


# ------------------------------------------------------------------------------------------------------------
# Fast?
# ------------------------------------------------------------------------------------------------------------


def time_shape(name: str, shape: tuple[int, ...], repeats: int) -> Iterator[dict]:
    """One row per way of attending; a way that does not fit into memory is left out and said so."""
    b, h, _, t, _ = shape
    fits = b * h * t * t * PLAIN_BYTES < torch.cuda.get_device_properties(0).total_memory
    yield row("fused", name, step(fused(True), shape), repeats)
    yield row("sdpa", name, sdpa_step(shape), repeats)
    if fits:
        yield row("plain", name, step(plain(True), shape), repeats)
    else:
        print(f"{name}: plain left out, its (T, T) tensors do not fit")


def step(attend: Callable, shape: tuple[int, ...]) -> Callable[[], None]:
    tensors = inputs(*shape)
    b, h, _, t, e = shape
    pulls = [
        torch.randn(b, t, h, e, device="cuda").bfloat16().transpose(1, 2),
        torch.full((b, h, t), 1e-3).cuda(),
    ]
    return lambda: torch.autograd.grad(attend(*tensors)[:2], tensors, pulls)


def sdpa_step(shape: tuple[int, ...]) -> Callable[[], None]:
    *tensors, _ = inputs(*shape)
    pull = torch.randn_like(tensors[0])

    def run():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            gqa = shape[1] != shape[2]
            out = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=gqa)
        torch.autograd.grad(out, tensors, pull)

    return run


def row(what: str, shape: str, run: Callable[[], None], repeats: int) -> dict:
    times, peak = measure(run, repeats)
    p20, p50, p80 = (statistics.quantiles(times, n=10)[i] for i in (1, 4, 7))
    device, version = torch.cuda.get_device_name(0), f"{torch.__version__} triton {triton.__version__}"
    print(f"{what:6} {shape:20} {p20:.3f} {p50:.3f} {p80:.3f} ms  {peak:.0f} MiB", flush=True)
    found = {"what": what, "shape": shape, "dtype": "bfloat16", "device": device, "torch": version}
    return {
        **found,
        "ms_p20": f"{p20:.4f}",
        "ms_p50": f"{p50:.4f}",
        "ms_p80": f"{p80:.4f}",
        "peak_mib": f"{peak:.0f}",
    }


def measure(run: Callable[[], None], repeats: int) -> tuple[list[float], float]:
    """Milliseconds of each repeat, a cold L2 before each, and the peak MiB of one run."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 2**20
    flush = torch.empty(64 * 2**20, dtype=torch.int32, device="cuda")
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in times], peak


# ------------------------------------------------------------------------------------------------------------
# Tiles
# ------------------------------------------------------------------------------------------------------------


def choose_tiles() -> None:
    """Time each kernel's candidates, the other two fixed; leave the fastest in TILES (E 64, 16 bits)."""
    best = kernel.TILES[(64, 2)]
    for field, candidates in zip(best._fields, (FORWARD, QUERY_GRAD, KEY_GRAD), strict=True):
        totals = {}
        for candidate in candidates:
            kernel.TILES[(64, 2)] = best._replace(**{field: kernel.Tile(*candidate)})
            totals[candidate] = try_tiles(field, candidate)
        best = best._replace(**{field: kernel.Tile(*min(totals, key=totals.get))})
    kernel.TILES[(64, 2)] = best
    print("best:", best, flush=True)


def try_tiles(field: str, candidate: tuple[int, ...]) -> float:
    """Milliseconds of fwd + bwd, summed over the shapes; infinite where the candidate does not run."""
    try:
        medians = [statistics.median(measure(step(fused(True), s), 20)[0]) for s in SHAPES.values()]
    except Exception as error:  # too much shared memory, too many registers: a candidate that does not run
        print(field, candidate, type(error).__name__, str(error)[:100], flush=True)
        return float("inf")
    print(field, candidate, *(f"{m:.3f}" for m in medians), flush=True)
    return sum(medians)


if __name__ == "__main__":
    main()
