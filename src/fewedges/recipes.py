"""Every choice in one place: the same dataclass is the Python API, the YAML file and the command line.

The string under each field is its help text. Ranges are checked when a recipe is made, and a message names the
field. `read_recipe` and `write_recipe` go through YAML; what was resolved is written beside every output.
"""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fewedges.errors import RecipeError
from fewedges.fields import bad as _bad
from fewedges.fields import check as _check
from fewedges.fields import choices as _choices
from fewedges.weight_recipes import WEIGHT_RECIPES


@dataclass(frozen=True, kw_only=True)
class SparseAttention:
    """Sparse attention post-training: fewest attention edges at an unchanged loss (arXiv:2512.05865).

    Minimises   kl_weight * KL + loss_weight * cross-entropy + multiplier * edges per query per head,
    and lets the multiplier grow while every margin holds and shrink while one is broken. With `target_heads` a second
    price, on open heads, goes by their number alone: a margin may then stay broken.
    """

    kl_margin: float | None = 0.1
    """Constraint: KL(dense || sparse) in nats per token may reach this. None: not constrained."""
    loss_margin: float | None = 0.0
    """Constraint: cross-entropy may exceed the dense model's by this, nats per token. None: not constrained."""
    target_edges: float | None = None
    """The constraint turned around: this many edges per query per head, at the least loss (both margins None)."""
    target_heads: int | None = None
    """Leave this many heads of the model open, found by a second price, on heads alone. None: no such price."""
    slack: float = 0.0
    """Extra margin at full learning rate, falling with it to 0: room for the noise of large steps, nats per token."""
    cooling: bool = False
    """Let the price of an edge fall with the learning rate: no gate closes when its loss can no longer be repaired."""
    kl_weight: float = 1.0
    """Weight of the KL divergence to the dense model in the objective."""
    loss_weight: float = 0.1
    """Weight of next-token cross-entropy in the objective."""

    bias: Literal["learned", "constant"] = "learned"
    """Gate bias: one learned number per head, or the constant `bias_start` everywhere."""
    bias_start: float = 0.0
    """Where the gate bias starts; larger opens more edges at step 0."""
    gate_query: bool = False
    """Also learn one vector per head that every query adds in the gate alone, so that a softmax sink can close."""
    anneal_from: float = 0.0
    """Extra gate bias at step 0, falling linearly to 0 over `anneal_steps`."""
    anneal_steps: int = 0
    """Steps of that fall; 0 switches annealing off."""
    sampling: Literal["logistic", "none"] = "logistic"
    """Training gates: sampled with logistic noise, or thresholded; both straight-through."""
    layer_weights: tuple[float, ...] = ()
    """Price of an edge by layer (one number per layer); empty: 1 everywhere."""
    head_weights: tuple[float, ...] = ()
    """Price of an edge by head index (one number per head); empty: 1 everywhere."""
    head_closing: float = 0.0
    """Close whole heads: an edge's price times (mean edges of a head / its own head's) to this power. 0: one price."""
    path_closing: float = 0.0
    """Fewer paths through the layers: an edge's price times ((mean edges of a layer + 1) / (its own + 1)) to this."""
    layer_budgets: tuple[float, ...] = ()
    """Edges by layer, in proportion: a layer pays by the share it keeps over the share meant for it. Empty: none."""

    multiplier_start: float = 2e-3
    """Price of one edge per query per head, in nats, at step 0."""
    head_multiplier_start: float = 0.1
    """Price of all heads being open, in nats, at step 0; it moves by the same law as the price of an edge."""
    multiplier_rate: float = 0.02
    """Largest change of log(multiplier) in one step."""
    multiplier_width: float = 0.02
    """Distance from the margin, in nats, at which that largest change is reached."""
    smoothing: float = 0.95
    """Decay of the running mean of the constraint that drives the multiplier."""

    train: Literal["full", "attention", "lora"] = "full"
    """What moves: all weights, the attention weights, or LoRA adapters on all linear layers (needs peft)."""
    lora_rank: int = 64
    """Rank of the LoRA adapters; their alpha equals the rank."""
    learning_rate: float = 2e-4
    """Peak learning rate of the weights (LoRA wants about 1e-3)."""
    bias_learning_rate: float = 0.02
    """Learning rate of the gate biases."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates."""
    weight_decay: float = 0.0
    """AdamW's weight decay, on matrices only."""
    clip: float = 1.0
    """Gradient norm is clipped to this."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0."""
    decay_fraction: float = 0.25
    """Last part of the budget over which the learning rate falls to 0."""

    context_length: int = 512
    """Tokens per training window, T."""
    batch_size: int = 16
    """Windows per optimiser step."""
    micro_batch: int | None = None
    """Windows per forward pass; None: the whole batch. Halved by itself when memory runs out."""
    steps: int | None = None
    """Budget: optimiser steps."""
    tokens: int | None = None
    """Budget: tokens read."""
    minutes: float | None = None
    """Budget: minutes of training, added up over resumed pieces. Resuming is exact for steps and tokens only."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward pass; weights and optimiser stay float32."""
    saved: Literal["float32", "bfloat16", "int8"] = "float32"
    """Number format of the trained weights on disk (what is loaded back is what was saved)."""
    kernel: Literal["reference", "triton"] = "reference"
    """Who computes gated attention: plain PyTorch, or the fused kernel (GPU)."""
    compiled: bool = False
    """Compile what lies between attention calls, layer by layer (torch.compile; the first step takes a minute)."""
    graph: bool = False
    """Replay each step as one CUDA graph (kernel=triton on a GPU, no micro-batches): many small kernels, one launch."""
    seed: int = 0
    """Seed of data order, gate noise and adapters."""
    log_every: int = 10
    """Steps between log records."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        positive = (
            "slack kl_weight loss_weight head_closing path_closing weight_decay warmup_steps anneal_steps anneal_from"
        )
        _check(self, positive, lambda x: x >= 0, "at least 0")
        strictly = (
            "target_edges target_heads multiplier_start head_multiplier_start multiplier_rate multiplier_width "
            "learning_rate bias_learning_rate clip lora_rank batch_size micro_batch steps tokens "
            "minutes log_every checkpoint_every"
        )
        _check(self, strictly, lambda x: x > 0, "more than 0")
        _check(self, "context_length", lambda x: x >= 2, "at least 2")
        _check(self, "smoothing", lambda x: 0 <= x < 1, "in [0, 1)")
        _check(self, "decay_fraction", lambda x: 0 <= x <= 1, "in [0, 1]")
        _check(self, "kl_margin seed", lambda x: x >= 0, "at least 0")
        _check(self, "loss_margin bias_start", lambda x: True, "that is a finite number")
        _check(self, "graph cooling gate_query compiled", lambda x: True, "true or false")
        _check(self, "layer_weights head_weights", lambda xs: all(x >= 0 for x in xs), "at least 0")
        _check(self, "layer_budgets", lambda xs: all(x > 0 for x in xs), "more than 0")
        _check(self, "adam_betas", lambda xs: len(xs) == 2 and all(0 <= x < 1 for x in xs), "that is two of [0, 1)")
        for name, choices in _choices(self):
            if getattr(self, name) not in choices:
                raise _bad(name, getattr(self, name), f"one of {', '.join(choices)}")
        self._check_together()

    def _check_together(self) -> None:
        margins = [name for name in ("kl_margin", "loss_margin") if getattr(self, name) is not None]
        if self.target_edges is not None and margins:
            raise RecipeError(
                "target_edges", f"{' and '.join(margins)} also set", "one kind: margins None, or no target"
            )
        if self.target_edges is None and not margins:
            raise RecipeError("kl_margin and loss_margin", "both are None, so nothing is constrained", "kl_margin=0.1")
        if self.kl_weight == 0 and self.loss_weight == 0:
            raise RecipeError("kl_weight and loss_weight", "both are 0, so nothing is learned", "kl_weight=1")
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            raise _bad("micro_batch", self.micro_batch, f"a divisor of batch_size {self.batch_size}")
        if self.graph and (self.kernel != "triton" or self.micro_batch not in (None, self.batch_size)):
            raise RecipeError(
                "graph", f"kernel={self.kernel}, micro_batch={self.micro_batch}", "kernel=triton, no micro_batch"
            )
        if self.sampling == "none" and self.kernel == "triton":
            raise RecipeError("sampling=none", "the fused kernel only samples", "kernel=reference")

    @property
    def tokens_per_step(self) -> int:
        """Tokens read by one optimiser step."""
        return self.batch_size * self.context_length

    def has_budget(self) -> bool:
        """Whether training would ever stop."""
        return not (self.steps is None and self.tokens is None and self.minutes is None)


@dataclass(frozen=True, kw_only=True)
class CircuitSearch:
    """How circuits are searched and measured; the same for every model that is compared."""

    method: Literal["eap", "eap-ig", "eap-ig-activations", "exact", "learned"] = "eap-ig"
    """How edges are ranked: by plain or integrated gradients, by patching each (small models), by a learned mask."""
    steps: int = 5
    """Steps of integration."""
    gim: bool = False
    """Use GIM's backward rules (arXiv:2505.17630)."""
    through_gates: bool = True
    """Let gradients pass a sparse model's gates (straight-through); False: a gate is a constant."""
    mask_steps: int = 300
    """Steps of learning a mask (method=learned)."""
    mask_density: float = 0.05
    """Share of edges that a learned mask aims to keep (method=learned)."""
    ablation: Literal["counterfactual", "resample", "mean", "mean-position", "zero"] = "counterfactual"
    """What a removed edge carries instead."""
    how: Literal["absolute", "signed", "greedy", "greedy-signed", "random"] = "absolute"
    """In which order edges are kept."""
    nodes: bool = False
    """Keep whole heads and MLPs, with all edges between them, instead of single edges."""
    split: bool = True
    """Query, key and value inputs of a head apart; False: one input per head."""
    key_readers: Literal["group", "head"] = "group"
    """With shared keys and values: read them once per key/value head, or once per query head as EAP-IG and MIB do."""
    grid: Literal["log", "mib"] = "log"
    """Sizes of the circuits of a curve: `points` on a log axis from 10 edges to all, or MIB's ten percentages."""
    points: int = 20
    """Circuits per curve."""
    count: int | None = None
    """Prompts: half to search on, half to measure on. Default 128, and all rows of a file."""
    samples: int = 1000
    """Bootstrap samples."""
    controls: bool = True
    """Also measure random circuits, shuffled answers and untrained gates."""
    complements: bool = True
    """Also measure all edges but the circuit's: necessity."""
    memory: int | None = None
    """Bytes that may be used beside the model, prompts and scores, one prompt at least; default 768 MiB, GPU 6 GiB."""
    seed: int = 0
    """Seed of prompts, split, controls and bootstrap."""

    def __post_init__(self) -> None:
        _check(self, "steps samples mask_steps memory", lambda x: x >= 1, "at least 1")
        _check(self, "points", lambda x: x >= 2, "at least 2")
        _check(self, "count", lambda x: x >= 4, "at least 4")
        _check(self, "seed", lambda x: x >= 0, "at least 0")
        _check(self, "mask_density", lambda x: 0 < x < 1, "between 0 and 1")
        _check(self, "gim through_gates nodes split controls complements", lambda x: True, "true or false")
        for name, choices in _choices(self):
            if getattr(self, name) not in choices:
                raise _bad(name, getattr(self, name), f"one of {', '.join(choices)}")
        self._check_together()

    def _check_together(self) -> None:
        if self.gim and not self.method.startswith("eap"):
            raise RecipeError(f"gim with method={self.method}", "it has no backward pass of its own", "an eap method")
        if self.nodes and (self.method == "learned" or self.how.startswith("greedy") or self.grid == "mib"):
            found = f"method={self.method}, how={self.how}, grid={self.grid}, which are of single edges"
            raise RecipeError("nodes", found, "another method, how=absolute or signed, grid=log")
        if self.key_readers == "head" and not self.split:
            raise RecipeError("split=false", "key_readers=head, and one input per head", "one of the two")


