"""IOI with a long lead-in: sentences that have nothing to do with the names stand before the IOI sentence.

Draye et al. 2025 (arXiv:2512.05865) report a task of this name. We could not read its definition: ours is the IOI
of `ioi.py` behind `clauses` sentences of our own, the same ones in the clean and the corrupt prompt. Compare ratios
between models, not numbers with theirs.
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fewedges.errors import DataError
from fewedges.explain.tasks import ioi
from fewedges.explain.tasks.pairs import Pair, Span, build, single
from fewedges.explain.tasks.prompts import Prompts

LEAD_INS = (
    "It had rained all night, and the streets were still wet.",
    "The newspaper said that summer would come late this year.",
    "A dog barked somewhere behind the old houses.",
    "Nobody knew why the clock on the tower had stopped.",
    "The train was late again, as it was on most days.",
    "Two birds sat on the roof and did not move.",
    "The bakery on the corner had just opened its doors.",
    "A cold wind blew from the river to the hills.",
    "The lights of the town went out one after another.",
    "For weeks there had been talk of a new bridge.",
    "The old road was closed because of the snow.",
    "Somebody had painted the fence green over the weekend.",
)


def generate(
    tokenizer: Any,
    count: int,
    seed: int = 0,
    *,
    clauses: int = 3,
    corruption: str = "abc",
    order: str = "both",
) -> Prompts:
    """Make `count` prompts, each behind `clauses` (0 to 12) different sentences drawn at random.

    The template number is that of the IOI sentence: halves of a split share lead-ins.
    """
    name = f"ioi_long ({corruption}, {clauses} clauses)"
    ioi.check_options(name, corruption, order)
    if not 0 <= clauses <= len(LEAD_INS):
        raise DataError(name, f"clauses {clauses}", f"0 to {len(LEAD_INS)}")
    names = single(tokenizer, ioi.NAMES, 10, name=name)
    source = random.Random(f"{name} {seed}")
    pairs = behind(source, ioi.draw(source, names, corruption, order), clauses)
    return build(tokenizer, pairs, count, name=name, metric="logit_diff")


def behind(source: random.Random, pairs: Iterator[Pair], clauses: int) -> Iterator[Pair]:
    """Put the same lead-in before both prompts of every pair."""
    for pair in pairs:
        lead = "".join(f"{clause} " for clause in source.sample(LEAD_INS, clauses))
        spans = tuple(Span(role, start + len(lead), end + len(lead)) for role, start, end in pair.spans)
        yield replace(pair, clean=lead + pair.clean, corrupt=lead + pair.corrupt, spans=spans)
