"""Docstring completion: which argument of the function is described next?

    def load(self, file, mode, size, index, name, flag):
        \"""turn small box

        :param size: warm light
        :param index: old key
        :param                        -> " name"

After Heimersheim and Janiak 2023 ("A circuit for Python docstrings in a 4-layer attention-only transformer"); all
words are our own. Corrupt (their random_random): the three described arguments get other names in the definition,
and the two in the docstring get yet others. Measured by the logit of the right name less the largest logit of any
other argument name in either prompt.

Roles of tokens: A, B, C, the three arguments in the definition; A doc and B doc in the docstring; END.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fewedges.errors import DataError
from fewedges.explain.tasks.pairs import Pair, Span, build, single
from fewedges.explain.tasks.prompts import Prompts


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a function is written: arguments before and after the three that matter, and what marks a description."""

    marker: str
    before: int
    after: int


LAYOUTS = (
    Layout(marker=":param", before=2, after=1),  # the published one
    Layout(marker="@param", before=2, after=1),
    Layout(marker=":param", before=1, after=1),
    Layout(marker="@param", before=1, after=2),
    Layout(marker=":param", before=1, after=2),
    Layout(marker="@param", before=1, after=1),
)
METHODS = "load save read write open close send run build test check update create start stop parse find sort".split()
ARGUMENTS = (
    "file mode size index name flag data key value path text line color width height depth level count limit offset "
    "start end first last left right source target input output parent child node tree graph table row column cell "
    "page block frame image model user group role token number label title url port host time date day year state "
    "status result error message event action filter format style type shape scale weight rate score point length "
    "order version option field item list set map array string buffer stream queue command query option test"
).split()
WORDS = (
    "small box warm light old key cold water green tree long road big house dark room white stone fast car high hill "
    "new bridge soft voice red door quiet street young horse deep sea dry land open window heavy chair round ball "
    "short story bright star early train clean shirt full glass blue sky strong wind sharp knife"
).split()


def generate(tokenizer: Any, count: int, seed: int = 0, *, layouts: Sequence[int] | None = None) -> Prompts:
    """Make `count` prompts in the layouts of these numbers (None: all 6; the published one is 0).

    The layout is the template that halves of a split do not share.
    """
    chosen = list(range(len(LAYOUTS))) if layouts is None else list(layouts)
    if not chosen or not set(chosen) <= set(range(len(LAYOUTS))):
        raise DataError("docstring", f"layouts {chosen}", f"some of 0 to {len(LAYOUTS) - 1}")
    names = single(tokenizer, list(dict.fromkeys(ARGUMENTS)), 20, name="docstring")
    pairs = draw(random.Random(f"docstring {seed}"), names, chosen)
    return build(tokenizer, pairs, count, name="docstring", metric="max_diff")


def draw(source: random.Random, names: list[str], layouts: list[int]) -> Iterator[Pair]:
    """Draw pairs without end: layouts in turn, all names of a pair different."""
    for number in itertools.count():
        layout = LAYOUTS[template := layouts[number % len(layouts)]]
        taken = iter(source.sample(names, 8 + layout.before + layout.after))
        around = [list(itertools.islice(taken, size)) for size in (layout.before, layout.after)]
        clean, others, documented = (list(itertools.islice(taken, size)) for size in (3, 3, 2))
        method, words = source.choice(METHODS), source.sample(WORDS, 7)
        yield Pair(
            clean=function(layout, around, clean, clean[:2], method, words),
            corrupt=function(layout, around, others, documented, method, words),
            answers=(f" {clean[2]}",),
            wrong=tuple(f" {name}" for name in (*clean[:2], *around[0], *around[1], *others, *documented)),
            template=template,
            spans=spans_of(layout, around, clean, method, words),
        )


def function(
    layout: Layout,
    around: list[list[str]],
    defined: list[str],
    documented: list[str],
    method: str,
    words: Sequence[str],
) -> str:
    """Write the function up to the mark where the next argument name follows."""
    arguments = ", ".join(["self", *around[0], *defined, *around[1]])
    one, two = (f"    {layout.marker} {name}: " for name in documented)
    return (
        f'\ndef {method}({arguments}):\n    """{" ".join(words[:3])}\n\n'
        f"{one}{' '.join(words[3:5])}\n{two}{' '.join(words[5:7])}\n    {layout.marker}"
    )


def spans_of(
    layout: Layout, around: list[list[str]], defined: list[str], method: str, words: Sequence[str]
) -> tuple[Span, ...]:
    """Where the three arguments stand in the definition, and the first two in the docstring."""
    text = function(layout, around, defined, defined[:2], method, words)
    place = text.index("(self") + len(", ".join(["(self", *around[0]]))
    found = []
    for role, name in zip("ABC", defined, strict=True):
        found.append(Span(role, place + 2, place + 2 + len(name)))
        place += 2 + len(name)
    for role, name in zip("AB", defined, strict=False):
        start = text.index(f"    {layout.marker} {name}:") + len(f"    {layout.marker} ")
        found.append(Span(f"{role} doc", start, start + len(name)))
    return tuple(found)
