"""Indirect object identification: two names, one of them said twice; which one comes last?

"When Mary and John went to the market, John gave an apple to" -> " Mary". Measured by logit(" Mary") - logit(" John").
The task is that of Wang et al. 2022, arXiv:2211.00593; sentences and words are our own.

Corruptions, all of which keep sentence, place and thing:

    abc          all three names become others, all different (Wang et al., ACDC)
    third_name   only the second mention of the subject becomes a third name (EAP-IG's `corrupted`)
    s2_io_flip   it becomes the other name, so the answer flips (MIB's default, EAP-IG's `corrupted_hard`)

Roles of tokens: IO and S1, the two names in either order; S2, the subject again; place, thing; END.
"""

import itertools
import random
from collections.abc import Iterator
from typing import Any

from fewedges.errors import DataError
from fewedges.explain.tasks.pairs import Pair, Span, build, single, spans
from fewedges.explain.tasks.prompts import Prompts

CORRUPTIONS = ("abc", "third_name", "s2_io_flip")
ORDERS = ("both", "baba", "abba")

TEMPLATES = (
    "When {a} and {b} went to the {place}, {s} gave a {thing} to",
    "After {a} and {b} arrived at the {place}, {s} handed a {thing} to",
    "While {a} and {b} were waiting at the {place}, {s} passed a {thing} to",
    "Yesterday {a} and {b} met at the {place}, and {s} sold a {thing} to",
    "Once {a} and {b} had left the {place}, {s} offered a {thing} to",
    "On Sunday {a} and {b} worked at the {place}, and {s} handed a {thing} to",
    "The friends {a} and {b} found a {thing} at the {place}. In the end {s} gave it to",
    "As soon as {a} and {b} reached the {place}, {s} gave a {thing} to",
    "Since {a} and {b} were bored at the {place}, {s} gave a {thing} to",
    "Last winter {a} and {b} often came to the {place}, where {s} once gave a {thing} to",
    "There was an argument between {a} and {b} at the {place}. Afterwards {s} gave a {thing} to",
    "Because {a} and {b} had a long day at the {place}, {s} offered a {thing} to",
    "In the evening {a} and {b} walked to the {place}. There {s} handed a {thing} to",
    "Before {a} and {b} closed the {place}, {s} gave a {thing} to",
    "Together {a} and {b} visited the {place}, and {s} passed a {thing} to",
)
"""{a} and {b} are the two names, {s} is the subject: the one that is said twice."""
PLACES = "market museum station library garden hotel beach farm theatre office".split()
THINGS = "book letter ring basket ticket camera drink map bottle coin".split()
NAMES = (
    "James John Robert Michael William David Richard Joseph Thomas Charles Daniel Matthew Anthony Mark Paul Steven "
    "Andrew George Kevin Edward Jason Ryan Jacob Eric Stephen Scott Benjamin Samuel Frank Patrick Jack Henry Adam "
    "Nathan Peter Walter Roger Arthur Sean Joe Bruce Roy Alan Simon Oliver Martin Max Tom Tim Jim Bob Dan Ben Sam "
    "Alex Luke Mary Jennifer Linda Elizabeth Barbara Susan Jessica Sarah Karen Lisa Nancy Margaret Emily Michelle "
    "Carol Amanda Melissa Rebecca Laura Helen Amy Angela Anna Ruth Nicole Katherine Christine Emma Rachel Maria "
    "Julie Victoria Kelly Olivia Martha Andrea Ann Alice Jane Hannah Julia Sara Kate Lucy Claire Marie Jenny"
).split()


def generate(tokenizer: Any, count: int, seed: int = 0, *, corruption: str = "abc", order: str = "both") -> Prompts:
    """Make `count` prompts. `order`: baba says the subject first, abba second; both takes them in turn.

    A template's two orders have one template number. DataError if fewer than 10 names are one token.
    """
    name = f"ioi ({corruption})"
    check_options(name, corruption, order)
    names = single(tokenizer, NAMES, 10, name=name)
    pairs = draw(random.Random(f"{name} {seed}"), names, corruption, order)
    return build(tokenizer, pairs, count, name=name, metric="logit_diff")


def check_options(name: str, corruption: str, order: str) -> None:
    """Raise DataError for a corruption or an order that there is not."""
    if corruption not in CORRUPTIONS:
        raise DataError(name, f"corruption {corruption!r}", f"one of {', '.join(CORRUPTIONS)}")
    if order not in ORDERS:
        raise DataError(name, f"order {order!r}", f"one of {', '.join(ORDERS)}")


def draw(source: random.Random, names: list[str], corruption: str, order: str) -> Iterator[Pair]:
    """Draw pairs without end: templates in a shuffled round, everything else at random."""
    templates = source.sample(range(len(TEMPLATES)), len(TEMPLATES))
    for number in itertools.count():
        template = templates[number % len(templates)]
        first = order == "baba" or (order == "both" and number // len(templates) % 2 == 0)
        words = {"place": source.choice(PLACES), "thing": source.choice(THINGS)}
        indirect, subject, *others = source.sample(names, 5)
        clean, corrupt = roles(indirect, subject, others, corruption)
        yield Pair(
            clean=sentence(TEMPLATES[template], *clean, first, words),
            corrupt=sentence(TEMPLATES[template], *corrupt, first, words),
            answers=(f" {indirect}",),
            wrong=(f" {subject}",),
            template=template,
            spans=spans_of(TEMPLATES[template], *clean, first, words),
        )


def roles(
    indirect: str, subject: str, others: list[str], corruption: str
) -> tuple[tuple[str, str, str], tuple[str, str, str]]:
    """(indirect object, subject, subject again) of the clean and of the corrupt prompt; `others` are 3 more names."""
    changed = {
        "abc": (others[0], others[1], others[2]),
        "third_name": (indirect, subject, others[0]),
        "s2_io_flip": (indirect, subject, indirect),
    }
    return (indirect, subject, subject), changed[corruption]


def sentence(template: str, indirect: str, subject: str, again: str, subject_first: bool, words: dict[str, str]) -> str:
    """Fill a template."""
    a, b = (subject, indirect) if subject_first else (indirect, subject)
    return template.format(a=a, b=b, s=again, **words)


def spans_of(
    template: str, indirect: str, subject: str, again: str, subject_first: bool, words: dict[str, str]
) -> tuple[Span, ...]:
    """Where the names stand in that sentence."""
    (a, first), (b, second) = ((subject, "S1"), (indirect, "IO"))[:: 1 if subject_first else -1]
    filled = {"a": a, "b": b, "s": again, **words}
    return spans(template, filled, {"a": first, "b": second, "s": "S2", "place": "place", "thing": "thing"})
