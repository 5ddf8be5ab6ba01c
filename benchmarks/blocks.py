"""Pixelated butterfly and kept blocks against cuBLAS dense: right on this GPU, and how much faster?

    python benchmarks/blocks.py out.csv                                  # all parts, about 200 s on an H100
    python benchmarks/blocks.py out.csv --parts check cells              # some; rows are written as they come
    TRITON_INTERPRET=1 python benchmarks/blocks.py out.csv --dry         # every path once, tiny, on a CPU

check: relative 2-norms against float64, the kernel with every candidate tile beside torch's own products in the same
dtype; the exit code says if any is twice as wrong. cells, blocks:
milliseconds by CUDA events as in benchmarks/attention.py (cold L2), dense timed anew beside every group; `-graphs`
are the same calls replayed as CUDA graphs. `fwd` is the layer's call, `fwd+bwd` adds the gradients of inputs and of
all parameters. `speedup` is dense over it, medians. Tile shapes are tried at first use: out.tiles.csv has them all.
"""

import argparse
import csv
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from attention import row
from inference import graphed
from torch import Tensor, nn

from fewedges.sparsify import block_kernel, cell_gradients, cell_products
from fewedges.sparsify.block_kernel import BlockIndex, block_product, index_blocks
from fewedges.sparsify.butterfly import PixelatedLinear, Plan
from fewedges.sparsify.cell_kernel import pixelated_product
from fewedges.sparsify.launching import power_above, trials
from fewedges.sparsify.pattern import Blocks

Run = Callable[[], object]
PARTS = ("check", "cells", "cell-graphs", "blocks", "block-graphs")
FIELDS = "what shape dtype device torch ms_p20 ms_p50 ms_p80 peak_mib density speedup".split()
CELLS = {  # inputs, outputs, bias, plans: about .19 with and without a low rank, and what its butterfly costs alone
    "7B up": (4096, 11008, False, (Plan(16, 1, 192), Plan(16, 2, 0), Plan(16, 1, 0))),
    "7B down": (11008, 4096, False, (Plan(16, 1, 192), Plan(16, 2, 0), Plan(16, 1, 0))),
    "medium up": (1024, 4096, True, (Plan(16, 1, 64), Plan(16, 2, 0))),
    "medium down": (4096, 1024, True, (Plan(16, 1, 64), Plan(16, 2, 0))),
}
BLOCKS = (128, 64, 32)
DENSITIES = (0.25, 0.1)
TOKENS = (8192, 1024)
CELL_CHECKS = [  # inputs, outputs, plan, tokens, dtype
    (4096, 11008, Plan(16, 1, 192), 515, torch.bfloat16),
    (1024, 768, Plan(16, 2, 32, "random"), 1000, torch.bfloat16),
    (768, 3072, Plan(16, 1, 48), 300, torch.float16),
    (256, 384, Plan(4, 1, 16), 77, torch.float32),
]
BLOCK_CHECKS = [  # inputs, outputs, b, density, tokens, dtype
    *((1024, 1536, b, 0.25, 1000, torch.bfloat16) for b in BLOCKS),
    *((512, 768, b, 0.4, 77, torch.float16) for b in BLOCKS),
    *((512, 384, b, 0.4, 77, torch.float32) for b in BLOCKS),
]
TINY = {"tiny": (64, 96, True, (Plan(4, 1, 8), Plan(4, 2, 0)))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--shapes", nargs="+", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--repeats", type=int, default=40, help="timed runs a row; at least 30 for a result")
    parser.add_argument("--seconds", type=float, default=190, help="begin no new group of rows after this long")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU, nothing timed")
    options = parser.parse_args()
    device, started = torch.device("cpu" if options.dry else "cuda"), time.perf_counter()
    worst = check(device, options.dry) if "check" in options.parts else 0.0
    timed = functools.partial(dry_row if options.dry else row, repeats=options.repeats)
    with options.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for name, group in groups(options.parts, options.shapes, device, options.dry):
            passed = time.perf_counter() - started
            print(f"-- {name}, after {passed:.0f} s" + (": left out" if passed > options.seconds else ""), flush=True)
            for found in group(timed) if passed <= options.seconds else ():
                writer.writerow(found)
                file.flush()
    write_trials(options.csv.with_suffix(".tiles.csv"))
    sys.exit(0 if worst <= 2 else f"a kernel is {worst:.1f} times as wrong as torch in the same dtype")


