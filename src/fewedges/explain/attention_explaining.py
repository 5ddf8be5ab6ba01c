"""The verb `explain` over attention edges: how many token readings carry a task in the dense and in the sparse model.

Edges are ranked on one half of the prompts (`attention_ranking`) and circuits measured on the other
(`attention_circuit`). Beside the curve of each model stand

    signed (or absolute)   the other ranking: see below
    own                    each prompt's own edges, ranked and measured on that prompt: what roles could at best do
    random                 edges drawn at random: does the ranking know anything?

Ranked by absolute score, a circuit comes to resemble the model. Ranked by signed score it keeps what helps and drops
what holds back: its explained effect soon passes 1 and says little (dense SmolLM2, IOI: 0.9 with 4 of 33,966 edges, 2.9
with 1,560). So absolute is the default. Curves still rise and fall on the way, and "first at 0.9" may be a chance:
beside it stand the size from which 0.9 is kept (`stays_at`) and that of the KL share (`like_at`), which cannot
overshoot.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fewedges.errors import RecipeError, StoreError
from fewedges.explain.attention_circuit import AttentionCurve, attention_curve
from fewedges.explain.attention_ranking import RoleScores, edge_budgets, own_ranks, role_scores
from fewedges.explain.explaining import Explained
from fewedges.explain.manifest import call_of, changed, facts_of, manifest_of
from fewedges.explain.tasks import prompts_for
from fewedges.explain.tasks.prompts import Prompts
from fewedges.explain.tasks.solved import check_solved
from fewedges.measure.report import models_of
from fewedges.model.loading import Loaded
from fewedges.recipes import CircuitSearch
from fewedges.sparsify.attention.result import Sparse

SEARCH = CircuitSearch(how="absolute", through_gates=False, complements=False)
Read = Literal["edges_at", "stays_at", "like_at"]
READS: dict[Read, str] = {"like_at": "kl", "stays_at": "stays"}
NAMED = 200  # role edges of a circuit that are kept by name


@dataclass(frozen=True, kw_only=True)
class AttentionExplained(Explained):
    """The attention edges that carry a task, in every model that was compared: curves are AttentionCurves.

    `circuits`: by model, the names of its best role edges, at most 200, in the first circuit that explains 0.9.
    """

    def ratio_by(self, read: Read, level: float = 0.9, label: str = "sparse") -> float:
        """How many times fewer edges than in the dense model, read off the curves in this way."""
        return _ratio(*(getattr(self.curves[name], read)(level) for name in ("dense", label)))

    def ratio_by_interval(self, read: Read, level: float = 0.9, label: str = "sparse") -> tuple[float, float]:
        """Its 95 % bootstrap interval: the same prompts drawn for both models."""
        dense, other = self.curves["dense"], self.curves[label]
        count, samples = len(dense.full), self.facts.get("samples", 1000)
        rows = np.random.default_rng(self.facts.get("seed", 0)).integers(count, size=(samples, count))
        drawn = [_ratio(*(getattr(curve.of(some), read)(level) for curve in (dense, other))) for some in rows]
        low, high = np.quantile(np.nan_to_num(drawn, nan=1.0, posinf=np.inf), [0.025, 0.975], method="nearest")
        return float(low), float(high)

    def ordered(self, name: str) -> "AttentionExplained":
        """The same comparison by another ranking that was measured: "signed", "absolute", "own"."""
        ends = f", {name}"
        curves = {label.removesuffix(ends): curve for label, curve in self.curves.items() if label.endswith(ends)}
        return replace(self, curves=curves, circuits={})

    def to_dict(self) -> dict[str, Any]:
        """Plain data: ratios with their intervals first, then accuracies, curves and circuits."""
        data, ratios = super().to_dict(), {}
        for label in [x for x in self.labels if x != "dense"]:
            for read, short in READS.items():
                name = f"ratio_edges_{short}" + ("" if label == "sparse" else f"_{label}")
                ends = self.ratio_by_interval(read, label=label)
                ratios |= {name: _finite(self.ratio_by(read, label=label)), f"{name}_interval": [*map(_finite, ends)]}
        at = {
            f"at_{short}": {label: _finite(getattr(x, read)()) for label, x in self.curves.items()}
            for read, short in READS.items()
        }
        return {**ratios, **data, **at}

    def __str__(self) -> str:
        lines = super().__str__().splitlines()
        lines[0] = lines[0].replace(": edges (heads) that", ": attention edges (heads) of a prompt that", 1)
        if "sparse" in self.curves:
            for read, words in {"stays_at": "from where 0.9 is kept", "like_at": "at a KL share of 0.9"}.items():
                low, high = self.ratio_by_interval(read)  # type: ignore[arg-type]
                found = f"{self.ratio_by(read):.3g} times fewer edges ({low:.3g} to {high:.3g})"  # type: ignore[arg-type]
                lines.append(f"dense / sparse {words}: {found}")
        return "\n".join(lines)


def read_attention_explained(path: Path | str) -> AttentionExplained:
    """Read what `AttentionExplained.save` wrote. StoreError for anything else."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        curves: dict[str, Any] = {label: AttentionCurve.from_dict(found) for label, found in data["curves"].items()}
        names = {"circuits": data["circuits"], "solved": data["accuracies"], "facts": data["facts"]}
        return AttentionExplained(task=data["task"], model=data["model"], curves=curves, **names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        found = f"these are no explained attention edges ({type(error).__name__}: {error})"
        raise StoreError(f"read {path}", found, "a file that `AttentionExplained.save` wrote") from error


def explain_attention(
    what: Sparse | Loaded,
    task: str | Path = "ioi",
    search: CircuitSearch | None = None,
    *,
    source: str | Path | None = None,
    call: str | None = None,
    own: bool = False,
    watch: Callable[[str], None] | None = None,
    **options: Any,
) -> AttentionExplained:
    """Rank and measure the attention edges that carry a task in a sparse model, its dense base and its control.

    `search`: of its rankings absolute and signed, of its ablations counterfactual and zero; RecipeError for others.
    `own` also measures each prompt's own edges; `source` and `call` as in `explain`. `options` go to the task's
    generator. A model that does not do the task is an error.
    """
    search, tell = search or SEARCH, watch or (lambda _: None)
    _check(search)
    models = models_of(what)
    manifest = manifest_of(what, source, call or call_of(task, search, options, verb="explain_attention"))
    prompts = prompts_for(task, models["dense"].tokenizer, search.count, search.seed, **options)
    solved = check_solved({label: loaded.model for label, loaded in models.items()}, prompts)
    train, test = prompts.split(search.seed)
    curves: dict[str, AttentionCurve] = {}
    circuits: dict[str, list[str]] = {}
    for label, loaded in models.items():
        tell(f"{label}: {solved[label]}")
        found = _Model(loaded.model, label, train, test, search)
        curves |= found.curves(own=own)
        circuits[label] = found.circuit(curves[label])
        tell(f"{label}: {curves[label].edges_at():.4g} attention edges at 0.9, {curves[label].like_at():.4g} by KL")
    known = {label: one.describe() for label, one in solved.items()}
    facts = facts_of(what, prompts, train, test, search, options, manifest) | {"edges": "attention"}
    return AttentionExplained(
        task=prompts.name,
        model=models["dense"].name,
        curves=dict(curves),
        circuits=circuits,
        solved=known,
        facts=facts,
    )


def suited(search: CircuitSearch) -> CircuitSearch:
    """The settings that suit attention edges, but for those that were changed."""
    return replace(SEARCH, **changed(search))


class _Model:
    """One model's search and measurement."""

    def __init__(self, model: Any, label: str, train: Prompts, test: Prompts, search: CircuitSearch):
        self.model, self.label, self.test, self.search = model, label, test, search
        self.settings: dict[str, Any] = {"steps": search.steps, "through_gates": search.through_gates}
        places = {name for row in test.places for name in row}
        self.scores: RoleScores = role_scores(model, train, places=places, ablation=self._ablation, **self.settings)
        met, slots = int(self.scores.met.sum()), self.scores.met.size
        self.budgets = edge_budgets(met, search.points, slots=slots)

    @property
    def _ablation(self) -> Any:
        return self.search.ablation

    def curves(self, *, own: bool) -> dict[str, AttentionCurve]:
        """Its curve, and those of its controls, which have half or a third of the budgets."""
        how: Any = self.search.how
        found = {self.label: self._curve(how, self.budgets, complements=self.search.complements)}
        if self.search.controls and self.label != "control":
            other = "signed" if how == "absolute" else "absolute"
            found[f"{self.label}, {other}"] = self._curve(other, _thinned(self.budgets, 2))
            found[f"{self.label}, random"] = self._curve("random", _thinned(self.budgets, 3))
        if own:
            ranks = own_ranks(how=how, **self.settings)
            live = found[self.label].all_edges
            budgets = edge_budgets(live, max(self.search.points // 2, 2), slots=self.scores.met.size)
            name = f"{self.label}, own"
            found[name] = attention_curve(
                self.model, self.test, ranks, budgets, how="own", ablation=self._ablation, size=8
            )
        return found

    def circuit(self, found: AttentionCurve, level: float = 0.9) -> list[str]:
        """The best role edges of the first measured circuit that reaches this level."""
        index, how = found.index_at(level), self.search.how
        if index is None:
            return []
        count = min(int(found.budgets[index]), NAMED)
        return self.scores.names(self.scores.order(how, self.search.seed)[:count])  # type: ignore[arg-type]

    def _curve(self, how: Any, budgets: list[int], *, complements: bool = False) -> AttentionCurve:
        ranks = self.scores.ranks(self.test, how, self.search.seed)
        choices: dict[str, Any] = {"how": how, "ablation": self._ablation, "complements": complements}
        return attention_curve(self.model, self.test, ranks, budgets, **choices)


def _thinned(budgets: list[int], every: int) -> list[int]:
    """Every second or third budget, and all edges."""
    return [*budgets[:-1:every], budgets[-1]]


def _check(search: CircuitSearch) -> None:
    """Refuse what attention edges do not have."""
    kinds = {
        "method": (search.method, ("eap-ig",)),
        "ablation": (search.ablation, ("counterfactual", "zero")),
        "how": (search.how, ("absolute", "signed")),
        "gim": (search.gim, (False,)),
        "nodes": (search.nodes, (False,)),
        "split": (search.split, (True,)),
        "key_readers": (search.key_readers, ("group",)),
        "grid": (search.grid, ("log",)),
        "memory": (search.memory, (None,)),
    }
    for name, (value, allowed) in kinds.items():
        if value not in allowed:
            hint = f"one of {', '.join(map(str, allowed))}"
            raise RecipeError(f"explain attention edges: {name}={value!r}", "not there for attention edges", hint)


def _ratio(dense: float, other: float) -> float:
    return dense / max(other, 1e-9) if np.isfinite(dense) or np.isfinite(other) else float("nan")


def _finite(x: float) -> float | None:
    return x if np.isfinite(x) else None
