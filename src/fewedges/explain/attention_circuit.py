"""Explained effect against number of attention edges: how many token readings carry a task.

The component graph (`graph`) asks which head talks to which; it has as many edges in a sparse model as in a dense one.
Here an edge is one token reading another in one head (`attention_masking`). The first n edges of a ranking
(`attention_ranking`) are kept, and measured exactly with all other edges ablated, embeddings and MLPs alive:

    f(C) = (metric(C) - metric(no edge)) / (metric(all edges) - metric(no edge))

The size of a circuit is the mean number of live edges that it keeps of a prompt, its heads the mean number of heads
with such an edge.

Shapes: K circuit, B prompt, L layer, H head, Q query, K key, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewedges.errors import DataError
from fewedges.explain.attention_masking import EdgeAblation, Pair
from fewedges.explain.attention_ranking import Ranks, pairs
from fewedges.explain.circuit import LEVELS, Curve
from fewedges.explain.tasks.prompts import Prompts


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionCurve(Curve):
    """K nested circuits of attention edges. `edges` and `heads` are means over prompts, `all_edges` that of live ones.

    `budgets`: edges asked for, of the roles or of each prompt; the last one is all. `mlps`: 0, none is ever removed.
    """

    edges: Float[np.ndarray, "K"]
    heads: Float[np.ndarray, "K"]
    kept: Int[np.ndarray, "K B"]
    """Live edges kept."""
    touched: Int[np.ndarray, "K B"]
    """Heads with a kept edge."""
    empty_kl: Float[np.ndarray, "B"]
    """KL(model || no edge), in nats."""

    def edges_at(self, level: float = 0.9) -> float:
        """Edges of a prompt at which f first reaches this level; inf if it never does."""
        return self._crossing(level, self.kept.sum(1)) / len(self.full)

    def heads_at(self, level: float = 0.9) -> float:
        """Heads with an edge of the circuit there."""
        return self._crossing(level, self.touched.sum(1)) / len(self.full)

    @property
    def likeness(self) -> Float[np.ndarray, "K"]:
        """1 - KL(model || circuit) / KL(model || no edge), means first: unlike f it cannot overshoot."""
        return 1 - self.kl.mean(1) / self.empty_kl.mean()

    def like_at(self, level: float = 0.9) -> float:
        """Edges at which the likeness first reaches this level; inf if it never does."""
        alike = replace(self, metric=np.tile(self.likeness[:, None], len(self.full)))
        ends = {"full": np.ones(len(self.full)), "empty": np.zeros(len(self.full))}
        return replace(alike, **ends).edges_at(level)

    def stays_at(self, level: float = 0.9) -> float:
        """Edges from which on f stays at this level or above, whatever smaller circuits reached by chance."""
        below = np.flatnonzero(self.explained < level)
        if not len(below):
            return float(self.edges[0])
        if (start := int(below[-1])) == len(self.edges) - 1:
            return float("inf")
        rows = slice(start, start + 2)
        names = ("budgets", "edges", "heads", "mlps", "metric", "kl", "correct", "kept", "touched")
        return replace(self, without=None, **{name: getattr(self, name)[rows] for name in names}).edges_at(level)

    def of(self, rows: Sequence[int] | Int[np.ndarray, "N"]) -> "AttentionCurve":
        """The curve over some of the prompts, repeats allowed."""
        rows = np.asarray(rows)
        names = ("metric", "kl", "correct", "kept", "touched")
        some = {name: getattr(self, name)[:, rows] for name in names}
        without = None if self.without is None else self.without[:, rows]
        counts = {"edges": some["kept"].mean(1), "heads": some["touched"].mean(1)}
        return replace(
            self,
            **some,
            **counts,
            without=without,
            **{n: getattr(self, n)[rows] for n in ("full", "empty", "empty_kl")},
        )

    @property
    def cpr(self) -> float:
        """Area under f over the share of live edges kept."""
        return float(np.trapezoid(self.explained, self.edges / self.edges[-1]))

    @property
    def cmd(self) -> float:
        """Area under |1 - f|: 0 is best."""
        return float(np.trapezoid(np.abs(1 - self.explained), self.edges / self.edges[-1]))

    @property
    def falls(self) -> float:
        """How far f falls below what a smaller circuit reached, before it first comes to 0.95: 0 if it only grows."""
        end = self.index_at(0.95)
        rising = self.explained[: len(self.explained) if end is None else end + 1]
        return float((np.maximum.accumulate(rising) - rising).max())

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "AttentionCurve":
        """The curve that `to_dict` wrote."""
        names = {field.name for field in fields(cls)}
        kept: dict[str, Any] = {name: np.array(x) if isinstance(x, list) else x for name, x in data.items()}
        return cls(**{name: x for name, x in kept.items() if name in names})

    def __str__(self) -> str:
        rows = [f"{'edges':>10} {'heads':>7} {'explained':>10} {'KL':>8} {'accuracy':>9}"]
        numbers = zip(self.edges, self.heads, self.explained, self.kl.mean(1), self.accuracy, strict=True)
        rows += [f"{e:10.1f} {h:7.1f} {f:10.3f} {kl:8.3g} {a:9.3f}" for e, h, f, kl, a in numbers]
        at = ", ".join(f"{level}: {self.edges_at(level):.4g}" for level in LEVELS)
        end = f"(of {self.all_edges:,} live ones a prompt; {self.ablation} ablation)"
        return "\n".join([*rows, f"attention edges at explained effect {at} {end}"])


def attention_curve(
    model: Any,
    prompts: Prompts,
    ranks: Ranks,
    budgets: Sequence[int],
    *,
    how: str = "signed",
    ablation: EdgeAblation | str = "counterfactual",
    complements: bool = False,
    size: int = 16,
) -> AttentionCurve:
    """Measure the circuits of the first n edges of a ranking, exactly, for every n of `budgets`.

    `complements` also measures all live edges but the circuit's. DataError where attention carries nothing: the
    metric without any edge is that of the model.
    """
    budgets, parts = sorted(budgets), []
    with torch.no_grad():
        for rows, both in pairs(model, prompts, ablation, size):
            parts.append(_measure(both, ranks(both, rows), budgets, complements))
    columns: dict[str, Any] = {name: np.concatenate([part[name] for part in parts], -1) for name in parts[0]}
    if not abs(columns["full"].mean() - columns["empty"].mean()) > 1e-9:
        found = f"the metric without any edge is the model's own, {columns['full'].mean():.3g}"
        raise DataError(f"attention edges of {prompts.name}", found, "a task whose answer is read from other tokens")
    live, without = columns.pop("live"), columns.pop("without", None)
    edges, heads = columns["kept"].mean(1), columns["touched"].mean(1)
    sizes = {
        "all_edges": round(float(live.mean())),
        "edges": edges,
        "heads": heads,
        "mlps": np.zeros(len(budgets), dtype=int),
    }
    return AttentionCurve(ablation=ablation, how=how, budgets=np.array(budgets), without=without, **sizes, **columns)


def _measure(both: Pair, ranks: Tensor, budgets: list[int], complements: bool) -> dict[str, np.ndarray]:
    """One chunk of prompts: what every circuit does and how large it is, (K, B) or (B,)."""
    nothing = torch.zeros_like(both.live, dtype=both.logits.dtype)
    found: dict[str, list[Any]] = {name: [] for name in ("metric", "kl", "correct", "kept", "touched", "without")}
    for budget in budgets:
        kept = both.live & (ranks < budget)
        logits = both.run(kept.to(nothing.dtype))
        found["metric"].append(both.metric(logits))
        found["kl"].append(_kl(both.logits, logits))
        found["correct"].append(both.prompts.correct(logits))
        found["kept"].append(kept.sum((0, 2, 3, 4)))
        found["touched"].append(kept.any((3, 4)).sum((0, 2)))
        if complements:
            found["without"].append(both.metric(both.run((both.live & ~kept).to(nothing.dtype))))
    empty = both.run(nothing)
    ends = {"full": both.metric(both.logits), "empty": both.metric(empty), "empty_kl": _kl(both.logits, empty)}
    columns = {name: torch.stack(rows) for name, rows in found.items() if rows} | ends
    columns["live"] = both.live.sum((0, 2, 3, 4))
    exact = {name: x.double() if x.is_floating_point() else x for name, x in columns.items()}
    return {name: x.cpu().numpy() for name, x in exact.items()}


def _kl(model: Float[Tensor, "B V"], circuit: Float[Tensor, "B V"]) -> Float[Tensor, "B"]:
    """KL(model || circuit), in nats."""
    whole, part = (torch.log_softmax(x.float(), -1) for x in (model, circuit))
    return (whole.exp() * (whole - part)).sum(-1)
