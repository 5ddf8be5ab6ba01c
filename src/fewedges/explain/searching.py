"""One model's search: rank edges by the method that is asked for, cut circuits, measure them and their controls.

eap, eap-ig, ...   gradients (`attribution`); nodes by the sum over the edges out of each
exact              every edge patched on its own (`patching`), and every node: small models only
learned            the probability that a learned gate stays open (`mask`): sees no answers, only the model's output
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float

from fewedges.errors import RecipeError
from fewedges.explain.attribution import Scores, attribute
from fewedges.explain.circuit import Curve, curve, measure_masks
from fewedges.explain.exchange import Exchanged, per_head, write_eap_ig
from fewedges.explain.graph import Graph
from fewedges.explain.hooks import Wiring, wire
from fewedges.explain.mask import expected_open, learn_mask
from fewedges.explain.patching import edge_effects, node_effects
from fewedges.explain.select import How, budget_grid, mib_budgets, nested, node_circuits, prune, ranking
from fewedges.explain.tasks.prompts import Prompts
from fewedges.model.loading import Loaded
from fewedges.recipes import CircuitSearch
from fewedges.sparsify.attention.interface import GatePass, is_gated

MOST_RUNS = 500_000
"""Exact patching runs a circuit on a prompt this often at most: two minutes for the addition model on one CPU core."""
RESAMPLES = 100
"""Bootstrap samples of a ranking: each ranks all edges again."""


class Ranked(NamedTuple):
    """What a method says of edges and nodes."""

    edges: Float[np.ndarray, "J I"]
    nodes: Float[np.ndarray, "J"] | None
    """None: the method says nothing of nodes."""
    scores: Scores | None
    """Prompt by prompt, where the method has that."""


@contextmanager
def wired(loaded: Loaded, search: CircuitSearch) -> Iterator[Wiring]:
    """The circuit graph of a model, its weights frozen meanwhile."""
    learning = [parameter for parameter in loaded.model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield wire(loaded.model, loaded.anatomy, split=search.split, key_readers=search.key_readers)
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def rank(wiring: Wiring, prompts: Prompts, search: CircuitSearch) -> Ranked:
    """Rank edges and nodes on these prompts. RecipeError for exact patching of a graph that is too large."""
    common: dict[str, Any] = {"ablation": search.ablation, "seed": search.seed, "memory": search.memory}
    if search.method == "exact":
        _check_runs(wiring.graph, prompts, search)
        edges = np.zeros(wiring.graph.real.shape) if search.nodes else edge_effects(wiring, prompts, **common)
        return Ranked(edges, node_effects(wiring, prompts, **common), None)
    through = search.through_gates and is_gated(wiring.model)
    common["options"] = {"gate_pass": GatePass(straight_through=True)} if through else None
    if search.method == "learned":
        learned = learn_mask(wiring, prompts, density=search.mask_density, steps=search.mask_steps, **common)
        return Ranked(expected_open(torch.from_numpy(learned)).numpy() * wiring.graph.real, None, None)
    scores = attribute(wiring, prompts, search.method, steps=search.steps, gim=search.gim, **common)
    return Ranked(scores.edges, scores.nodes, scores)


def _check_runs(graph: Graph, prompts: Prompts, search: CircuitSearch) -> None:
    circuits = graph.sources if search.nodes else graph.edges + graph.sources
    if circuits * len(prompts) > MOST_RUNS:
        what = f"{circuits:,} edges and nodes" if not search.nodes else f"{circuits:,} nodes"
        found = f"{what} x {len(prompts)} prompts are {circuits * len(prompts):,} runs, at most {MOST_RUNS:,}"
        hint = "method eap-ig, fewer prompts, or `patching.edge_effects` of a few edges"
        raise RecipeError("explain with method exact", found, hint)


class Search:
    """One model's search and measurement."""

    def __init__(self, label: str, wiring: Wiring, train: Prompts, test: Prompts, search: CircuitSearch):
        self.label, self.wiring, self.train, self.test, self.search = label, wiring, train, test, search
        self.ranked = rank(wiring, train, search)

    def curves(self) -> dict[str, Curve]:
        """Its curve, and those of its controls. A learned mask sees no answers, so none can be shuffled for it."""
        search, label = self.search, self.label
        found = {label: self._curve(self.ranked, search.how, complements=search.complements)}
        if search.controls and label in ("dense", "sparse"):
            found[f"{label}, random"] = self._curve(self.ranked, "random")
            if search.method != "learned":
                shuffled = rank(self.wiring, self.train.shuffled(search.seed), search)
                found[f"{label}, shuffled"] = self._curve(shuffled, search.how)
        return found

    def circuit(self, found: Curve, level: float = 0.9) -> Bool[np.ndarray, "J I"]:
        """The first measured circuit that reaches this level; no edge where none does."""
        index = found.index_at(level)
        return (
            np.zeros_like(self.wiring.graph.real) if index is None else self._masks(self.ranked, self.search.how)[index]
        )

    def ranking(self, found: Curve) -> dict[str, Any]:
        """What is known of the ranking: `nodes`, and the share of the circuit that stays when prompts are redrawn."""
        names, nodes = self.wiring.graph.source_names, self.ranked.nodes
        known: dict[str, Any] = {}
        if nodes is not None:
            known["nodes"] = dict(zip(names, map(float, nodes), strict=True))
        index = found.index_at()
        by_score = self.search.how in ("absolute", "signed") and not self.search.nodes
        if self.ranked.scores is not None and index is not None and by_score:
            known["stays"] = self._stays(self.ranked.scores, int(found.budgets[index]))
        return known

    def export(self, path: Path, found: Curve) -> Path:
        """Write all scores and the circuit as EAP-IG's json."""
        width = self.wiring.blocks[0].weight.shape[-1]
        circuit = Exchanged(graph=self.wiring.graph, scores=self.ranked.edges, mask=self.circuit(found), width=width)
        write_eap_ig(path, per_head(circuit))
        return path

    def _stays(self, scores: Scores, budget: int) -> float:
        """Mean share of the `budget` best edges that are also the best on prompts drawn with replacement."""
        graph, how = self.wiring.graph, self.search.how
        best = nested(graph, ranking(graph, scores.edges, how, self.search.seed), [budget])[0]
        drawn = (ranking(graph, x, how, self.search.seed) for x in scores.bootstrap(RESAMPLES, self.search.seed))
        return float(np.mean([best.ravel()[order[:budget]].mean() for order in drawn]))

    def _masks(self, ranked: Ranked, how: How) -> Bool[np.ndarray, "K J I"]:
        graph, search = self.wiring.graph, self.search
        if search.nodes:
            assert ranked.nodes is not None  # refused by CircuitSearch for methods without
            return node_circuits(graph, ranked.nodes, how, search.points, search.seed)
        order = ranking(graph, ranked.edges, how, search.seed)
        return np.stack([prune(graph, mask) for mask in nested(graph, order, self._budgets())])

    def _budgets(self) -> tuple[int, ...]:
        graph = self.wiring.graph
        return mib_budgets(graph) if self.search.grid == "mib" else budget_grid(graph, self.search.points)

    def _curve(self, ranked: Ranked, how: How, *, complements: bool = False) -> Curve:
        search = self.search
        choices: dict[str, Any] = {"ablation": search.ablation, "seed": search.seed, "complements": complements}
        choices["reference"] = None if search.ablation == "counterfactual" else self.train
        choices |= {"how": how, "memory": search.memory}
        if search.nodes:
            return measure_masks(self.wiring, self.test, self._masks(ranked, how), **choices)
        return curve(self.wiring, self.test, ranked.edges, budgets=self._budgets(), **choices)
