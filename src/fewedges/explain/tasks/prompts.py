"""What a task is to a circuit search: pairs of prompts, the tokens to tell apart, and one number to measure.

Shapes: B prompt, T token (right-padded), V vocabulary, K whatever is stacked in front.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fewedges.errors import DataError

Metric = Literal["logit_diff", "prob_diff", "max_diff"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompts:
    """B clean prompts of one task, each beside a corrupt prompt with as many tokens.

    The rows are padded on the right; a causal model never looks there from `last`. Raises DataError if shapes
    disagree, a prompt has no answer or no wrong token, or one token is both.
    """

    name: str
    """The task and its options, such as "ioi (abc)"."""
    metric: Metric
    """logit_diff: mean answer logit - mean wrong logit. max_diff: mean answer logit - largest wrong logit.
    prob_diff: sum of answer probabilities - sum of wrong ones, softmax over the whole vocabulary."""
    clean: Int[Tensor, "B T"]
    corrupt: Int[Tensor, "B T"]
    last: Int[Tensor, "B"]
    """The position whose next token is predicted: the last token that is no padding."""
    answers: tuple[tuple[int, ...], ...]
    """Per prompt, the tokens that are right after the clean prompt."""
    wrong: tuple[tuple[int, ...], ...]
    template: tuple[int, ...]
    """Per prompt, the number of its template: what `split` keeps together."""
    texts: tuple[tuple[str, str], ...]
    """(clean, corrupt) as text."""
    roles: tuple[tuple[str, ...], ...] = ()
    """Per prompt, what each token up to `last` is to the task, such as "S2"; "" for no role. (): no roles at all."""

    def __post_init__(self) -> None:
        check(self)

    def __len__(self) -> int:
        return len(self.last)

    def __str__(self) -> str:
        return summary(self)

    def _repr_html_(self) -> str:
        import html

        return f"<pre>{html.escape(str(self))}</pre>"

    @property
    def mask(self) -> Bool[Tensor, "B T"]:
        """Which tokens are no padding."""
        return torch.arange(self.clean.shape[1], device=self.last.device) <= self.last[:, None]

    @property
    def places(self) -> tuple[tuple[str, ...], ...]:
        """Per prompt, a name for each token up to `last`, the same from prompt to prompt where they have roles.

        A role; S1+1 for the token behind S1, where that has none; start and start+1 before the first role; END for
        the last token. Without roles, the position's number.
        """
        if not self.roles:
            return tuple(tuple(map(str, range(end + 1))) for end in self.last.tolist())
        return tuple(map(named, self.roles))

    @property
    def chance(self) -> float:
        """What guessing gets right on average: a half for prob_diff, else answers / (answers + wrong)."""
        if self.metric == "prob_diff":
            return 0.5
        shares = [len(a) / (len(a) + len(w)) for a, w in zip(self.answers, self.wrong, strict=True)]
        return sum(shares) / len(shares)

    def measure_metric(self, logits: Float[Tensor, "*K B V"]) -> Float[Tensor, "*K B"]:
        """Measure each prompt by its logits at `last`; differentiable."""
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        if self.metric == "prob_diff":
            scores = torch.softmax(logits, -1)
            return _reduced(scores, self.answers, "sum") - _reduced(scores, self.wrong, "sum")
        against = "max" if self.metric == "max_diff" else "mean"
        return _reduced(logits, self.answers, "mean") - _reduced(logits, self.wrong, against)

    def correct(self, logits: Float[Tensor, "*K B V"]) -> Bool[Tensor, "*K B"]:
        """Does the best answer beat the best wrong token (for prob_diff: all answers all wrong tokens)?"""
        if self.metric == "prob_diff":
            return self.measure_metric(logits) > 0
        return _reduced(logits, self.answers, "max") > _reduced(logits, self.wrong, "max")

    def first(self, logits: Float[Tensor, "*K B V"]) -> Bool[Tensor, "*K B"]:
        """Is the most probable token of the whole vocabulary an answer?"""
        return _reduced(logits, self.answers, "max") >= logits.amax(-1)

    def subset(self, rows: Sequence[int]) -> "Prompts":
        """Only these prompts, in this order; a row may come twice (bootstrap). Needless padding is cut off."""
        rows = [int(row) for row in rows]
        if not rows or not all(-len(self) <= row < len(self) for row in rows):
            raise DataError(f"subset of {self.name}", f"rows {rows[:8]}", f"one or more of 0 to {len(self) - 1}")
        last = self.last[rows]
        width = int(last.max()) + 1
        lists = {name: tuple(getattr(self, name)[row] for row in rows) for name in self._lists}
        return replace(self, clean=self.clean[rows, :width], corrupt=self.corrupt[rows, :width], last=last, **lists)

    def split(self, seed: int = 0) -> tuple["Prompts", "Prompts"]:
        """Divide into two halves that share no template, as equal in size as templates allow.

        DataError if there is only one template.
        """
        sizes = Counter(self.template)
        if len(sizes) < 2:
            raise DataError(f"split {self.name}", "all prompts have one template", "more prompts, or more templates")
        order = sorted(sizes)
        random.Random(seed).shuffle(order)
        halves: tuple[list[int], list[int]] = ([], [])
        for template in sorted(order, key=lambda one: -sizes[one]):  # large ones first, the rest in shuffled order
            rows = [row for row, one in enumerate(self.template) if one == template]
            min(halves, key=len).extend(rows)
        return self.subset(sorted(halves[0])), self.subset(sorted(halves[1]))

    def shuffled(self, seed: int = 0) -> "Prompts":
        """Give every prompt the answers and wrong tokens of another one: a control that no model should solve."""
        if len(self) < 2:
            raise DataError(f"shuffle {self.name}", "one prompt", "two prompts or more")
        order = list(range(len(self)))
        random.Random(seed).shuffle(order)
        source = dict(zip(order, order[1:] + order[:1], strict=True))  # one cycle: nobody keeps his own
        swapped = {name: tuple(getattr(self, name)[source[row]] for row in range(len(self))) for name in LISTS[:2]}
        return replace(self, name=f"{self.name}, shuffled labels", **swapped)

    def with_start(self, token: int) -> "Prompts":
        """Put one token, such as a beginning-of-text token, before every prompt."""
        start = torch.full_like(self.last, token)[:, None]
        clean, corrupt = (torch.cat([start, tokens], dim=1) for tokens in (self.clean, self.corrupt))
        roles = tuple(("", *row) for row in self.roles)
        return replace(self, clean=clean, corrupt=corrupt, last=self.last + 1, roles=roles)

    def to(self, device: Any) -> "Prompts":
        """The same prompts with their tokens on a device."""
        moved = {name: getattr(self, name).to(device) for name in ("clean", "corrupt", "last")}
        return replace(self, **moved)

    def describe(self) -> dict[str, Any]:
        """Name, metric, sizes, and a sha256 over tokens and labels, as plain data for a manifest."""
        tokens = [(self.clean * self.mask).tolist(), (self.corrupt * self.mask).tolist(), self.last.tolist()]
        digest = hashlib.sha256(repr((tokens, self.answers, self.wrong)).encode()).hexdigest()
        sizes = {"prompts": len(self), "tokens": self.clean.shape[1], "templates": len(set(self.template))}
        return {"name": self.name, "metric": self.metric, **sizes, "sha256": digest}

    @property
    def _lists(self) -> tuple[str, ...]:
        return LISTS + (("roles",) if self.roles else ())


LISTS = ("answers", "wrong", "template", "texts")


def check(prompts: Prompts) -> None:
    """Raise DataError unless everything has one length and every prompt tells some tokens from others."""
    asked = f"Prompts({prompts.name!r})"
    count, shape = len(prompts.last), tuple(prompts.clean.shape)
    lengths = {len(getattr(prompts, name)) for name in prompts._lists}
    if lengths != {count} or shape[0] != count or tuple(prompts.corrupt.shape) != shape or 0 in shape:
        found = f"clean {shape}, corrupt {tuple(prompts.corrupt.shape)}, last {count}, lists of {sorted(lengths)}"
        raise DataError(asked, found, "one length B for all, at least 1, and clean as wide as corrupt")
    if prompts.metric not in get_args(Metric):
        raise DataError(asked, f"metric {prompts.metric!r}", f"one of {', '.join(get_args(Metric))}")
    if not 0 <= int(prompts.last.min()) <= int(prompts.last.max()) < shape[1]:
        raise DataError(asked, f"last from {int(prompts.last.min())} to {int(prompts.last.max())}", f"0 to {shape[1]}")
    ends = [len(row) - 1 for row in prompts.roles] or prompts.last.tolist()
    if ends != prompts.last.tolist():
        raise DataError(asked, f"roles up to {ends[:5]}, prompts up to {prompts.last.tolist()[:5]}", "one per token")
    for row, (answers, wrong) in enumerate(zip(prompts.answers, prompts.wrong, strict=True)):
        if not answers or not wrong or set(answers) & set(wrong):
            found = f"prompt {row} has answers {answers[:5]} and wrong tokens {wrong[:5]}"
            raise DataError(asked, found, "at least one of each, and no token in both")


def named(roles: Sequence[str]) -> tuple[str, ...]:
    """Name every position by its role, or by how far it stands behind the last one; the last position is END."""
    names, anchor, behind = [], "start", 0
    for position, role in enumerate(roles):
        anchor, behind = (role, 0) if role else (anchor, behind + 1 if position else 0)
        names.append(f"{anchor}+{behind}" if behind else anchor)
    return (*names[:-1], "END")


def summary(prompts: Prompts) -> str:
    """Say in a few lines what the prompts are, with the first pair as an example."""
    (clean, corrupt), (answers, wrong) = prompts.texts[0], (len(prompts.answers[0]), len(prompts.wrong[0]))
    sizes = f"{len(set(prompts.template))} templates, at most {prompts.clean.shape[1]} tokens"
    return (
        f"{prompts.name}: {len(prompts)} prompts from {sizes}\n  clean    {clean!r}\n  corrupt  {corrupt!r}\n"
        f"  {prompts.metric}: {answers} answer token{'s' * (answers > 1)}, {wrong} wrong"
    )


def _reduced(
    scores: Float[Tensor, "*K B V"], tokens: tuple[tuple[int, ...], ...], how: Literal["sum", "mean", "max"]
) -> Float[Tensor, "*K B"]:
    """Sum, mean or maximum of the scores of each prompt's own tokens, however many it has."""
    width, device = max(map(len, tokens)), scores.device
    index = torch.tensor([one + one[:1] * (width - len(one)) for one in tokens], device=device)  # (B, N)
    values = scores[..., torch.arange(len(tokens), device=device)[:, None], index]  # (*K, B, N)
    if how == "max":
        return values.amax(-1)  # what fills a row repeats its first token
    counts = torch.tensor([len(one) for one in tokens], device=device)
    present = torch.arange(width, device=device) < counts[:, None]  # (B, N)
    total = values.masked_fill(~present, 0).sum(-1)
    return total if how == "sum" else total / counts
