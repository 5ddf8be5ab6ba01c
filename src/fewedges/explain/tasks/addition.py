"""Two-digit addition, the task of the built-in model: which digit of the sum comes next?

"17+35=0" -> "5". Corrupt: one of the two numbers is another one, such that the digits already written stay the same
and the next one differs. Measured by the logit of the right digit less that of the corrupt sum's digit.

Roles of tokens, one a character: a10 a1 + b10 b1 = s100 s10; END is the last of them that is written.
"""

import random
from collections.abc import Iterator
from typing import Any

from fewedges.data.addition import split
from fewedges.errors import DataError
from fewedges.explain.tasks.pairs import Pair, Span, build
from fewedges.explain.tasks.prompts import Prompts

DIGITS = ("hundreds", "tens", "ones")
ROLES = ("a10", "a1", "+", "b10", "b1", "=", "s100", "s10")


def generate(tokenizer: Any, count: int, seed: int = 0, *, digit: str = "tens", held_out: bool = True) -> Prompts:
    """Make `count` prompts (at most 2,000 held out) that stop before a digit: hundreds, tens or ones.

    The clean problems are those the built-in model was not trained on, unless told otherwise. The template is the
    pair of numbers in either order.
    """
    if digit not in DIGITS:
        raise DataError("addition", f"digit {digit!r}", f"one of {', '.join(DIGITS)}")
    rows = split().held_out if held_out else split().train
    numbers = [(int(10 * r[1] + r[2]) - 11, int(10 * r[4] + r[5]) - 11) for r in rows.tolist()]
    name = f"addition ({digit})"
    pairs = draw(random.Random(f"{name} {seed}"), numbers, DIGITS.index(digit))
    return build(tokenizer, pairs, count, name=name, metric="logit_diff")


def draw(source: random.Random, numbers: list[tuple[int, int]], place: int) -> Iterator[Pair]:
    """Draw pairs in a random order of problems, each at most once; those that cannot be corrupted are left out."""
    for a, b in source.sample(numbers, len(numbers)):
        others = [(a, other) for other in range(100)] if source.random() < 0.5 else [(other, b) for other in range(100)]
        right = f"{a + b:03d}"
        sums = [(x, y, f"{x + y:03d}") for x, y in others]
        fitting = [x for x in sums if x[2][:place] == right[:place] and x[2][place] != right[place]]
        if not fitting:
            continue
        x, y, total = source.choice(fitting)
        yield Pair(
            clean=f"{a:02d}+{b:02d}={right[:place]}",
            corrupt=f"{x:02d}+{y:02d}={right[:place]}",
            answers=(right[place],),
            wrong=(total[place],),
            template=100 * min(a, b) + max(a, b),
            spans=tuple(Span(role, n, n + 1) for n, role in enumerate(ROLES[: 6 + place])),
        )
