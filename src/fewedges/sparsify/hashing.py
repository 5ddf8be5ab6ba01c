"""Reformer attention: tokens attend within their hash bucket (Kitaev et al. 2020, arXiv:2001.04451).

Queries and keys are one vector each. In every round a random rotation R hashes it to argmax [x R; -x R]; tokens are
sorted by bucket and cut into chunks of m; a token looks at its own chunk and the one before. What it may attend to
there, as the paper defines it (section 2, equation 6): keys of its own bucket, not later, not itself unless nothing
else is left; a key found in several rounds counts once. Then the result is exactly the softmax over the union of
what the rounds found: `lsh_pattern` is that union, the slow reference.

The published programs (trax, transformers) leave two of these out: they attend to other buckets in the two chunks,
and count a key once for every round; and the first chunk of a round looks back into the round before.
`published_lsh_attention` is that variant.

Shapes: B batch, H head, n tokens, E head width; r rounds, b buckets, m chunk, c = r n / m chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fewedges.errors import RecipeError
from fewedges.sparsify.pattern import Pattern

ITSELF = -1e5
"""Score of a token for itself: it counts only where there is nothing else."""


def rotations(
    heads: int, width: int, rounds: int, buckets: int | Sequence[int], seed: int = 0
) -> Float[Tensor, "H E r half"]:
    """Random rotations, standard normal; half a column a bucket, for factorised buckets of all factors together."""
    factors = _factors(buckets)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(heads, width, rounds, sum(factors) // 2, generator=generator)


def hash_buckets(
    x: Float[Tensor, "B H n E"], rotation: Float[Tensor, "H E r half"], buckets: int | Sequence[int]
) -> Int[Tensor, "B H r n"]:
    """The bucket of every token in every round: argmax [x R; -x R] (Andoni et al. 2015, arXiv:1509.02897).

    With buckets (b1, b2) two hashes of b1 and b2 buckets are combined to h1 + b1 h2, for many buckets at little cost.
    """
    rotated = torch.einsum("bhne,hers->bhrns", x.detach(), rotation.to(x))
    factors, total, size = _factors(buckets), torch.zeros((), dtype=torch.long, device=x.device), 1
    if rotated.shape[-1] != sum(factors) // 2:
        found = f"rotations of {rotated.shape[-1]} columns"
        raise RecipeError(f"hash to {buckets} buckets", found, "rotations(...) for the same buckets")
    for part, factor in zip(rotated.split([f // 2 for f in factors], -1), factors, strict=True):
        total = total + size * torch.cat([part, -part], -1).argmax(-1)
        size *= factor
    return total


def suggested_buckets(n: int, chunk: int) -> int:
    """2 n / m, brought down to a power of two: half a chunk a bucket, on average. At least the 2 of one rotation."""
    if min(n, chunk) < 1:
        raise RecipeError("suggested buckets", f"{n} tokens in chunks of {chunk}", "1 or more of each")
    return 2 ** max(1, (2 * n // chunk).bit_length() - 1)


def lsh_attention(
    x: Float[Tensor, "B H n E"],
    value: Float[Tensor, "B H n E"],
    buckets: Int[Tensor, "B H r n"],
    chunk: int,
    *,
    causal: bool = True,
    real: Bool[Tensor, "B n"] | None = None,
) -> Float[Tensor, "B H n E"]:
    """Attend as the paper defines it, in time and memory n r m: the softmax over `lsh_pattern`.

    `x` is query and key in one; keys are scaled to length 1 (so there is no 1 / sqrt(E)). `real` is False for
    padding, which is no key. n must be a multiple of the chunk.
    """
    found = _found(buckets, chunk)
    scores = _scores(x, found)
    mine = _allowed(found, causal, real) & (found.bucket[..., :, None] == found.key_bucket[..., None, :])
    mine[:, :, :: x.shape[-2] // chunk, :, :chunk] = False  # before the first chunk of a round there is none
    scores = scores - _times_found(buckets, found, chunk).to(scores.dtype).log()  # a key of many rounds counts once
    return _combined(scores.masked_fill(~mine, -torch.inf), value, found)


def published_lsh_attention(
    x: Float[Tensor, "B H n E"],
    value: Float[Tensor, "B H n E"],
    buckets: Int[Tensor, "B H r n"],
    chunk: int,
    *,
    causal: bool = True,
    real: Bool[Tensor, "B n"] | None = None,
) -> Float[Tensor, "B H n E"]:
    """Attend as trax and transformers do: to all of the two chunks, whatever its bucket, once for every round."""
    found = _found(buckets, chunk)
    scores = _scores(x, found).masked_fill(~_allowed(found, causal, real), -torch.inf)
    return _combined(scores, value, found)


def lsh_pattern(
    buckets: Int[Tensor, "B H r n"], chunk: int, *, causal: bool = True, real: Bool[Tensor, "B n"] | None = None
) -> Pattern:
    """What the paper's attention sees, (B, H, n, n): in any round the same bucket and the same chunk or the one before.

    The diagonal is kept only where a query sees nothing else.
    """
    place = _places(buckets) // chunk  # (B, H, r, n): each token's chunk
    behind = place[..., :, None] - place[..., None, :]
    seen = (buckets[..., :, None] == buckets[..., None, :]) & (behind >= 0) & (behind <= 1)
    seen = seen.any(-3)  # (B, H, n, n)
    seen = seen.tril() if causal else seen
    seen = seen if real is None else seen & real[:, None, None]
    itself = torch.eye(seen.shape[-1], dtype=torch.bool, device=seen.device)
    alone = ~(seen & ~itself).any(-1, keepdim=True)
    return Pattern(torch.where(itself, alone, seen))


@dataclass(frozen=True)
class HashedAttention:
    """A router for `attending.attend_`: a pretrained model's queries see the keys of their own bucket in any round.

    Query and key are two vectors here, both hashed by the same rotations; no chunks limit a bucket. Every query
    sees itself. This prunes a model trained dense; it is not what Reformer trains.
    """

    buckets: int
    rounds: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        _factors(self.buckets)
        if self.rounds < 1:
            raise RecipeError("rounds", repr(self.rounds), "1 or more")

    def route(
        self, query: Float[Tensor, "B H Q E"], key: Float[Tensor, "B H K E"], allowed: Bool[Tensor, "B 1 Q K"]
    ) -> Pattern:
        """The pattern of these queries and keys, (B, H, Q, K); `allowed` tells each query's own position."""
        rotation = rotations(query.shape[1], query.shape[-1], self.rounds, self.buckets, self.seed)
        asks, offers = (hash_buckets(x.float(), rotation.to(x.device), self.buckets) for x in (query, key))
        same = (asks[..., :, None] == offers[..., None, :]).any(-3)
        last = allowed.shape[-1] - 1 - allowed.flip(-1).int().argmax(-1, keepdim=True)  # (B, 1, Q, 1)
        return Pattern(same | (torch.arange(allowed.shape[-1], device=same.device) == last))


