"""The circuit graph of a decoder as index arithmetic: sources, destinations, and which pairs are edges.

A *source* writes to the residual stream: `input` (the embedding), every head `a{l}.h{h}`, every MLP `m{l}`. A
*destination* reads it: the query, key and value input of every head (`a{l}.h{h}<q>`), every MLP, `logits`. An edge
`src->dst` exists where the source writes before the destination reads, so all of a graph is one Boolean matrix
(sources, destinations). Order and names are those of EAP-IG (Hanna, Pezzelle, Belinkov 2024, arXiv:2403.17806) and
of MIB: GPT-2 small has 157 sources, 445 destinations and 32,491 edges (11,611 without the split).

With fewer key/value heads than query heads a key is read once per key/value head: `a3.g1<k>`. Nothing here knows a
model: `hooks.wire` makes the graph of one. Shapes: J source, I destination, L layer, H head, G key/value head.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from fewedges.errors import RecipeError

ROLES = "qkv"


@dataclass(frozen=True, kw_only=True)
class Graph:
    """The graph of L layers with H heads and an MLP each."""

    layers: int
    heads: int
    key_readers: int
    """Key (and value) inputs of a layer: the key/value heads, or H to read once per query head."""
    split: bool = True
    """Query, key and value inputs of a head are destinations of their own; False: one input per head."""
    parallel: bool = False
    """Attention and MLP of a layer read the same residual stream (NeoX): no edge from its heads to its MLP."""

    def __post_init__(self) -> None:
        if min(self.layers, self.heads, self.key_readers) < 1 or self.heads % self.key_readers:
            found = f"{self.layers} layers, {self.heads} heads, {self.key_readers} key readers"
            raise RecipeError("graph", found, "at least one of each, and heads a multiple of key readers")
        if not self.split and self.key_readers != self.heads:
            raise RecipeError("graph with split=False", f"{self.key_readers} key readers", f"{self.heads}, the heads")

    # -- sources -----------------------------------------------------------------------------------------------

    @property
    def sources(self) -> int:
        """J."""
        return 1 + self.layers * (self.heads + 1)

    def head(self, layer: int, head: int = 0) -> int:
        """The source index of a head."""
        return 1 + layer * (self.heads + 1) + head

    def mlp(self, layer: int) -> int:
        """The source index of an MLP."""
        return self.head(layer, self.heads)

    @cached_property
    def source_names(self) -> tuple[str, ...]:
        """`input`, `a0.h0`, ..., `m0`, `a1.h0`, ..."""
        rows = ([*(f"a{layer}.h{head}" for head in range(self.heads)), f"m{layer}"] for layer in range(self.layers))
        return ("input", *(name for row in rows for name in row))

    # -- destinations ------------------------------------------------------------------------------------------

    @property
    def readers(self) -> int:
        """Attention inputs of a layer: H + 2 G, or H without the split."""
        return self.heads + 2 * self.key_readers if self.split else self.heads

    @property
    def destinations(self) -> int:
        """I."""
        return self.layers * (self.readers + 1) + 1

    def reader(self, layer: int, role: str = "q", index: int = 0) -> int:
        """The destination index of a query ("q"), key ("k") or value ("v") input."""
        start = layer * (self.readers + 1)
        if not self.split:
            return start + index
        return start + {"q": 0, "k": self.heads, "v": self.heads + self.key_readers}[role] + index

    def mlp_reader(self, layer: int) -> int:
        """The destination index of an MLP's input."""
        return layer * (self.readers + 1) + self.readers

    @property
    def logits(self) -> int:
        """The destination index of the logits, the last."""
        return self.destinations - 1

    @cached_property
    def destination_names(self) -> tuple[str, ...]:
        """`a0.h0<q>`, ..., `m0`, ..., `logits`."""
        keys = "h" if self.key_readers == self.heads else "g"
        names: list[str] = []
        for layer in range(self.layers):
            names += [f"a{layer}.h{h}" + ("<q>" if self.split else "") for h in range(self.heads)]
            if self.split:
                names += [f"a{layer}.{keys}{g}<{role}>" for role in "kv" for g in range(self.key_readers)]
            names.append(f"m{layer}")
        return (*names, "logits")

    # -- edges -------------------------------------------------------------------------------------------------

    def before_attention(self, layer: int) -> int:
        """How many sources write before the attention of this layer reads."""
        return self.head(layer)

    def before_mlp(self, layer: int) -> int:
        """How many sources write before the MLP of this layer reads."""
        return self.head(layer) if self.parallel else self.mlp(layer)

    @cached_property
    def before(self) -> Int[np.ndarray, "I"]:
        """Per destination, how many sources write before it reads: the first ones."""
        rows = ([self.before_attention(n)] * self.readers + [self.before_mlp(n)] for n in range(self.layers))
        return np.array([count for row in rows for count in row] + [self.sources])

    @cached_property
    def real(self) -> Bool[np.ndarray, "J I"]:
        """Which pairs of a source and a destination are edges."""
        return np.arange(self.sources)[:, None] < self.before

    @property
    def edges(self) -> int:
        """The number of edges."""
        return int(self.before.sum())

    @cached_property
    def feeds(self) -> Bool[np.ndarray, "I J"]:
        """Which source computes from which destination (logits feed none)."""
        feeds = np.zeros((self.destinations, self.sources), dtype=bool)
        share = self.heads // self.key_readers
        for layer in range(self.layers):
            feeds[self.mlp_reader(layer), self.mlp(layer)] = True
            for head in range(self.heads):
                for role in ROLES:
                    index = head if role == "q" else head // share
                    feeds[self.reader(layer, role, index), self.head(layer, head)] = True
        return feeds

    def name(self, source: int | np.integer, destination: int | np.integer) -> str:
        """`src->dst` of an edge."""
        return f"{self.source_names[source]}->{self.destination_names[destination]}"

    def names(self, mask: Bool[np.ndarray, "J I"]) -> tuple[str, ...]:
        """The names of the edges in a mask, sources first."""
        return tuple(self.name(j, i) for j, i in np.argwhere(mask & self.real))

    def index(self, name: str) -> tuple[int, int]:
        """Source and destination of an edge `src->dst`; RecipeError if there is no such edge."""
        source, _, destination = name.partition("->")
        found = self._sources.get(source), self._destinations.get(destination)
        if found[0] is None or found[1] is None or not self.real[found]:
            hint = (
                f"sources like {self.source_names[1]}, destinations like {self.destination_names[0]}, in causal order"
            )
            raise RecipeError(f"edge {name!r}", "no such edge in this graph", hint)
        return found[0], found[1]

    def mask(self, names: Any) -> Bool[np.ndarray, "J I"]:
        """The mask that keeps exactly these edges."""
        mask = np.zeros((self.sources, self.destinations), dtype=bool)
        for name in names:
            mask[self.index(name)] = True
        return mask

    @cached_property
    def _sources(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.source_names)}

    @cached_property
    def _destinations(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.destination_names)}

    def used(self, mask: Bool[np.ndarray, "*K J I"]) -> Bool[np.ndarray, "*K J"]:
        """Which sources have an edge in these masks."""
        return np.any(mask & self.real, axis=-1)

    def is_head(self) -> Bool[np.ndarray, "J"]:
        """Which sources are attention heads."""
        return np.array([name.startswith("a") for name in self.source_names])

    def __str__(self) -> str:
        form = "query, key and value apart" if self.split else "one input per head"
        shape = f"{self.sources} sources x {self.destinations} destinations"
        return f"{self.edges:,} edges ({shape}; {form}{', parallel' if self.parallel else ''})"
