"""Two-digit addition: the built-in task that needs no download.

A problem is text such as "17+35=052": two digits, two digits, three digits, zero padded. As tokens it is a
beginning token and then the characters, T = 10 in all; only the three answer digits count in the loss. There
are 10,000 problems, split once and for all into 8,000 to train on and 2,000 held out. The split is over
ordered pairs: 17+35 may be held out while 35+17 is trained on.

The task is that of the toy model of Draye et al. 2025, arXiv:2512.05865 (4 layers). We do not know their
layout of the text. Ours writes the highest digit first, so a carry is needed before the digit it comes from.

Shapes: N problem, B batch, T token.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fewedges.data.batch import Batch
from fewedges.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

BOS = "<bos>"
VOCABULARY: tuple[str, ...] = (BOS, *"0123456789+=")
LENGTH = 10
"""Tokens of a problem: <bos> 1 7 + 3 5 = 0 5 2."""
ANSWER = slice(7, 10)
"""Columns of the answer digits, hundreds first."""
HELD_OUT = 2_000
SPLIT_SEED = 20_251_205
"""Fixed: the shipped model was trained on this split, so another one would leak held-out problems."""
EXAMPLES = ("43+45=088", "29+19=048", "87+68=155")
"""All three held out."""


class Split(NamedTuple):
    """All problems, once."""

    train: Int[Tensor, "8000 10"]
    held_out: Int[Tensor, "2000 10"]


def tokenizer() -> "PreTrainedTokenizerFast":
    """Build the character tokenizer in code; it puts <bos> first by itself and refuses other characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    characters = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    characters.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    characters.decoder = decoders.Fuse()
    # As in GPT-2, one token begins, ends and pads.
    return PreTrainedTokenizerFast(tokenizer_object=characters, bos_token=BOS, eos_token=BOS, pad_token=BOS)


def problems() -> Int[Tensor, "10000 10"]:
    """All problems in order: row 100 a + b is a + b."""
    row = torch.arange(10_000)
    return encode(row // 100, row % 100)


def encode(a: Int[Tensor, "*N"], b: Int[Tensor, "*N"]) -> Int[Tensor, "*N 10"]:
    """Write the problems a + b (each 0 to 99) as tokens."""
    bos, plus, equals = (torch.full_like(a, VOCABULARY.index(token)) for token in (BOS, "+", "="))
    return torch.stack([bos, *_digits(a, 2), plus, *_digits(b, 2), equals, *_digits(a + b, 3)], dim=-1)


def split() -> Split:
    """Divide the problems into 8,000 to train on and 2,000 held out, always the same."""
    order = torch.randperm(10_000, generator=torch.Generator().manual_seed(SPLIT_SEED))
    rows = problems()[order]
    return Split(train=rows[:-HELD_OUT], held_out=rows[-HELD_OUT:])


@dataclass(frozen=True, eq=False)
class Sums:
    """Batches of problems: a pure function of (seed, step), so a resumed run reads the same data."""

    seed: int = 0
    tokens: Int[Tensor, "N 10"] = field(default_factory=lambda: split().train, repr=False)
    """The problems to draw from: those to train on, unless told otherwise."""

    @property
    def context_length(self) -> int:
        """T, tokens of a problem."""
        return LENGTH

    def at(self, step: int, size: int) -> Batch:
        """Return batch number `step` of `size` problems; each epoch reads every problem once."""
        if step < 0 or size < 1:
            raise DataError("a batch of sums", f"step {step}, size {size}", "step 0 or more and size 1 or more")
        place = torch.arange(step * size, (step + 1) * size)
        epochs = place // len(self.tokens)  # a batch may reach over the end of an epoch
        parts = [self._order(e)[place[epochs == e] % len(self.tokens)] for e in epochs.unique().tolist()]
        tokens = self.tokens[torch.cat(parts)]  # (B, T)
        return Batch(tokens, counts=answer_counts(tokens))

    def describe(self) -> dict[str, Any]:
        """Name, problems, sha256 of what is read."""
        digest = hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()
        return {"name": "addition", "problems": len(self.tokens), "seed": self.seed, "sha256": digest}

    def _order(self, epoch: int) -> Int[Tensor, "N"]:
        # torch's CPU generator keeps the low 32 bits of its seed: (seed << 32) + epoch would lose the seed.
        key = (self.seed * 1_000_003 + epoch) % 2**32
        return torch.randperm(len(self.tokens), generator=torch.Generator().manual_seed(key))


def answer_counts(tokens: Int[Tensor, "B 10"]) -> Bool[Tensor, "B 10"]:
    """Mark the three answer digits."""
    counts = torch.zeros_like(tokens, dtype=torch.bool)
    counts[:, ANSWER] = True
    return counts


def carries(a: int, b: int) -> int:
    """Count the carries of a + b on paper: 0, 1 or 2."""
    ones = a % 10 + b % 10 >= 10
    tens = a // 10 + b // 10 + ones >= 10
    return int(ones) + int(tens)


def examples() -> tuple[str, str, str]:
    """Return a held-out sum without a carry, one with a carry into the tens, and one with two carries."""
    return EXAMPLES


@torch.no_grad()
def exact_match(model: "PreTrainedModel", tokens: Int[Tensor, "N 10"], batch: int = 1000) -> float:
    """Return the fraction of problems of which greedy decoding gets all three answer digits right.

    One forward pass over the true answer is enough. If every argmax is right, greedy decoding writes these
    very digits, one after the other. If one is wrong, everything before the first wrong one was right, so
    greedy decoding comes to the same prefix and makes the same mistake.
    """
    right = 0
    with _evaluating(model):
        for rows in tokens.to(model.device).split(batch):
            guess = model(input_ids=rows).logits[:, ANSWER.start - 1 : ANSWER.stop - 1].argmax(-1)  # (B, 3)
            right += int((guess == rows[:, ANSWER]).all(-1).sum())
    return right / len(tokens)


@contextmanager
def _evaluating(model: "PreTrainedModel") -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _digits(number: Int[Tensor, "*N"], width: int) -> list[Int[Tensor, "*N"]]:
    """The digits as tokens, most significant first."""
    zero = VOCABULARY.index("0")
    return [number // 10**power % 10 + zero for power in reversed(range(width))]
