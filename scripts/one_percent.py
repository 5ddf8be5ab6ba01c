"""Is a layer with 1% of its weights as slow as a dense one? `python scripts/one_percent.py --out results/hardware/cpu`

The claim (Hooker 2020, quoted by Chen, Dao et al. 2022): "an unstructured sparse model with 1% nonzero weights can be
as slow as a dense model". Here a linear layer keeps 1% of its weights, anywhere (CSR) and in whole blocks (BSR; 32, 64,
128 a side), for several shapes and numbers of input vectors M, beside dense in the same interleaved rounds, on this
machine's CPU or, with --device cuda, its GPU. Written to --out:

    one-percent.json         a case a shape and M: speed-ups, the limit by the measured peaks, all rows, the protocol
    hardware.json, .csv      the table of `fewedges hardware` for three shapes, all ways, six densities
    and with --figures DIR   hardware-blocks and hardware-speedup, drawn from real patterns and this table, and
                             hardware-one-percent, a panel for every device that has a folder beside --out; SVG and
                             PNG, -light and -dark

--only-figures draws again from what is there. Other work on a machine shows as spread: p20 and p80
of paired ratios; on a busy CPU take --threads 1 --clock thread.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import torch

from fewedges import store
from fewedges.draw import save
from fewedges.draw.covered import Covered, covered
from fewedges.draw.hardware import speedups
from fewedges.draw.one_percent import one_percent as draw_one_percent
from fewedges.draw.theme import THEMES
from fewedges.measure.hardware import Hardware
from fewedges.measure.speed import hardware
from fewedges.measure.ways import examples

CLAIM = "an unstructured sparse model with 1% nonzero weights can be as slow as a dense model"
WAYS = ("masked", "csr", "bsr 32", "bsr 64", "bsr 128", "butterfly")
SHAPES = {
    "cpu": ("768x3072", "1024x4096", "4096x4096", "4096x11008"),
    "cuda": ("1024x4096", "4096x4096", "4096x11008", "11008x4096"),
}
ROWS = {"cpu": (1, 16, 256), "cuda": (1, 1024, 8192)}
TABLE = {"cpu": ("768x3072", "1024x4096", "2048x2048"), "cuda": ("1024x4096", "4096x11008", "11008x4096")}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype")
    parser.add_argument("--shapes", nargs="+")
    parser.add_argument("--rows", type=int, nargs="+", help="numbers of input vectors")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, help="of torch on CPU")
    parser.add_argument("--clock", default="wall", choices=("wall", "thread"), help="thread: CPU time of one thread")
    parser.add_argument("--figures", type=Path)
    parser.add_argument("--only-figures", action="store_true")
    parser.add_argument("--no-table", action="store_true")
    return parser.parse_args()


def main():
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    if not args.only_figures:
        one_percent(args)
        if not args.no_table:
            table(args)
    if args.figures:
        draw(args.out, args.figures)


def tell(line):
    print(line, file=sys.stderr, flush=True)


# -- the claim -----------------------------------------------------------------------------------------------------


def one_percent(args):
    """Time 1% by shape and M, and write what came of it."""
    started, runs = time.strftime("%Y-%m-%d %H:%M"), []
    common = {"device": args.device, "dtype": args.dtype, "densities": (0.01,), "ways": WAYS, "repeats": args.repeats}
    common["clock"] = args.clock
    for rows in args.rows or ROWS[args.device]:
        tell(f"M = {rows}")
        runs.append(hardware(shapes=args.shapes or SHAPES[args.device], rows=rows, watch=tell, **common))
    cases = [case(run, shape) for run in runs for shape in run.shapes()]
    found = {
        "claim": CLAIM,
        "started": started,
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{runs[0].facts['processor']}, {platform.platform()}",
        "protocol": [run.protocol() for run in runs],
        "verdict": verdict(cases),
        "cases": cases,
        "runs": [{"facts": run.facts, "rows": run.rows} for run in runs],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    store.write_text(args.out / "one-percent.json", json.dumps(found, indent=1) + "\n")
    print_cases(cases)
    print(found["verdict"])


def case(run, shape):
    """One shape at one M: dense milliseconds, and every way's speed-up with its spread."""
    (dense,) = run.timed(shape, "dense")
    rows = [row for row in run.rows if row["shape"] == shape and row["what"] != "dense"]
    ways = {row["what"]: summary(row) for row in rows}
    (csr,) = run.timed(shape, "csr")
    return {"shape": shape, "M": run.facts["M"], "dense_ms": dense["ms_p50"], "limit": csr["limit"], "ways": ways}


def summary(row):
    if "speedup" not in row:
        return {"why": row["why"]}
    names = ("density", "cover(32)", "ms_p50", "speedup", "speedup_p20", "speedup_p80", "roofline", "error", "how")
    return {name: row[name] for name in names}


def verdict(cases):
    """What the claim comes to here, in one sentence."""
    gains = [(case["ways"]["csr"]["speedup"], case) for case in cases if "speedup" in case["ways"]["csr"]]
    (low, worst), (high, best) = (pick(gains, key=lambda pair: pair[0]) for pick in (min, max))
    slow = sum(gain <= 1 for gain, _ in gains)
    where = [f"{at['shape']} at M = {at['M']}" for at in (worst, best)]
    return (
        f"With 1% of the weights anywhere (CSR) {slow} of {len(gains)} cases are as slow as dense or slower; "
        f"the speed-up is {low:.2g}x ({where[0]}, limit {worst['limit']:.2g}x) to {high:.2g}x "
        f"({where[1]}, limit {best['limit']:.2g}x)."
    )


def print_cases(cases):
    names = list(dict.fromkeys(way for case in cases for way in case["ways"]))
    print("shape M dense_ms limit", *(name.replace(" ", "") for name in names))
    for found in cases:
        gains = [found["ways"][name].get("speedup") for name in names]
        cells = ["-" if gain is None else f"{gain:.2f}" for gain in gains]
        print(found["shape"], found["M"], f"{found['dense_ms']:.3f}", f"{found['limit']:.1f}", *cells)


# -- the table and the pictures ------------------------------------------------------------------------------------


def table(args):
    """All ways over six densities, as the verb has it; the same command goes on where it was stopped."""
    common = {"device": args.device, "dtype": args.dtype, "repeats": args.repeats, "clock": args.clock}
    print(hardware(shapes=TABLE[args.device], watch=tell, out=args.out, **common))


def draw(results, figures):
    """All pictures, light and dark: blocks from patterns made here, speed-ups from the tables that were saved."""
    measured = [json.loads(path.read_text()) for path in sorted(results.parent.glob("*/one-percent.json"))]
    for theme in THEMES:
        save(covered(patterns(), theme=theme), figures / f"hardware-blocks-{theme}")
        for folder in sorted(path.parent for path in results.parent.glob("*/hardware.json")):
            name = "hardware-speedup" + (f"-{folder.name}" if folder.name != results.name else "")
            save(speedups(Hardware.load(folder).to_dict(), theme=theme), figures / f"{name}-{theme}")
        save(draw_one_percent(measured, theme=theme), figures / f"hardware-one-percent-{theme}")


def patterns(block=16):
    """1% anywhere, as many in blocks, and a butterfly, to be drawn."""
    found = examples(block=block).items()
    return [Covered(title=name, mask=pattern.mask().numpy(), block=block) for name, pattern in found]


if __name__ == "__main__":
    main()
