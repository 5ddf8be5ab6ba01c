"""Explained effect against attention edges: run tasks on a sparse run, save results, draw all of them in one figure.

python scripts/attention_circuits.py run RUN results/circuits/few-heads ioi greater_than docstring ioi_long
python scripts/attention_circuits.py draw results/circuits/few-heads docs/figures ioi greater_than docstring ioi_long
python scripts/attention_circuits.py draw results/circuits/sparse docs/figures ioi greater_than docstring ioi_long \
    end=sparse
"""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

NAMES = {"ioi": "IOI", "greater_than": "Greater Than", "docstring": "Docstring", "ioi_long": "IOI Long"}

FLAGS = ("controls", "complements", "through_gates", "own")


def run(folder: str, out: Path, tasks: list[str], options: dict[str, Any], end: str = "") -> None:
    """Search, measure and save, task by task."""
    from fewedges.explain.attention_explaining import SEARCH, explain_attention
    from fewedges.sparsify.attention.result import Sparse, load

    what = load(folder, device=options.pop("device", "cpu"))
    assert isinstance(what, Sparse)
    own = options.pop("own", False)
    out.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        start = time.perf_counter()
        found = explain_attention(what, task, replace(SEARCH, **options), own=own, watch=tell)
        found.facts["seconds"] = round(time.perf_counter() - start, 1)
        found.facts["run"] = Path(folder).name
        tell(str(found.save(out / f"attention-{task}{end}.json")))
        print(found, *[f"{name}\n{curve}" for name, curve in found.curves.items()], sep="\n", flush=True)


def draw(results: Path, out: Path, tasks: list[str], name: str = "") -> None:
    """Draw the curves of saved results, in both themes."""
    from fewedges.explain.attention_explaining import read_attention_explained
    from fewedges.pictures import draw_attention_circuits

    read = {NAMES.get(task, task): read_attention_explained(results / f"attention-{task}.json") for task in tasks}
    for theme in ("light", "dark"):
        for path in draw_attention_circuits(read, out, name=name, theme=theme):
            tell(str(path))


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    verb, first, second, *rest = sys.argv[1:]
    pairs = [word.split("=", 1) for word in rest if "=" in word]
    names = [word for word in rest if "=" not in word]
    if verb == "run":
        options: dict[str, Any] = {name: int(x) if x.isdigit() else x for name, x in pairs}
        end = f"-{options.pop('end')}" if "end" in options else ""
        run(first, Path(second), names, {n: bool(x) if n in FLAGS else x for n, x in options.items()}, end)
    else:
        draw(Path(first), Path(second), names, dict(pairs).get("end", ""))
