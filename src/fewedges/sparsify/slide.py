"""SLIDE: hash tables choose the active neurons of a wide layer; only those are computed, and only those learn.

Chen et al. 2019 (arXiv:1903.03129). Neurons are hashed by their weights, an input by itself: what falls into the
input's buckets has a large inner product with it, probably. The softmax runs over the active neurons of each input,
true labels always among them; gradients are sparse rows, which `RowAdam` (torch.optim.SparseAdam's mathematics)
applies to those rows alone. Weights move, so the tables are filled again now and then, with new hash functions more
rarely.

Shapes: M inputs, d width, N neurons, P active pairs (input, neuron), U rows touched, k labels of an input (-1 where it
has fewer).
"""

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fewedges.errors import DataError, RecipeError
from fewedges.sparsify.pattern import Pattern
from fewedges.sparsify.slide_hash import HASHES, Functions, Hashing, Tables

CAPACITY = 128
"""Neurons a bucket holds."""
BLOCK = 2**17
"""Entries that `RowAdam` moves together: so that they stay in a core's cache."""
STATE = ("keys", "facts", "random_state")
"""What a layer saves beside weight and bias."""


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
        row, label = _pairs(labels, self.shape)
        at, wanted = self.row * self.shape[1] + self.neuron, row * self.shape[1] + label
        place = torch.searchsorted(at, wanted).clamp(max=max(len(at) - 1, 0))
        if len(at) < len(wanted) or not at[place].equal(wanted):
            raise RecipeError("loss over active neurons", "a label is not active", "forward(x, labels)")
        share = 1 / (labels >= 0).sum(-1).clamp(min=1)
        return -(self.log_softmax()[place] * share[row]).sum() / self.shape[0]