RECIPES: dict[str, type] = {"sparse-attention": SparseAttention, "circuits": CircuitSearch, **WEIGHT_RECIPES}


def to_dict(recipe: Any) -> dict[str, Any]:
    """Give plain data, with the recipe's name under `recipe`."""
    name = next(name for name, kind in RECIPES.items() if type(recipe) is kind)
    return {"recipe": name, **_plain(dataclasses.asdict(recipe))}


def from_dict(data: dict[str, Any]) -> Any:
    """Make a recipe from plain data; an unknown name or field is an error that lists the known ones."""
    kind = RECIPES.get(str(data.get("recipe", "sparse-attention")))
    if kind is None:
        raise RecipeError("recipe", repr(data.get("recipe")), f"one of {', '.join(RECIPES)}")
    fields = {f.name for f in dataclasses.fields(kind)}
    given = {name: value for name, value in data.items() if name != "recipe"}
    if unknown := sorted(map(str, set(given) - fields)):
        raise RecipeError(f"recipe field {unknown[0]}", "no such field", f"one of {', '.join(sorted(fields))}")
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()})


def read_recipe(path: Path | str) -> Any:
    """Read a recipe from a YAML file; a list of them (stages: prune, then distil) is a tuple."""
    import yaml

    try:
        data = _loaded(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"recipe file {path}", str(error), "a YAML file like recipes/smollm2.yaml") from error
    stages: Any = data if isinstance(data, list) and data else [data]
    if not all(isinstance(stage, dict) for stage in stages):
        found = f"{type(data).__name__}, not a mapping or a list of them"
        raise RecipeError(f"recipe file {path}", found, "lines of `field: value`")
    read = tuple(from_dict({name: _number(value) for name, value in stage.items()}) for stage in stages)
    return read if isinstance(data, list) else read[0]


def _loaded(text: str) -> Any:
    """yaml.safe_load without YAML 1.1's numbers to base 60: `structure: 2:4` is no 124."""
    import yaml

    class Loader(yaml.SafeLoader):
        """With its own table of what a bare word may be."""

    word = ("tag:yaml.org,2002:str", re.compile(r"\d+:\d+$"))
    known = yaml.SafeLoader.yaml_implicit_resolvers.items()
    Loader.yaml_implicit_resolvers = {first: [word, *rules] for first, rules in known}
    return Loader(text).get_single_data()


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 (no dot) as text; nobody means that."""
    if isinstance(value, list):
        return [_number(x) for x in value]
    return float(value) if isinstance(value, str) and re.fullmatch(r"[+-]?\d+[eE][+-]?\d+", value) else value


def write_recipe(recipe: Any, path: Path | str) -> None:
    """Write a recipe, or a tuple of them, as YAML, every field resolved."""
    import yaml

    data = [to_dict(stage) for stage in recipe] if isinstance(recipe, tuple) else to_dict(recipe)
    Path(path).write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in data.items()}
