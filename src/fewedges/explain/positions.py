"""Which token reads which, and which of these readings carry the task: the attention edges of prompts, scored.

An attention edge is an open gate (layer, head, query token, key token); in a dense model every causal pair is one.
What an edge is worth is what the metric loses when that edge alone is closed (how: see `closing`):

    exact      every edge is closed in a run of its own and the metric measured: the slow oracle
    gradient   the exact change of the head's output, dotted with the metric's gradient there: all edges of a prompt
               from one forward and one backward pass. Exact where all that follows is linear

Positive: the edge helps. Effects do not add up: two edges that can stand in for one another are worth little each.
The gradient correlates with exact at 0.90 (sparse SmolLM2, IOI) and 0.93 (dense; results/circuits/positions-check.log),
but misses an edge whose effect goes through a saturated softmax, such as the previous-token reading before a sure
induction head: measure those heads.
Given the edges of a circuit (`Explained.circuits`) only its heads are looked at, and `through` opens up one circuit
edge into token edges. Over many prompts, edges are named by the roles of their tokens: "S2 reads S1 in a7.h3".

Shapes: B prompt, T token, N attention edge, L layer, H head, Q query, K key.
"""

import html
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from fewedges import store
from fewedges.errors import DataError, RecipeError, StoreError
from fewedges.explain.closing import metric_without, read_edges
from fewedges.explain.tasks.prompts import Prompts
from fewedges.model.loading import Loaded
from fewedges.sparsify.attention.interface import is_gated

Method = Literal["gradient", "exact"]
SHOWN = 12  # edges that are printed
NODE = re.compile(r"a(\d+)\.([hg])(\d+)")


