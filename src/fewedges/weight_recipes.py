"""Recipes for sparse weights, and the table of methods: one row each.

A method is what it scores by, among which entries it compares (group), how a budget is shared over matrices
(allocation), when it does so (schedule), and what becomes of the survivors (update). A new method is a new row, and a
new score if it has one. `Prune` runs the rows of METHODS, the recipes that train those of TRAINED.
"""

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from fewedges.errors import RecipeError
from fewedges.fields import bad, check, choices


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    score: str
    """A name in score.SCORES: what goes."""
    group: Literal["matrix", "row"] = "matrix"
    """Among which entries scores are compared."""
    allocation: Literal["uniform", "erk", "global"] = "uniform"
    schedule: Literal["once", "cubic", "cosine", "rewinding"] = "once"
    """When; a name in schedule.SCHEDULES."""
    update: Literal["none", "obs", "train", "rewind"] = "none"
    """What happens to the survivors: nothing, they make good what goes, they train, they go back to early weights."""
    grow: str | None = None
    """A name in score.SCORES: what comes in the place of what goes. Such a method begins with a random mask."""


METHODS: dict[str, Method] = {
    "random": Method("random"),
    "magnitude": Method("magnitude"),
    "snip": Method("snip", allocation="global"),  # Lee et al. 2019, arXiv:1810.02340
    "wanda": Method("wanda", group="row"),  # Sun et al. 2023, arXiv:2306.11695
    "sparsegpt": Method("obs", update="obs"),  # Frantar and Alistarh 2023, arXiv:2301.00774
}
"""The rows that look once."""

TRAINED: dict[str, Method] = {
    "static": Method("random", allocation="erk", update="train"),
    "rigl": Method("magnitude", allocation="erk", schedule="cosine", update="train", grow="gradient"),  # 1911.11134
    "set": Method("magnitude", allocation="erk", schedule="cosine", update="train", grow="random"),  # 1707.04780
    "gradual": Method("magnitude", schedule="cubic", update="train"),  # Zhu and Gupta 2017, arXiv:1710.01878
    "tickets": Method("magnitude", schedule="rewinding", update="rewind"),  # Frankle and Carbin 2019, arXiv:1803.03635
}
"""The rows that train; the schedule says by which recipe."""


@dataclass(frozen=True)
class Structure:
    """The granularity of pruning, as it is written: unstructured, 2:4, 16x16, head, channel."""

    kind: Literal["unstructured", "n:m", "block", "head", "channel"]
    n: int = 1
    """Kept of M, or the height of a block."""
    m: int = 1
    """M, or the width of a block."""

    @classmethod
    def parse(cls, text: str) -> "Structure":
        """Read "unstructured", "N:M" (keep N of M inputs), "HxW" (blocks), "head" or "channel"."""
        if text in ("unstructured", "head", "channel"):
            return cls(text)  # type: ignore[arg-type]
        if found := re.fullmatch(r"(\d+)([:x])(\d+)", str(text)):
            n, m = int(found[1]), int(found[3])
            if found[2] == ":" and 0 < n <= m:
                return cls("n:m", n, m)
            if found[2] == "x" and n > 0 and m > 0:
                return cls("block", n, m)
        raise RecipeError("structure", repr(text), "unstructured, 2:4 (keeps 2 of 4), 16x16 (blocks), head or channel")

    def __str__(self) -> str:
        return {"n:m": f"{self.n}:{self.m}", "block": f"{self.n}x{self.m}"}.get(self.kind, self.kind)


