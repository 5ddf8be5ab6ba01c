"""Hash functions that send similar vectors to equal keys, and the tables that find them: the search inside SLIDE.

Every table has a key made of K codes. simhash: a code is the sign of a projection on a third of the coordinates
(Charikar 2002); winner-take-all: which of a few coordinates is largest (Yagnik et al. 2011); densified
winner-take-all, for sparse vectors: a code whose coordinates are all zero is borrowed from another (Chen and
Shrivastava 2018). If two vectors share a code with probability p, some table finds them with 1 - (1 - p^K)^L.

Shapes: M vectors, d width, L tables, K codes of a key, N neurons, P found pairs (vector, neuron).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewedges.errors import RecipeError

RATIO = 3
"""One coordinate in so many takes part in a projection of simhash."""
ATTEMPTS = 100
"""Other codes that an empty one asks before it stays 0."""
HASHES = ("simhash", "wta", "dwta")
AT_ONCE = 512
"""Vectors hashed together: what they need fits a core's cache (128 to 2048 are within a tenth of each other)."""


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
        return torch.cat([self._codes(part) for part in x.detach().float().split(AT_ONCE)]).long()

    def keys(self, x: Float[Tensor, "M d"]) -> Int[Tensor, "M L"]:
        """The key of every vector in every table: its codes as the digits of a number."""
        return torch.cat([self._keys(part) for part in x.detach().float().split(AT_ONCE)])

    def _keys(self, x: Float[Tensor, "S d"]) -> Int[Tensor, "S L"]:
        codes = self._codes(x)
        key = codes[..., -1].long()
        for code in reversed(codes.unbind(-1)[:-1]):
            key = key.mul_(self.hashing.base).add_(code)
        return key

    def _codes(self, x: Float[Tensor, "S d"]) -> Int[Tensor, "S L K"]:
        if self.hashing.kind == "simhash":
            found = (x @ self.projection >= 0).byte()
        else:
            found = self._winners(x).T
            zero = x == 0
            if self.hashing.kind == "dwta" and zero.any():
                found = self._densified(x, zero)
        return found.unflatten(1, (self.hashing.tables, self.hashing.codes))

    def _winners(self, x: Float[Tensor, "S d"]) -> Int[Tensor, "LK S"]:
        """Place of the largest coordinate of every bin, the first of equal ones: a bin's argmax, coordinate by
        coordinate over whole rows (a third of argmax's time)."""
        columns = x.T.contiguous()
        best = columns.index_select(0, self.coordinates[:, 0])
        kind = torch.uint8 if self.hashing.bin <= 256 else torch.int32
        found = torch.zeros(best.shape, dtype=kind, device=x.device)
        for place in range(1, self.hashing.bin):
            value = columns.index_select(0, self.coordinates[:, place])
            larger = (value > best).to(kind).mul_(place)
            torch.maximum(found, larger, out=found)  # masked_fill_ took 30 times as long
            torch.maximum(best, value, out=best)
        return found

    def _densified(self, x: Float[Tensor, "S d"], zero: Tensor) -> Int[Tensor, "S LK"]:
        """Winners among the coordinates that are not zero; where all are, the code of another function."""
        own = self._winners(x.masked_fill(zero, -torch.inf)).T
        empty = zero.T[self.coordinates].all(1).T  # (S, LK)
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
    """Keys of the neurons, sorted."""
    neuron: Int[Tensor, "L N"]
    capacity: int

    @classmethod
    def of(cls, keys: Int[Tensor, "N L"], capacity: int) -> "Tables":
        """Insert neurons 0, 1, 2, ... by their keys."""
        keys = keys.T.contiguous()
        neuron = _stable_order(keys)
        return cls(keys.gather(1, neuron), neuron, capacity)

    def find(self, keys: Int[Tensor, "M L"]) -> tuple[Int[Tensor, "P"], Int[Tensor, "P"], Int[Tensor, "P"]]:
        """Look vectors up: pairs (vector, neuron) in order, and in how many tables each was found."""
        asked = keys.T.contiguous()  # (L, M)
        end = torch.searchsorted(self.key, asked, right=True)
        counts = (end - torch.searchsorted(self.key, asked)).clamp(max=self.capacity)
        first = end - counts + self.size * torch.arange(len(asked), device=keys.device)[:, None]
        flat = counts.flatten()
        start = (first.flatten() - (flat.cumsum(0) - flat)).repeat_interleave(flat)
        neuron = self.neuron.flatten().index_select(0, start + torch.arange(len(start), device=keys.device))
        vector = torch.arange(len(keys), device=keys.device).repeat(len(asked)).repeat_interleave(flat)
        pair = vector * self.size + neuron
        if len(keys) * self.size < 2**31:
            pair = pair.int()  # sorts in half the time
        pair, times = torch.unique_consecutive(pair.sort().values, return_counts=True)
        pair = pair.long()
        vector = pair // self.size
        return vector, pair - vector * self.size, times

    @property
    def size(self) -> int:
        """N."""
        return self.neuron.shape[1]


def _stable_order(keys: Int[Tensor, "L N"]) -> Int[Tensor, "L N"]:
    """Stable argsort of every row. NumPy sorts 16-bit numbers by radix, in a tenth of torch's time."""
    if keys.device.type == "cpu" and int(keys.max()) < 2**16:
        return torch.from_numpy(np.argsort(keys.numpy().astype(np.uint16), axis=-1, kind="stable"))
    return keys.sort(dim=-1, stable=True).indices