def groups(
    parts: Sequence[str], names: Sequence[str], device: torch.device, dry: bool
) -> Iterator[tuple[str, Callable]]:
    """Name and rows of every group; the dense row comes first."""
    shapes, tokens = (TINY, (33,)) if dry else ({name: CELLS[name] for name in names}, TOKENS)
    replay = (lambda run: run) if dry else graphed
    for name, (inputs, outputs, bias, plans) in shapes.items():
        for m in tokens:
            given = (f"{name} {inputs}->{outputs} M{m}", inputs, outputs, m, device)
            if "cells" in parts:
                yield f"cells {given[0]}", functools.partial(time_cells, *given, bias, plans, lambda run: run, "")
            if "cell-graphs" in parts:
                yield f"graphs {given[0]}", functools.partial(time_cells, *given, bias, plans, replay, "graph ")
    for name, (inputs, outputs, *_) in shapes.items():
        for m in tokens:
            sides = (128, 256) if dry else (inputs, outputs)
            sizes = [(b, d) for b in ((32,) if dry else BLOCKS) for d in ((0.5,) if dry else DENSITIES)]
            given = (f"{name} {sides[0]}->{sides[1]} M{m}", *sides, m, device)
            if "blocks" in parts:
                yield f"blocks {given[0]}", functools.partial(time_blocks, *given, sizes, lambda run: run, "")
            if "block-graphs" in parts:
                yield f"graphs blocks {given[0]}", functools.partial(time_blocks, *given, sizes, replay, "graph ")


# ------------------------------------------------------------------------------------------------------------
# Fast?
# ------------------------------------------------------------------------------------------------------------


def time_cells(shape, inputs, outputs, m, device, bias, plans, wrap, prefix, timed) -> Iterator[dict]:
    """Dense, then each plan by batched products and by the kernel."""
    x = torch.randn(m, inputs, device=device).to(half(device)).requires_grad_()
    dense = nn.Linear(inputs, outputs, bias=bias).to(device, x.dtype)
    base = {}
    for way, run in ways(dense, x):
        base[way] = timed(f"{prefix}dense {way}", shape, wrap(run))
        yield base[way] | {"density": 1, "speedup": 1}
    for plan in plans:
        for kernel in ("reference", "triton"):
            layer = PixelatedLinear(inputs, outputs, plan, bias=bias, kernel=kernel).to(device, x.dtype)
            name = f"pixelated {plan.grid} {plan.factors} {plan.rank} {kernel}"
            for way, run in ways(layer, x):
                found = timed(f"{prefix}{name} {way}", shape, wrap(run))
                yield beside(found, base[way], plan.density(outputs, inputs))


def time_blocks(shape, inputs, outputs, m, device, sizes, wrap, prefix, timed) -> Iterator[dict]:
    """Dense, then random blocks by the kernel."""
    x = torch.randn(m, inputs, device=device).to(half(device)).requires_grad_()
    dense, base = nn.Linear(inputs, outputs, bias=False).to(device, x.dtype), {}
    for way, run in ways(dense, x):
        base[way] = timed(f"{prefix}dense {way}", shape, wrap(run))
        yield base[way] | {"density": 1, "speedup": 1}
    for b, density in sizes:
        index, layer = random_blocks(inputs, outputs, b, density, x)
        for way, run in ways(layer, x):
            found = timed(f"{prefix}blocks {b} d{density} {way}", shape, wrap(run))
            yield beside(found, base[way], index.density)


class BlockLinear(nn.Module):
    """Just the product, as a module, so that `ways` can run it."""

    def __init__(self, values: Tensor, index: BlockIndex):
        super().__init__()
        self.values, self.index = nn.Parameter(values), index

    def forward(self, x: Tensor) -> Tensor:
        return block_product(x, self.values, self.index, kernel="triton")