@dataclass(frozen=True, kw_only=True)
class Prune:
    """One-shot pruning of a pretrained model's matrices; embeddings and the output layer stay dense."""

    method: str = "sparsegpt"
    """A row of the table: random, magnitude, snip, wanda or sparsegpt."""
    density: float = 0.5
    """Fraction of entries (heads, channels) kept; N:M has its own."""
    structure: str = "unstructured"
    """Granularity: unstructured, 2:4 (keeps 2 of 4), 16x16 (blocks), head or channel (these two shrink the model)."""
    group: Literal["method", "matrix", "row"] = "method"
    """Where scores are compared: as the method does, in the whole matrix, or in each row (output)."""
    allocation: Literal["method", "uniform", "erk", "global", "cost"] = "method"
    """How the budget is shared over matrices: as the method does, alike, Erdos-Renyi-kernel, by score, by price."""
    price: tuple[str, ...] = ()
    """For allocation cost: the price of an entry kept, by endings of names, such as down_proj=2; of others 1."""
    keep_dense: tuple[str, ...] = ()
    """Matrices left dense: the ends of their names, such as down_proj."""

    calibration_windows: int = 128
    """Windows of text that inputs or gradients are measured on."""
    context_length: int = 2048
    """Tokens per window, T."""
    micro_batch: int = 4
    """Windows per forward pass; changes no result but rounding."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the calibration passes; statistics and updates stay in float32 and float64."""

    damping: float = 0.01
    """SparseGPT: added to the Hessian's diagonal, in units of its mean."""
    block: int = 128
    """SparseGPT: columns between two updates of the rest."""
    bits: int | None = None
    """SparseGPT: also quantise to so many bits in the same sweep (8 or 4). None: no."""
    group_size: int | None = None
    """Input columns that share one scale when quantising; None: a whole row."""
    seed: int = 0
    """Seed of random scores and of the order of the data."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise bad("method", self.method, f"one of {', '.join(METHODS)}")
        kind = Structure.parse(self.structure)
        check(self, "density", lambda x: 0 < x <= 1, "in (0, 1]")
        if kind.kind == "n:m" and self.density not in (0.5, kind.n / kind.m):
            raise bad("density", self.density, f"{kind.n / kind.m:g} for structure {kind}, or none")
        check(self, "calibration_windows micro_batch block group_size", lambda x: x > 0, "more than 0")
        check(self, "context_length", lambda x: x >= 2, "at least 2")
        check(self, "damping", lambda x: x > 0, "more than 0")
        check(self, "bits", lambda x: x in (4, 8), "4 or 8")
        check(self, "seed", lambda x: x >= 0, "at least 0")
        _check_names(self, "keep_dense price")
        _check_choices(self)
        self._check_together(kind)

    def _check_together(self, kind: Structure) -> None:
        row = METHODS[self.method]
        if self.bits is not None and row.update != "obs":
            raise bad("bits", self.bits, "only with method sparsegpt; else quantise in a second stage")
        if row.update == "obs" and self.group == "row":
            raise bad("group", self.group, "method or matrix: SparseGPT compares whole column blocks")
        if self.allocation == "global" and row.score in ("wanda", "obs"):
            raise bad("allocation", self.allocation, f"uniform or erk: {self.method} prunes block after block")
        if kind.kind == "n:m" and self.allocation not in ("method", "uniform"):
            raise bad("allocation", self.allocation, f"uniform: structure {kind} fixes every matrix")
        if kind.kind == "n:m" and self.block % kind.m:
            raise bad("block", self.block, f"a multiple of {kind.m} for structure {kind}")
        if self.bits is not None and self.group_size is not None and self.block % self.group_size:
            raise bad("group_size", self.group_size, f"a divisor of block {self.block}")
        if kind.kind in ("head", "channel") and self.method not in ("random", "magnitude", "wanda"):
            raise bad("method", self.method, f"random, magnitude or wanda for structure {kind}")


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Round the matrices to few bits: symmetric, zero stays zero."""

    bits: int = 8
    """8 or 4."""
    format: Literal["int", "fp8"] = "int"
    """Whole numbers, or 8-bit floats (torchao only, where the device has them)."""
    group_size: int | None = None
    """Input columns that share one scale; None: a whole row."""
    backend: Literal["reference", "torchao"] = "reference"
    """Plain rounding kept in float, or torchao's tensors (needs torchao; weight-only)."""

    def __post_init__(self) -> None:
        check(self, "bits", lambda x: x in (4, 8), "4 or 8")
        check(self, "group_size", lambda x: x > 0, "more than 0")
        _check_choices(self)
        if self.format == "fp8" and (self.backend, self.bits, self.group_size) != ("torchao", 8, None):
            raise bad("format", "fp8", "only with backend torchao, 8 bits and no group_size")


