"""Fixed attention patterns by FlexAttention against dense causal flash attention: right on this GPU, and how fast?

    python benchmarks/fixed_attention.py out.csv              # errors, then times; about 50 s on an H100
    python benchmarks/fixed_attention.py out.csv --dry        # every path once, tiny, on a CPU

check: relative 2-norms of output and gradients against masked SDPA in float32, at T = 1024, beside masked SDPA in
bfloat16; the exit code says if FlexAttention is twice as wrong. Times by CUDA events as in benchmarks/attention.py
(cold L2), bfloat16, causal. `kernel` has its block mask at hand and is replayed as a CUDA graph; `layer` is a layer's
whole call as attending.py makes it, reordering included, launched from Python; `first` is that of the first layer of a
forward pass, which lays the rule and its block mask for the rest. Columns: density of the causal triangle, edges per
query per head, cover of its 128 x 128 blocks (what FlexAttention computes), speed-up over dense flash attention run the
same way; 1 / cover is its limit.
"""

import argparse
import functools
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from attention import row, write_rows
from blocks import dry_row
from inference import graphed
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewedges.sparsify import attending
from fewedges.sparsify.fixed_attention import BigBird, BlockButterfly, Fixed, Full, Local, Longformer, Rule, Strided
from fewedges.sparsify.pattern import Pattern

HEADS, WIDTH, TOKENS = 12, 64, 16384
SDPA = torch.nn.functional.scaled_dot_product_attention
Run = Callable[[], object]


