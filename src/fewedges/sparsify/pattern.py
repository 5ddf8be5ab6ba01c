"""Pattern: which entries of a matrix are kept. Weights and attention share it, and with it what sparsity costs.

A pattern knows its mask and counts on it; what differs between kinds is how a machine stores and computes what is
kept. `cover(b)`, the fraction of b x b blocks touched, is what a machine pays that moves whole blocks: at density p
of random entries it is 1 - (1 - p)^(b b), 92 % of 16 x 16 blocks at 1 % density.

Shapes: R rows, C columns; any leading dimensions (heads, batch) are kept.
"""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fewedges.errors import RecipeError
from fewedges.weight_recipes import Structure

INDEX_BITS = 32
"""Bits of an index or a row pointer in compressed storage."""


@dataclass(frozen=True, eq=False)
class Pattern:
    """Kept entries of an R x C matrix, anywhere: the unstructured pattern, and the base of the others."""

    kept: Tensor = field(repr=False)
    """bool (..., R, C); checked below, not by annotation, so that what is wrong gets a message."""

    def __post_init__(self) -> None:
        if self.kept.dtype != torch.bool or self.kept.dim() < 2:
            found = f"{self.kept.dtype} of shape {tuple(self.kept.shape)}"
            raise RecipeError("a pattern", found, "a bool tensor (..., rows, columns)")

    @property
    def kind(self) -> str:
        """The structure as a recipe writes it (unstructured, 2:4, 16x16), or "dense"; `of_kind` reads it."""
        return "unstructured"

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., R, C)."""
        return tuple(self.kept.shape)

    def mask(self) -> Bool[Tensor, "*lead R C"]:
        """The kept entries as a bool tensor."""
        return self.kept

    @property
    def size(self) -> int:
        """Number of entries, kept or not."""
        return math.prod(self.shape)

    @property
    def nnz(self) -> int:
        """Number of kept entries."""
        return int(self.mask().sum())

    @property
    def density(self) -> float:
        """Fraction of entries kept; 1 - sparsity."""
        return self.nnz / self.size

    def layout(self, b: int) -> Bool[Tensor, "*lead r c"]:
        """Which b x b blocks hold a kept entry; blocks at the lower and right edge may be smaller."""
        _check_block(b)
        rows, columns = self.shape[-2:]
        ragged = (0, -columns % b, 0, -rows % b)
        padded = torch.nn.functional.pad(self.mask(), ragged)
        cells = padded.unflatten(-1, (-1, b)).unflatten(-3, (-1, b))  # (..., r, b, c, b)
        return cells.any(-1).any(-2)

    def cover(self, b: int) -> float:
        """Fraction of b x b blocks touched."""
        return float(self.layout(b).float().mean())

    def bytes(self, dtype: torch.dtype | int = torch.float32, b: int | None = None) -> int:
        """Bytes of the kept values (a dtype, or bits a value) and of what says where they are.

        With `b`, stored as whole b x b blocks with one index each; else as this kind of pattern is best stored:
        here the smaller of a bitmap (one bit an entry) and compressed rows (one 32-bit index a value).
        """
        bits = dtype if isinstance(dtype, int) else dtype.itemsize * 8
        if b is not None:
            live, rows = int(self.layout(b).sum()), math.prod(self.layout(b).shape[:-1])
            return _bytes(live * (b * b * bits + INDEX_BITS) + (rows + 1) * INDEX_BITS)
        return self._own_bytes(bits)

    def flops(self, tokens: int, b: int | None = None) -> int:
        """Multiplications and additions for so many input vectors: 2 a kept entry, or 2 an entry of a live block."""
        return 2 * tokens * (self.nnz if b is None else int(self.layout(b).sum()) * b * b)

    def __or__(self, other: "Pattern") -> "Pattern":
        return Pattern(self.mask() | self._alike(other))

    def __and__(self, other: "Pattern") -> "Pattern":
        return Pattern(self.mask() & self._alike(other))

    def permute(self, rows: Int[Tensor, "R"] | None = None, columns: Int[Tensor, "C"] | None = None) -> "Pattern":
        """Reorder: row i of the result is row rows[i] of this pattern, columns alike."""
        mask = self.mask() if rows is None else self.mask()[..., rows, :]
        return Pattern(mask if columns is None else mask[..., columns])

    def tile(self, rows: int, columns: int) -> "Pattern":
        """Repeat it to a larger R x C, cut off where it does not fit whole."""
        times = [1] * (len(self.shape) - 2) + [-(-rows // self.shape[-2]), -(-columns // self.shape[-1])]
        return Pattern(self.mask().repeat(*times)[..., :rows, :columns].contiguous())

    def causal(self) -> "Pattern":
        """Only entries on or below the diagonal: keys not after their query."""
        return Pattern(self.mask().tril())

    def __str__(self) -> str:
        covers = ", ".join(f"cover({b}) {self.cover(b):.3f}" for b in (16, 32, 64))
        return f"{type(self).__name__} {'x'.join(map(str, self.shape))}: density {self.density:.4f}, {covers}"

    def _own_bytes(self, bits: int) -> int:
        pointers = (math.prod(self.shape[:-1]) + 1) * INDEX_BITS
        return _bytes(self.nnz * bits + min(self.size, self.nnz * INDEX_BITS + pointers))

    def _alike(self, other: "Pattern") -> Tensor:
        if other.shape != self.shape:
            raise RecipeError("join two patterns", f"shapes {self.shape} and {other.shape}", "patterns of one shape")
        return other.mask()


@dataclass(frozen=True, eq=False)
class NM(Pattern):
    """N kept of every M neighbours in a row ("2:4")."""

    n: int
    m: int

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = not 0 < self.n <= self.m or self.shape[-1] % self.m
        if wrong or (self.kept.unflatten(-1, (-1, self.m)).sum(-1) > self.n).any():
            found = f"a mask {self.shape} that does not keep at most {self.n} of every {self.m}"
            raise RecipeError(f"a {self.n}:{self.m} pattern", found, "select(score, structure='2:4')")

    @property
    def kind(self) -> str:
        """N:M."""
        return f"{self.n}:{self.m}"

    def _own_bytes(self, bits: int) -> int:
        groups = self.size // self.m
        return _bytes(groups * self.n * (bits + math.ceil(math.log2(self.m))))


@dataclass(frozen=True, eq=False)
class Blocks(Pattern):
    """Whole blocks of `height` x `width`, on or off: `kept` is the layout, one entry a block."""

    height: int
    width: int

    @property
    def kind(self) -> str:
        """HxW."""
        return f"{self.height}x{self.width}"

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., R, C) of the matrix, not of the layout."""
        *lead, rows, columns = self.kept.shape
        return (*lead, rows * self.height, columns * self.width)

    def mask(self) -> Bool[Tensor, "*lead R C"]:
        """The layout, stretched."""
        return self.kept.repeat_interleave(self.height, -2).repeat_interleave(self.width, -1)

    @property
    def nnz(self) -> int:
        """Number of kept entries."""
        return int(self.kept.sum()) * self.height * self.width

    def _own_bytes(self, bits: int) -> int:
        live, rows = int(self.kept.sum()), math.prod(self.kept.shape[:-1])
        return _bytes(live * (self.height * self.width * bits + INDEX_BITS) + (rows + 1) * INDEX_BITS)


