"""Prompts from a file: a user's own pairs, and those of EAP-IG, MIB and auto-circuit.

A row is a line of a .csv or .jsonl, or an entry of a .json list (or of its `prompts`). Its columns say whose it is:

    clean, corrupt, answers, wrong         our own. Lists of texts that go on after `clean`, such as " Mary"; in a
                                           csv, texts with | between. `answer_ids`, `wrong_ids`: token ids instead.
                                           `wrong_answers` (auto-circuit) is `wrong`. `template` may be there.
    clean, corrupted, correct_idx,         EAP-IG's IOI: token ids of one model's tokenizer, which is not checked.
        incorrect_idx                      `corrupted_hard` by corrupt="corrupted_hard".
    clean, corrupted, label                EAP-IG's Greater Than: the year's last two digits; `correct_idx` alone too.
    prompt, choices, answerKey,            MIB's IOI: another choice than the answer is wrong; of a word with several
        <name>_counterfactual              tokens the first counts. corrupt="abc" etc.; by default s2_io_flip.

A row that cannot be used is an error that names it, unless `skip` leaves such rows out (and logs how many).
"""

import csv
import json
import logging
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from fewedges.errors import DataError
from fewedges.explain.tasks import greater_than
from fewedges.explain.tasks.pairs import Pair, encode, stack, tokens_of
from fewedges.explain.tasks.prompts import Metric, Prompts

log = logging.getLogger(__name__)

KINDS = (".csv", ".jsonl", ".json")
COUNTERFACTUAL = "_counterfactual"
KNOWN = "clean, corrupt, answers, wrong; or the columns of EAP-IG or MIB's IOI"
Row = Mapping[str, Any]


def is_file(task: str | Path) -> bool:
    """Whether this names a file of prompts rather than a task."""
    return isinstance(task, Path) or str(task).endswith(KINDS)


def generate(
    tokenizer: Any,
    count: int | None = None,
    seed: int = 0,
    *,
    path: str | Path,
    corrupt: str | None = None,
    metric: Metric | None = None,
    skip: bool = False,
) -> Prompts:
    """Read a file: all rows, or `count` of them drawn at random by `seed`, in the file's order.

    `corrupt` names the column (EAP-IG) or the counterfactual (MIB). The metric is logit_diff unless given, and
    prob_diff for years. Without a `template` column every row is its own template.
    """
    path = Path(path)
    rows = read_rows(path)
    pairs = pairs_of(tokenizer, rows, corrupt, path)
    found = list(zip(pairs, tokens_of(tokenizer, pairs), strict=True))
    bad = {number: tokens for number, (_, tokens) in enumerate(found, 1) if isinstance(tokens, str)}
    if bad and not skip:
        number, why = next(iter(bad.items()))
        others = f" (and {len(bad) - 1} more of {len(rows)})" if len(bad) > 1 else ""
        raise DataError(f"{path} row {number}{others}", why, "mend these rows, or leave them out with skip=True")
    if bad:
        log.warning("%s: %d of %d rows left out", path, len(bad), len(rows))
    good = [(pair, tokens) for pair, tokens in found if not isinstance(tokens, str)]
    wanted = len(good) if count is None else count
    if not 1 <= wanted <= len(good):
        raise DataError(f"{wanted} prompts of {path}", f"{len(good)} usable rows", f"a count of 1 to {len(good)}")
    places = sorted(random.Random(seed).sample(range(len(good)), wanted))
    metric = metric or ("prob_diff" if years(rows[0]) else "logit_diff")
    return stack(tokenizer, [good[place] for place in places], name=path.stem, metric=metric)


