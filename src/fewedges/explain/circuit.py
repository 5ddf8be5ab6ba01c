"""Explained effect against number of edges: nested circuits of one ranking, measured exactly, and read off.

    f(C) = (m(C) - m(empty)) / (m(full) - m(empty))          explained effect; means over prompts before the ratio

Edges are counted after dead ends are pruned. `edges_at(0.9)` is where f first reaches 0.9, between two circuits
interpolated linearly in f over log edges. CPR is the area under f, CMD the area under |1 - f|, over the share of
edges kept, by the trapezoid rule from the smallest circuit on (MIB, Mueller et al. 2025, arXiv:2504.13151).
Necessity is the effect lost when the circuit's edges alone are ablated: 1 - f(all edges but C).

Shapes: K circuit, B prompt, J source, I destination.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from fewedges.errors import RecipeError
from fewedges.explain.ablation import Ablation
from fewedges.explain.evaluate import Measured, evaluate
from fewedges.explain.hooks import Wiring
from fewedges.explain.select import How, budget_grid, nested, prune, ranking
from fewedges.explain.tasks.prompts import Prompts

LEVELS = (0.5, 0.8, 0.9, 0.95)


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """K nested circuits of one model on B prompts, from few edges to all."""

    all_edges: int
    """Edges of the graph."""
    ablation: str
    how: str
    budgets: Int[np.ndarray, "K"]
    """Edges asked for."""
    edges: Int[np.ndarray, "K"]
    """Edges left after pruning dead ends."""
    heads: Int[np.ndarray, "K"]
    """Attention heads among them."""
    mlps: Int[np.ndarray, "K"]
    metric: Float[np.ndarray, "K B"]
    kl: Float[np.ndarray, "K B"]
    correct: Bool[np.ndarray, "K B"]
    full: Float[np.ndarray, "B"]
    empty: Float[np.ndarray, "B"]
    without: Float[np.ndarray, "K B"] | None = None
    """The metric of the complements; None if they were not run."""

    @property
    def explained(self) -> Float[np.ndarray, "K"]:
        """f of every circuit: sufficiency."""
        return self._share(self.metric)

    @property
    def necessity(self) -> Float[np.ndarray, "K"] | None:
        """1 - f of every complement."""
        return None if self.without is None else 1 - self._share(self.without)

    @property
    def accuracy(self) -> Float[np.ndarray, "K"]:
        """Share of prompts each circuit gets right."""
        return self.correct.mean(1)

    @property
    def cpr(self) -> float:
        """Area under f over the share of edges asked for: larger is better, above 1 is possible."""
        return float(np.trapezoid(self.explained, self.budgets / self.all_edges))

    @property
    def cmd(self) -> float:
        """Area under |1 - f|: 0 is best."""
        return float(np.trapezoid(np.abs(1 - self.explained), self.budgets / self.all_edges))

    def edges_at(self, level: float = 0.9) -> float:
        """Edges at which f first reaches this level; inf if it never does."""
        return self._crossing(level, self.edges)

    def heads_at(self, level: float = 0.9) -> float:
        """Attention heads in the circuit there."""
        return self._crossing(level, self.heads)

    def necessity_at(self, level: float = 0.9) -> float | None:
        """The effect lost when the first circuit that reaches this level is cut out of the whole model.

        None where complements were not run, or where no circuit reaches the level.
        """
        index, lost = self.index_at(level), self.necessity
        return None if index is None or lost is None else float(lost[index])

    def index_at(self, level: float = 0.9) -> int | None:
        """The first circuit that reaches this level."""
        reached = np.flatnonzero(self.explained >= level)
        return int(reached[0]) if len(reached) else None

    def interval(
        self, value: Callable[["Curve"], float], *, samples: int = 1000, share: float = 0.95, seed: int = 0
    ) -> tuple[float, float]:
        """Bootstrap interval of a number read off the curve, prompts drawn with replacement."""
        draw = np.random.default_rng(seed)
        rows = draw.integers(len(self.full), size=(samples, len(self.full)))
        found = np.array([value(self.of(some)) for some in rows])
        low, high = np.quantile(found, [(1 - share) / 2, (1 + share) / 2], method="nearest")
        return float(low), float(high)

    def of(self, rows: Sequence[int] | Int[np.ndarray, "N"]) -> "Curve":
        """The curve over some of the prompts, repeats allowed."""
        rows = np.asarray(rows)
        columns = {name: getattr(self, name)[:, rows] for name in ("metric", "kl", "correct")}
        without = None if self.without is None else self.without[:, rows]
        return replace(self, **columns, full=self.full[rows], empty=self.empty[rows], without=without)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for json."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: x.tolist() if isinstance(x, np.ndarray) else x for name, x in plain.items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Curve":
        """The curve that `to_dict` wrote."""
        kept: dict[str, Any] = {name: np.array(x) if isinstance(x, list) else x for name, x in data.items()}
        return cls(**kept)

    def __str__(self) -> str:
        rows = [f"{'edges':>8} {'heads':>6} {'explained':>10} {'KL':>8} {'accuracy':>9}"]
        numbers = zip(self.edges, self.heads, self.explained, self.kl.mean(1), self.accuracy, strict=True)
        rows += [f"{e:8d} {h:6d} {f:10.3f} {kl:8.3g} {a:9.3f}" for e, h, f, kl, a in numbers]
        at = ", ".join(f"{level}: {self.edges_at(level):.4g}" for level in LEVELS)
        return "\n".join([*rows, f"edges at explained effect {at} (of {self.all_edges:,}; {self.ablation} ablation)"])

    def _share(self, metric: Float[np.ndarray, "K B"]) -> Float[np.ndarray, "K"]:
        return (metric.mean(1) - self.empty.mean()) / (self.full.mean() - self.empty.mean())

    def _crossing(self, level: float, counts: Int[np.ndarray, "K"]) -> float:
        """`counts` where f first reaches the level, linear in f between circuits, over the logarithm of counts."""
        last, f = self.index_at(level), self.explained
        if last is None:
            return float("inf")
        if last == 0 or f[last] == f[last - 1]:
            return float(counts[last])
        part = (level - f[last - 1]) / (f[last] - f[last - 1])
        low, high = np.log(np.maximum(counts[last - 1 : last + 1], 1))
        return float(min(np.exp(low + part * (high - low)), counts[last]))


def curve(
    wiring: Wiring,
    prompts: Prompts,
    scores: Float[np.ndarray, "J I"],
    *,
    how: How = "absolute",
    budgets: Sequence[int] | None = None,
    ablation: Ablation = "counterfactual",
    complements: bool = False,
    reference: Prompts | None = None,
    seed: int = 0,
    options: dict[str, Any] | None = None,
    memory: int | None = None,
) -> Curve:
    """Rank edges by `scores` (see `select.ranking`), prune and measure the circuits of all budgets, exactly.

    Without `budgets`: 20 from 10 edges to all, evenly on a log axis. `complements` also measures all edges but the
    circuit's. RecipeError if the model does not do the task: the full metric equals the empty one.
    """
    graph = wiring.graph
    asked = np.array(budget_grid(graph) if budgets is None else sorted(budgets))
    order = ranking(graph, scores, how, seed)
    masks = np.stack([prune(graph, mask) for mask in nested(graph, order, asked.tolist())])
    choices: dict[str, Any] = {"ablation": ablation, "reference": reference, "seed": seed, "options": options}
    return measure_masks(wiring, prompts, masks, asked, how=how, complements=complements, memory=memory, **choices)


def measure_masks(
    wiring: Wiring,
    prompts: Prompts,
    masks: Bool[np.ndarray, "K J I"],
    budgets: Int[np.ndarray, "K"] | None = None,
    *,
    how: str,
    complements: bool = False,
    **settings: Any,
) -> Curve:
    """Measure given circuits, from small to large; `budgets`: by default their sizes; `settings`: of `evaluate`."""
    graph, sizes = wiring.graph, masks.sum((1, 2))
    measured = evaluate(wiring, prompts, masks, **settings)
    _check_effect(prompts, measured)
    without = evaluate(wiring, prompts, graph.real & ~masks, **settings).metric if complements else None
    used, is_head = graph.used(masks), graph.is_head()
    return Curve(
        all_edges=graph.edges,
        ablation=settings.get("ablation", "counterfactual"),
        how=how,
        budgets=sizes if budgets is None else budgets,
        edges=sizes,
        heads=used[:, is_head].sum(1),
        mlps=used[:, ~is_head].sum(1) - used[:, 0],
        metric=measured.metric,
        kl=measured.kl,
        correct=measured.correct,
        full=measured.full,
        empty=measured.empty,
        without=without,
    )


def circuit_mask(
    wiring: Wiring, scores: Float[np.ndarray, "J I"], edges: int, *, how: How = "absolute", seed: int = 0
) -> Bool[np.ndarray, "J I"]:
    """The pruned circuit of one budget."""
    graph = wiring.graph
    return prune(graph, nested(graph, ranking(graph, scores, how, seed), [edges])[0])


def _check_effect(prompts: Prompts, measured: Measured) -> None:
    if not abs(measured.full.mean() - measured.empty.mean()) > 1e-9:
        found = f"the full model's metric is the ablated model's, {measured.full.mean():.3g}"
        raise RecipeError(f"explained effect on {prompts.name}", found, "another ablation, or a task the model does")
