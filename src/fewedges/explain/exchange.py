"""Exchange circuits with EAP-IG and the MIB circuit track: their json, read and written.

    {"cfg": {n_layers, n_heads, parallel_attn_mlp, d_model},
     "nodes": {"a0.h0": {"in_graph": true}, ...},  "edges": {"input->a0.h0<q>": {"score": 0.1, "in_graph": true}, ...}}

Their graph reads keys and values once per query head. A model with fewer key/value heads is wired by
`wire(..., key_readers="head")` for exchange, or a circuit found per group is written with `per_head`. Layout:
hannamw/EAP-IG 2.0, `Graph.to_json`.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from fewedges.errors import DataError, RecipeError
from fewedges.explain.graph import Graph
from fewedges.store import write_text


@dataclass(frozen=True, kw_only=True, eq=False)
class Exchanged:
    """A circuit as files carry it."""

    graph: Graph
    scores: Float[np.ndarray, "J I"]
    mask: Bool[np.ndarray, "J I"]
    width: int
    """D, which their files state."""


def per_head(circuit: Exchanged) -> Exchanged:
    """The same circuit with keys and values read once per query head.

    An edge into a key/value group becomes one into every query head of it, all kept or all ablated: the circuit
    computes what it did. Each carries an equal part of the group's score, so that sums stay what they were; scores of
    their own come from `key_readers="head"`.
    """
    old = circuit.graph
    share = old.heads // old.key_readers
    if share == 1:
        return circuit
    new = replace(old, key_readers=old.heads)
    columns, parts = [], []
    for layer in range(old.layers):
        queries = [old.reader(layer, "q", head) for head in range(old.heads)]
        shared = [old.reader(layer, role, head // share) for role in "kv" for head in range(old.heads)]
        columns += [*queries, *shared, old.mlp_reader(layer)]
        parts += [1.0] * len(queries) + [1 / share] * len(shared) + [1.0]
    columns, parts = [*columns, old.logits], np.array([*parts, 1.0])
    return Exchanged(
        graph=new, scores=circuit.scores[:, columns] * parts, mask=circuit.mask[:, columns], width=circuit.width
    )


def write_eap_ig(path: Path | str, circuit: Exchanged) -> None:
    """Write scores and circuit as EAP-IG's json. RecipeError for a graph of another kind than theirs."""
    graph = circuit.graph
    if not graph.split or graph.key_readers != graph.heads:
        found = "a graph without the q/k/v split" if not graph.split else "key/value inputs per key/value head"
        raise RecipeError(
            f"write {path}", found, 'wire(model, anatomy, key_readers="head")' if graph.split else "split=True"
        )
    if not np.isfinite(circuit.scores).all():
        raise RecipeError(f"write {path}", "scores that are not finite", "finite scores")
    entered = np.any(circuit.mask & graph.real, axis=0)  # (I,)
    used = graph.used(circuit.mask) | np.any(graph.feeds & entered[:, None], axis=0)
    nodes = {name: {"in_graph": bool(used[j])} for j, name in enumerate(graph.source_names)}
    edges = {
        graph.name(j, i): {"score": float(circuit.scores[j, i]), "in_graph": bool(circuit.mask[j, i])}
        for j, i in np.argwhere(graph.real)
    }
    config = {
        "n_layers": graph.layers,
        "n_heads": graph.heads,
        "parallel_attn_mlp": graph.parallel,
        "d_model": circuit.width,
    }
    write_text(
        Path(path), json.dumps({"cfg": config, "nodes": {**nodes, "logits": {"in_graph": True}}, "edges": edges})
    )


def read_eap_ig(path: Path | str) -> Exchanged:
    """Read EAP-IG's json; every edge of the graph must be there once. DataError for anything else."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        config, edges = data["cfg"], data["edges"]
        _check_count(config, len(edges))
        graph = Graph(
            layers=_whole(config["n_layers"]),
            heads=_whole(config["n_heads"]),
            key_readers=_whole(config["n_heads"]),
            parallel=bool(config["parallel_attn_mlp"]),
        )
        scores, mask = np.zeros(graph.real.shape), np.zeros(graph.real.shape, dtype=bool)
        for name, facts in edges.items():
            index = graph.index(name)
            scores[index], mask[index] = _number(facts["score"]), _truth(facts["in_graph"])
        width = _whole(config["d_model"])
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:  # RecipeError is a ValueError
        raise DataError(f"read {path}", f"no EAP-IG circuit ({error})", "a file that Graph.to_json wrote") from error
    return Exchanged(graph=graph, scores=scores, mask=mask, width=width)


def _check_count(config: dict[str, Any], found: int) -> None:
    """As many edges as sizes promise, by formula: before anything of these sizes is made."""
    layers, heads = _whole(config["n_layers"]), _whole(config["n_heads"])
    before = layers + (heads + 1) * layers * (layers - 1) // 2  # sources before the attention of each layer, summed
    same_layer = 0 if config["parallel_attn_mlp"] else layers * heads
    expected = (3 * heads + 1) * before + same_layer + 1 + layers * (heads + 1)
    if found != expected:
        raise ValueError(f"{found} of {expected} edges")


def _whole(x: Any) -> int:
    if type(x) is not int or not 1 <= x <= 10**6:
        raise ValueError(f"{x!r} is no size")
    return x


def _number(x: Any) -> float:
    if isinstance(x, bool) or not isinstance(x, int | float) or not math.isfinite(x):
        raise ValueError(f"{x!r} is no score")
    return float(x)


def _truth(x: Any) -> bool:
    if not isinstance(x, bool):
        raise ValueError(f"{x!r} is neither true nor false")
    return x
