"""The figures of circuits between components, from what `fewedges explain` saved.

    python scripts/circuit_figures.py results/circuits docs/figures

draws, light and dark, RESULTS/../circuits-TASK.json of four tasks (smollm2-few-heads) as one figure (explained-effect),
the same with mean ablation (RESULTS/few-heads/mean; explained-effect-mean), both for RESULTS/sparse
(explained-effect-sparse, -sparse-mean), and the two circuits of Greater Than in few-heads side by side (connectivity).
Prints what share of each circuit's edges MLPs write.
"""

import sys
from dataclasses import replace
from pathlib import Path

from attention_circuits import NAMES

from fewedges.explain.explaining import read_explained
from fewedges.pictures import draw_circuits, draw_effects


def main(results: Path, out: Path) -> None:
    ends = {"few-heads": "", "few-heads/mean": "-mean", "sparse": "-sparse", "sparse/mean": "-sparse-mean"}
    for name, end in ends.items():
        folder = results.parent if name == "few-heads" else results / name
        paths = {title: folder / f"circuits-{task}.json" for task, title in NAMES.items()}
        found = {title: replace(read_explained(path), task=title) for title, path in paths.items() if path.exists()}
        for theme in ("light", "dark"):
            models = f"SmolLM2-135M and smollm2-{name.partition('/')[0]}"
            files = draw_effects(
                list(found.values()), out / f"explained-effect{end}-{theme}", title=models, theme=theme
            )
            if not end:
                files += draw_circuits(found["Greater Than"], out / f"connectivity-{theme}", theme=theme)
            print(*files, sep="\n")
        if not end:
            print_shares(found)


def print_shares(found) -> None:
    """How many of a circuit's edges an MLP writes, or both ends are MLPs, by task and model."""
    for title, one in found.items():
        for label, edges in one.circuits.items():
            ends = [edge.split("->") for edge in edges]
            written, between = (sum(all(end[0] == "m" for end in e[:n]) for e in ends) for n in (1, 2))
            share = written / len(ends)
            print(f"{title}, {label}: {len(ends)} edges, {share:.2f} written by MLPs, {between} between MLPs")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