class SlideLinear(nn.Module):
    """A wide linear layer of which each input computes few outputs.

    An input's active neurons are those found in more than `above` tables, of these the `most` that were found most
    often (ties at random), filled with random ones to `least`, and its labels. (The published program's default is
    above 0, no limit, least 1000.) Call `seen_` after every step.

    A state dict holds the tables too: after a load training goes on as if it had not been cut. One that holds weight
    and bias alone (strict=False) fills new tables from them.
    """

    keys: Tensor
    """Keys by which neurons stand in the tables, (N, L): of the weights as they were when these were filled."""
    facts: Tensor
    """Seed, inputs seen, and the family of hash functions, as they were last saved."""
    random_state: Tensor
    """Where the draws were then."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hashing: Hashing | None = None,
        *,
        above: int = 0,
        least: int = 0,
        most: int | None = None,
        refill: int = 6400,
        redraw: int = 128_000,
        seed: int = 0,
    ):
        super().__init__()
        if not 0 <= least <= out_features or min(above, refill - 1, redraw - 1) < 0 or (most is not None and most < 1):
            found = f"above {above}, least {least}, most {most}, refill {refill}, redraw {redraw}"
            raise RecipeError("a SLIDE layer", found, f"0 <= least <= {out_features}, above >= 0, others more than 0")
        self.in_features, self.out_features = in_features, out_features
        self.hashing = Hashing() if hashing is None else hashing
        self.above, self.least, self.most, self.refill, self.redraw = above, least, most, refill, redraw
        self.weight = nn.Parameter(torch.randn(out_features, in_features) * in_features**-0.5)
        self.bias = nn.Parameter(torch.zeros(out_features, 1))
        self.seed, self.inputs_seen = seed, 0
        self._generator = torch.Generator().manual_seed(seed)
        for name in STATE:
            self.register_buffer(name, torch.empty(0, dtype=torch.long))
        self.fill_()
        self._note()

    def fill_(self, new_functions: bool = False) -> None:
        """Fill the tables from the weights as they now are."""
        self.seed += new_functions
        self.functions = Functions(self.hashing, self.in_features, self.seed, self.weight.device)
        keys = self.functions.keys(self.weight)
        self.keys = keys.to(_smallest(self.hashing.keys))
        self.tables = Tables.of(keys, CAPACITY)

    def _set_up(self) -> None:
        """Functions and tables where the weights now are, from seed and keys: not filled again."""
        self.functions = Functions(self.hashing, self.in_features, self.seed, self.weight.device)
        self.tables = Tables.of(self.keys.to(self.weight.device).long(), CAPACITY)

    def _apply(self, fn: Any, recurse: bool = True) -> "SlideLinear":
        """Move the module (to, cuda, double), and its tables with it."""
        super()._apply(fn, recurse)
        self._set_up()
        return self

    def _note(self) -> None:
        """Bring the buffers that are saved up to date."""
        facts = [self.seed, self.inputs_seen, *self._family()]
        self.facts = torch.tensor(facts, device=self.weight.device)
        self.random_state = self._generator.get_state().to(self.weight.device)

    def _family(self) -> list[int]:
        hashing = self.hashing
        return [HASHES.index(hashing.kind), hashing.codes, hashing.tables, hashing.base]

    def _save_to_state_dict(self, *given: Any) -> None:
        self._note()
        super()._save_to_state_dict(*given)

    def _load_from_state_dict(self, state: Any, prefix: str, *given: Any) -> None:
        """RecipeError for tables of other hash functions: their keys would find anything."""
        whole = all(prefix + name in state for name in STATE)
        theirs = state[prefix + "facts"][2:].tolist() if whole else self._family()
        if theirs != self._family():
            found = f"kind, codes, tables and base are {theirs} there, {self._family()} here"
            raise RecipeError("load a SLIDE layer", found, "the same Hashing, or weight and bias alone, strict=False")
        super()._load_from_state_dict(state, prefix, *given)
        if not whole:
            return self.fill_()
        self.seed, self.inputs_seen = self.facts[:2].tolist()
        self._generator.set_state(self.random_state.cpu())
        self._set_up()

    def seen_(self, inputs: int) -> bool:
        """Count trained inputs; True when the tables were filled again."""
        before, self.inputs_seen = self.inputs_seen, self.inputs_seen + inputs
        redraw = before // self.redraw < self.inputs_seen // self.redraw
        refill = before // self.refill < self.inputs_seen // self.refill
        if redraw or refill:
            self.fill_(new_functions=redraw)
        return redraw or refill

    def forward(self, x: Float[Tensor, "M d"], labels: Int[Tensor, "M k"] | None = None) -> Active:
        """Logits of the active neurons; gradients of weight and bias are sparse. float32 and float64."""
        if self.weight.dtype not in (torch.float32, torch.float64):
            raise RecipeError("a SLIDE layer", f"weights of {self.weight.dtype}", "float32 or float64")
        row, neuron = self.active(x, labels)
        logit = _Logits.apply(x.to(self.weight.dtype), self.weight, self.bias, row, neuron)
        return Active(row, neuron, logit, (len(x), self.out_features))

    def all_logits(self, x: Float[Tensor, "M d"]) -> Float[Tensor, "M N"]:
        """What a dense layer would compute."""
        return nn.functional.linear(x, self.weight, self.bias[:, 0])

    @torch.no_grad()
    def active(
        self, x: Float[Tensor, "M d"], labels: Int[Tensor, "M k"] | None = None
    ) -> tuple[Int[Tensor, "P"], Int[Tensor, "P"]]:
        """Pairs (input, neuron) that are computed, in order."""
        row, neuron, times = self.tables.find(self.functions.keys(x))
        if self.above:
            row, neuron, times = (part[times > self.above] for part in (row, neuron, times))
        chosen = row * self.out_features + neuron
        if self.most is not None:
            chosen = chosen[self._most(row, times, len(x))]
        if labels is not None:
            with_labels = _pairs(labels, (len(x), self.out_features))
            chosen = torch.cat([chosen, with_labels[0] * self.out_features + with_labels[1]]).unique()
        chosen = self._filled(chosen, len(x))
        row = chosen // self.out_features
        return row, chosen - row * self.out_features

    def _most(self, row: Int[Tensor, "P"], times: Int[Tensor, "P"], rows: int) -> Tensor:
        """Which of the found pairs are kept: of every input the `most` with the largest counts, (P,).

        Counting instead of sorting: how many neurons an input found t times gives the last count that gets in, and
        how many of those do; they are taken in a circle from a random place on, as all else prefers low numbers.
        """
        assert self.most is not None
        grades = self.hashing.tables + 1
        found = torch.bincount(row * grades + times, minlength=rows * grades).view(rows, grades)
        at_least = found.flip(1).cumsum(1).flip(1)  # (M, L + 1): neurons found t times or more
        last = (at_least >= self.most).sum(1, keepdim=True) - 1  # (M, 1): the last count that gets in; -1: all do
        ties = found.gather(1, last.clamp(min=0))[:, 0] * (last[:, 0] >= 0)
        places = self.most - at_least.gather(1, last.clamp(min=0))[:, 0] + ties
        times = times - last[:, 0].repeat_interleave(at_least[:, 0])
        start = (torch.rand(rows, generator=self._generator).to(row.device) * ties).long()
        rank = torch.arange(int(ties.sum()), device=row.device)
        rank -= (ties.cumsum(0) - ties + start).repeat_interleave(ties)  # -start, ..., ties - start - 1
        rank += ties.repeat_interleave(ties) * (rank < 0)
        kept = times > 0
        return kept.masked_scatter_(times == 0, rank < places.repeat_interleave(ties))

    def _filled(self, chosen: Int[Tensor, "P"], rows: int) -> Int[Tensor, "S"]:
        """Add random neurons to inputs that have fewer than `least`: draw, drop what is there, and draw again."""
        while True:
            counts = torch.bincount(chosen // self.out_features, minlength=rows)
            short = (self.least - counts).clamp(min=0)  # (M,)
            if not short.any():
                return chosen
            if 2 * int(short.sum()) > rows * self.out_features - len(chosen):  # most draws would hit what is there
                return self._filled_from_line(chosen, short)
            drawn = torch.randint(self.out_features, (int(short.sum()),), generator=self._generator)
            row = torch.arange(rows, device=chosen.device).repeat_interleave(short)
            chosen = torch.cat([chosen, row * self.out_features + drawn.to(chosen.device)]).unique()

    def _filled_from_line(self, chosen: Int[Tensor, "P"], short: Int[Tensor, "M"]) -> Int[Tensor, "S"]:
        """The first `short` of all that are not chosen, in a random order."""
        order = torch.rand(len(short), self.out_features, generator=self._generator).to(chosen.device)
        line = order.flatten().index_fill(0, chosen, 2).view_as(order).argsort(-1)
        wanted = torch.arange(self.out_features, device=chosen.device) < short[:, None]
        row = torch.arange(len(short), device=chosen.device)[:, None]
        return torch.cat([chosen, (row * self.out_features + line)[wanted]]).sort().values


class _Logits(torch.autograd.Function):
    """x_i . w_j + b_j of chosen pairs and its gradients, as products with sparse matrices.

    Gathering the weights of all pairs first, (P, d), took 10 times as long (38,400 pairs, d 128, one CPU core).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, row: Tensor, neuron: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, row, neuron)
        chosen = _csr(row, neuron, bias[neuron, 0], (len(x), len(weight)))
        return torch.sparse.sampled_addmm(chosen, x, weight.T).values()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        (slope,), (x, weight, row, neuron) = slopes, ctx.saved_tensors
        order = neuron.argsort(stable=True)
        touched, place = torch.unique_consecutive(neuron[order], return_inverse=True)
        turned = _csr(place, row[order], slope[order], (len(touched), len(x)))  # (U, M)
        by_weight = _rows(touched, _product(turned, x), weight.shape)
        by_bias = _rows(touched, _product(turned, x.new_ones(len(x), 1)), (len(weight), 1))
        by_x = _product(_csr(row, neuron, slope, (len(x), len(weight))), weight) if ctx.needs_input_grad[0] else None
        return by_x, by_weight, by_bias, None, None


