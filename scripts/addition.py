"""The addition result: the demo's recipe with three seeds, each beside a dense control.

    python scripts/addition.py --out results/addition.json

Protocol: exact match of all three answer digits on the 2,000 held-out sums, hard gates, the last step (nothing is
picked); edges per query per head over all 10 queries of those sums. One thread. The control trains on the same data
for the same steps with the same objective, without gates; its objective starts at its minimum (KL to itself), so it
says that training alone changes nothing.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

import fewedges as fe
from fewedges import store
from fewedges.demo import demo_recipe
from fewedges.recipes import to_dict

KEYS = ("accuracy", "edges_per_query_per_head", "density", "cross_entropy", "kl")


def one_seed(dense, seed, steps):
    """Numbers of one seed: dense, control, sparse, and the seconds it took without the control."""
    recipe = demo_recipe(seed)
    recipe = dataclasses.replace(recipe, steps=steps or recipe.steps)
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        fe.sparsify(dense, recipe, out=folder)
        seconds = time.monotonic() - began
        sparse = fe.sparsify(dense, recipe, out=folder, control=True)
    rows = fe.measure(sparse).rows
    picked = {name: {key: row[key] for key in KEYS if key in row} for name, row in rows.items()}
    return {"seed": seed, "training_seconds": round(seconds, 1), **picked}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dense = fe.load("addition")
    runs = [one_seed(dense, seed, args.steps) for seed in args.seeds]
    worst = {
        "accuracy_min": min(run["sparse"]["accuracy"] for run in runs),
        "edges_per_query_per_head_max": max(run["sparse"]["edges_per_query_per_head"] for run in runs),
        "edges_per_query_per_head_median": statistics.median(run["sparse"]["edges_per_query_per_head"] for run in runs),
    }
    facts = {"recipe": to_dict(demo_recipe()), "device": store.device_name("cpu"), "versions": store.versions()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"summary": worst, "runs": runs, **facts}, indent=1) + "\n")
    print(json.dumps(worst, indent=1))


if __name__ == "__main__":
    main()