def rules(unit: int) -> dict[str, Rule]:
    """The patterns, their sizes in units: 64 tokens, less for a dry run."""
    return {
        f"local {4 * unit}": Local(4 * unit),
        f"strided {2 * unit}": Strided(2 * unit),
        f"strided {2 * unit} second, reordered": Strided(2 * unit, "second"),
        f"fixed {2 * unit} {unit // 8}": Fixed(2 * unit, unit // 8),
        f"bigbird {unit} 3": BigBird(unit, 3),
        f"longformer {8 * unit} 1": Longformer(8 * unit, tokens=(0,)),
        f"butterfly {2 * unit}, {unit} global": BlockButterfly(2 * unit, first=unit),
        "causal": Full(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=55, help="begin no new pattern after this long")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU, nothing timed")
    options = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64  # a variant a length, and maybe one a pattern
    device, started = torch.device("cpu" if options.dry else "cuda"), time.perf_counter()
    if options.dry:
        options.lengths = [128]
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
    unit = 8 if options.dry else 64
    worst = check(device, unit, 128 if options.dry else 1024)
    timed = functools.partial(dry_row if options.dry else row, repeats=options.repeats)
    write_rows(options.csv, times(options, device, unit, timed, started))
    sys.exit(0 if worst <= 2 else f"FlexAttention is {worst:.1f} times as wrong as masked SDPA in the same dtype")


def times(options: argparse.Namespace, device: torch.device, unit: int, timed: Callable, started: float) -> Iterator:
    """All rows: for each length dense flash attention, then pattern after pattern."""
    for length in options.lengths:
        tensors = inputs(max(1, TOKENS // length) if device.type == "cuda" else 1, length, device)
        shape, base = f"B{len(tensors[0])} H{HEADS} T{length} E{WIDTH}", {}
        plain = functools.partial(flash, *tensors)
        for way, run in ways(tensors, kernel=plain, layer=plain, first=plain):
            base[way] = timed(f"sdpa {way}", shape, run)
            yield base[way] | dict.fromkeys(("density", "cover", "speedup"), "1") | {"edges": f"{(length + 1) / 2}"}
        for name, rule in rules(unit).items():
            if time.perf_counter() - started > options.seconds:
                print(f"{name} at {length}: left out, {options.seconds:.0f} s are over", flush=True)
                continue
            yield from time_rule(name, rule, tensors, shape, base, timed)


def time_rule(name: str, rule: Rule, tensors: list[Tensor], shape: str, base: dict, timed: Callable) -> Iterator[dict]:
    """The kernel forward, and with its backward pass; and the whole call of a layer."""
    query, key, value = tensors
    length, device = query.shape[2], query.device
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
    layer = attending.Laid(rule, HEADS, None, "flex")
    kept = layer.kept(mask, query, key)
    known = cost(kept.mask[0, 0])
    kernel = functools.partial(attending._flex(query.is_cuda), query, key, value, block_mask=kept.blocks)

    def whole() -> Tensor:
        return attending.flex_attention(query, key, value, layer.kept(mask, query, key))

    def first() -> Tensor:
        layer._seen.clear()
        return whole()

    for way, run in ways(tensors, kernel=kernel, layer=whole, first=first):
        try:
            found = timed(f"{name} {way}", shape, run)
        except Exception as error:  # one that does not run here does not take the others with it
            print(name, way, "left out:", type(error).__name__, str(error)[:200], flush=True)
            continue
        speedup = float(base[way]["ms_p50"]) / max(float(found["ms_p50"]), 1e-9)
        print(f"   {'':30} {known} {speedup:.2f} times dense", flush=True)
        yield found | known | {"speedup": f"{speedup:.3f}"}


def ways(tensors: list[Tensor], **calls: Callable[[], Tensor]) -> Iterator[tuple[str, Run]]:
    """Each call forward, and with the gradients of all inputs; the kernel replayed as a CUDA graph."""
    pull = torch.randn_like(tensors[0])
    for name, attend in calls.items():
        runs: dict[str, Run] = {"fwd": attend}
        if tensors[0].is_cuda:  # FlexAttention has no backward pass on a CPU
            runs["fwd+bwd"] = functools.partial(backward, attend, tensors, pull)
        for way, run in runs.items():
            yield f"{name} {way}", later(run) if name == "kernel" and tensors[0].is_cuda else run


def backward(attend: Callable[[], Tensor], tensors: list[Tensor], pull: Tensor) -> object:
    return torch.autograd.grad(attend(), tensors, pull)


def later(run: Run) -> Run:
    """The same as a CUDA graph, captured at the first call, so that what fails is left out there."""
    graph: list[Run] = []

    def replay() -> None:
        if not graph:
            graph.append(graphed(run))
        graph[0]()

    return replay


def inputs(batch: int, length: int, device: torch.device) -> list[Tensor]:
    """Query, key and value as the transposed views that a model hands over."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    made = [torch.randn(batch, length, HEADS, WIDTH, device=device).to(dtype).transpose(1, 2) for _ in range(3)]
    return [x.requires_grad_(device.type == "cuda") for x in made]  # no backward pass on a CPU


def flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if not query.is_cuda:
        return SDPA(query, key, value, is_causal=True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return SDPA(query, key, value, is_causal=True)


def laid(rule: Rule, length: int, device: torch.device) -> Tensor:
    """The causal mask (1, 1, T, T), laid on the device; BigBird draws its blocks on the CPU."""
    with torch.device("cpu" if isinstance(rule, BigBird) else device):
        mask = rule(length).mask()
    return mask.to(device).tril()[None, None]


def cost(kept: Tensor) -> dict[str, str]:
    """Density of the causal triangle, edges per query per head, and cover of its blocks in the order they are run."""
    length, edges = len(kept), int(kept.sum())
    layout = Pattern(kept).layout(attending.BLOCK)
    blocks = len(layout) * (len(layout) + 1) / 2
    density = edges / (length * (length + 1) / 2)
    return {"density": f"{density:.4f}", "cover": f"{int(layout.sum()) / blocks:.4f}", "edges": f"{edges / length:.1f}"}


# ------------------------------------------------------------------------------------------------------------
# Right?
# ------------------------------------------------------------------------------------------------------------


def check(device: torch.device, unit: int, length: int) -> float:
    """Print errors of FlexAttention and of masked SDPA in the same dtype; return the worst ratio, 2e-6 forgiven."""
    tensors, worst = inputs(2, length, device), 0.0
    wide = [x.detach().float().requires_grad_(x.is_cuda) for x in tensors]
    for name, rule in rules(unit).items():
        kept = laid(rule, length, device)
        seen = attending.blocked(kept, rule.order(length) if hasattr(rule, "order") else None)
        truth = results(attending.masked_attention, wide, kept)
        ours = results(attending.flex_attention, tensors, seen)
        same = results(attending.masked_attention, tensors, kept)
        wrong, plain = ([relative(a, b) for a, b in zip(x, truth, strict=False)] for x in (ours, same))
        print(f"{name:32} flex", *(f"{e:.1e}" for e in wrong), "sdpa", *(f"{e:.1e}" for e in plain), flush=True)
        ratios = [a / max(b, 2e-6) for a, b in zip(wrong, plain, strict=False)]
        worst = max(worst, *ratios) if all(torch.isfinite(x).all() for x in ours) else float("inf")
    return worst


def results(attend: Callable, tensors: list[Tensor], kept: object) -> list[Tensor]:
    """The output, and on a GPU the gradients of query, key and value for one fixed pull."""
    output = attend(*tensors, kept)
    if not output.is_cuda:
        return [output.detach()]
    pull = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return [output.detach(), *torch.autograd.grad(output, tensors, pull)]


def relative(found: Tensor, exact: Tensor) -> float:
    return ((found.float() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


if __name__ == "__main__":
    main()