def _csr(row: Tensor, column: Tensor, value: Tensor, shape: tuple[int, int]) -> Tensor:
    """A CSR matrix of entries that are in order of rows."""
    ends = torch.searchsorted(row, torch.arange(shape[0] + 1, device=row.device))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its sparse layouts a beta on first use
        return torch.sparse_csr_tensor(ends, column, value, shape, check_invariants=False)


def _product(sparse: Tensor, dense: Tensor) -> Tensor:
    """sparse @ dense, without the two passes over the result that torch.mm makes before."""
    out = dense.new_empty(sparse.shape[0], dense.shape[1])
    return torch.addmm(out, sparse, dense, beta=0, out=out)


def _rows(which: Int[Tensor, "U"], rows: Float[Tensor, "U d"], shape: Iterable[int]) -> Tensor:
    """A matrix of which only these rows, in order, are not zero."""
    return torch.sparse_coo_tensor(which[None], rows, tuple(shape), is_coalesced=True, check_invariants=False)


def _pairs(labels: Int[Tensor, "M k"], shape: tuple[int, int]) -> tuple[Int[Tensor, "P"], Int[Tensor, "P"]]:
    """(input, label) without the -1; DataError for what is no neuron: its place would be one of the next input's."""
    rows, neurons = shape
    asked, kind = f"labels of {rows} inputs among {neurons} neurons", labels.dtype
    if kind == torch.bool or kind.is_floating_point or kind.is_complex or labels.dim() != 2 or len(labels) != rows:
        found = f"{kind} of shape {tuple(labels.shape)}"
        raise DataError(asked, found, f"integers of shape ({rows}, k), -1 where an input has fewer")
    labels = labels.long()  # 8 and 16 bits hold no larger number to compare with
    wrong = labels[(labels < -1) | (labels >= neurons)]
    if len(wrong):
        raise DataError(asked, f"label {int(wrong[0])}", f"0 to {neurons - 1}, and -1 where an input has fewer")
    row, place = (labels >= 0).nonzero(as_tuple=True)
    return row, labels[row, place]


