"""The first ten minutes: addition made sparse, measured, drawn, its circuits found, and all of it told in words."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fewedges.recipes import SparseAttention, from_dict, read_recipe, to_dict

RECIPE = Path(__file__).parent / "assets" / "addition" / "recipe.yaml"


def demo_recipe(seed: int = 0) -> SparseAttention:
    """The recipe of the demo, by seed."""
    return from_dict({**to_dict(read_recipe(RECIPE)), "seed": seed})


def run_demo(out: Path, *, seed: int = 0, as_json: bool = False, dry_run: bool = False) -> dict[str, Any]:
    """Sparsify, measure and draw the addition model; print a story, or one json object."""
    recipe = demo_recipe(seed)
    if dry_run:
        print(f"would train the addition model for {recipe.steps} steps and write to {out}\n{to_dict(recipe)}")
        return {}
    began = time.monotonic()
    with _one_thread():
        sparse, report = _sparse_addition(recipe, out, quiet=as_json)
        circuits, pictures = _explain(sparse, out)
    files = _draw_all(sparse, out) + pictures
    files += [report.save(out / "report.json"), out / "run" / "manifest.json"]
    summary = _summary(report, time.monotonic() - began, files)
    print(json.dumps(summary, indent=2) if as_json else _story(summary, out, str(circuits)))
    return summary


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from a second thread, and on a busy machine lose a factor of 8 to it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _sparse_addition(recipe: SparseAttention, out: Path, *, quiet: bool) -> tuple[Any, Any]:
    import dataclasses

    from fewedges.measure.report import measure
    from fewedges.model.loading import load
    from fewedges.sparsify.attention.result import sparsify

    def tell(record: dict[str, Any]) -> None:
        if record["step"] % 100 == 0 or record["step"] == 1:
            edges, kl = record["edges_per_query_per_head"], record["kl"]
            print(f"step {record['step']:5d}   edges per query per head {edges:6.3f}   KL {kl:.4f}", file=sys.stderr)

    dense = load("addition")
    sparse = sparsify(dense, recipe, out=out / "run", watch=None if quiet else tell)
    report = measure(sparse)
    sparse = dataclasses.replace(sparse, results=report.to_dict())
    sparse.save(out / "run")
    return sparse, report


def _explain(sparse: Any, out: Path) -> tuple[Any, list[Path]]:
    """Find the circuit of the tens digit in both models; write its numbers and pictures."""
    from fewedges.explain.explaining import explain
    from fewedges.pictures import draw_explained
    from fewedges.recipes import CircuitSearch

    call = f"fewedges demo --out {out} --seed {sparse.recipe.seed}"
    found = explain(sparse, "addition", CircuitSearch(count=128, samples=300), source=out / "run", call=call)
    files = [found.save(out / "circuits-addition.json")]
    for theme in ("light", "dark"):
        files += draw_explained([found], out, name="addition", theme=theme)
    return found, files


def _draw_all(sparse: Any, out: Path) -> list[Path]:
    from fewedges.data.addition import examples
    from fewedges.draw import save, training_curve
    from fewedges.pictures import draw_prompt

    files: list[Path] = []
    for number, prompt in enumerate(examples()):
        name = ("no-carry", "one-carry", "two-carries")[number]
        for theme in ("light", "dark"):
            files += draw_prompt(sparse, prompt, out, name=name, theme=theme)
    known = [{**record, "dense_edges": 5.5} for record in sparse.records]
    for theme in ("light", "dark"):
        figure = training_curve(known, title="Addition, made sparse", theme=theme)
        files += save(figure, out / f"curve-{theme}")
    return files


def _summary(report: Any, seconds: float, files: list[Path]) -> dict[str, Any]:
    """What `--json` prints; scripts of others rely on these keys."""
    rows = {
        name: {
            "accuracy": row["accuracy"],
            "edges_per_query_per_head": row["edges_per_query_per_head"],
            "density": row["density"],
            "cross_entropy": row["cross_entropy"],
        }
        for name, row in report.rows.items()
    }
    return {**rows, "seconds": round(seconds, 1), "files": [str(path) for path in files]}


def _story(summary: dict[str, Any], out: Path, circuits: str) -> str:
    dense, sparse = summary["dense"], summary["sparse"]
    many, few = dense["edges_per_query_per_head"], sparse["edges_per_query_per_head"]
    return f"""
What you are looking at
  A small transformer (4 layers of 4 attention heads) that adds two-digit numbers: 29+19=048.
  In a dense model every token reads every earlier token in every head: {many:.2f} attention
  edges per query per head. After post-training, a gate cuts every edge whose score is not above 0,
  and what is left is what the model needs.

                                dense      sparse
  sums right (2,000 unseen)   {dense["accuracy"]:7.2%}     {sparse["accuracy"]:7.2%}
  edges per query per head    {many:7.3f}     {few:7.3f}    ({many / max(few, 1e-9):.0f} times fewer)
  of the causal triangle      {dense["density"]:7.2%}     {sparse["density"]:7.2%}

{circuits}

Pictures in {out}
  connectivity-*  which token reads which, layer by layer: dense is a haze, sparse can be read by eye
  heads-*         the attention map of every head; grey heads are closed
  curve-*         how edges fell while the loss was held
  explained-*     how many circuit edges (component to component) explain how much of the tens digit
  circuit-*       both models' circuits for it
Next
  fewedges draw {out}/run --prompt "58+27=085" --out {out}
  fewedges measure {out}/run
Done in {summary["seconds"]:.0f} s.
"""
