"""What slide_words.py trains: words to come from words before, and output layers that compute few of many classes."""

import collections
import lzma
import re
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from fewedges.sparsify.slide import RowAdam, SlideLinear
from fewedges.sparsify.slide_hash import Hashing

WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
BAG, AHEAD, LEFT_OUT, EVERY = 64, 32, 100, 50
CODES, REFILL = {"simhash": 9, "wta": 4, "dwta": 4}, 1280
SLIDES = (*CODES, "random")
LABELS = 15
"""Words that a window has on average."""


class Examples(NamedTuple):
    """Windows of text, both parts padded with -1."""

    words: torch.Tensor  # (n, 64)
    labels: torch.Tensor  # (n, 32)

    def at(self, which):
        return Examples(self.words[which], self.labels[which])


class Problem(NamedTuple):
    train: Examples
    held: Examples
    rank: torch.Tensor
    """Every class's place by frequency."""


def documents(path):
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [WORD.findall(text.lower()) for text in file.read().split("<|endoftext|>")]


def windows(texts, ids):
    """Every document cut in steps of 32 words; a window needs 4 known words in its bag, and a label."""
    found = []
    for text in texts:
        line = np.array([ids.get(word, -1) for word in text], dtype=np.int64)
        starts = AHEAD * np.arange(max(0, (len(line) - BAG) // AHEAD))
        found.append(line[starts[:, None] + np.arange(BAG + AHEAD)])
    words, labels = np.split(np.concatenate(found), [BAG], axis=1)
    labels = np.sort(labels, axis=1)
    labels[:, 1:][labels[:, 1:] == labels[:, :-1]] = -1
    good = ((words >= 0).sum(1) >= 4) & (labels >= 0).any(1)
    return Examples(torch.from_numpy(words[good]), torch.from_numpy(labels[good]))


def problem(data, held_data, classes, held_examples):
    """Classes are numbered at random, as a full bucket keeps the highest numbers. Held out: `held_data`, or every 50th
    document of `data`."""
    texts = documents(data)
    train = [text for i, text in enumerate(texts) if i % EVERY]
    held = documents(held_data) if held_data else texts[::EVERY]
    counts = collections.Counter(word for text in train for word in text)
    ranked = [word for word, _ in counts.most_common(LEFT_OUT + classes)][LEFT_OUT:]
    number = np.random.default_rng(0).permutation(classes)
    ids = dict(zip(ranked, number.tolist(), strict=True))
    held = windows(held, ids)
    some = torch.randperm(len(held.words), generator=torch.Generator().manual_seed(0))[:held_examples]
    return Problem(windows(train, ids), held.at(some), torch.from_numpy(np.argsort(number)))


# -- the network and its output layers -----------------------------------------------------------------------------


class Hidden(nn.Module):
    """A sparse bag of words to a hidden vector."""

    def __init__(self, words, width):
        super().__init__()
        self.bag = nn.EmbeddingBag(words + 1, width, mode="sum", padding_idx=words)
        nn.init.normal_(self.bag.weight, std=0.3)
        self.bias = nn.Parameter(torch.zeros(width))
        self.words = words

    def forward(self, words):
        known = words >= 0
        return torch.relu(
            self.bag(words.masked_fill(~known, self.words)) / known.sum(1, keepdim=True).sqrt() + self.bias
        )


class Whole:
    """All classes."""

    def __init__(self, width, classes, lr):
        self.weight = nn.Parameter(torch.randn(classes, width) * width**-0.5)  # as SlideLinear's
        self.bias = nn.Parameter(torch.zeros(classes, 1))
        self.optimizer = torch.optim.Adam([self.weight, self.bias], lr, fused=True)

    def loss(self, hidden, labels):
        """The loss to train by, and how many logits it took."""
        logs = torch.log_softmax(nn.functional.linear(hidden, self.weight, self.bias[:, 0]), -1)
        return mean_of(logs.gather(1, labels.clamp(min=0)), labels), len(hidden) * len(self.weight)

    def seen_(self, inputs):
        pass

    def holds(self, hidden, classes):
        """Which of these classes are active, and how many are; what is drawn in training stays as it was."""
        return torch.ones_like(classes, dtype=torch.bool), len(self.weight)


class Slide(Whole):
    """Those that hash tables find, or random ones in the same layer."""

    def __init__(self, kind, size, width, classes, lr, seed, codes=None):
        if kind == "random":  # 2^40 buckets: nothing is found; SLIDE's labels come on top of `size`; no refills
            found = {"hashing": Hashing(codes=40, tables=1), "least": size + LABELS, "refill": 2**40, "redraw": 2**40}
        else:
            hashing = Hashing(kind=kind, codes=codes or CODES[kind])
            found = {"hashing": hashing, "most": size, "least": size, "refill": REFILL}
        self.layer = SlideLinear(width, classes, **found, seed=seed)
        self.weight, self.bias, self.seen_ = self.layer.weight, self.layer.bias, self.layer.seen_
        self.optimizer = RowAdam([self.weight, self.bias], lr)

    def loss(self, hidden, labels):
        active = self.layer(hidden, labels)
        return active.loss(labels), len(active.row)

    def holds(self, hidden, classes):
        before = self.layer._generator.get_state()
        row, neuron = self.layer.active(hidden)
        self.layer._generator.set_state(before)
        asked = classes + len(self.weight) * torch.arange(len(hidden))[:, None]
        return torch.isin(asked, row * len(self.weight) + neuron), len(row) / len(hidden)


class Sampled(Whole):
    """Negatives drawn for the batch, log of their probability subtracted: no bias in the sum over classes.

    The `size` first of clocks that ring at given rates are drawn: up to the time when the next one rings each has rung
    with probability 1 - exp(-rate time).
    """

    def __init__(self, rates, size, width, lr, seed):
        super().__init__(width, len(rates), lr)
        self.rates, self.size, self.optimizer = rates, size, RowAdam([self.weight, self.bias], lr)
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self):
        clock = torch.empty(len(self.rates)).exponential_(generator=self.generator) / self.rates
        rung, which = clock.topk(self.size + 1, largest=False)
        return which[:-1], torch.log(-torch.expm1(-self.rates[which[:-1]] * rung[-1]))

    def loss(self, hidden, labels):
        drawn, log_chance = self.draw()
        known = labels >= 0
        classes = torch.cat([drawn, labels[known]]).unique()
        offset = torch.full((len(classes) + 1,), -torch.inf)  # others' labels are out, unless drawn
        offset[torch.searchsorted(classes, drawn)] = -log_chance
        place = torch.searchsorted(classes, labels.clamp(min=0)).masked_fill(~known, len(classes))
        offset = offset.repeat(len(labels), 1).scatter(1, place, 0.0)[:, :-1]
        weight, bias = (nn.functional.embedding(classes, part, sparse=True) for part in (self.weight, self.bias))
        logs = torch.log_softmax(hidden @ weight.T + bias[:, 0] + offset, -1)
        return mean_of(logs.gather(1, place.clamp(max=len(classes) - 1)), labels), int((offset > -torch.inf).sum())

    def holds(self, hidden, classes):
        before = self.generator.get_state()
        drawn, _ = self.draw()
        self.generator.set_state(before)
        return torch.isin(classes, drawn), self.size


def mean_of(logs, labels):
    """Cross-entropy from log-probabilities of labels, the labels of an input weighted alike."""
    known = labels >= 0
    return -((logs.masked_fill(~known, 0)).sum(1) / known.sum(1)).mean()


def output(name, size, width, rank, lr, seed):
    """The output layer of an arm."""
    if name == "dense":
        return Whole(width, len(rank), lr)
    if name in SLIDES:
        return Slide(name, size, width, len(rank), lr, seed)
    rates = torch.log1p(1 / (rank + 1.0)) if name == "zipf" else torch.ones(len(rank))
    return Sampled(rates, size, width, lr, seed)
