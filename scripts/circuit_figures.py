"""The figures of circuits between components, from what `fewedges explain` saved.

    python scripts/circuit_figures.py results/circuits docs/figures

draws, light and dark, RESULTS/../circuits-TASK.json of four tasks (smollm2-few-heads) as one figure
(explained-effect), the mean and bands over prompts and three runs (beside the shipped one RESULTS/few-heads/seed-1, its
last 5,000 steps with another seed, and RESULTS/few-heads/other-start, these steps from the smollm2-sparse of another
seed), one run with mean ablation (RESULTS/few-heads/mean; explained-effect-mean), both ablations for RESULTS/sparse
(explained-effect-sparse, -sparse-mean), and the two circuits of Greater Than in few-heads side by side (connectivity).
Prints what share of each circuit's edges MLPs write, and writes the ratios of the three runs and their means to
RESULTS/few-heads/seeds.json.
"""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

from attention_circuits import NAMES

from fewedges import store
from fewedges.explain.circuit import LEVELS
from fewedges.explain.explaining import read_explained
from fewedges.explain.over_seeds import ratio_over_seeds
from fewedges.pictures import draw_circuits, draw_effects

FOLDERS = {"few-heads": "", "few-heads/mean": "-mean", "sparse": "-sparse", "sparse/mean": "-sparse-mean"}
AGAIN = {"few-heads": ("few-heads/seed-1", "few-heads/other-start")}
"""Other runs of the same recipe, for the figures that are over runs."""


def main(results: Path, out: Path) -> None:
    for name, end in FOLDERS.items():
        found = read(results.parent if name == "few-heads" else results / name)
        again = [read(results / folder) for folder in AGAIN.get(name, ())]
        others = [[run[title] for run in again if title in run] for title in found]
        models = f"SmolLM2-135M and smollm2-{name.partition('/')[0]}"
        for theme in ("light", "dark"):
            path = out / f"explained-effect{end}-{theme}"
            files = draw_effects(list(found.values()), path, title=models, theme=theme, again=others)
            if not end:
                one = "Greater Than: the first measured circuit with 0.9 of the effect (counterfactual ablation)"
                shown = replace(found["Greater Than"], task=one, model="SmolLM2-135M")
                files += draw_circuits(shown, out / f"connectivity-{theme}", theme=theme)
            print(*files, sep="\n")
        if not end:
            print_shares(found)
            ratios = over_seeds(found, others)
            store.write_text(results / name / "seeds.json", json.dumps(ratios, indent=1) + "\n")


def read(folder: Path) -> dict:
    """Title -> what was found, of the tasks that are there."""
    paths = {title: folder / f"circuits-{task}.json" for task, title in NAMES.items()}
    return {title: replace(read_explained(path), task=title) for title, path in paths.items() if path.exists()}


def over_seeds(found: dict, others: list) -> dict:
    """By task, count and model, then level: each run's ratio to dense, their geometric mean, its interval."""
    rows: dict = {}
    for (title, first), again in zip(found.items(), others, strict=True):
        runs = [first, *again]
        for count, label in itertools.product(("edges", "heads"), ("sparse", "control")):
            levels = rows.setdefault(title, {})[f"{count}, {label}"] = {}
            for level in LEVELS:
                mean, low, high = ratio_over_seeds(runs, count, level, label=label)
                each = [run.ratio(count, level, label=label) for run in runs]
                levels[f"{level:g}"] = {"runs": each, "mean": mean, "interval": [low, high]}
                print(f"{title}, {count}, dense / {label} at {level:g}: {mean:.2f} ({low:.2f} to {high:.2f}) of {each}")
    return rows


def print_shares(found: dict) -> None:
    """How many of a circuit's edges an MLP writes, or both ends are MLPs, by task and model."""
    for title, one in found.items():
        for label, edges in one.circuits.items():
            ends = [edge.split("->") for edge in edges]
            written, between = (sum(all(end[0] == "m" for end in e[:n]) for e in ends) for n in (1, 2))
            share = written / len(ends)
            print(f"{title}, {label}: {len(ends)} edges, {share:.2f} written by MLPs, {between} between MLPs")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
