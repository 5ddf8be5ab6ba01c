"""Attention patterns that are fixed before the data is seen: each rule is n -> Pattern over n queries and n keys.

A rule says which keys a query may see; attached to a decoder (attending.py) it is further cut to the causal
triangle. Rules join by `Union` (in one head) and `Heads` (one for each); layers get rules of their own.

Sources: strided and fixed, Child et al. 2019 (arXiv:1904.10509); BigBird, Zaheer et al. 2020 (arXiv:2007.14062);
Longformer, Beltagy et al. 2020 (arXiv:2004.05150); block butterfly + global, Chen et al. 2022 (arXiv:2112.00029).

Shapes: n tokens, i query, j key, H heads; l stride, b block, N blocks.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fewedges.errors import RecipeError
from fewedges.recipes import _check
from fewedges.sparsify.butterfly import cells_of, neighbours
from fewedges.sparsify.pattern import Pattern, dense

Part = Literal["both", "first", "second"]


@runtime_checkable
class Rule(Protocol):
    """A pattern for every length; (n, n), or (H, n, n) where heads differ.

    A rule with `moves = False` says that a shorter text sees the corner of what a longer one sees, in the causal
    triangle: while decoding its pattern is laid once for many tokens.
    """

    def __call__(self, n: int) -> Pattern:
        """The pattern over n queries and n keys."""
        ...


@dataclass(frozen=True)
class Full:
    """Every key."""

    moves: ClassVar[bool] = False

    def __call__(self, n: int) -> Pattern:
        """All n x n."""
        return dense((n, n))


@dataclass(frozen=True)
class Local:
    """The query's own position and the `window` - 1 before it."""

    moves: ClassVar[bool] = False
    window: int

    def __post_init__(self) -> None:
        _check(self, "window", lambda x: x > 0, "at least 1")

    def __call__(self, n: int) -> Pattern:
        """i - window < j <= i."""
        i, j = _positions(n)
        return Pattern((j <= i) & (j > i - self.window))


