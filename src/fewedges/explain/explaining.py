"""The verb `explain`: find a task's circuit in the dense, the control and the sparse model by one code, and compare.

Edges are ranked on one half of the prompts (by template, where a task has templates) and circuits are measured on
the other. Beside the curve of each model stand its controls, and the question each answers:

    random           circuits of the same sizes, edges drawn at random: does the ranking know anything?
    shuffled         ranked with the answers shuffled over prompts: does it know the task, or any prompt of its form?
    untrained gates  the dense weights behind gates score > 0: is it the training, or the gates alone?
    control          the dense model fine-tuned alike, without gates: is it sparsity, or fine-tuning?

Source of protocol and figure: Draye et al. 2025, arXiv:2512.05865; explained effect is MIB's faithfulness.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fewedges import store
from fewedges.errors import StoreError
from fewedges.explain.circuit import LEVELS, Curve
from fewedges.explain.manifest import call_of, described, facts_of, manifest_of
from fewedges.explain.searching import Search, wired
from fewedges.explain.tasks import prompts_for
from fewedges.explain.tasks.prompts import Prompts
from fewedges.explain.tasks.solved import accuracy, check_solved
from fewedges.measure.report import models_of
from fewedges.model.loading import Loaded
from fewedges.recipes import CircuitSearch
from fewedges.sparsify.attention.result import Sparse, gates_only

log = logging.getLogger(__name__)

UNTRAINED = "untrained gates"
FEW = 8
"""Below so many measured prompts a bootstrap has too few to draw from, and `explain` says so."""
MODELS = ("dense", "control", "sparse", UNTRAINED)


@dataclass(frozen=True, kw_only=True)
class Explained:
    """The circuits of a task in every model that was compared."""

    task: str
    model: str
    curves: dict[str, Curve]
    """By model ("dense", "control", "sparse"), and by model and control ("dense, random")."""
    circuits: dict[str, list[str]]
    """By model: the names of the edges at the first measured circuit that explains 0.9 of the effect."""
    solved: dict[str, Any]
    """By model: how well it does the task."""
    facts: dict[str, Any] = field(default_factory=dict)
    rankings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By model: `nodes`, what each head and MLP is worth, and `stays`, see `Search.ranking`."""

    @property
    def labels(self) -> list[str]:
        """The models that were compared, without their controls."""
        return [label for label in MODELS if label in self.curves]

    def ratio(self, count: str = "edges", level: float = 0.9, label: str = "sparse") -> float:
        """How many times fewer edges (or heads) than in the dense model explain this share of the effect."""
        return times_fewer(self.curves["dense"], self.curves[label], count, level)

    def ratio_interval(self, count: str = "edges", level: float = 0.9, label: str = "sparse") -> tuple[float, float]:
        """Its 95 % bootstrap interval: the same prompts drawn for both models."""
        dense, other = self.curves["dense"], self.curves[label]
        draw = np.random.default_rng(self.facts.get("seed", 0))
        rows = draw.integers(len(dense.full), size=(self.facts.get("samples", 1000), len(dense.full)))
        found = [times_fewer(dense.of(some), other.of(some), count, level) for some in rows]
        known = np.nan_to_num(np.array(found), nan=1.0, posinf=np.inf)
        low, high = np.quantile(known, [0.025, 0.975], method="nearest")
        return float(low), float(high)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: ratios with their intervals first, then accuracies, curves and circuits."""
        ratios: dict[str, Any] = {}
        for label in [x for x in self.labels if x != "dense"]:
            for count in ("edges", "heads"):
                name = f"ratio_{count}" if label == "sparse" else f"ratio_{count}_{label.replace(' ', '_')}"
                ratios[name] = _finite(self.ratio(count, label=label))
                ratios[f"{name}_interval"] = [_finite(x) for x in self.ratio_interval(count, label=label)]
        at = {label: _counts(found) for label, found in self.curves.items()}
        curves = {label: found.to_dict() for label, found in self.curves.items()}
        head = {"task": self.task, "model": self.model, **ratios, "accuracies": self.solved, "at": at}
        return {**head, "curves": curves, "circuits": self.circuits, "rankings": self.rankings, "facts": self.facts}

    def save(self, path: Path | str) -> Path:
        """Write it as json."""
        store.write_text(Path(path), json.dumps(self.to_dict()) + "\n")
        return Path(path)

    def __str__(self) -> str:
        what = "whole heads and MLPs" if self.facts.get("nodes") else "edges (heads)"
        rows = [f"{self.task} in {self.model}: {what} that explain a share of the effect, {_protocol(self.facts)}"]
        rows += [run] if (run := described(self.facts)) else []
        rows.append(f"{'':26}" + "".join(f"{level:>16}" for level in LEVELS) + f"{'accuracy':>12}")
        for label, found in self.curves.items():
            cells = "".join(f"{_cell(found, level):>16}" for level in LEVELS)
            done = self.solved.get(label, {}).get("accuracy")
            rows.append(f"{label:26}{cells}" + (f"{done:>12.1%}" if done is not None else ""))
            if found.without is not None:
                lost = [found.necessity_at(level) for level in LEVELS]
                rows.append(f"{'  effect lost without them':26}" + "".join(f"{_number(x):>16}" for x in lost))
        rows += [f"{label}: {line}" for label, one in self.rankings.items() if (line := _ranking(one))]
        rows += self._ratios() if "sparse" in self.curves else []
        return "\n".join(rows)

    def _ratios(self) -> list[str]:
        found = {count: (self.ratio(count), *self.ratio_interval(count)) for count in ("edges", "heads")}
        return [
            f"dense / sparse at 0.9: {ratio:.3g} times fewer {count} ({low:.3g} to {high:.3g})"
            for count, (ratio, low, high) in found.items()
        ]

    def _repr_html_(self) -> str:
        return f"<pre>{self}</pre>"


def read_explained(path: Path | str) -> Explained:
    """Read what `Explained.save` wrote. StoreError for anything else."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        curves = {label: Curve.from_dict(found) for label, found in data["curves"].items()}
        names = {"circuits": data["circuits"], "solved": data["accuracies"], "facts": data["facts"]}
        names["rankings"] = data.get("rankings", {})  # results before November 2026 have none
        return Explained(task=data["task"], model=data["model"], curves=curves, **names)
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"it is not a saved explanation ({type(error).__name__}: {error})"
        raise StoreError(f"read {path}", found, "a file that `fewedges explain` wrote") from error