@dataclass(frozen=True, eq=False)
class Dense(Pattern):
    """Everything is kept."""

    @property
    def kind(self) -> str:
        """Not a structure that one can ask for."""
        return "dense"

    def _own_bytes(self, bits: int) -> int:
        return _bytes(self.size * bits)


def dense(shape: tuple[int, ...], device: torch.device | str = "cpu") -> Dense:
    """The pattern that keeps everything."""
    return Dense(torch.ones(shape, dtype=torch.bool, device=device))


def of_kind(mask: Bool[Tensor, "*lead R C"], kind: str) -> Pattern:
    """The pattern of a kind (see `Pattern.kind`) that keeps these entries; RecipeError where they are not of it."""
    if kind == "dense" and bool(mask.all()):
        return Dense(mask)
    structure = None if kind == "dense" else Structure.parse(kind)
    if structure is not None and structure.kind == "n:m":
        return NM(mask, structure.n, structure.m)
    if structure is not None and structure.kind == "block":
        blocks = Blocks(mask[..., :: structure.n, :: structure.m], structure.n, structure.m)
        if blocks.shape == tuple(mask.shape) and torch.equal(blocks.mask(), mask):
            return blocks
    if kind != "unstructured":
        raise RecipeError(f"a pattern of kind {kind}", f"a mask {tuple(mask.shape)} that is not so", "unstructured")
    return Pattern(mask)


def of_kind_if_so(mask: Bool[Tensor, "*lead R C"], kind: str) -> Pattern:
    """The pattern of this kind where the mask is of it, else the unstructured one."""
    try:
        return of_kind(mask, kind)
    except RecipeError:
        return Pattern(mask)


def _check_block(b: int) -> None:
    if b < 1:
        raise RecipeError(f"blocks of {b} x {b}", "a block has at least one entry", "b = 16, 32 or 64")


def _bytes(bits: int) -> int:
    return -(-bits // 8)