@dataclass(frozen=True, kw_only=True)
class Training:
    """What all stages that train have in common: objective, AdamW, batches, checkpoints. Not a recipe by itself.

    Minimises   kl_weight * KL(dense || student) + loss_weight * cross-entropy + hidden_weight * hidden difference.
    """

    kl_weight: float = 0.0
    """Weight of the KL divergence to the dense model."""
    loss_weight: float = 1.0
    """Weight of next-token cross-entropy."""
    hidden_weight: float = 0.0
    """Weight of the squared difference of hidden states after each block, relative to the dense model's square."""
    train: Literal["all", "matrices"] = "all"
    """What moves: all parameters, or the matrices of the blocks alone."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates."""
    weight_decay: float = 0.0
    """AdamW's weight decay, on matrices only."""
    clip: float = 1.0
    """Gradient norm is clipped to this."""
    warmup_steps: int = 20
    """Steps over which the learning rate rises from 0."""
    decay_fraction: float = 0.5
    """Last part of the steps over which the learning rate falls to 0."""
    context_length: int = 512
    """Tokens per training window, T."""
    batch_size: int = 8
    """Windows per optimiser step."""
    micro_batch: int | None = None
    """Windows per forward pass; changes no result but rounding. None: the whole batch."""
    steps: int = 1000
    """Optimiser steps."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward pass; weights and optimiser stay float32."""
    seed: int = 0
    """Seed of the order of the data, and of all that is drawn: new weights, first mask, what grows at random."""
    log_every: int = 10
    """Steps between log records."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        positive = "kl_weight loss_weight hidden_weight weight_decay warmup_steps seed"
        check(self, positive, lambda x: x >= 0, "at least 0")
        strictly = "learning_rate clip batch_size micro_batch steps log_every checkpoint_every"
        check(self, strictly, lambda x: x > 0, "more than 0")
        check(self, "context_length", lambda x: x >= 2, "at least 2")
        check(self, "decay_fraction", lambda x: 0 <= x <= 1, "in [0, 1]")
        check(self, "adam_betas", lambda xs: len(xs) == 2 and all(0 <= x < 1 for x in xs), "that is two of [0, 1)")
        _check_choices(self)
        if self.kl_weight == self.loss_weight == self.hidden_weight == 0:
            names = "kl_weight, loss_weight and hidden_weight"
            raise RecipeError(names, "all are 0, so nothing is learned", "kl_weight=1")


@dataclass(frozen=True, kw_only=True)
class Distil(Training):
    """Training towards the dense model with masks held: recovery after any method, or a student of fewer layers."""

    layers: tuple[int, ...] = ()
    """First make a student of these layers (0 is the first) of a model not yet pruned; empty: all layers."""
    kl_weight: float = 1.0
    """Weight of the KL divergence to the dense model."""
    loss_weight: float = 0.0
    """Weight of next-token cross-entropy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ascending = "that is ascending layer numbers from 0"
        check(self, "layers", lambda xs: list(xs) == sorted(set(xs)) and all(x >= 0 for x in xs), ascending)


@dataclass(frozen=True, kw_only=True)
class Train(Training):
    """Training with a mask made before the first step and held; the other recipes that train move it."""

    schedule: ClassVar[str] = "once"
    """Rows of the table with this schedule are this recipe's methods."""
    rules: ClassVar[tuple[str, ...]] = ("uniform", "erk", "cost")

    method: str = "static"
    """A row of the table: static (a random mask)."""
    density: float = 0.2
    """Fraction of entries kept over all matrices, in the end."""
    structure: str = "unstructured"
    """Granularity: unstructured, or 16x16 (blocks)."""
    allocation: Literal["method", "uniform", "erk", "global", "cost"] = "method"
    """How the budget is shared over matrices: as the method does, alike, Erdos-Renyi-kernel, by score, by price."""
    price: tuple[str, ...] = ()
    """For allocation cost: the price of an entry kept, by endings of names, such as down_proj=2; of others 1."""
    keep_dense: tuple[str, ...] = ()
    """Matrices left dense: the ends of their names, such as down_proj."""
    from_scratch: bool = False
    """Begin with new random weights (drawn by the seed) instead of the given ones; the tokenizer stays."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fitting = [name for name, row in TRAINED.items() if row.schedule == self.schedule]
        if self.method not in fitting:
            raise bad("method", self.method, f"one of {', '.join(fitting)}")
        check(self, "density", lambda x: 0 < x <= 1, "in (0, 1]")
        check(self, "from_scratch", lambda x: True, "true or false")
        if Structure.parse(self.structure).kind not in ("unstructured", "block"):
            raise bad("structure", self.structure, "unstructured or 16x16 (blocks); others: Prune, then Distil")
        _check_names(self, "keep_dense price")
        if self.rule not in self.rules:
            raise bad("allocation", self.allocation, f"one of {', '.join(self.rules)} for method {self.method}")

    @property
    def row(self) -> Method:
        """The method."""
        return TRAINED[self.method]

    @property
    def rule(self) -> str:
        """The allocation, resolved."""
        return self.row.allocation if self.allocation == "method" else self.allocation


@dataclass(frozen=True, kw_only=True)
class Stepwise(Train):
    """What trainings share in which the mask changes every so many steps."""

    every: int | None = None
    """Steps between two changes of the mask. None: 100, or a tenth of the steps where that is less."""
    until: float = 0.75
    """Fraction of the steps after which the mask rests; a density is reached by then."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "until", lambda x: 0 < x <= 1, "in (0, 1]")
        check(self, "every", lambda x: x > 0, "more than 0")


