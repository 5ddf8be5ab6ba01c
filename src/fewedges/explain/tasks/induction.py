"""Induction: random tokens that begin anew go on as before.

x1 x2 ... xn x1 ... xk -> x(k+1). After Elhage et al. 2021 ("A mathematical framework for transformer circuits") and
Olsson et al. 2022, arXiv:2209.11895. Corrupt: x(k+1) is another token y, so that the answer flips to y, by a change
of a single token. Measured by logit(x(k+1)) - logit(y).
"""

import random
from typing import Any

from fewedges.errors import DataError
from fewedges.explain.tasks.pairs import Pair, Tokens, encode, stack
from fewedges.explain.tasks.prompts import Prompts


def generate(tokenizer: Any, count: int, seed: int = 0, *, length: int = 20) -> Prompts:
    """Make `count` prompts of `length` different random tokens, then at least half of them again.

    Special tokens are left out. Every prompt is its own template. The texts are for the eye: written as tokens
    again they may become others.
    """
    name = f"induction ({length})"
    vocabulary = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    if length < 3 or len(vocabulary) <= length or count < 1:
        found = f"{count} prompts of {length} different tokens, out of {len(vocabulary)}"
        raise DataError(name, found, "a count of at least 1, a length of at least 3, and below the vocabulary")
    source = random.Random(f"{name} {seed}")
    (start,) = encode(tokenizer, [""])
    rows = [pair(tokenizer, source, vocabulary, length, start, number) for number in range(count)]
    return stack(tokenizer, rows, name=name, metric="logit_diff")


def pair(
    tokenizer: Any, source: random.Random, vocabulary: list[int], length: int, start: list[int], number: int
) -> tuple[Pair, Tokens]:
    """Draw one prompt as text and as tokens."""
    *tokens, other = source.sample(vocabulary, length + 1)
    again = source.randrange(length // 2, length)
    answer = tokens[again]
    changed = [other if token == answer else token for token in tokens]
    clean, corrupt = ([*start, *first, *tokens[:again]] for first in (tokens, changed))
    right, wrong = (answer,), (other,)
    before, after = tokenizer.decode(clean), tokenizer.decode(corrupt)
    texts = Pair(clean=before, corrupt=after, answers=right, wrong=wrong, template=number)
    return texts, Tokens(clean=clean, corrupt=corrupt, answers=right, wrong=wrong)