def explain(
    what: Sparse | Loaded,
    task: str | Path = "ioi",
    search: CircuitSearch | None = None,
    *,
    source: str | Path | None = None,
    call: str | None = None,
    export: Path | None = None,
    watch: Callable[[str], None] | None = None,
    **options: Any,
) -> Explained:
    """Find and measure the circuits of a task in a sparse model, its dense base and its control, or in a dense model.

    `task` is one of `fewedges.explain.tasks.TASKS` or a file of prompts; `options` go to its generator. A model that
    does not do the task is an error. Runs on the device the models are on. `source` is the saved run that `what` was
    loaded from: its manifest is noted in the result, beside `call` (or this call in Python). With `export`, a folder,
    each model's scores and its circuit at 0.9 are also written there as EAP-IG's json (see `exchange`).
    """
    search, tell = search or CircuitSearch(), watch or (lambda _: None)
    models = models_of(what)
    manifest = manifest_of(what, source, call or call_of(task, search, options))
    prompts = prompts_for(task, models["dense"].tokenizer, search.count, search.seed, **options)
    solved = check_solved({label: loaded.model for label, loaded in models.items()}, prompts)
    if search.controls:
        models |= _untrained(models["dense"], prompts, solved)
    train, test = prompts.split(search.seed)
    if len(test) < FEW:
        log.warning("%s: measured on %d prompts, too few for its intervals: --count %d", task, len(test), 2 * FEW)
    facts = facts_of(what, prompts, train, test, search, options, manifest) | {"graphs": {}}
    found = Explained(task=prompts.name, model=models["dense"].name, curves={}, circuits={}, solved={}, facts=facts)
    for label, loaded in models.items():
        tell(f"{label}: {solved[label]}")
        with wired(loaded, search) as wiring:
            tell(f"{label}: {wiring.graph}")
            _add(found, Search(label, wiring, train, test, search), export)
        tell(f"{label}: {found.curves[label].edges_at():.4g} edges at 0.9")
    found.solved.update({label: one.describe() for label, one in solved.items()})
    return found


