"""Greater Than: a thing that began in 1732 cannot have ended before; which year comes next?

"The war lasted from the year 1732 to the year 17" -> "33" or later. After Hanna et al. 2023, arXiv:2305.00586; the
words are our own. Corrupt: the same with 01 for the first year's last two digits. Measured by the probability of
all tokens that can come next less that of all that cannot, which depends on how the tokenizer writes a year:

    two digits a token (GPT-2)         answers 33 ... 99, wrong 00 ... 32
    one digit a token (SmolLM2, Qwen)  the tens digit: answers 3 ... 9, with which a later year can still be
                                       written; wrong 0 ... 2, with which none can (from a year such as 1739 on,
                                       3 is wrong too: no year after 1739 begins with 173)

Both are exact: an answer is a token that some later year of the century goes on with, a wrong token is a number that
none does. Years have tens digit 2 or more, so that 01 is another decade, and end at 98. Tokenizers with three digits
a token (Llama 3) cannot express the task.

Roles of tokens: noun; XX and YY, the first year's century and its last two digits; XX2, the century again; END.
"""

import itertools
import random
from collections.abc import Iterator
from typing import Any

from fewedges.errors import DataError
from fewedges.explain.tasks.pairs import Pair, Span, build, encode, spans
from fewedges.explain.tasks.prompts import Prompts

TEMPLATES = (
    "The {noun} lasted from the year {start} to the year {century}",
    "The {noun} began in the year {start} and ended in the year {century}",
    "The {noun} that started in {start} was not over until {century}",
    "The {noun} went on from {start} until the year {century}",
    "People remember the {noun}, which lasted from {start} to {century}",
    "The {noun} of the years {start} to {century}",
)
NOUNS = (
    "war siege drought famine plague revolt rebellion reign project strike trial journey expedition campaign treaty "
    "truce dispute boom crisis building restoration exile marriage partnership lease voyage alliance conflict "
    "blockade occupation uprising migration mission study tour search survey truce feud quest"
).split()
CENTURIES = range(11, 20)
YEARS = range(20, 99)
FEWEST = 20  # years a tokenizer must be able to write

Labels = dict[int, tuple[tuple[int, ...], tuple[int, ...]]]
"""Per year: answers and wrong tokens."""


def generate(tokenizer: Any, count: int, seed: int = 0) -> Prompts:
    """Make `count` prompts. DataError if the tokenizer writes years neither by one nor by two digits a token."""
    years, size = spelled(tokenizer)
    name = f"greater_than ({'two digits' if size == 2 else 'tens digit'})"
    pairs = draw(random.Random(f"{name} {seed}"), years, labels_of(tokenizer, size))
    return build(tokenizer, pairs, count, name=name, metric="prob_diff")


def draw(source: random.Random, years: list[tuple[int, int]], labels: Labels) -> Iterator[Pair]:
    """Draw pairs without end: templates in a shuffled round, everything else at random."""
    templates = source.sample(range(len(TEMPLATES)), len(TEMPLATES))
    for number in itertools.count():
        template = templates[number % len(templates)]
        century, year = source.choice(years)
        words = {"noun": source.choice(NOUNS), "century": century, "start": f"{century}{year:02d}"}
        answers, wrong = labels[year]
        yield Pair(
            clean=TEMPLATES[template].format(**words),
            corrupt=TEMPLATES[template].format(**{**words, "start": f"{century}01"}),
            answers=answers,
            wrong=wrong,
            template=template,
            spans=spans_of(TEMPLATES[template], words),
        )


def spans_of(template: str, words: dict[str, Any]) -> tuple[Span, ...]:
    """Where noun, years and century stand in a prompt; a year is two spans."""
    found = spans(template, words, {"noun": "noun", "start": "XX", "century": "XX2"})
    return (*found, *(Span("YY", end - 2, end) for role, _, end in found if role == "XX"))


def labels_of(tokenizer: Any, size: int) -> Labels:
    """For each year: the tokens of `size` digits that can come next, and those that cannot."""
    span = 10 ** (2 - size)  # years that go on with one token
    ids = [token(tokenizer, f"{number:0{size}d}") for number in range(10**size)]
    known = [(number, id) for number, id in enumerate(ids) if id is not None]
    if len(known) < len(ids):
        found = f"{len(ids) - len(known)} numbers of {size} digits are not one token"
        raise DataError("greater_than", found, "another task, or another tokenizer")
    labels = {}
    for year in range(100):
        latest = {id: span * number + span - 1 for number, id in known}
        right = tuple(id for id, last in latest.items() if last > year)
        labels[year] = right, tuple(id for id in latest if id not in right)
    return labels


def spelled(tokenizer: Any) -> tuple[list[tuple[int, int]], int]:
    """The (century, year) that this tokenizer writes in the way the task needs, and its digits per token."""
    pairs = list(itertools.product(CENTURIES, (1, *YEARS)))
    written = encode(tokenizer, [f"the year {c}{end}" for c, y in pairs for end in ("", f"{y:02d}")])
    both = zip(pairs, written[::2], written[1::2], strict=True)
    ends = {pair: after[len(before) :] for pair, before, after in both if after[: len(before)] == before}
    for size in (2, 1):
        fits = {pair for pair, end in ends.items() if end == spelling(tokenizer, pair[1], size)}
        years = [(c, y) for c, y in pairs if y in YEARS and {(c, y), (c, 1)} <= fits]
        if len(years) >= FEWEST:
            return years, size
    found = "this tokenizer writes a year neither as century and two digits nor digit by digit"
    raise DataError("greater_than", found, "another task, or a tokenizer such as those of GPT-2, SmolLM2 or Qwen")


def spelling(tokenizer: Any, year: int, size: int) -> list[int | None]:
    """The tokens of a year's last two digits, `size` digits each; None for one that there is not."""
    text = f"{year:02d}"
    return [token(tokenizer, text[place : place + size]) for place in range(0, 2, size)]


def token(tokenizer: Any, text: str) -> int | None:
    """The token that is this text, if there is one."""
    found = tokenizer.convert_tokens_to_ids(text)
    return None if found == tokenizer.unk_token_id else found
