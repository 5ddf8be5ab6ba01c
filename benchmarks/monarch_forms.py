"""Which form of a Monarch is fast at a density? `OMP_NUM_THREADS=1 python benchmarks/monarch_forms.py out.csv`

A density buys many forms. Timed here, beside dense and in the same interleaved rounds: 2, 4, 8, 16 and 32 blocks a
factor, each with the largest rank of a piece that is not over, and the densest `square` one (rank 1), which is what the
table of `fewedges hardware` took before. `taken` is what it takes now (`ways.monarch_form`). One thread, float32, the
thread's own CPU time (others may use the machine; `load` says how much), a cold cache before each call.
"""

import argparse
import csv
import os
import platform
import statistics
from pathlib import Path

import torch
from torch.nn.functional import linear

from fewedges.measure.clock import interleaved
from fewedges.measure.setting import parse_shape
from fewedges.measure.ways import monarch_form
from fewedges.sparsify.monarch import Monarch

SHAPES = ("1024x4096", "768x3072", "2048x2048")
DENSITIES = (0.01, 0.05, 0.1, 0.25, 0.5)
COUNTS = (2, 4, 8, 16, 32)
FIELDS = "shape M asked form taken k r width density ms_p20 ms_p50 ms_p80 speedup repeats torch device load".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="inputs x outputs")
    parser.add_argument("--densities", nargs="+", type=float, default=DENSITIES)
    parser.add_argument("--rows", type=int, default=256, help="input vectors")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with options.csv.open("w", newline="") as file, torch.inference_mode():
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for shape in options.shapes:
            for density in options.densities:
                for row in rows(shape, density, options.rows, options.repeats):
                    writer.writerow(row)
                    print(*(row.get(name, "-") for name in FIELDS[:-3]), flush=True)


def forms(inputs: int, outputs: int, density: float) -> dict[str, tuple[int, int]]:
    """Blocks and rank by name; those that are over are left out."""
    most = density * inputs * outputs / (inputs + outputs)
    fitting = [k for k in range(2, int(most) + 1) if not inputs % k and not outputs % k]
    found = {f"{k} blocks": (k, int(most / k)) for k in COUNTS if k in fitting}
    return found | ({"square": (max(fitting), 1)} if fitting else {})


def rows(shape: str, density: float, m: int, repeats: int) -> list[dict]:
    inputs, outputs = parse_shape(shape)
    torch.manual_seed(0)
    x, weight, found = torch.randn(m, inputs), torch.randn(outputs, inputs), forms(inputs, outputs, density)
    layers = {name: Monarch(inputs, outputs, k, rank=r) for name, (k, r) in found.items()}
    runs = {"dense": lambda: linear(x, weight)} | {name: lambda f=layer: f(x) for name, layer in layers.items()}
    times = interleaved(runs, torch.device("cpu"), repeats, clock="thread")
    base, taken = statistics.median(times["dense"]), monarch_form((outputs, inputs), density)
    facts = {"shape": shape, "M": m, "asked": density, "repeats": repeats, "torch": torch.__version__}
    facts |= {"device": processor(), "load": f"{os.getloadavg()[0]:.2f}"}
    facts |= {"density": 1}
    return [
        facts | form(layers.get(name)) | spread(times[name], base) | {"form": name, "taken": found.get(name) == taken}
        for name in runs
    ]


def processor() -> str:
    """As Linux names it."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.machine()


def form(layer: Monarch | None) -> dict:
    if layer is None:
        return {}
    density = layer.flops(1) / 2 / (layer.in_features * layer.out_features)
    return {"k": layer.blocks, "r": layer.rank, "width": layer.width, "density": f"{density:.4f}"}


def spread(times: list[float], base: float) -> dict:
    cuts = statistics.quantiles(times, n=10)
    return {f"ms_p{10 * at}": f"{cuts[at - 1]:.3f}" for at in (2, 5, 8)} | {"speedup": f"{base / cuts[4]:.2f}"}


if __name__ == "__main__":
    main()