class _Found(NamedTuple):
    """Tokens in sorted order, in chunks, with what each chunk looks at."""

    token: Int[Tensor, "B H c m"]
    """Position of each query."""
    bucket: Int[Tensor, "B H c m"]
    """Its bucket, numbered through all rounds."""
    key: Int[Tensor, "B H c 2*m"]
    """Positions of the keys: the chunk before, then its own."""
    key_bucket: Int[Tensor, "B H c 2*m"]
    place: Int[Tensor, "B H rn"]
    """Where each token of each round sits in the sorted order."""


def _places(buckets: Int[Tensor, "B H r n"]) -> Int[Tensor, "B H r n"]:
    """Each token's place when a round is sorted by bucket, then position."""
    return buckets.argsort(dim=-1, stable=True).argsort(-1)


def _found(buckets: Int[Tensor, "B H r n"], chunk: int) -> _Found:
    n, rounds = buckets.shape[-1], buckets.shape[-2]
    if chunk < 1 or n % chunk:
        raise RecipeError(f"chunks of {chunk}", f"{n} tokens are not a multiple", "padding to a multiple")
    order = buckets.argsort(dim=-1, stable=True)  # (B, H, r, n)
    through = buckets + buckets.amax().add(1) * torch.arange(rounds, device=buckets.device)[:, None]
    token = order.flatten(-2).unflatten(-1, (-1, chunk))
    bucket = through.gather(-1, order).flatten(-2).unflatten(-1, (-1, chunk))
    place = order.argsort(-1) + n * torch.arange(rounds, device=buckets.device)[:, None]
    return _Found(token, bucket, _with_previous(token), _with_previous(bucket), place.flatten(-2))