def _smallest(values: int) -> torch.dtype:
    """The smallest integers that hold so many values."""
    sizes = ((torch.uint8, 2**8), (torch.int16, 2**15), (torch.int32, 2**31))
    return next((kind for kind, most in sizes if values <= most), torch.int64)


class RowAdam(torch.optim.Optimizer):
    """Adam of matrices whose gradients are sparse rows: rows without a gradient, and their moments, stay.

    The mathematics of torch.optim.SparseAdam (Kingma and Ba 2014, section 2, lazily), in place and block by block.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move every row that has a gradient. Raises RecipeError for a dense gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move_(weight, weight.grad, group)

    def _move_(self, weight: Tensor, slope: Tensor, group: dict[str, Any]) -> None:
        if not slope.is_sparse:
            raise RecipeError("RowAdam", "a gradient that is not sparse", "torch.optim.Adam for this parameter")
        state, (first, second) = self.state[weight], group["betas"]
        if not state:
            state |= {"step": 0, "mean": torch.zeros_like(weight), "square": torch.zeros_like(weight)}
        state["step"] += 1
        size = group["lr"] * (1 - second ** state["step"]) ** 0.5 / (1 - first ** state["step"])
        blocks = (part.split(max(1, BLOCK // weight.shape[1])) for part in _row_parts(slope))
        for rows, value in zip(*blocks, strict=True):
            mean = state["mean"].index_select(0, rows).lerp_(value, 1 - first)
            square = state["square"].index_select(0, rows).mul_(second).addcmul_(value, value, value=1 - second)
            state["mean"].index_copy_(0, rows, mean)
            state["square"].index_copy_(0, rows, square)
            moved = weight.index_select(0, rows).addcdiv_(mean, square.sqrt_().add_(group["eps"]), value=-size)
            weight.index_copy_(0, rows, moved)


def _row_parts(slope: Tensor) -> tuple[Int[Tensor, "U"], Float[Tensor, "U d"]]:
    """Rows of a sparse gradient, each once. Autograd forgets that ours are; looking is cheaper than coalescing."""
    rows = slope._indices()[0]
    if not (rows[1:] > rows[:-1]).all():
        slope = slope.coalesce()
    return slope._indices()[0], slope._values()
