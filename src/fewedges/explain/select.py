"""Which edges to keep: rankings of a graph's edges, nested circuits cut from them, dead ends pruned.

A ranking is an order of edges, so the circuits of all budgets are its beginnings and nested by construction.
`absolute` and `signed` rank by score; `greedy` grows from the logits upward, always by the best edge that ends in a
part already reached (Hanna et al. 2024, arXiv:2403.17806); `random` is the control.

Shapes: J source, I destination, N edge, K circuit.
"""

import heapq
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from fewedges.errors import RecipeError
from fewedges.explain.graph import Graph

How = Literal["absolute", "signed", "greedy", "greedy-signed", "random"]

MIB_PERCENT = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
"""Budgets of the MIB circuit track, in percent of all edges (arXiv:2504.13151)."""


def ranking(
    graph: Graph, scores: Float[np.ndarray, "J I"], how: How = "absolute", seed: int = 0
) -> Int[np.ndarray, "N"]:
    """Order edges from the most to the least worth keeping, as flat indices into (J, I).

    All edges are ranked; `greedy` leaves out those it cannot reach from the logits. Ties go to the earlier edge.
    """
    if how not in get_args(How) or scores.shape != graph.real.shape or not np.isfinite(scores).all():
        found = f"how={how!r}, scores {scores.shape}, finite: {bool(np.isfinite(scores).all())}"
        raise RecipeError("ranking", found, f"one of {', '.join(get_args(How))}, and finite scores {graph.real.shape}")
    edges = np.flatnonzero(graph.real)
    if how == "random":
        return np.random.default_rng(seed).permutation(edges)
    worth = scores if how.endswith("signed") else np.abs(scores)
    if how.startswith("greedy"):
        return _greedy(graph, worth)
    return edges[np.argsort(-worth.ravel()[edges], kind="stable")]


def nested(graph: Graph, order: Int[np.ndarray, "N"], budgets: Sequence[int]) -> Bool[np.ndarray, "K J I"]:
    """The circuits made of the first n edges of a ranking, for every budget n; not pruned."""
    if any(n < 0 or n > graph.edges for n in budgets):
        raise RecipeError("budgets", f"{list(budgets)[:8]}", f"numbers from 0 to {graph.edges}")
    rank = np.full(graph.real.size, graph.edges + 1)
    rank[order] = np.arange(len(order))
    return np.stack([(rank < n).reshape(graph.real.shape) for n in budgets])


def prune(graph: Graph, mask: Bool[np.ndarray, "J I"]) -> Bool[np.ndarray, "J I"]:
    """Leave out dead ends: edges from parts that nothing enters, and into parts that nothing leaves.

    Under counterfactual ablation this changes no output: a part whose inputs are all ablated writes its ablated
    value, and one that is never read writes for nobody. Under other ablations it defines the circuit.
    """
    mask = mask & graph.real
    while True:
        entered = mask.any(0) @ graph.feeds  # (J,)
        entered[0] = True  # the input comes from outside
        read = mask.any(1)
        wanted = graph.feeds @ read  # (I,)
        wanted[graph.logits] = True
        smaller = mask & entered[:, None] & wanted
        if (smaller == mask).all():
            return mask
        mask = smaller


def budget_grid(graph: Graph, points: int = 20, smallest: int = 10) -> tuple[int, ...]:
    """Edge counts from `smallest` to all edges, evenly spaced on a logarithmic axis, without repeats."""
    if points < 2 or smallest < 1:
        raise RecipeError("budget grid", f"{points} points from {smallest}", "two points or more, from at least 1")
    grid = np.geomspace(min(smallest, graph.edges), graph.edges, points)
    return tuple(sorted({round(float(n)) for n in grid}))


def mib_budgets(graph: Graph) -> tuple[int, ...]:
    """The edge counts at which MIB evaluates a circuit."""
    return tuple(int(graph.edges * percent / 100) for percent in MIB_PERCENT)


def node_circuits(
    graph: Graph, scores: Float[np.ndarray, "J"], how: How = "absolute", points: int = 20, seed: int = 0
) -> Bool[np.ndarray, "K J I"]:
    """Nested circuits of whole heads and MLPs: the input, the n best of them, and every edge between these.

    n goes from 1 to all of them, evenly on a log axis; dead ends are pruned. A key or value input that several heads
    share is kept where one of them is. RecipeError for an order that nodes do not have.
    """
    if how not in ("absolute", "signed", "random") or scores.shape != (graph.sources,):
        raise RecipeError(
            "node circuits",
            f"how={how!r}, scores {scores.shape}",
            f"absolute, signed or random, a score of {graph.sources} sources",
        )
    worth = np.abs(scores) if how == "absolute" else scores
    nodes = np.arange(1, graph.sources)
    order = (
        np.random.default_rng(seed).permutation(nodes)
        if how == "random"
        else nodes[np.argsort(-worth[1:], kind="stable")]
    )
    place = np.zeros(graph.sources, dtype=int)
    place[order] = np.arange(1, graph.sources)
    sizes = {round(float(n)) for n in np.geomspace(1, len(nodes), points)}
    return np.stack([prune(graph, graph.real & (place <= n)[:, None]) for n in sorted(sizes)])


def _greedy(graph: Graph, worth: Float[np.ndarray, "J I"]) -> Int[np.ndarray, "N"]:
    heap: list[tuple[float, int]] = []
    entered = np.zeros(graph.sources, dtype=bool)
    opened = np.zeros(graph.destinations, dtype=bool)
    order: list[int] = []

    def open_up(destination: int) -> None:
        if not opened[destination]:
            opened[destination] = True
            for source in range(graph.before[destination]):
                heapq.heappush(heap, (-float(worth[source, destination]), source * graph.destinations + destination))

    open_up(graph.logits)
    while heap:
        _, edge = heapq.heappop(heap)
        order.append(edge)
        source = edge // graph.destinations
        if not entered[source]:
            entered[source] = True
            for destination in np.flatnonzero(graph.feeds[:, source]):
                open_up(int(destination))
    return np.array(order)