def _with_previous(x: Int[Tensor, "B H c m"]) -> Int[Tensor, "B H c 2*m"]:
    """Each chunk after the one before it; the first looks back at the last, as the published programs do."""
    return torch.cat([x.roll(1, -2), x], -1)


def _scores(x: Float[Tensor, "B H n E"], found: _Found) -> Float[Tensor, "B H c m 2*m"]:
    """q k / |k|, and ITSELF where a token meets itself."""
    key = torch.nn.functional.normalize(x, dim=-1)
    scores = _taken(x, found.token) @ _taken(key, found.key).transpose(-1, -2)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    return scores.masked_fill(found.token[..., :, None] == found.key[..., None, :], ITSELF)


def _allowed(found: _Found, causal: bool, real: Tensor | None) -> Bool[Tensor, "B H c m 2*m"]:
    query, key = found.token[..., :, None], found.key[..., None, :]
    allowed = key <= query if causal else torch.ones_like(key <= query)
    if real is not None:
        flat = real[:, None].expand(-1, key.shape[1], -1)
        known = flat.gather(-1, found.key.flatten(2)).view_as(found.key)
        allowed = allowed & (known[..., None, :] | (query == key))
    return allowed


def _times_found(buckets: Int[Tensor, "B H r n"], found: _Found, chunk: int) -> Int[Tensor, "B H c m 2*m"]:
    """In how many rounds each query meets each of its keys: N_ij of the paper; at least 1 where it counts."""
    chunks = _places(buckets) // chunk
    times = torch.zeros((), dtype=torch.long, device=buckets.device)
    for round_ in range(buckets.shape[-2]):
        mine, theirs = (_taken_one(buckets[:, :, round_], at) for at in (found.token, found.key))
        here, there = (_taken_one(chunks[:, :, round_], at) for at in (found.token, found.key))
        behind = here[..., :, None] - there[..., None, :]
        times = times + ((mine[..., :, None] == theirs[..., None, :]) & (behind >= 0) & (behind <= 1))
    return times.clamp(min=1)


def _combined(
    scores: Float[Tensor, "B H c m 2*m"], value: Float[Tensor, "B H n E"], found: _Found
) -> Float[Tensor, "B H n E"]:
    """Softmax in each round, back to the order of the text, rounds weighted by the softmax of their logsumexp."""
    total = scores.logsumexp(-1, keepdim=True)  # (B, H, c, m, 1)
    output = torch.softmax(scores, -1).to(value.dtype) @ _taken(value, found.key)  # (B, H, c, m, E)
    n = value.shape[-2]
    output = _taken_flat(output.flatten(2, 3), found.place).unflatten(2, (-1, n))  # (B, H, r, n, E)
    total = _taken_flat(total.flatten(2, 3), found.place).unflatten(2, (-1, n))
    return (output * torch.softmax(total, 2).to(output.dtype)).sum(2)


def _taken(x: Float[Tensor, "B H n E"], at: Int[Tensor, "B H c k"]) -> Float[Tensor, "B H c k E"]:
    return _taken_flat(x, at.flatten(2)).unflatten(2, at.shape[2:])


def _taken_flat(x: Float[Tensor, "B H n E"], at: Int[Tensor, "B H k"]) -> Float[Tensor, "B H k E"]:
    return x.gather(2, at[..., None].expand(-1, -1, -1, x.shape[-1]))


def _taken_one(x: Int[Tensor, "B H n"], at: Int[Tensor, "B H c k"]) -> Int[Tensor, "B H c k"]:
    return x.gather(-1, at.flatten(2)).view_as(at)


def _factors(buckets: int | Sequence[int]) -> list[int]:
    factors = [buckets] if isinstance(buckets, int) else list(buckets)
    if not factors or any(f < 2 or f % 2 for f in factors):
        raise RecipeError(f"{buckets} buckets", "a rotation and its negative give two each", "even numbers")
    return factors
