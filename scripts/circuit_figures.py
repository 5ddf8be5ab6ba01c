"""The figures of circuits between components, from what `fewedges explain` saved.

    python scripts/circuit_figures.py results/circuits docs/figures

draws, light and dark, RESULTS/few-heads/circuits-TASK.json of four tasks as one figure (explained-effect), the same
with mean ablation (explained-effect-mean), both for RESULTS/sparse (explained-effect-sparse, -sparse-mean), and the two
circuits of Greater Than in few-heads side by side (connectivity).
"""

import sys
from dataclasses import replace
from pathlib import Path

from attention_circuits import NAMES

from fewedges.explain.explaining import read_explained
from fewedges.pictures import draw_circuits, draw_effects


def main(results: Path, out: Path) -> None:
    ends = {"few-heads": "", "few-heads/mean": "-mean", "sparse": "-sparse", "sparse/mean": "-sparse-mean"}
    for folder, end in ((results / name, end) for name, end in ends.items()):
        paths = {title: folder / f"circuits-{task}.json" for task, title in NAMES.items()}
        found = {title: replace(read_explained(path), task=title) for title, path in paths.items() if path.exists()}
        for theme in ("light", "dark"):
            files = draw_effects(list(found.values()), out / f"explained-effect{end}-{theme}", theme=theme)
            if not end:
                files += draw_circuits(found["Greater Than"], out / f"connectivity-{theme}", theme=theme)
            print(*files, sep="\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