def _add(found: Explained, one: Search, export: Path | None) -> None:
    """Note what one model's search finds."""
    label, graph = one.label, one.wiring.graph
    found.curves.update(one.curves())
    curve = found.curves[label]
    found.circuits[label] = list(graph.names(one.circuit(curve)))
    found.rankings[label] = one.ranking(curve)
    found.facts["graphs"][label] = {"layers": graph.layers, "heads": graph.heads, "key_readers": graph.key_readers}
    if export is not None:
        export.mkdir(parents=True, exist_ok=True)
        path = one.export(export / exported_name(found.task, label), curve)
        found.facts.setdefault("exported", []).append(str(path))


def exported_name(task: str, label: str) -> str:
    """The file of a model's circuit: `ioi-abc-sparse.json`."""
    words = "".join(c if c.isalnum() or c == "_" else " " for c in f"{task} {label}".lower())
    return f"{'-'.join(words.split())}.json"


def _untrained(dense: Loaded, prompts: Prompts, solved: dict[str, Any]) -> dict[str, Loaded]:
    """The dense weights behind gates score > 0, if that still does the task; how well is noted either way."""
    gated = gates_only(dense, 0.0).loaded
    solved[UNTRAINED] = accuracy(gated.model, prompts)
    return {} if solved[UNTRAINED].trouble else {UNTRAINED: gated}


def times_fewer(dense: Curve, other: Curve, count: str = "edges", level: float = 0.9) -> float:
    """Edges (or heads) of the one over those of the other where each first explains `level`; inf, 0, NaN if never.

    A ratio of counts: none counts as one, for a draw of prompts may be explained without a single head.
    """
    first, second = (max(getattr(found, f"{count}_at")(level), 1.0) for found in (dense, other))
    return first / second if np.isfinite(first) or np.isfinite(second) else float("nan")


def _finite(x: float) -> float | None:
    return x if np.isfinite(x) else None


def _counts(found: Curve) -> dict[str, Any]:
    """Edges, heads and necessity at every level; None where a level is never reached."""
    levels = {str(level): [_finite(found.edges_at(level)), _finite(found.heads_at(level))] for level in LEVELS}
    necessity = {str(level): found.necessity_at(level) for level in LEVELS} if found.without is not None else None
    return {**levels, "of": found.all_edges, "cpr": found.cpr, "cmd": found.cmd, "necessity": necessity}


def _cell(found: Curve, level: float) -> str:
    edges, heads = found.edges_at(level), found.heads_at(level)
    return f"{edges:,.0f} ({heads:.0f})" if np.isfinite(edges) else "not reached"


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.2f}"


def _ranking(known: dict[str, Any]) -> str:
    """The nodes that are worth most, and how steady the circuit is."""
    best = sorted(known.get("nodes", {}).items(), key=lambda one: -abs(one[1]))[:6]
    said = [", ".join(f"{name} {score:+.2f}" for name, score in best)] if best else []
    said += [f"{known['stays']:.0%} of its edges at 0.9 stay when prompts are redrawn"] if "stays" in known else []
    return "; ".join(said)


def _protocol(facts: dict[str, Any]) -> str:
    return f"{facts.get('method')}, {facts.get('ablation')} ablation, {facts.get('test')} held-out prompts"
