"""From pairs of texts to tokens, with any tokenizer: what a tokenizer cannot say in the way a task needs is left out.

A text is written as the tokenizer writes it by itself: with a beginning-of-text token where it puts one, else
without (`Prompts.with_start` adds one). A word counts as one token if it adds one token to the text before it.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any, NamedTuple

import torch

from fewedges.errors import DataError
from fewedges.explain.tasks.prompts import Metric, Prompts

PATIENCE = 50  # pairs drawn for each one asked for, before a task gives up
AT_ONCE = 64  # pairs written as tokens together


class Span(NamedTuple):
    """A part of the clean text that has a role in the task: characters `start` to `end`."""

    role: str
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One prompt before it is tokens. Answers and wrong ones are texts that go on after `clean`, or token ids."""

    clean: str
    corrupt: str
    answers: tuple[str | int, ...]
    wrong: tuple[str | int, ...]
    template: int = 0
    spans: tuple[Span, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The same as tokens."""

    clean: list[int]
    corrupt: list[int]
    answers: tuple[int, ...]
    wrong: tuple[int, ...]


def build(tokenizer: Any, draws: Iterator[Pair], count: int, *, name: str, metric: Metric) -> Prompts:
    """Draw pairs until `count` different ones can be written as tokens.

    A pair is left out if its prompts are the same or have different numbers of tokens, or if an answer or wrong
    word is not one token. DataError, with the reason found most often, if that leaves too few.
    """
    asked = f"{count} prompts of {name}"
    if count < 1:
        raise DataError(asked, "nothing to draw", "a count of at least 1")
    kept: dict[tuple[str, str], tuple[Pair, Tokens]] = {}
    reasons: Counter[str] = Counter()
    draws = itertools.islice(draws, PATIENCE * count + 1000)
    while len(kept) < count and (some := list(itertools.islice(draws, AT_ONCE))):
        for pair, found in zip(some, tokens_of(tokenizer, some), strict=True):
            if isinstance(found, str):
                reasons[found] += 1
            elif len(kept) < count:
                kept.setdefault((pair.clean, pair.corrupt), (pair, found))
    if len(kept) < count:
        why = f"; most often {reasons.most_common(1)[0][0]}" if reasons else ""
        raise DataError(asked, f"only {len(kept)} can be written with this tokenizer{why}", "fewer, or another task")
    return stack(tokenizer, kept.values(), name=name, metric=metric)


def stack(tokenizer: Any, pairs: Iterable[tuple[Pair, Tokens]], *, name: str, metric: Metric) -> Prompts:
    """Put pairs and their tokens together, padded on the right."""
    texts, tokens = zip(*pairs, strict=True)
    filler = next((x for x in (tokenizer.pad_token_id, tokenizer.eos_token_id) if x is not None), 0)
    return Prompts(
        name=name,
        metric=metric,
        clean=padded([one.clean for one in tokens], filler),
        corrupt=padded([one.corrupt for one in tokens], filler),
        last=torch.tensor([len(one.clean) - 1 for one in tokens]),
        answers=tuple(one.answers for one in tokens),
        wrong=tuple(one.wrong for one in tokens),
        template=tuple(pair.template for pair in texts),
        texts=tuple((pair.clean, pair.corrupt) for pair in texts),
        roles=roles_of(tokenizer, texts, tokens),
    )


def roles_of(tokenizer: Any, pairs: Sequence[Pair], tokens: Sequence[Tokens]) -> tuple[tuple[str, ...], ...]:
    """The role of each token of the clean prompts: a span names the first token that holds some of it.

    () if no pair has spans, or if the tokenizer cannot say where its tokens stand in a text (those written in Python).
    """
    if not any(pair.spans for pair in pairs) or not tokenizer.is_fast:
        return ()
    texts = [pair.clean for pair in pairs]
    written = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    found = []
    for pair, one, places in zip(pairs, tokens, written, strict=True):
        roles = [""] * len(one.clean)
        start = len(one.clean) - len(places)  # a beginning-of-text token
        for span in pair.spans:
            inside = [n for n, (first, end) in enumerate(places) if first < span.end and end > span.start]
            for n in inside[:1]:
                roles[start + n] = span.role
        found.append(tuple(roles))
    return tuple(found)


def spans(template: str, words: Mapping[str, Any], roles: Mapping[str, str]) -> tuple[Span, ...]:
    """Where the fields of a template stand in the text that `template.format(**words)` gives; field -> role."""
    found, place = [], 0
    for literal, name, _, _ in Formatter().parse(template):
        place += len(literal)
        if name is not None:
            end = place + len(str(words[name]))
            found += [Span(roles[name], place, end)] if name in roles else []
            place = end
    return tuple(found)


def padded(rows: Sequence[list[int]], filler: int) -> torch.Tensor:
    """Stack lists of tokens, filled up on the right."""
    width = max(map(len, rows))
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows])


def tokens_of(tokenizer: Any, pairs: Sequence[Pair]) -> list[Tokens | str]:
    """Write each pair as tokens, or say why it cannot be."""
    texts = [text for pair in pairs for text in (pair.clean, pair.corrupt, *endings(pair))]
    written = iter(encode(tokenizer, texts))
    return [_tokens(tokenizer, pair, written) for pair in pairs]


def endings(pair: Pair) -> list[str]:
    """The clean prompt with each answer and wrong word that is given as text."""
    return [pair.clean + end for end in (*pair.answers, *pair.wrong) if isinstance(end, str)]


def _tokens(tokenizer: Any, pair: Pair, written: Iterator[list[int]]) -> Tokens | str:
    """Take a pair's texts off `written`, all of them, and judge them."""
    clean, corrupt = next(written), next(written)
    sides = [_ends(clean, side, written) for side in (pair.answers, pair.wrong)]
    answers, wrong = (tuple(dict.fromkeys(id for id in side if id is not None)) for side in sides)
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in (*clean, *corrupt, *answers, *wrong):
        return "a word is unknown"
    if len(clean) != len(corrupt):
        return "clean and corrupt differ in their number of tokens"
    if clean == corrupt:
        return "clean and corrupt are the same"
    if None in sides[0] + sides[1]:
        return "an answer or a wrong word is not one token"
    if not clean or not answers or not wrong or set(answers) & set(wrong):
        return "no token tells an answer from a wrong word"
    return Tokens(clean=clean, corrupt=corrupt, answers=answers, wrong=wrong)


def _ends(clean: list[int], side: Sequence[str | int], written: Iterator[list[int]]) -> list[int | None]:
    return [end if isinstance(end, int) else added(clean, next(written)) for end in side]


def added(before: list[int], after: list[int]) -> int | None:
    """The one token that `after` has more than `before`; None if it is not one, or if others changed."""
    return after[-1] if after[:-1] == before else None


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Texts as tokens, after the beginning-of-text token if the tokenizer puts one by itself; nothing at the end."""
    try:
        start = tokenizer("")["input_ids"][:1]
        start = start if start == [tokenizer.bos_token_id] else []
        return [start + ids for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    except Exception as error:  # the tokenizers package raises Exception itself
        found = f"the tokenizer cannot write it as tokens ({error})"
        raise DataError(f"text such as {texts[0]!r}", found, "a task in the characters this model knows") from error


def single(tokenizer: Any, words: Sequence[str], least: int, *, name: str) -> list[str]:
    """The words that are one token after a space. DataError if there are fewer than `least`."""
    before, *texts = encode(tokenizer, ["the", *(f"the {word}" for word in words)])
    unknown = tokenizer.unk_token_id
    tokens = [added(before, text) for text in texts]
    found = [word for word, token in zip(words, tokens, strict=True) if token is not None and token != unknown]
    if len(found) < least:
        shown = f"{len(found)} of {len(words)} words are one token of this tokenizer, such as {words[0]!r} should be"
        raise DataError(name, shown, f"a tokenizer with at least {least} of them, or another task")
    return found
