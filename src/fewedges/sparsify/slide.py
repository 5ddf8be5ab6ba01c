"""SLIDE: hash tables choose the active neurons of a wide layer; only those are computed, and only those learn.

Chen et al. 2019 (arXiv:1903.03129). Neurons are hashed by their weights, an input by itself: what falls into the
input's buckets has a large inner product with it, probably. The softmax runs over the active neurons of each input,
true labels always among them; gradients are sparse rows, which torch.optim.SparseAdam applies to those rows alone.
Weights move, so the tables are filled again now and then, with new hash functions more rarely.

Shapes: M inputs, d width, N neurons, P active pairs (input, neuron), k labels of an input (-1 where it has fewer).
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fewedges.errors import RecipeError
from fewedges.sparsify.pattern import Pattern
from fewedges.sparsify.slide_hash import Functions, Hashing, Tables

CAPACITY = 128
"""Neurons a bucket holds."""


class Active(NamedTuple):
    """Logits of the active neurons of every input, input by input."""

    row: Int[Tensor, "P"]
    neuron: Int[Tensor, "P"]
    logit: Float[Tensor, "P"]
    shape: tuple[int, int]
    """(M, N)."""

    def pattern(self) -> Pattern:
        """Which neurons are active, (M, N)."""
        kept = torch.zeros(self.shape, dtype=torch.bool, device=self.row.device)
        kept[self.row, self.neuron] = True
        return Pattern(kept)

    def log_softmax(self) -> Float[Tensor, "P"]:
        """Log-probabilities over the active neurons of each input."""
        rows = self.shape[0]
        top = self.logit.new_full((rows,), -torch.inf)
        top = top.scatter_reduce(0, self.row, self.logit.detach(), "amax")
        shifted = self.logit - top[self.row]
        total = torch.zeros_like(top).index_add(0, self.row, shifted.exp())
        return shifted - total.log()[self.row]

    def loss(self, labels: Int[Tensor, "M k"]) -> Float[Tensor, ""]:
        """Cross-entropy in nats, labels of an input weighted alike; every label must be active.

        It leaves out what is not active, so it lies below the loss of the whole layer.
        """
        row, label = _pairs(labels)
        at, wanted = self.row * self.shape[1] + self.neuron, row * self.shape[1] + label
        if not torch.isin(wanted, at).all():
            raise RecipeError("loss over active neurons", "a label is not active", "forward(x, labels)")
        place = torch.searchsorted(at, wanted)
        share = 1 / (labels >= 0).sum(-1).clamp(min=1)
        return -(self.log_softmax()[place] * share[row]).sum() / self.shape[0]


class SlideLinear(nn.Module):
    """A wide linear layer of which each input computes few outputs.

    An input's active neurons are those found in more than `above` tables, filled with random ones to `least`, and
    its labels. (The published program's default is above 0, least 1000.) Call `seen_` after every step.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hashing: Hashing | None = None,
        *,
        above: int = 0,
        least: int = 0,
        refill: int = 6400,
        redraw: int = 128_000,
        seed: int = 0,
    ):
        super().__init__()
        if not 0 <= least <= out_features or above < 0 or refill < 1 or redraw < 1:
            found = f"above {above}, least {least}, refill {refill}, redraw {redraw}"
            raise RecipeError("a SLIDE layer", found, f"0 <= least <= {out_features}, above >= 0, others more than 0")
        self.in_features, self.out_features = in_features, out_features
        self.hashing = Hashing() if hashing is None else hashing
        self.above, self.least, self.refill, self.redraw = above, least, refill, redraw
        self.weight = nn.Parameter(torch.randn(out_features, in_features) * in_features**-0.5)
        self.bias = nn.Parameter(torch.zeros(out_features, 1))
        self.seed, self.inputs_seen = seed, 0
        self._generator = torch.Generator().manual_seed(seed)
        self.register_load_state_dict_post_hook(lambda module, _: module.fill_())
        self.fill_()

    def fill_(self, new_functions: bool = False) -> None:
        """Fill the tables from the weights as they now are."""
        self.seed += new_functions
        self.functions = Functions(self.hashing, self.in_features, self.seed, self.weight.device)
        self.tables = Tables.of(self.functions.keys(self.weight), CAPACITY)

    def _apply(self, fn: Any, recurse: bool = True) -> "SlideLinear":
        """Move the module (to, cuda, double), and fill tables where the weights now are."""
        super()._apply(fn, recurse)
        self.fill_()
        return self

    def seen_(self, inputs: int) -> bool:
        """Count trained inputs; True when the tables were filled again."""
        before, self.inputs_seen = self.inputs_seen, self.inputs_seen + inputs
        redraw = before // self.redraw < self.inputs_seen // self.redraw
        refill = before // self.refill < self.inputs_seen // self.refill
        if redraw or refill:
            self.fill_(new_functions=redraw)
        return redraw or refill

    def forward(self, x: Float[Tensor, "M d"], labels: Int[Tensor, "M k"] | None = None) -> Active:
        """Logits of the active neurons; gradients of weight and bias are sparse."""
        row, neuron = self.active(x, labels)
        weight = nn.functional.embedding(neuron, self.weight, sparse=True)  # (P, d)
        bias = nn.functional.embedding(neuron, self.bias, sparse=True)[:, 0]
        return Active(row, neuron, (x[row] * weight).sum(-1) + bias, (len(x), self.out_features))

    def all_logits(self, x: Float[Tensor, "M d"]) -> Float[Tensor, "M N"]:
        """What a dense layer would compute."""
        return nn.functional.linear(x, self.weight, self.bias[:, 0])

    @torch.no_grad()
    def active(
        self, x: Float[Tensor, "M d"], labels: Int[Tensor, "M k"] | None = None
    ) -> tuple[Int[Tensor, "P"], Int[Tensor, "P"]]:
        """Pairs (input, neuron) that are computed, in order."""
        row, neuron, times = self.tables.find(self.functions.keys(x))
        chosen = (row * self.out_features + neuron)[times > self.above]
        if labels is not None:
            with_labels = _pairs(labels)
            chosen = torch.cat([chosen, with_labels[0] * self.out_features + with_labels[1]]).unique()
        chosen = self._filled(chosen, len(x))
        return chosen // self.out_features, chosen % self.out_features

    def _filled(self, chosen: Int[Tensor, "P"], rows: int) -> Int[Tensor, "S"]:
        """Add random neurons to inputs that have fewer than `least`."""
        counts = torch.bincount(chosen // self.out_features, minlength=rows)
        short = (self.least - counts).clamp(min=0)  # (M,)
        needy = short.nonzero()[:, 0]
        if not len(needy):
            return chosen
        rank = torch.rand(len(needy), self.out_features, generator=self._generator).to(chosen.device)
        place = torch.full((rows,), -1, device=chosen.device).scatter(0, needy, torch.arange(len(needy)).to(needy))
        taken = place[chosen // self.out_features]
        rank[taken[taken >= 0], (chosen % self.out_features)[taken >= 0]] = 2  # already active: last in line
        line = rank.argsort(-1)[:, : int(short.max())]
        wanted = torch.arange(line.shape[1], device=chosen.device) < short[needy, None]
        return torch.cat([chosen, (needy[:, None] * self.out_features + line)[wanted]]).sort().values


def _pairs(labels: Int[Tensor, "M k"]) -> tuple[Int[Tensor, "P"], Int[Tensor, "P"]]:
    """(input, label) without the -1."""
    row, place = (labels >= 0).nonzero(as_tuple=True)
    return row, labels[row, place]
