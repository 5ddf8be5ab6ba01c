"""Hash functions that send similar vectors to equal keys, and the tables that find them: the search inside SLIDE.

Every table has a key made of K codes. simhash: a code is the sign of a projection on a third of the coordinates
(Charikar 2002); winner-take-all: which of a few coordinates is largest (Yagnik et al. 2011); densified
winner-take-all, for sparse vectors: a code whose coordinates are all zero is borrowed from another (Chen and
Shrivastava 2018). If two vectors share a code with probability p, some table finds them with 1 - (1 - p^K)^L.

Shapes: M vectors, d width, L tables, K codes of a key, N neurons, P found pairs (vector, neuron).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewedges.errors import RecipeError

RATIO = 3
"""One coordinate in so many takes part in a projection of simhash."""
ATTEMPTS = 100
"""Other codes that an empty one asks before it stays 0."""
HASHES = ("simhash", "wta", "dwta")


@dataclass(frozen=True, kw_only=True)
class Hashing:
    """A family of hash functions; drawn for a width by `Functions`."""

    kind: Literal["simhash", "wta", "dwta"] = "simhash"
    codes: int = 6
    """K, codes of a key."""
    tables: int = 50
    """L."""
    bin: int = 8
    """Coordinates that a winner-take-all code compares."""

    def __post_init__(self) -> None:
        if self.kind not in HASHES or min(self.codes, self.tables, self.bin - 1) < 1:
            raise RecipeError(f"{self}", "no such family", f"kind {', '.join(HASHES)}; codes and tables 1 or more")
        if self.keys >= 2**62:
            raise RecipeError(f"{self.codes} codes", f"{self.keys:.0e} keys do not fit an index", "fewer codes")

    @property
    def base(self) -> int:
        """Values of a code."""
        return 2 if self.kind == "simhash" else self.bin

    @property
    def keys(self) -> int:
        """Values of a key: buckets of a table."""
        return self.base**self.codes


class Functions:
    """Hash functions of one family for vectors of one width, drawn from a seed."""

    def __init__(self, hashing: Hashing, width: int, seed: int = 0, device: torch.device | str = "cpu"):
        self.hashing, generator = hashing, torch.Generator().manual_seed(seed)
        count = hashing.codes * hashing.tables
        if hashing.kind != "simhash" and width < hashing.bin:
            raise RecipeError(f"codes of {hashing.bin} coordinates", f"vectors of {width}", "a smaller bin")
        mixed = torch.rand(count, width, generator=generator).argsort(-1)
        if hashing.kind == "simhash":
            chosen = mixed[:, : max(1, width // RATIO)]
            signs = 2.0 * torch.randint(0, 2, chosen.shape, generator=generator) - 1
            self.projection = torch.zeros(count, width).scatter(1, chosen, signs).T.to(device)  # (d, L K)
        else:
            self.coordinates = mixed[:, : hashing.bin].to(device)  # (L K, bin)
            self.others = torch.randint(0, count, (ATTEMPTS, count), generator=generator).to(device)

    def codes(self, x: Float[Tensor, "M d"]) -> Int[Tensor, "M L K"]:
        """The codes of every vector."""
        x = x.detach().float()
        if self.hashing.kind == "simhash":
            found = (x @ self.projection >= 0).long()
        elif self.hashing.kind == "wta":
            found = x[:, self.coordinates].argmax(-1)
        else:
            found = self._densified(x[:, self.coordinates])
        return found.unflatten(1, (self.hashing.tables, self.hashing.codes))

    def keys(self, x: Float[Tensor, "M d"]) -> Int[Tensor, "M L"]:
        """The key of every vector in every table: its codes as the digits of a number."""
        digits = self.hashing.base ** torch.arange(self.hashing.codes, device=x.device)
        return (self.codes(x) * digits).sum(-1)

    def _densified(self, values: Float[Tensor, "M LK bin"]) -> Int[Tensor, "M LK"]:
        """Winners among the coordinates that are not zero; where all are, the code of another function."""
        there = values != 0
        own, empty = values.masked_fill(~there, -torch.inf).argmax(-1), ~there.any(-1)
        found, missing = own.masked_fill(empty, 0), empty.clone()
        for other in self.others:
            if not missing.any():
                break
            now = missing & ~empty[:, other]
            found = torch.where(now, own[:, other], found)
            missing &= ~now
        return found


@dataclass(frozen=True, eq=False)
class Tables:
    """Neurons by key in L tables; a bucket holds at most `capacity`, the latest (first in, first out)."""

    key: Int[Tensor, "L N"]
    """Keys of the neurons kept, sorted; those pushed out have the largest number there is."""
    neuron: Int[Tensor, "L N"]

    @classmethod
    def of(cls, keys: Int[Tensor, "N L"], capacity: int) -> "Tables":
        """Insert neurons 0, 1, 2, ... by their keys."""
        sorted_, neuron = keys.T.sort(dim=-1, stable=True)
        after = torch.searchsorted(sorted_.contiguous(), sorted_.contiguous(), right=True)  # end of each one's bucket
        pushed = after - torch.arange(keys.shape[0], device=keys.device) > capacity
        key, order = sorted_.masked_fill(pushed, torch.iinfo(torch.long).max).sort(dim=-1, stable=True)
        return cls(key.contiguous(), neuron.gather(1, order))

    def find(self, keys: Int[Tensor, "M L"]) -> tuple[Int[Tensor, "P"], Int[Tensor, "P"], Int[Tensor, "P"]]:
        """Look vectors up: pairs (vector, neuron) in order, and in how many tables each was found."""
        asked = keys.T.contiguous()  # (L, M)
        begin = torch.searchsorted(self.key, asked)
        counts = torch.searchsorted(self.key, asked, right=True) - begin
        flat, first = counts.flatten(), (begin + torch.arange(len(asked), device=keys.device)[:, None] * self.size)
        start = (first.flatten() - (flat.cumsum(0) - flat)).repeat_interleave(flat)
        neuron = self.neuron.flatten()[start + torch.arange(len(start), device=keys.device)]
        vector = torch.arange(len(keys), device=keys.device).repeat(len(asked)).repeat_interleave(flat)
        pair, times = torch.unique(vector * self.size + neuron, return_counts=True)
        return pair // self.size, pair % self.size, times

    @property
    def size(self) -> int:
        """N."""
        return self.neuron.shape[1]
