"""SLIDE on words: which words come next? `OMP_NUM_THREADS=1 python scripts/slide_words.py --data FILE --out DIR`

Extreme classification from plain text: the input is a sparse bag of 64 words, the labels are the words among the next
32 (15 on average), of 30,000: those most frequent after the first 100, which are left out on both sides.
Bag (sparse) -> 128 hidden, ReLU -> 30,000 classes, Adam, the same examples in the same order in every arm:

    dense     softmax over all classes
    simhash   SLIDE: hash tables choose the active classes of every input, the `size` found in most tables (filled with
    wta       random ones where fewer are found), and its labels; softmax over these
    dwta
    random    the same layer and loss, but the active classes of every input are drawn uniformly: the control
    uniform   sampled softmax: `size` negatives drawn uniformly for the whole batch, log of their probability subtracted
    zipf      the same with log-uniform negatives by frequency: the baseline in use

An arm takes --steps optimiser steps, and more if it has used less time than dense took for them: so there is one
row at equal steps and one at equal time. Held out: every 50th document. Time is CPU time of the one thread, wall time
beside it. Resumable by arm, size and seed. Written to --out: words.json.

    --tune 2e-3 5e-3 1e-2 2e-2 --held-data FILE --steps 250 --seeds 100   learning rates, on other text: tune.json
    --sweep 10000 30000 100000 300000                                     a step's time by classes: sweep.json
"""

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages, read by torch at its first tensor

import argparse
import collections
import ctypes
import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from slide_problem import (
    AHEAD,
    BAG,
    CODES,
    LABELS,
    LEFT_OUT,
    REFILL,
    SLIDES,
    Hidden,
    Slide,
    Whole,
    mean_of,
    output,
    problem,
)
from torch import nn

from fewedges import store

RATES = {"dense": 1e-2, "simhash": 1e-2, "wta": 1e-2, "dwta": 1e-2, "random": 5e-3, "uniform": 2e-3, "zipf": 1e-2}
ARMS = tuple(RATES)
MARKS = ("equal_steps", "equal_time")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--held-data", type=Path, help="held-out text, if not every 50th document")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--classes", type=int, default=30_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--sizes", type=int, nargs="+", default=[300, 100, 1000], help="only the first has all seeds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--held", type=int, default=4096, help="held-out examples")
    parser.add_argument("--look-every", type=int, default=100)
    parser.add_argument("--only", nargs="*", choices=ARMS, default=list(ARMS), help="for trying")
    parser.add_argument("--tune", type=float, nargs="+", help="learning rates to try")
    parser.add_argument("--sweep", type=int, nargs="+", help="numbers of classes")
    return parser.parse_args()


# -- training and looking ------------------------------------------------------------------------------------------


class Clock:
    """CPU and wall seconds of what is inside."""

    def __enter__(self):
        self.began = time.thread_time(), time.perf_counter()
        return self

    def __exit__(self, *_):
        self.cpu, self.wall = time.thread_time() - self.began[0], time.perf_counter() - self.began[1]


def train(args, data, name, size, seed, budget=0.0, lr=None):
    """One arm: `args.steps` steps and until `budget` CPU seconds are used; what it reached at both, and its layers."""
    torch.manual_seed(seed)
    hidden, rate = Hidden(args.classes, args.width), lr or RATES[name]
    layer = output(name, size, args.width, data.rank, rate, seed)
    optimizers = [layer.optimizer, torch.optim.Adam(hidden.parameters(), rate, fused=True)]
    order = torch.randperm(len(data.train.words), generator=torch.Generator().manual_seed(seed))
    times, tables, pairs, curve, marks, spent = [], 0.0, 0, [], {}, 0.0
    while len(times) < args.steps or spent < budget:
        batch = data.train.at(order[(torch.arange(args.batch) + len(times) * args.batch) % len(order)])
        with Clock() as step:
            pairs += take_step(hidden, layer, optimizers, batch)
        with Clock() as filling:
            layer.seen_(args.batch)
        times.append((step.cpu + filling.cpu, step.wall + filling.wall))
        tables, spent = tables + filling.cpu, spent + times[-1][0]
        reached = dict(zip(MARKS, (len(times) >= args.steps, spent >= (budget or math.inf)), strict=True))
        new = [mark for mark in MARKS if reached[mark] and mark not in marks]
        if new or len(times) % args.look_every == 0:
            curve.append({"step": len(times), "cpu_s": round(spent, 2), **look(hidden, layer, data.held)})
            marks |= dict.fromkeys(new, curve[-1])
    marks.setdefault("equal_time", marks["equal_steps"])  # dense itself
    active = round(pairs / len(times) / args.batch, 1)
    found = {
        "arm": name,
        "size": size,
        "seed": seed,
        "lr": rate,
        **marks,
        **spread(times),
        "active_in_training": active,
    }
    return found | {"tables_ms_a_step": round(1e3 * tables / len(times), 2), "curve": curve}, hidden, layer