@dataclass(frozen=True)
class Strided:
    """Sparse Transformer, strided: the last l positions (first), and every l-th before the query (second).

    Alternate layers with the two parts, split heads between them, or join them in one head (both).
    """

    moves: ClassVar[bool] = False
    stride: int
    """l, near the square root of n."""
    part: Part = "both"

    def __post_init__(self) -> None:
        _check(self, "stride", lambda x: x > 0, "at least 1")
        _check_part(self.part)

    def __call__(self, n: int) -> Pattern:
        """First: i - l <= j <= i. Second: j <= i, (i - j) mod l = 0."""
        i, j = _positions(n)
        return _join(self.part, (j <= i) & (j >= i - self.stride), (j <= i) & ((i - j) % self.stride == 0))

    def order(self, n: int) -> Int[Tensor, "n"] | None:
        """Positions sorted by column of the n/l x l table: in this order the second part alone is block local.

        Its cover falls by up to l: l = 128, n = 4096, b = 128 from .516 to .031 (the paper's transpose).
        """
        at = torch.arange(n)
        return (at % self.stride * n + at // self.stride).argsort() if self.part == "second" else None


@dataclass(frozen=True)
class Fixed:
    """Sparse Transformer, fixed: the query's own stretch of l (first), and the last c of every stretch (second).

    Heads may take different `vertical` stripes: stripe v is the c columns that end v c before the stretch's end.
    Alone the second part leaves the queries before the first stripe without a key; their output is 0.
    """

    moves: ClassVar[bool] = False
    stride: int
    """l: 128 or 256 in the paper."""
    summary: int
    """c: 8, 16 or 32."""
    vertical: int = 0
    part: Part = "both"

    def __post_init__(self) -> None:
        _check(self, "stride summary", lambda x: x > 0, "at least 1")
        _check_part(self.part)
        fits = self.vertical >= 0 and self.summary * (self.vertical + 1) <= self.stride
        _check(self, "vertical", lambda _: fits, "within the stride: summary * (vertical + 1) <= stride")

    def __call__(self, n: int) -> Pattern:
        """First: j <= i, both in one stretch. Second: j <= i, l - c (v + 1) <= j mod l < l - c v."""
        i, j = _positions(n)
        end = self.stride - self.summary * self.vertical
        stripe = (j % self.stride >= end - self.summary) & (j % self.stride < end)
        return _join(self.part, (j <= i) & (j // self.stride == i // self.stride), (j <= i) & stripe)


@dataclass(frozen=True)
class BigBird:
    """BigBird, internal: blocks of b; the first and last see all and are seen by all, three neighbours, r at random.

    Every block row but the first and last gets r blocks it would not see otherwise (all of them when there are
    fewer), drawn evenly for each of `heads`. transformers draws them from the first 5 + 2r blocks only (for 1024,
    3072 and 4096 tokens, from the first 1024), and in eval takes block 0 r times over, which is no masked softmax.
    The last block moves with n: to decode, attach it with a fixed `length`.
    """

    moves: ClassVar[bool] = True
    block: int
    randoms: int = 3
    heads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self, "block heads", lambda x: x > 0, "at least 1")
        _check(self, "randoms", lambda x: x >= 0, "at least 0")

    def __call__(self, n: int) -> Pattern:
        """(n, n), or (heads, n, n); the last block may be short."""
        blocks = -(-n // self.block)
        on = self.blocks_of(blocks, self.draw(blocks))
        return Pattern(_stretched(on if self.heads > 1 else on[0], self.block, n))

    def draw(self, blocks: int) -> Bool[Tensor, "H N N"]:
        """The random blocks."""
        free = ~self.blocks_of(blocks, torch.zeros(self.heads, blocks, blocks, dtype=torch.bool))
        generator = torch.Generator().manual_seed(self.seed)
        rank = torch.rand(free.shape, generator=generator).masked_fill(~free, -1).argsort(-1, descending=True)
        drawn = torch.zeros_like(free).scatter(-1, rank[..., : self.randoms], True)
        return drawn & free

    def blocks_of(self, blocks: int, drawn: Bool[Tensor, "H N N"]) -> Bool[Tensor, "H N N"]:
        """Global and neighbouring blocks, and those drawn."""
        i, j = _positions(blocks)
        last = blocks - 1
        return drawn | (i == 0) | (i == last) | (j == 0) | (j == last) | ((i - j).abs() <= 1)


@dataclass(frozen=True)
class Longformer:
    """Longformer: window / 2 positions on each side, `dilation` apart, and global tokens that see and are seen.

    Longformer gives global tokens projections of their own; here they share the model's.
    """

    moves: ClassVar[bool] = False
    window: int
    dilation: int = 1
    tokens: tuple[int, ...] = ()
    """Global positions."""

    def __post_init__(self) -> None:
        _check(self, "window", lambda x: x > 0 and x % 2 == 0, "even and more than 0")
        _check(self, "dilation", lambda x: x > 0, "at least 1")
        _check(self, "tokens", lambda x: all(t >= 0 for t in x), "positions from 0")

    def __call__(self, n: int) -> Pattern:
        """|i - j| <= dilation * window / 2, (i - j) mod dilation = 0, or i or j global."""
        i, j = _positions(n)
        band = ((i - j).abs() <= self.dilation * self.window // 2) & ((i - j) % self.dilation == 0)
        at = torch.tensor(self.tokens, dtype=torch.long)
        return Pattern(band | torch.isin(i, at) | torch.isin(j, at))


@dataclass(frozen=True)
class BlockButterfly:
    """Flat block butterfly over blocks of b tokens; the first `first` tokens see and are seen by all.

    A matrix with g rows and g columns has rank 2g at most: the global part stands in for the low rank of weights.
    """

    moves: ClassVar[bool] = False
    block: int
    factors: int | None = None
    """k, strides 1, 2, ... 2^(k-1) blocks; None: all."""
    first: int = 0

    def __post_init__(self) -> None:
        _check(self, "block", lambda x: x > 0, "at least 1")
        _check(self, "first", lambda x: x >= 0, "at least 0")
        _check(self, "factors", lambda x: x is None or x >= 0, "at least 0")

    def __call__(self, n: int) -> Pattern:
        """Cut from the next power of two of blocks; what a shorter n sees is the corner of what a longer one does."""
        power = (-(-n // self.block) - 1).bit_length()
        cells = cells_of(neighbours(2**power, power if self.factors is None else min(self.factors, power)))
        i, j = _positions(n)
        return Pattern(_stretched(cells, self.block, n) | (i < self.first) | (j < self.first))


@dataclass(frozen=True)
class Union:
    """What any of several rules lets through, in one head."""

    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        _check_rules(self.rules)

    @property
    def moves(self) -> bool:
        """Whether any of them does; a rule that does not say may."""
        return any(getattr(rule, "moves", True) for rule in self.rules)

    def __call__(self, n: int) -> Pattern:
        """The union."""
        masks = torch.broadcast_tensors(*(rule(n).mask() for rule in self.rules))
        return Pattern(torch.stack(masks).any(0))


@dataclass(frozen=True)
class Heads:
    """A rule for each head."""

    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        _check_rules(self.rules)

    @property
    def moves(self) -> bool:
        """Whether any of them does; a rule that does not say may."""
        return any(getattr(rule, "moves", True) for rule in self.rules)

    def __call__(self, n: int) -> Pattern:
        """(H, n, n)."""
        masks = [rule(n).mask() for rule in self.rules]
        if any(mask.dim() != 2 for mask in masks):
            raise RecipeError("heads", "a rule that is itself one of several heads", "rules of one head each")
        return Pattern(torch.stack(masks))

    def order(self, n: int) -> Int[Tensor, "*H n"] | None:
        """Each head's own order, (H, n); (n,) where all have the same; None where no head has one."""
        found = [rule.order(n) if hasattr(rule, "order") else None for rule in self.rules]  # type: ignore[attr-defined]
        if all(order is None for order in found):
            return None
        orders = torch.stack([torch.arange(n) if order is None else order for order in found])
        return orders[0] if bool((orders == orders[0]).all()) else orders


def _positions(n: int) -> tuple[Int[Tensor, "n 1"], Int[Tensor, "1 n"]]:
    at = torch.arange(n)
    return at[:, None], at[None]


def _join(part: Part, first: Tensor, second: Tensor) -> Pattern:
    return Pattern({"first": first, "second": second, "both": first | second}[part])


def _stretched(layout: Bool[Tensor, "*lead N N"], block: int, n: int) -> Bool[Tensor, "*lead n n"]:
    return layout.repeat_interleave(block, -1).repeat_interleave(block, -2)[..., :n, :n]


def _check_rules(rules: tuple[Rule, ...]) -> None:
    if not rules or not all(callable(rule) for rule in rules):
        raise RecipeError(f"rules {rules}", "nothing to lay", "a tuple of rules, as (Local(128), Strided(64))")


def _check_part(part: str) -> None:
    if part not in ("both", "first", "second"):
        raise RecipeError(f"part {part!r}", "no such part of a Sparse Transformer", "both, first or second")
