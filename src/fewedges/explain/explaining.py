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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from fewedges import store
from fewedges.errors import StoreError
from fewedges.explain.attribution import attribute
from fewedges.explain.circuit import LEVELS, Curve, circuit_mask, curve
from fewedges.explain.hooks import Wiring, wire
from fewedges.explain.select import How, budget_grid
from fewedges.explain.tasks import prompts_for
from fewedges.explain.tasks.prompts import Prompts
from fewedges.explain.tasks.solved import accuracy, check_solved
from fewedges.measure.report import models_of
from fewedges.model.loading import Loaded
from fewedges.recipes import CircuitSearch
from fewedges.sparsify.attention.interface import GatePass, is_gated
from fewedges.sparsify.attention.result import Sparse, gates_only

UNTRAINED = "untrained gates"
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

    @property
    def labels(self) -> list[str]:
        """The models that were compared, without their controls."""
        return [label for label in MODELS if label in self.curves]

    def ratio(self, count: str = "edges", level: float = 0.9, label: str = "sparse") -> float:
        """How many times fewer edges (or heads) than in the dense model explain this share of the effect."""
        return _ratio(self.curves["dense"], self.curves[label], count, level)

    def ratio_interval(self, count: str = "edges", level: float = 0.9, label: str = "sparse") -> tuple[float, float]:
        """Its 95 % bootstrap interval: the same prompts drawn for both models."""
        dense, other = self.curves["dense"], self.curves[label]
        draw = np.random.default_rng(self.facts.get("seed", 0))
        rows = draw.integers(len(dense.full), size=(self.facts.get("samples", 1000), len(dense.full)))
        found = [_ratio(dense.of(some), other.of(some), count, level) for some in rows]
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
        return {**head, "curves": curves, "circuits": self.circuits, "facts": self.facts}

    def save(self, path: Path | str) -> Path:
        """Write it as json."""
        store.write_text(Path(path), json.dumps(self.to_dict()) + "\n")
        return Path(path)

    def __str__(self) -> str:
        rows = [
            f"{self.task} in {self.model}: edges (heads) that explain a share of the effect, {_protocol(self.facts)}"
        ]
        rows.append(f"{'':26}" + "".join(f"{level:>16}" for level in LEVELS) + f"{'accuracy':>12}")
        for label, found in self.curves.items():
            cells = "".join(f"{_cell(found, level):>16}" for level in LEVELS)
            done = self.solved.get(label, {}).get("accuracy")
            rows.append(f"{label:26}{cells}" + (f"{done:>12.1%}" if done is not None else ""))
        if "sparse" in self.curves:
            for count in ("edges", "heads"):
                low, high = self.ratio_interval(count)
                rows.append(
                    f"dense / sparse at 0.9: {self.ratio(count):.3g} times fewer {count} ({low:.3g} to {high:.3g})"
                )
        return "\n".join(rows)

    def _repr_html_(self) -> str:
        return f"<pre>{self}</pre>"