def random_blocks(inputs: int, outputs: int, b: int, density: float, like: Tensor) -> tuple[BlockIndex, BlockLinear]:
    torch.manual_seed(0)
    layout = torch.rand(outputs // b, inputs // b) < density
    index = index_blocks(Blocks(layout, b, b), b).to(like.device)
    values = torch.randn(index.blocks, b, b, device=like.device).to(like.dtype) * (inputs * density) ** -0.5
    return index, BlockLinear(values, index)


def ways(layer: nn.Module, x: Tensor) -> Iterator[tuple[str, Run]]:
    """The call alone, without autograd; and with the gradients of everything."""
    wanted = [x, *layer.parameters()]
    with torch.no_grad():
        upstream = torch.randn_like(layer(x))

    def forward():
        with torch.no_grad():
            layer(x)

    yield "fwd", forward
    yield "fwd+bwd", lambda: torch.autograd.grad(layer(x), wanted, upstream)


def beside(found: dict, base: dict, density: float) -> dict:
    speedup = float(base["ms_p50"]) / max(float(found["ms_p50"]), 1e-9)
    print(f"   {'':30} density {density:.4f}, {speedup:.2f} times dense", flush=True)
    return found | {"density": f"{density:.4f}", "speedup": f"{speedup:.3f}"}


def half(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float16  # the interpreter multiplies no bfloat16


def dry_row(what: str, shape: str, run: Run, repeats: int) -> dict:
    """One run, not timed."""
    run()
    print(f"{what:6} {shape:20} runs", flush=True)
    zeros = dict.fromkeys(("ms_p20", "ms_p50", "ms_p80", "peak_mib"), "0")
    return {"what": what, "shape": shape, "dtype": "float16", "device": "cpu", "torch": torch.__version__} | zeros


def write_trials(path: Path) -> None:
    rows = trials()
    if rows:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        for found in rows:
            if found["chosen"]:
                print(found["what"], found["shape"], tuple(found["tile"]), f"{found['ms']:.3f} ms", flush=True)


# ------------------------------------------------------------------------------------------------------------
# Right?
# ------------------------------------------------------------------------------------------------------------


def check(device: torch.device, dry: bool) -> float:
    """Print errors of kernel and reference; return the worst ratio, 2e-6 forgiven; infinite if bits differ."""
    cells = [(64, 96, Plan(4, 1, 8), 37, torch.float16)] if dry else CELL_CHECKS
    blocks = [(64, 96, 32, 0.6, 37, torch.float16)] if dry else BLOCK_CHECKS
    return max(*(check_cells(device, *given) for given in cells), *(check_blocks(device, *given) for given in blocks))


def check_cells(device: torch.device, inputs: int, outputs: int, plan: Plan, m: int, dtype: torch.dtype) -> float:
    """Every candidate tile, one after the other."""
    torch.manual_seed(0)
    layer, exact = (PixelatedLinear(inputs, outputs, plan).to(device) for _ in range(2))
    layer, exact = layer.to(dtype), exact.double()
    if layer.gamma is not None:
        layer.gamma.data.fill_(0.3)
    exact.load_state_dict(layer.state_dict())
    x, parameters = torch.randn(m, inputs, device=device).to(dtype), list(layer.parameters())
    names = ["y", "x", *(name for name, _ in layer.named_parameters())]
    truth = gradients(exact, x.double(), list(exact.parameters()))
    plain, worst = gradients(layer, x, parameters), 0.0
    low = (None, None) if layer.low is None else (layer.low.up, layer.low.down)
    given = (*layer.sparse.joined(layer.sparse.weight), *low, layer.gamma, layer.bias)
    for tiles in cell_tiles(dtype, x.device, plan.rank):
        run = functools.partial(call, pixelated_product, given, {"tiles": tiles})
        name = f"cells {inputs}->{outputs} {plan} M{m} {dtype} {[tuple(tile) for tile in tiles]}"
        worst = max(worst, judged(name, names, run, x, parameters, plain, truth))
    return worst


def check_blocks(device: torch.device, inputs: int, outputs: int, b: int, density: float, m: int, dtype) -> float:
    """Every candidate tile, one after the other."""
    x = torch.randn(m, inputs, device=device).to(dtype)
    index, layer = random_blocks(inputs, outputs, b, density, x)
    values = layer.values.detach().requires_grad_()
    wide = values.detach().double().requires_grad_()
    truth = gradients(functools.partial(call, block_product, (wide, index), {}), x.double(), [wide])
    plain, worst = gradients(functools.partial(call, block_product, (values, index), {}), x, [values]), 0.0
    size = dtype.itemsize
    for tiles in pairs(block_kernel.PRODUCTS[b, size], block_kernel.GRADIENTS[b, size], dtype, device):
        options = {"kernel": "triton", "tiles": block_kernel.BlockTiles(*tiles)}
        run = functools.partial(call, block_product, (values, index), options)
        name = f"blocks {b} {inputs}->{outputs} density {index.density:.3f} M{m} {dtype} {[tuple(t) for t in tiles]}"
        worst = max(worst, judged(name, ["y", "x", "values"], run, x, [values], plain, truth))
    return worst


def cell_tiles(dtype: torch.dtype, device: torch.device, rank: int) -> list[cell_products.Tiles]:
    """Every candidate at least once; thin products by torch and by the kernel, in several parts."""
    size, wide = dtype.itemsize, power_above(max(rank, 1))
    found = pairs(cell_products.PRODUCTS[size], cell_gradients.GRADIENTS[size], dtype, device)
    own = (
        cell_products.THIN[size] if dtype == torch.bfloat16 and device.type == "cuda" else cell_products.THIN[size][:1]
    )
    thin = [t._replace(columns=min(t.columns, wide)) for t in own]
    thin = [cell_products.BY_TORCH, *(thin if device.type == "cuda" else map(shrunk, thin))]
    low = [thin[n % len(thin)]._replace(splits=1 + n % 4) if n % len(thin) else thin[0] for n in range(len(found) + 1)]
    return [
        cell_products.Tiles(a, b, c._replace(splits=1 + n % 3), low[n], low[n + 1]) for n, (a, b, c) in enumerate(found)
    ]


def pairs(products: tuple, gradients: tuple, dtype: torch.dtype, device: torch.device) -> list[tuple]:
    """Forward, input gradient and weight gradient, each candidate at least once; of other dtypes only the first."""
    if dtype != torch.bfloat16 or device.type != "cuda":
        small = [(products[0], products[0], gradients[0])]
        return small if device.type == "cuda" else [tuple(shrunk(tile) for tile in small[0])]
    count = max(len(products), len(gradients))
    return [(products[n % len(products)],) * 2 + (gradients[n % len(gradients)],) for n in range(count)]


def shrunk(tile: tuple) -> tuple:
    """For the interpreter."""
    if isinstance(tile, cell_products.Tile):
        return tile._replace(rows=16, columns=32, depth=16)
    return tile._replace(depth=32, **({"rows": 16} if isinstance(tile, block_kernel.BlockTile) else {}))


def call(product: Callable, given: tuple, options: dict, x: Tensor) -> Tensor:
    return product(x, *given, **options)


def judged(name: str, names: list[str], run: Callable, x: Tensor, parameters: list[Tensor], plain, truth) -> float:
    """Errors of two runs, beside the plain ones; a tile that does not run here is said so and passed over."""
    try:
        ours, again = (gradients(run, x, parameters) for _ in range(2))
    except Exception as error:  # too much shared memory, too many registers: a tile that does not run
        if not type(error).__module__.startswith("triton"):
            raise
        print(name, "DOES NOT RUN", type(error).__name__, str(error)[:100], flush=True)
        return 0.0
    same = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    return report(name, names, {"triton": ours, "reference": plain}, truth, same)


def gradients(layer: Callable, x: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """The result, and gradients of inputs and parameters for one fixed pull."""
    x = x.detach().requires_grad_()
    y = layer(x)
    pull = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], pull)]


def report(name: str, names: list[str], found: dict[str, list[Tensor]], truth: list[Tensor], same: bool) -> float:
    wrong = {
        kernel: [((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in zip(x, truth, strict=True)]
        for kernel, x in found.items()
    }
    print(name, "same bits twice:", same)
    for kernel, errors in wrong.items():
        print(f"   {kernel:9}", *(f"{n} {e:.1e}" for n, e in zip(names, errors, strict=True)), flush=True)
    forgiven = [2e-6 if t.numel() > 1 else 1e-2 for t in truth]  # gamma's is one number, a sum that may be small
    ratio = max(a / max(b, f) for a, b, f in zip(wrong["triton"], wrong["reference"], forgiven, strict=True))
    return ratio if same and all(torch.isfinite(x).all() for x in found["triton"]) else float("inf")


if __name__ == "__main__":
    main()
