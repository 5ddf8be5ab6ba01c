"""Which attention edges to keep: scores of edges by the roles of their tokens, or of each prompt's own edges, in order.

Over prompts, edges are named by role, (layer, head, query place, key place): "S2 reads S1 in a7.h3". A role's score is
the mean over prompts, 0 where a prompt lacks the edge (`attention_masking.edge_scores`). `signed` ranks by what helps,
`absolute` by what matters either way, `random` is the control. Role edges never met in the search come last of all.

Shapes: B prompt, L layer, H head, P place (role), Q query, K key, T token, N edge.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fewedges.errors import RecipeError
from fewedges.explain.attention_masking import EdgeAblation, Pair, edge_scores, pair
from fewedges.explain.tasks.prompts import Prompts

Order = Literal["signed", "absolute", "random"]
Ranks = Callable[[Pair, list[int]], Int[Tensor, "L B H Q K"]]
"""Of the edges of some prompts (their pair of runs, their numbers), the place in the ranking, from 0."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RoleScores:
    """Scores of a model's attention edges by the roles of their tokens, over some prompts."""

    places: tuple[str, ...]
    total: Float[np.ndarray, "L H P P"]
    """Mean over prompts, 0 where a prompt lacks the edge; [layer, head, query, key]."""
    met: Bool[np.ndarray, "L H P P"]
    """Live in at least one of the prompts."""

    def order(self, how: Order | str = "signed", seed: int = 0) -> Int[np.ndarray, "N"]:
        """All slots of (L, H, P, P), flat, from the most to the least worth keeping; those never met come last."""
        check_order(how)
        met = np.flatnonzero(self.met)
        if how == "random":
            return np.concatenate([np.random.default_rng(seed).permutation(met), np.flatnonzero(~self.met)])
        worth = self.total.ravel()[met]
        order = np.argsort(-(worth if how == "signed" else np.abs(worth)), kind="stable")
        return np.concatenate([met[order], np.flatnonzero(~self.met)])

    def names(self, slots: Int[np.ndarray, "N"]) -> list[str]:
        """Role edges in words."""
        found = zip(*np.unravel_index(slots, self.met.shape), strict=True)
        return [f"{self.places[q]} reads {self.places[k]} in a{layer}.h{head}" for layer, head, q, k in found]

    def ranks(self, prompts: Prompts, how: Order | str = "signed", seed: int = 0) -> Ranks:
        """The place of every token edge of other prompts in this ranking."""
        slots, known = np.empty(self.met.size, dtype=np.int64), {name: n for n, name in enumerate(self.places)}
        slots[self.order(how, seed)] = np.arange(self.met.size)
        table = torch.from_numpy(slots.reshape(self.met.shape))

        def look_up(both: Pair, rows: list[int]) -> Int[Tensor, "L B H Q K"]:
            found = torch.full(both.live.shape, self.met.size - 1)
            for column, row in enumerate(rows):
                at = torch.tensor([known[name] for name in prompts.places[row]])
                found[:, column, :, : len(at), : len(at)] = table[:, :, at[:, None], at]
            return found.to(both.live.device)

        return look_up


def role_scores(
    model: Any,
    prompts: Prompts,
    *,
    steps: int = 8,
    ablation: EdgeAblation | str = "counterfactual",
    through_gates: bool = False,
    places: Iterable[str] = (),
    size: int = 8,
) -> RoleScores:
    """Score every attention edge on these prompts and gather the scores by role, `size` prompts at a time.

    `places`: all roles to leave room for, those of prompts to be measured later included.
    """
    names = tuple(sorted({name for row in prompts.places for name in row} | set(places)))
    known, total, met = {name: n for n, name in enumerate(names)}, None, None
    for rows, both in pairs(model, prompts, ablation, size):
        found = edge_scores(both, steps, through_gates=through_gates)
        if total is None or met is None:
            total = torch.zeros(len(found), found.shape[2], len(names), len(names), dtype=torch.float64)
            met = torch.zeros(total.shape, dtype=torch.bool)
        for column, row in enumerate(rows):
            at = torch.tensor([known[name] for name in prompts.places[row]])
            one_hot = torch.nn.functional.one_hot(at, len(names)).double()  # (T, P)
            some, live = (x[:, column, :, : len(at), : len(at)].double().cpu() for x in (found, both.live))
            total += one_hot.T @ some @ one_hot
            met |= one_hot.T @ live @ one_hot > 0
    assert total is not None  # there is at least one prompt
    assert met is not None
    return RoleScores(places=names, total=(total / len(prompts)).numpy(), met=met.numpy())


def own_ranks(steps: int = 8, how: Order | str = "signed", *, through_gates: bool = False) -> Ranks:
    """Rank the edges of each prompt by its own scores: scored on the very prompt that is measured."""
    check_order(how, random=False)

    def rank(both: Pair, rows: list[int]) -> Int[Tensor, "L B H Q K"]:
        scores = edge_scores(both, steps, through_gates=through_gates)
        worth = torch.where(both.live, scores if how == "signed" else scores.abs(), -torch.inf)
        order = torch.argsort(worth.movedim(1, 0).flatten(1), dim=1, descending=True, stable=True)  # (B, N)
        return torch.argsort(order, dim=1).view(worth.movedim(1, 0).shape).movedim(0, 1)

    return rank


def pairs(model: Any, prompts: Prompts, ablation: EdgeAblation | str, size: int) -> Iterator[tuple[list[int], Pair]]:
    """The prompts in chunks: their numbers, and their whole runs."""
    for start in range(0, len(prompts), size):
        rows = list(range(start, min(start + size, len(prompts))))
        yield rows, pair(model, prompts.subset(rows), ablation)


def check_order(how: str, *, random: bool = True) -> None:
    """RecipeError for a ranking that there is not."""
    known = [name for name in get_args(Order) if random or name != "random"]
    if how not in known:
        raise RecipeError("attention edges", f"how={how!r}", f"one of {', '.join(known)}")


def edge_budgets(edges: int, points: int = 20, smallest: int = 1, *, slots: int) -> list[int]:
    """Numbers of edges from `smallest` to `edges`, evenly on a log axis, and then all there can be."""
    grid = np.geomspace(min(smallest, edges), edges, max(points - 1, 1))
    return [*sorted({round(float(n)) for n in grid} - {slots}), slots]
