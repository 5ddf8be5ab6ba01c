"""Kept blocks on one CPU thread against dense: `OMP_NUM_THREADS=1 python benchmarks/blocks_cpu.py out.csv`

Interleaved, in every case (shape, b, density, M): `dense`, F.linear; `reference`, which writes the dense matrix out;
`gathered` and `one by one`, the two forms of kernel="batched" (the one that it takes is `taken`); `torch bsr`, torch's
own block layout, made once (it has no gradient). `fwd` is the call alone, `fwd+bwd` adds the gradients of inputs and
values. Random blocks, float32, the thread's own CPU time (others may use the machine; `load` says how much), a cold
cache before each call. `speedup` is dense over it, medians. All cases take about 15 minutes.
"""

import argparse
import csv
import itertools
import os
import platform
import statistics
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from fewedges.measure.clock import interleaved
from fewedges.measure.setting import parse_shape
from fewedges.sparsify import block_batched
from fewedges.sparsify.block_kernel import BlockIndex, block_product, index_blocks, scatter_blocks
from fewedges.sparsify.select import select

SHAPES, SIDES, DENSITIES, TOKENS = ("1024x4096", "768x3072"), (32, 64, 128), (0.05, 0.1, 0.25), (1, 64, 256, 1024)
FEW = block_batched.FEW
FORMS = {"gathered": 10**9, "one by one": -1}
"""Up to how many tokens inputs are gathered."""
FIELDS = "shape b asked density M way what taken ms_p20 ms_p50 ms_p80 speedup repeats torch device load".split()
Run = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="inputs x outputs")
    parser.add_argument("--sides", nargs="+", type=int, default=SIDES, help="b")
    parser.add_argument("--densities", nargs="+", type=float, default=DENSITIES)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, help="M")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Sparse BSR tensor support is in beta")
    with options.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for case in itertools.product(options.shapes, options.sides, options.densities, options.tokens):
            for row in rows(*case, options.repeats):
                writer.writerow(row)
                print(*(row[name] for name in FIELDS[:-3]), flush=True)
            file.flush()


def rows(shape: str, b: int, asked: float, m: int, repeats: int) -> Iterator[dict]:
    inputs, outputs = parse_shape(shape)
    torch.manual_seed(0)
    index = index_blocks(select(torch.rand(outputs, inputs), f"{b}x{b}", asked), b)
    x, values = torch.randn(m, inputs), torch.randn(index.blocks, b, b) * (inputs * asked) ** -0.5
    facts = {"shape": shape, "b": b, "asked": asked, "density": f"{index.density:.4f}", "M": m, "repeats": repeats}
    facts |= {"torch": torch.__version__, "device": processor(), "load": f"{os.getloadavg()[0]:.2f}"}
    taken = "gathered" if m <= FEW else "one by one"
    for way, runs in (("fwd", forward(x, values, index)), ("fwd+bwd", backward(x, values, index))):
        times = interleaved(runs, torch.device("cpu"), repeats, clock="thread")
        base = statistics.median(times["dense"])
        for what, found in times.items():
            cuts = statistics.quantiles(found, n=10)
            spread = {f"ms_p{10 * at}": f"{cuts[at - 1]:.3f}" for at in (2, 5, 8)}
            yield (
                facts | spread | {"way": way, "what": what, "taken": what == taken, "speedup": f"{base / cuts[4]:.2f}"}
            )


def forward(x: Tensor, values: Tensor, index: BlockIndex) -> dict[str, Run]:
    dense = scatter_blocks(values, index).contiguous()
    bsr = torch.sparse_bsr_tensor(index.start, index.columns, values, index.shape, check_invariants=False)
    calls = {"dense": lambda: linear(x, dense), "torch bsr": lambda: (bsr @ x.T).T.contiguous()}
    calls |= {name: lambda call=call: call(x, values) for name, call in products(index).items()}
    wanted = calls["reference"]()
    for name, call in calls.items():
        assert (call() - wanted).norm() <= 1e-6 * wanted.norm(), name
    return {name: lambda call=call: quiet(call) for name, call in calls.items()}


def backward(x: Tensor, values: Tensor, index: BlockIndex) -> dict[str, Run]:
    """Call and gradients of inputs and weights; dense's are those of all weights."""
    dense = scatter_blocks(values, index).contiguous().requires_grad_()
    x, values = x.clone().requires_grad_(), values.clone().requires_grad_()
    pull = torch.randn(len(x), index.shape[0])
    runs = {"dense": lambda: torch.autograd.grad(linear(x, dense), [x, dense], pull)}
    for name, call in products(index).items():
        runs[name] = lambda call=call: torch.autograd.grad(call(x, values), [x, values], pull)
    return runs


def products(index: BlockIndex) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """A backward pass reads FEW too: each call sets it, and nothing runs between the call and its gradients."""

    def formed(few: int) -> Callable[[Tensor, Tensor], Tensor]:
        def call(x: Tensor, values: Tensor) -> Tensor:
            block_batched.FEW = few
            return block_product(x, values, index, kernel="batched")

        return call

    found = {"reference": lambda x, values: block_product(x, values, index)}
    return found | {name: formed(few) for name, few in FORMS.items()}


def quiet(call: Run) -> None:
    with torch.inference_mode():
        call()


def processor() -> str:
    """As Linux names it."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.machine()


if __name__ == "__main__":
    main()
