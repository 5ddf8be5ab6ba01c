"""Patch edges and nodes one by one: exact effects, the slow oracle beside attribution.

The effect of an edge is what the metric loses when that edge alone carries its ablated value in the otherwise
untouched model: positive for an edge that helps. One circuit run per edge: for tiny models and spot checks.

Shapes: J source, I destination, B prompt, N edge.
"""

from typing import Any

import numpy as np
from jaxtyping import Float

from fewedges.explain.evaluate import evaluate
from fewedges.explain.hooks import Wiring
from fewedges.explain.tasks.prompts import Prompts

AT_ONCE = 64
"""Masks built at a time."""


def edge_effects(
    wiring: Wiring, prompts: Prompts, edges: Any = None, *, alone: bool = False, **options: Any
) -> Float[np.ndarray, "J I"]:
    """Mean over prompts of metric(full) - metric(without the edge); 0 for pairs that were not asked for or are no edge.

    `edges` are (source, destination) pairs, None for all. With `alone`, the mirror image: metric(only this edge) -
    metric(empty). Other options are those of `evaluate`.
    """
    graph = wiring.graph
    pairs = np.argwhere(graph.real) if edges is None else np.array([*edges])
    effects = np.zeros(graph.real.shape)
    for start in range(0, len(pairs), AT_ONCE):
        some = pairs[start : start + AT_ONCE]
        masks = np.repeat(np.zeros_like(graph.real)[None] if alone else graph.real[None], len(some), axis=0)
        masks[np.arange(len(some)), some[:, 0], some[:, 1]] = alone
        effects[some[:, 0], some[:, 1]] = _effects(wiring, prompts, masks, alone, options)
    return effects * graph.real


def node_effects(wiring: Wiring, prompts: Prompts, **options: Any) -> Float[np.ndarray, "J"]:
    """Mean over prompts of metric(full) - metric(all edges out of the node ablated)."""
    graph = wiring.graph
    masks = np.repeat(graph.real[None], graph.sources, axis=0)
    masks[np.arange(graph.sources), np.arange(graph.sources)] = False
    starts = range(0, graph.sources, AT_ONCE)
    return np.concatenate([_effects(wiring, prompts, masks[n : n + AT_ONCE], False, options) for n in starts])


def _effects(wiring: Wiring, prompts: Prompts, masks: np.ndarray, alone: bool, options: dict[str, Any]) -> np.ndarray:
    measured = evaluate(wiring, prompts, masks, **options)
    if alone:
        return measured.metric.mean(1) - measured.empty.mean()
    return measured.full.mean() - measured.metric.mean(1)