def read_rows(path: Path) -> list[Row]:
    """Read a .csv, .jsonl or .json as a list of rows. DataError if it cannot be read, or holds none."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = _parsed(file, path.suffix)
    except (OSError, ValueError, KeyError, csv.Error) as error:  # json and unicode errors are ValueErrors
        raise DataError(f"prompts {path}", f"{type(error).__name__}: {error}", f"a UTF-8 file: {KNOWN}") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"prompts {path}", "no rows" if not rows else "a row without names", KNOWN)
    return rows


def _parsed(file: TextIO, kind: str) -> list[Any]:
    if kind == ".csv":
        return list(csv.DictReader(file, strict=True))
    if kind == ".jsonl":
        return [json.loads(line) for line in file if line.strip()]
    if kind == ".json":
        found = json.load(file)
        return found["prompts"] if isinstance(found, dict) else found
    raise ValueError(f"{kind or 'no ending'} is none of {', '.join(KINDS)}")


def pairs_of(tokenizer: Any, rows: list[Row], corrupt: str | None, path: Path) -> list[Pair]:
    """Read every row by the columns it has; templates are numbered in the order in which they come."""
    numbers: dict[str, int] = {}
    labels = greater_than.labels_of(tokenizer, greater_than.spelled(tokenizer)[1]) if years(rows[0]) else {}
    pairs = []
    for number, row in enumerate(rows, 1):
        template = numbers.setdefault(str(row.get("template", f"row {number}")), len(numbers))
        try:
            pairs.append(replace(pair_of(tokenizer, row, corrupt, labels), template=template))
        except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            found = f"columns {', '.join(map(str, row))}; {type(error).__name__}: {error}"
            raise DataError(f"{path} row {number}", found, KNOWN) from error
    return pairs


def years(row: Row) -> bool:
    """Whether this is a row of EAP-IG's Greater Than."""
    return "corrupted" in row and ("label" in row or "correct_idx" in row) and "incorrect_idx" not in row


def pair_of(tokenizer: Any, row: Row, corrupt: str | None, labels: greater_than.Labels) -> Pair:
    """Read a row by the columns it has. KeyError for one that is missing."""
    if "answerKey" in row:
        return of_mib(tokenizer, row, corrupt or "s2_io_flip")
    other = corrupt or ("corrupted" if "correct_idx" in row or years(row) else "corrupt")
    if years(row):
        answers, wrong = labels[int(row["label"] if "label" in row else row["correct_idx"])]
    elif "correct_idx" in row:
        answers, wrong = (known(tokenizer, row["correct_idx"]),), (known(tokenizer, row["incorrect_idx"]),)
    else:
        names = ("answers", "wrong_answers" if "wrong_answers" in row else "wrong")
        answers, wrong = (listed(tokenizer, row, name) for name in names)
    return Pair(clean=text(row, "clean"), corrupt=text(row, other), answers=answers, wrong=wrong)


def text(row: Row, name: str) -> str:
    """A prompt of a row; TypeError if it is none."""
    if not isinstance(row[name], str):
        raise TypeError(f"{name} is no text")
    return row[name]


def listed(tokenizer: Any, row: Row, name: str) -> tuple[str | int, ...]:
    """The answers or wrong tokens of one of our own rows: texts, or token ids."""
    ids = f"{name.removesuffix('s').removesuffix('_answer')}_ids"
    found = row[ids] if ids in row else row[name]
    found = found.split("|") if isinstance(found, str) else found
    return tuple(known(tokenizer, x) if ids in row or isinstance(x, int) else str(x) for x in found)


def known(tokenizer: Any, token: Any) -> int:
    """A token id that the tokenizer has; ValueError for another."""
    if not 0 <= int(token) < len(tokenizer):
        raise ValueError(f"token {token} is not in the tokenizer's 0 to {len(tokenizer) - 1}")
    return int(token)


def of_mib(tokenizer: Any, row: Row, corrupt: str) -> Pair:
    """Read a row of MIB's IOI: the first token of each choice, after a space."""
    if not isinstance(row["choices"], list) or not all(isinstance(choice, str) for choice in row["choices"]):
        raise ValueError("choices that are not a list of words: of MIB's tasks only IOI can be read")
    clean, key = text(row, "prompt"), int(row["answerKey"])
    before, *after = encode(tokenizer, [clean, *(f"{clean} {choice}" for choice in row["choices"])])
    tokens = [ids[len(before)] for ids in after]
    changed = text(row[corrupt.removesuffix(COUNTERFACTUAL) + COUNTERFACTUAL], "prompt")
    wrong = tuple(token for place, token in enumerate(tokens) if place != key)
    return Pair(clean=clean, corrupt=changed, answers=(tokens[key],), wrong=wrong)
