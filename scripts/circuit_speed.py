"""Cost of circuit search in plain forward passes: GPT-2 small's shape, random weights, 8 prompts of 16 tokens.

    python scripts/circuit_speed.py --threads 2 --rounds 5 --out results/circuit-speed.json

Protocol: every piece of work once to warm up, then in turn, round after round, host clock (synchronised on a GPU);
a ratio is the median time of the work over the median time of the plain forward pass of the same batch (all logits),
measured side by side. `circuit` is one evaluation from nothing: full run, corrupt run, circuit. Weights are random
(cost does not depend on them, but which inputs a circuit leaves empty does: its edges are the best by EAP); all
tokens of clean and corrupt prompts differ. Extra memory is the peak of one more run of each piece: of the process's
resident memory above the start, sampled every 2 ms (CPU), or of the allocator (GPU).
"""

import argparse
import ctypes
import gc
import json
import resource
import statistics
import threading
import time
from pathlib import Path

import torch
import transformers

from fewedges import store
from fewedges.explain.attribution import attribute
from fewedges.explain.evaluate import evaluate
from fewedges.explain.hooks import wire
from fewedges.explain.select import budget_grid, nested, ranking
from fewedges.explain.tasks.prompts import Prompts
from fewedges.model.anatomy import anatomy

TARGETS = {"plain": 1, "eap": 7, "eap-ig-5": 22, "circuit": 3, "curve-20": 35}
"""In plain forward passes."""
EDGES = 325


def random_prompts(vocabulary, batch=8, length=16):
    """Tokens, answers and wrong tokens drawn at random."""
    generator = torch.Generator().manual_seed(0)
    clean, corrupt = torch.randint(0, vocabulary, (2, batch, length), generator=generator)
    return Prompts(
        name="random tokens",
        metric="logit_diff",
        clean=clean,
        corrupt=corrupt,
        last=torch.full((batch,), length - 1),
        answers=tuple((n,) for n in range(batch)),
        wrong=tuple((n + batch,) for n in range(batch)),
        template=(0,) * batch,
        texts=(("", ""),) * batch,
    )


def work(model, wiring, prompts):
    """The pieces of work by name."""
    tokens = prompts.clean.to(wiring.device)
    graph = wiring.graph
    order = ranking(graph, attribute(wiring, prompts, "eap").edges)
    one, many = (nested(graph, order, budgets) for budgets in ([EDGES], budget_grid(graph, 20)))

    def plain():
        with torch.no_grad():
            model(tokens, use_cache=False)

    return {
        "plain": plain,
        "eap": lambda: attribute(wiring, prompts, "eap"),
        "eap-ig-5": lambda: attribute(wiring, prompts, "eap-ig", steps=5),
        "circuit": lambda: evaluate(wiring, prompts, one),
        "curve-20": lambda: evaluate(wiring, prompts, many),
    }


def seconds(piece, device):
    """One run on the host clock."""
    start = time.perf_counter()
    piece()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def extra_mib(piece, device):
    """Peak memory of one run above what was there."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        seconds(piece, device)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # or what earlier runs freed would be taken for free memory
    done, peak, before = threading.Event(), [0], resident()

    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    piece()
    done.set()
    watcher.join()
    return (max(peak[0], before) - before) / 2**20


def resident():
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval().requires_grad_(False).to(options.device)
    wiring = wire(model, anatomy(model))
    pieces = work(model, wiring, random_prompts(model.config.vocab_size))
    times = {name: [] for name in pieces}
    for round_ in range(options.rounds + 1):
        for name, piece in pieces.items():
            taken = seconds(piece, wiring.device)
            _ = times[name].append(taken) if round_ else None
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = {
        name: {
            "median_s": medians[name],
            "fastest_s": min(times[name]),
            "slowest_s": max(times[name]),
            "ratio": medians[name] / medians["plain"],
            "target": TARGETS[name],
            "extra_mib": extra_mib(pieces[name], wiring.device),
        }
        for name in pieces
    }
    found = {
        "device": store.device_name(wiring.device),
        "versions": store.versions(),
        "shape": "GPT-2 small, random weights, float32, 8 prompts of 16 tokens",
        "edges": wiring.graph.edges,
        "rounds": options.rounds,
        "work": rows,
    }
    print(f"{found['device']}; torch {found['versions']['torch']}, transformers {found['versions']['transformers']}")
    print(f"{'':12}{'median s':>10}{'ratio':>8}{'target':>8}{'extra MiB':>11}")
    for name, row in rows.items():
        print(f"{name:12}{row['median_s']:10.3f}{row['ratio']:8.2f}{row['target']:8d}{row['extra_mib']:11.0f}")
    if options.out:
        store.write_text(options.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