class RoleEdge(NamedTuple):
    """An attention edge over all prompts, by the roles of its tokens."""

    head: str
    query: str
    key: str
    score: float
    """Mean over all prompts, 0 where the edge is closed."""
    weight: float
    """Mean attention weight where it is open."""
    prompts: int
    """In how many it is open."""

    def __str__(self) -> str:
        return f"{self.query} reads {self.key} in {self.head}"


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenEdges:
    """N attention edges of B prompts, and what closing each one costs."""

    task: str
    model: str
    method: Method
    gated: bool
    """False: all causal edges of a dense model, and closing one lets the others of its row grow."""
    shape: tuple[int, int, int]
    """Layers, heads, key/value heads."""
    tokens: tuple[tuple[str, ...], ...]
    """Per prompt, as text."""
    places: tuple[tuple[str, ...], ...]
    """Per prompt, the name of each position: its role, or its number where the task has none."""
    edges: Int[np.ndarray, "N 5"]
    """(prompt, layer, head, query, key)."""
    weights: Float[np.ndarray, "N"]
    """Attention weight after the gate."""
    scores: Float[np.ndarray, "N"]
    """metric - metric without the edge, measured or to first order."""
    metric: Float[np.ndarray, "B"]
    """Of the whole model."""
    facts: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.edges)

    def only(self, rows: Any) -> "TokenEdges":
        """Some of the edges, by number or by a mask; prompts stay as they are."""
        return replace(self, edges=self.edges[rows], weights=self.weights[rows], scores=self.scores[rows])

    def strongest(self, count: int) -> "TokenEdges":
        """The edges with the largest scores, of either sign, largest first."""
        return self.only(np.argsort(-np.abs(self.scores), kind="stable")[:count])

    def of_prompt(self, number: int) -> "TokenEdges":
        """One prompt alone."""
        one = slice(number, number + 1) if number >= 0 else slice(number, number + 1 or None)
        found = self.only(self.edges[:, 0] == range(len(self.tokens))[number])
        moved = np.concatenate([np.zeros_like(found.edges[:, :1]), found.edges[:, 1:]], 1)
        return replace(found, edges=moved, tokens=self.tokens[one], places=self.places[one], metric=self.metric[one])

    def of_heads(self, names: Iterable[str]) -> "TokenEdges":
        """The edges of some heads, given as `a3.h7` or as circuit edges."""
        mask = heads_in(names, self.shape)
        return self.only(mask[self.edges[:, 1], self.edges[:, 2]])

    def heads(self) -> dict[str, float]:
        """Heads by what their one strongest edge is worth, most first: |score|, over several prompts that of a role."""
        best: dict[str, float] = {}
        for one in self.by_role():
            best.setdefault(one.head, abs(one.score))
        return best

    def by_role(self) -> list[RoleEdge]:
        """The edges gathered over prompts by head and names of their tokens, largest mean |score| first."""
        rows: dict[tuple[str, str, str], list[int]] = {}
        for number, (prompt, layer, head, query, key) in enumerate(self.edges.tolist()):
            names = self.places[prompt]
            rows.setdefault((f"a{layer}.h{head}", names[query], names[key]), []).append(number)
        found = []
        for names, numbers in rows.items():
            score = float(self.scores[numbers].sum()) / len(self.tokens)
            prompts = len(set(self.edges[numbers, 0].tolist()))
            found.append(RoleEdge(*names, score, float(self.weights[numbers].mean()), prompts))
        return sorted(found, key=lambda one: -abs(one.score))

    def carrying(
        self, number: int, heads: Iterable[str], count: int = 2, least: float = 0.1
    ) -> dict[tuple[int, int, int, int], RoleEdge]:
        """What to mark in the maps of some heads: per head its `count` strongest edges over all prompts.

        (layer, head, query, key) in prompt `number`, where they are open -> the edge by role. Edges worth less than
        `least` of the strongest one are left out.
        """
        names, found = self.places[number], {}
        mine = {tuple(edge[1:]) for edge in self.edges[self.edges[:, 0] == number].tolist()}
        roles = self.of_heads(heads).by_role()
        strongest = abs(roles[0].score) if roles else 0.0
        for one in [one for one in roles if abs(one.score) >= least * strongest]:
            if one.query not in names or one.key not in names:
                continue
            layer, head = map(int, one.head[1:].split(".h"))
            place = (layer, head, names.index(one.query), names.index(one.key))
            if place in mine and sum(place[:2] == other[:2] for other in found) < count:
                found[place] = one
        return found

    def through(self, circuit_edge: str) -> list[tuple[int | None, int | None]]:
        """Open up a circuit edge such as `a3.h7->a5.h2<v>`: pairs (edge of the writer, edge of the reader), by number.

        The writer's token edge ends (its query) where the reader's begins: at its key for <k> and <v>, at its query
        for <q>. None where an end is no head; into the logits only what is written at the last token counts. Pairs
        come in the order of their weaker edge, strongest first.
        """
        writer, _, reader = circuit_edge.partition("->")
        written, read = (self._numbers(end) for end in (writer, reader))
        if reader == "logits":
            ends = np.array([len(tokens) - 1 for tokens in self.tokens])
            written = [n for n in written if self.edges[n, 3] == ends[self.edges[n, 0]]]
        if NODE.match(writer) and NODE.match(reader):
            starts = self.edges[:, 3 if "<q>" in reader else 4]
            meet: dict[tuple[int, int], list[int]] = {}
            for n in written:
                meet.setdefault((self.edges[n, 0], self.edges[n, 3]), []).append(n)
            found = [(w, r) for r in read for w in meet.get((self.edges[r, 0], starts[r]), ())]
        else:
            found = [(n, None) for n in written] + [(None, n) for n in read]
        return sorted(found, key=lambda pair: -min(abs(self.scores[n]) for n in pair if n is not None))

    def say(self, number: int) -> str:
        """One edge in words."""
        prompt, layer, head, query, key = self.edges[number].tolist()
        ends = []
        for position in (query, key):
            place = self.places[prompt][position]
            known = f"{position}" if place == str(position) else f"{position}, {place}"
            ends.append(f"{self.tokens[prompt][position]!r} ({known})")
        return f"{ends[0]} reads {ends[1]} in a{layer}.h{head}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for json."""
        names = ("task", "model", "method", "gated", "shape", "tokens", "places", "facts")
        arrays = {name: getattr(self, name).tolist() for name in ("edges", "weights", "scores", "metric")}
        return {**{name: getattr(self, name) for name in names}, **arrays}

    def save(self, path: Path | str) -> Path:
        """Write it as json. Of a dense model, rather `strongest(1000)`: it has all causal edges."""
        store.write_text(Path(path), json.dumps(self.to_dict()) + "\n")
        return Path(path)

    def __str__(self) -> str:
        kind = "open gates" if self.gated else "causal edges"
        count = f"{len(self):,} {kind} of {len(self.tokens)} prompt{'s' * (len(self.tokens) > 1)}"
        head = f"{self.task} in {self.model}: {count}, {self.method} scores, metric {self.metric.mean():.3g}"
        if len(self.tokens) == 1:
            best = self.strongest(SHOWN)
            rows = [f"{s:+9.3f}  {best.say(n)}, weight {best.weights[n]:.2f}" for n, s in enumerate(best.scores)]
        else:
            of = f"of {len(self.tokens)} prompts"
            rows = [
                f"{one.score:+9.3f}  {one}, open in {one.prompts} {of}, weight {one.weight:.2f}"
                for one in self.by_role()[:SHOWN]
            ]
        return "\n".join([head, *rows])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def _numbers(self, end: str) -> list[int]:
        """The edges of the head (or group of heads) at an end of a circuit edge; none if it is no head."""
        if not NODE.match(end):
            return []
        mask = heads_in([end], self.shape)
        return np.flatnonzero(mask[self.edges[:, 1], self.edges[:, 2]]).tolist()