@dataclass(frozen=True, kw_only=True)
class Rewire(Stepwise):
    """Training with a mask that moves: RigL (Evci et al. 2020, arXiv:1911.11134), or SET (2018, arXiv:1707.04780)."""

    schedule: ClassVar[str] = "cosine"

    method: str = "rigl"
    """A row of the table: rigl or set."""
    drop: float = 0.3
    """Fraction of the kept entries that the first rewiring moves; falls to 0 by a cosine."""
    grow: Literal["method", "gradient", "random"] = "method"
    """What comes in their place: as the method does, the entries with the largest gradient (RigL), or any (SET)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "drop", lambda x: 0 < x <= 1, "in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class Gradual(Stepwise):
    """Training while the mask closes, fast at first (Zhu and Gupta 2017, arXiv:1710.01878)."""

    schedule: ClassVar[str] = "cubic"
    rules: ClassVar[tuple[str, ...]] = ("uniform", "erk", "global", "cost")

    method: str = "gradual"
    """A row of the table: gradual."""


@dataclass(frozen=True, kw_only=True)
class Rewind(Train):
    """Lottery tickets: train for `steps`, prune, go back to an early step, and again (arXiv:1803.03635, 1912.05671)."""

    schedule: ClassVar[str] = "rewinding"
    rules: ClassVar[tuple[str, ...]] = ("uniform", "global")

    method: str = "tickets"
    """A row of the table: tickets."""
    rounds: int = 7
    """Times of pruning; each keeps the same share of what is left."""
    rewind: int = 0
    """Step whose weights the survivors go back to; 0: those it began with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "rounds", lambda x: x > 0, "more than 0")
        check(self, "rewind", lambda x: 0 <= x < self.steps, f"in [0, steps), steps {self.steps}")


@dataclass(frozen=True, kw_only=True)
class Tickets:
    """Lottery tickets by rounds and rate, for a loop of one's own; as a stage it is the `Rewind` of its density."""

    rounds: int = 7
    """Times of training and pruning; (1 - rate)^rounds is left."""
    rate: float = 0.2
    """Fraction of what is left that each round prunes, in every matrix."""
    rewind: int = 0
    """Step whose weights the survivors go back to; 0: the initial ones."""
    steps: int = 1000
    """Optimiser steps of one training."""
    scope: Literal["matrix", "global"] = "matrix"
    """Whether magnitudes are compared in each matrix or over all."""

    def __post_init__(self) -> None:
        check(self, "rounds steps", lambda x: x > 0, "more than 0")
        check(self, "rate", lambda x: 0 < x < 1, "in (0, 1)")
        check(self, "rewind", lambda x: 0 <= x < self.steps, f"in [0, steps), steps {self.steps}")
        _check_choices(self)

    @property
    def density(self) -> float:
        """What is left after all rounds."""
        return (1 - self.rate) ** self.rounds


def _check_choices(recipe: object) -> None:
    for name, options in choices(recipe):
        if getattr(recipe, name) not in options:
            raise bad(name, getattr(recipe, name), f"one of {', '.join(options)}")


def _check_names(recipe: object, fields: str) -> None:
    for field in fields.split():
        if not isinstance(value := getattr(recipe, field), tuple) or not all(isinstance(x, str) and x for x in value):
            raise bad(field, value, "that is a list of names")


WEIGHT_RECIPES: dict[str, type] = {"prune": Prune, "quantize": Quantize, "distil": Distil, "tickets": Tickets}
WEIGHT_RECIPES |= {"train": Train, "rewire": Rewire, "gradual": Gradual, "rewind": Rewind}