def read_explained(path: Path | str) -> Explained:
    """Read what `Explained.save` wrote. StoreError for anything else."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        curves = {label: Curve.from_dict(found) for label, found in data["curves"].items()}
        names = {"circuits": data["circuits"], "solved": data["accuracies"], "facts": data["facts"]}
        return Explained(task=data["task"], model=data["model"], curves=curves, **names)
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"it is not a saved explanation ({type(error).__name__}: {error})"
        raise StoreError(f"read {path}", found, "a file that `fewedges explain` wrote") from error


def explain(
    what: Sparse | Loaded,
    task: str | Path = "ioi",
    search: CircuitSearch | None = None,
    *,
    watch: Callable[[str], None] | None = None,
    **options: Any,
) -> Explained:
    """Find and measure the circuits of a task in a sparse model, its dense base and its control, or in a dense model.

    `task` is one of `fewedges.explain.tasks.TASKS` or a file of prompts; `options` go to its generator. A model that
    does not do the task is an error. Runs on the device the models are on.
    """
    search, tell = search or CircuitSearch(), watch or (lambda _: None)
    models = models_of(what)
    prompts = prompts_for(task, models["dense"].tokenizer, search.count, search.seed, **options)
    solved = check_solved({label: loaded.model for label, loaded in models.items()}, prompts)
    if search.controls:
        models |= _untrained(models["dense"], prompts, solved)
    train, test = prompts.split(search.seed)
    curves: dict[str, Curve] = {}
    circuits: dict[str, list[str]] = {}
    graphs: dict[str, dict[str, int]] = {}
    for label, loaded in models.items():
        tell(f"{label}: {solved[label]}")
        with _wired(loaded) as wiring:
            found = _Model(label, wiring, train, test, search)
            curves |= found.curves()
            circuits[label] = found.circuit(curves[label])
            graph = wiring.graph
            graphs[label] = {"layers": graph.layers, "heads": graph.heads, "key_readers": graph.key_readers}
        tell(f"{label}: {curves[label].edges_at():.4g} edges at 0.9")
    known = {label: one.describe() for label, one in solved.items()}
    facts = _facts(what, prompts, train, test, search, options) | {"graphs": graphs}
    return Explained(
        task=prompts.name, model=models["dense"].name, curves=curves, circuits=circuits, solved=known, facts=facts
    )


class _Model:
    """One model's search and measurement."""

    def __init__(self, label: str, wiring: Wiring, train: Prompts, test: Prompts, search: CircuitSearch):
        self.label, self.wiring, self.train, self.test, self.search = label, wiring, train, test, search
        self.scores = self._scores(train)

    def curves(self) -> dict[str, Curve]:
        """Its curve, and those of its controls."""
        search, label = self.search, self.label
        found = {label: self._curve(self.scores, search.how, complements=search.complements)}
        if search.controls and label in ("dense", "sparse"):
            found[f"{label}, random"] = self._curve(self.scores, "random")
            shuffled = self._scores(self.train.shuffled(search.seed))
            found[f"{label}, shuffled"] = self._curve(shuffled, search.how)
        return found

    def circuit(self, found: Curve, level: float = 0.9) -> list[str]:
        """The edges of the first measured circuit that reaches this level."""
        index = found.index_at(level)
        if index is None:
            return []
        edges, seed = int(found.budgets[index]), self.search.seed
        mask = circuit_mask(self.wiring, self.scores, edges, how=self.search.how, seed=seed)
        return list(self.wiring.graph.names(mask))

    def _scores(self, prompts: Prompts) -> Float[np.ndarray, "J I"]:
        search = self.search
        choices: dict[str, Any] = {"steps": search.steps, "gim": search.gim, "ablation": search.ablation}
        through = search.through_gates and is_gated(self.wiring.model)
        options = {"gate_pass": GatePass(straight_through=True)} if through else None
        return attribute(self.wiring, prompts, search.method, seed=search.seed, options=options, **choices).edges

    def _curve(self, scores: Float[np.ndarray, "J I"], how: How, *, complements: bool = False) -> Curve:
        search = self.search
        choices: dict[str, Any] = {"ablation": search.ablation, "seed": search.seed, "complements": complements}
        choices["reference"] = None if search.ablation == "counterfactual" else self.train
        budgets = budget_grid(self.wiring.graph, search.points)
        return curve(self.wiring, self.test, scores, how=how, budgets=budgets, **choices)


@contextmanager
def _wired(loaded: Loaded) -> Iterator[Wiring]:
    """The circuit graph of a model, its weights frozen meanwhile."""
    learning = [parameter for parameter in loaded.model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield wire(loaded.model, loaded.anatomy)
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _untrained(dense: Loaded, prompts: Prompts, solved: dict[str, Any]) -> dict[str, Loaded]:
    """The dense weights behind gates score > 0, if that still does the task; how well is noted either way."""
    gated = gates_only(dense, 0.0).loaded
    solved[UNTRAINED] = accuracy(gated.model, prompts)
    return {} if solved[UNTRAINED].trouble else {UNTRAINED: gated}


def _facts(
    what: Any, prompts: Prompts, train: Prompts, test: Prompts, search: CircuitSearch, options: Any
) -> dict[str, Any]:
    loaded = models_of(what)["dense"]
    device = store.device_name(next(loaded.model.parameters()).device)
    halves = {"prompts": prompts.describe(), "train": len(train), "test": len(test)}
    shown = {
        name: value if isinstance(value, str | int | float | bool) else str(value) for name, value in options.items()
    }
    return {**asdict(search), **halves, "options": shown, "device": device, "versions": store.versions()}


def _ratio(dense: Curve, other: Curve, count: str, level: float) -> float:
    first, second = (getattr(found, f"{count}_at")(level) for found in (dense, other))
    return first / max(second, 1e-9) if np.isfinite(first) or np.isfinite(second) else float("nan")


def _finite(x: float) -> float | None:
    return x if np.isfinite(x) else None


def _counts(found: Curve) -> dict[str, Any]:
    """Edges and heads at every level; None where a level is never reached."""
    levels = {str(level): [_finite(found.edges_at(level)), _finite(found.heads_at(level))] for level in LEVELS}
    return {**levels, "of": found.all_edges, "cpr": found.cpr, "cmd": found.cmd}


def _cell(found: Curve, level: float) -> str:
    edges, heads = found.edges_at(level), found.heads_at(level)
    return f"{edges:,.0f} ({heads:.0f})" if np.isfinite(edges) else "not reached"


def _protocol(facts: dict[str, Any]) -> str:
    return f"{facts.get('method')}, {facts.get('ablation')} ablation, {facts.get('test')} held-out prompts"