def read_token_edges(path: Path | str) -> TokenEdges:
    """Read what `TokenEdges.save` wrote. StoreError for anything else."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        data |= {name: tuple(map(tuple, data[name])) for name in ("tokens", "places")}
        data |= {name: np.array(data[name], dtype=float) for name in ("weights", "scores", "metric")}
        data |= {"edges": np.array(data["edges"], dtype=int).reshape(-1, 5), "shape": tuple(data["shape"])}
        return TokenEdges(**data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"these are no saved token edges ({type(error).__name__}: {error})"
        raise StoreError(f"read {path}", found, "a file that `TokenEdges.save` wrote") from error


def token_edges(
    loaded: Loaded,
    prompts: Prompts,
    method: Method = "gradient",
    *,
    heads: Iterable[str] | None = None,
    edges: Int[np.ndarray, "N 5"] | None = None,
    through_gates: bool = True,
    at_once: int | None = None,
) -> TokenEdges:
    """Score the attention edges of a dense or gated model on the clean prompts, up to each one's last token.

    `heads`: only these, as `a3.h7` or as the edges of a circuit. `edges`: only these (prompt, layer, head, query,
    key), such as `found.strongest(50).edges` of a fast search; DataError if one is closed. `through_gates` lets the
    gradient pass later gates straight through; closing an edge exactly always decides them anew. `at_once`: prompts
    (8), or runs of the exact method (64), in one pass; it keeps a few (B, H, T, T) of every layer.
    """
    if method not in get_args(Method):
        raise RecipeError("token_edges", f"method={method!r}", f"one of {', '.join(get_args(Method))}")
    shape = shape_of(loaded)
    mask = np.ones(shape[:2], dtype=bool) if heads is None else heads_in(heads, shape)
    size = at_once or (8 if method == "gradient" else 64)
    through = through_gates if method == "gradient" else None
    rows, weights, scores, metric = read_edges(loaded.model, prompts, mask, through=through, size=min(size, 8))
    if edges is not None:
        kept = _numbers_of(rows, np.asarray(edges), prompts)
        rows, weights, scores = rows[kept], weights[kept], scores[kept]
    if method == "exact":
        scores = metric[rows[:, 0]] - metric_without(loaded.model, prompts, rows, size=size)
    words = _words(loaded.tokenizer, prompts)
    return TokenEdges(
        task=prompts.name,
        model=loaded.name,
        method=method,
        gated=is_gated(loaded.model),
        shape=shape,
        tokens=words,
        places=prompts.places,
        edges=rows,
        weights=weights,
        scores=scores,
        metric=metric,
        facts={"prompts": prompts.describe(), "through_gates": through_gates, "versions": store.versions()},
    )


def shape_of(loaded: Loaded) -> tuple[int, int, int]:
    """Layers, heads, key/value heads."""
    layers = loaded.anatomy.layers
    return len(layers), layers[0].heads, layers[0].kv_heads


def heads_in(names: Iterable[str], shape: tuple[int, int, int]) -> Bool[np.ndarray, "L H"]:
    """The heads among nodes or circuit edges; a group `a3.g1` stands for those of its heads that are named, or for all.

    DataError for a head that the model does not have, or if there is none.
    """
    layers, heads, groups = shape
    mask, share = np.zeros((layers, heads), dtype=bool), heads // groups
    names = [names] if isinstance(names, str) else list(names)
    found = [(int(a), kind, int(n)) for name in names for a, kind, n in NODE.findall(name)]
    for layer, kind, number in sorted(found, key=lambda one: one[1], reverse=True):  # heads before groups
        if layer >= layers or number >= (heads if kind == "h" else groups):
            hint = f"a0.h0 to a{layers - 1}.h{heads - 1}"
            raise DataError("attention edges of a circuit", f"no a{layer}.{kind}{number} in this model", hint)
        group = mask[layer, number * share : (number + 1) * share]
        if kind == "h":
            mask[layer, number] = True
        elif not group.any():
            group[:] = True
    if not mask.any():
        raise DataError("attention edges of a circuit", f"no head in {names[:5]}", "names such as a3.h7 or a3.h7->m4")
    return mask


def _numbers_of(rows: np.ndarray, wanted: np.ndarray, prompts: Prompts) -> list[int]:
    """Where the wanted edges are among those that are open; DataError for one that is not."""
    place = {edge: number for number, edge in enumerate(map(tuple, rows.tolist()))}
    missing = [edge for edge in map(tuple, wanted.tolist()) if edge not in place]
    if missing:
        found = f"(prompt, layer, head, query, key) {missing[0]} is closed ({len(missing)} such)"
        raise DataError(f"attention edges of {prompts.name}", found, "edges of the same model and prompts")
    return [place[edge] for edge in map(tuple, wanted.tolist())]


def _words(tokenizer: Any, prompts: Prompts) -> tuple[tuple[str, ...], ...]:
    """The tokens of every prompt as text; their numbers where there is no tokenizer."""
    rows = [row[: end + 1] for row, end in zip(prompts.clean.tolist(), prompts.last.tolist(), strict=True)]
    say = str if tokenizer is None else lambda token: tokenizer.decode([token])
    return tuple(tuple(map(say, row)) for row in rows)