def take_step(hidden, layer, optimizers, batch):
    """One optimiser step; how many logits it computed."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss, count = layer.loss(hidden(batch.words), batch.labels)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    return count


def spread(times, warm_up=20):
    """p20, p50, p80 and mean of a step in milliseconds, refills of tables included, first steps not."""
    columns = zip(*times[min(warm_up, len(times) // 2) :], strict=True)
    return {name: points(values) for name, values in zip(("cpu_ms", "wall_ms"), columns, strict=True)}


def points(seconds):
    found = [*np.percentile(seconds, [20, 50, 80]), statistics.fmean(seconds)]
    return dict(zip(("p20", "p50", "p80", "mean"), [round(1e3 * float(v), 2) for v in found], strict=True))


@torch.no_grad()
def look(hidden, layer, held):
    """Precision and cross-entropy by all classes; what share is active and holds the ten largest logits."""
    sums = collections.Counter()
    for words, labels in zip(held.words.split(512), held.labels.split(512), strict=True):
        x = hidden(words)
        logits = nn.functional.linear(x, layer.weight, layer.bias[:, 0])
        top = logits.topk(10).indices
        right = (top[:, :5, None] == labels[:, None, :]).any(-1).float()
        there, active = layer.holds(x, top)
        values = {
            "p1": right[:, 0].mean(),
            "p5": right.mean(),
            "ce": mean_of(torch.log_softmax(logits, -1).gather(1, labels.clamp(min=0)), labels),
            "recall1": there[:, 0].float().mean(),
            "recall10": there.float().mean(),
            "active": active / len(layer.weight),
        }
        for name, value in values.items():
            sums[name] += float(value) * len(words) / len(held.words)
    return {name: round(value, 5) for name, value in sums.items()}


def guess_by_frequency(data):
    """P@1 and P@5 of the most frequent classes for everyone: what has learned nothing of the input."""
    top = data.rank.argsort()[:5].repeat(len(data.held.labels), 1)
    right = (top[:, :, None] == data.held.labels[:, None, :]).any(-1).float()
    return {"p1": round(float(right[:, 0].mean()), 5), "p5": round(float(right.mean()), 5)}


# -- which arms, and the file --------------------------------------------------------------------------------------


def plan(args):
    """(arm, size, seed), dense first as the others are given its time."""
    rows = []
    for size in args.sizes:
        for seed in args.seeds if size == args.sizes[0] else args.seeds[:1]:
            rows += [(arm, None if arm == "dense" else size, seed) for arm in args.only]
    return list(dict.fromkeys(rows))


def experiment(args):
    path, began = args.out / "words.json", time.perf_counter()
    whole, old = heading(args), json.loads(path.read_text()) if path.exists() else {}
    same = all(old.get(name) == whole[name] for name in ("protocol", "sha256"))
    runs, before = (old["runs"], old["seconds"]) if same else ([], 0)
    done = {(run["arm"], run["size"], run["seed"]) for run in runs}
    missing = [key for key in plan(args) if key not in done]
    data = read(args) if missing else None
    for name, size, seed in missing:
        budget = {run["seed"]: run["equal_steps"]["cpu_s"] for run in runs if run["arm"] == "dense"}
        runs.append(train(args, data, name, size, seed, budget.get(seed, 0.0))[0])
        tell({name: value for name, value in runs[-1].items() if name != "curve"})
        counts = {"train": len(data.train.words), "held": len(data.held.words)}
        seen = {"examples": counts, "by_frequency_alone": guess_by_frequency(data)}
        seconds = round(before + time.perf_counter() - began, 1)
        write(path, whole | seen | {"seconds": seconds, "table": table(runs), "runs": runs})
    print_table(table(runs or old["runs"]))


def read(args):
    return problem(args.data, args.held_data, args.classes, args.held)


def heading(args):
    """Protocol, sources, machine and versions."""
    names = ("steps", "batch", "classes", "width", "held", "look_every")
    protocol = {name: getattr(args, name) for name in names}
    protocol |= {"bag": BAG, "ahead": AHEAD, "left_out": LEFT_OUT, "codes": CODES, "tables": 50, "refill": REFILL}
    sources = {path.name: store.sha256_of(path) for path in (args.data, args.held_data) if path}
    machine = {"device": store.device_name("cpu"), "threads": torch.get_num_threads(), "versions": store.versions()}
    return {"protocol": protocol | {"rates": RATES}, "sha256": sources, **machine}


def write(path, whole):
    path.parent.mkdir(parents=True, exist_ok=True)
    store.write_text(path, json.dumps(whole) + "\n")


def tell(facts):
    print(json.dumps(facts), file=sys.stderr, flush=True)


def table(runs):
    """A row an arm and size: medians over seeds, and lowest and highest P@1."""
    target = {run["seed"]: run["equal_steps"]["p1"] for run in runs if run["arm"] == "dense"}
    groups = collections.defaultdict(list)
    for run in runs:
        groups[run["arm"], run["size"]].append(run)
    return [row(group, target) for group in groups.values()]


def row(group, target):
    found = {"arm": group[0]["arm"], "size": group[0]["size"], "seeds": len(group)}
    for part in (*MARKS, "cpu_ms", "wall_ms"):
        found[part] = {name: middle(run[part][name] for run in group) for name in group[0][part]}
    for mark in MARKS:
        found[mark]["p1_range"] = [pick(run[mark]["p1"] for run in group) for pick in (min, max)]
    for name in ("active_in_training", "tables_ms_a_step"):
        found[name] = middle(run[name] for run in group)
    return found | {"steps_to_dense_p1": [first_step(run, target.get(run["seed"], 2)) for run in group]}


def middle(values):
    return round(statistics.median(values), 5)


def first_step(run, level):
    return next((point["step"] for point in run["curve"] if point["p1"] >= level), None)


def print_table(rows):
    print(
        "| arm | size | ms p20/p50/p80; mean (tables) | P@1 | P@5 | CE | top-10 held | equal time: steps | P@1 | CE |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for found in rows:
        a, b, ms = (found[part] for part in ("equal_steps", "equal_time", "cpu_ms"))
        low, high = a["p1_range"]
        cells = [found["arm"], found["size"] or "all"]
        cells += [
            f"{ms['p20']:.0f}/{ms['p50']:.0f}/{ms['p80']:.0f}; {ms['mean']:.0f} ({found['tables_ms_a_step']:.0f})"
        ]
        cells += [f"{a['p1']:.3f} ({low:.3f}-{high:.3f})", f"{a['p5']:.3f}", f"{a['ce']:.2f}", f"{a['recall10']:.3f}"]
        print("|", *(f"{cell} |" for cell in [*cells, f"{b['step']:.0f}", f"{b['p1']:.3f}", f"{b['ce']:.2f}"]))


def tune(args):
    """Learning rates by P@1 on --held-data after --steps steps; RATES are set by hand from this."""
    data, rows = read(args), []
    for name in args.only:
        for lr in args.tune:
            run, *_ = train(args, data, name, None if name == "dense" else args.sizes[0], args.seeds[0], lr=lr)
            rows.append({"arm": name, "lr": lr, **run["equal_steps"]})
            tell(rows[-1])
    write(args.out / "tune.json", heading(args) | {"seed": args.seeds[0], "rows": rows})


# -- a step's time by number of classes ----------------------------------------------------------------------------


def sweep(args):
    """Dense and SLIDE steps of the wide layer alone, on rows of a trained layer drawn again, with noise."""
    data = read(args)
    _, hidden, layer = train(args, data, "dense", None, args.seeds[0])
    with torch.no_grad():
        x = hidden(data.held.words[: args.batch])
    rows = []
    for classes in args.sweep:
        for size in dict.fromkeys((args.sizes[0], classes // 100)):
            rows += [sweep_row(args, layer, x, classes, size, kind) for kind in SLIDES]
    keys = [(kind, share) for share in ("fixed", "1%") for kind in SLIDES]
    even = {f"{kind} {share}": break_even(rows, kind, share, args.sizes[0]) for kind, share in keys}
    write(args.out / "sweep.json", heading(args) | {"break_even_classes": even, "rows": rows})
    print(json.dumps(even, indent=1))


def sweep_row(args, layer, x, classes, size, kind):
    """One SLIDE layer beside a dense one: milliseconds of a step, and of a refill of the tables."""
    codes = {"simhash": round(math.log2(classes / 58)), "random": None}.get(kind, round(math.log(classes / 15, 8)))
    generator = torch.Generator().manual_seed(args.seeds[0])
    which = torch.randint(len(layer.weight), (classes,), generator=generator)
    noise = torch.randn(classes, args.width, generator=generator) * layer.weight.std().item() * 0.3
    weight, bias = layer.weight.detach()[which] + noise, layer.bias.detach()[which]
    labels = torch.randint(classes, (args.batch, LABELS), generator=generator)
    arms = {"dense": Whole(args.width, classes, 1e-4), kind: Slide(kind, size, args.width, classes, 1e-4, 0, codes)}
    x, times = x.clone().requires_grad_(), {name: [] for name in arms}
    for arm in arms.values():
        arm.weight.data.copy_(weight)
        arm.bias.data.copy_(bias)
    fills = [filled(arms[kind].layer) for _ in range(3)]
    for turn in range(3 + max(5, min(20, 2_000_000 // classes))):
        for name, arm in arms.items():
            with Clock() as clock:
                arm.optimizer.zero_grad()
                arm.loss(x, labels)[0].backward()
                arm.optimizer.step()
            times[name] += [clock.cpu] if turn >= 3 else []
    active = arms[kind].loss(x, labels)[1] / args.batch
    found = {"classes": classes, "kind": kind, "codes": codes, "size": size, "active": round(active, 1)}
    found |= {"dense_ms": points(times["dense"]), "slide_ms": points(times[kind]), "fill_ms": points(fills)["p50"]}
    filling = 0 if kind == "random" else found["fill_ms"] * args.batch / REFILL
    whole = found["slide_ms"]["p50"] + filling
    tell(found | {"with_fill_ms": round(whole, 2), "speedup": round(found["dense_ms"]["p50"] / whole, 3)})
    return found | {"with_fill_ms": round(whole, 2), "speedup": round(found["dense_ms"]["p50"] / whole, 3)}


def filled(layer):
    with Clock() as clock:
        layer.fill_()
    return clock.cpu


def break_even(rows, kind, share, fixed):
    """Classes from which on a step is cheaper than dense, between neighbours by logarithms; a bound where none is."""
    mine = [
        row
        for row in rows
        if row["kind"] == kind and row["size"] == (fixed if share == "fixed" else row["classes"] // 100)
    ]
    for low, high in itertools.pairwise(mine):
        a, b = math.log(low["speedup"]), math.log(high["speedup"])
        if a < 0 <= b:
            return round(low["classes"] * (high["classes"] / low["classes"]) ** (a / (a - b)), -2)
    return f"below {mine[0]['classes']}" if mine[0]["speedup"] >= 1 else f"above {mine[-1]['classes']}"


def main():
    args = arguments()
    torch.set_num_threads(1)
    if sys.platform == "linux":  # mmap and trim thresholds: freed memory is kept; with huge pages dense 67 -> 51 ms
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**30), libc.mallopt(-1, 2**31 - 1)
    (tune if args.tune else sweep if args.sweep else experiment)(args)


if __name__ == "__main__":
    main()
