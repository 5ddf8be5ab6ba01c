"""Whole heads and whole MLP channels removed: smaller matrices, an ordinary smaller model.

Every layer loses the same number, each its own worst, so that a plain configuration describes the result and plain
transformers loads it. The unit of head pruning is a key/value head with its query heads. What goes is chosen by the
matrix that writes it to the residual stream: the sum of squared scores over the unit's columns.

Shapes: D model width, H heads, G key/value heads, E head width, I channels of the MLP; R outputs, C inputs.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from fewedges.errors import ModelError, RecipeError
from fewedges.model.anatomy import Layer, anatomy, example_tokens
from fewedges.model.attention import refuse_patterns
from fewedges.model.loading import Loaded
from fewedges.sparsify.calibration import calibrated
from fewedges.sparsify.masks import Masks
from fewedges.sparsify.matrices import Block, Matrix, blocks_of
from fewedges.sparsify.pattern import Pattern
from fewedges.sparsify.pruned import Pruned, after
from fewedges.sparsify.score import SCORES, Evidence
from fewedges.sparsify.select import kept_units, select
from fewedges.weight_recipes import METHODS, Prune, Structure

CHANNELS = ("ffn_dim", "n_inner", "intermediate_size")
"""What configurations call I."""
EQUAL = 1e-4
"""Largest difference of logits, relative to the largest logit, between the small model and the masked large one."""


@dataclass(frozen=True)
class Cut:
    """The units of one block: what writes them, and which rows and columns of which matrices are theirs."""

    writer: Matrix
    width: int
    """Columns of the writer that belong to one unit."""
    rows: dict[str, Int[Tensor, "R"]]
    """For every matrix that makes the units: the unit each of its output rows belongs to (-1: to none)."""

    @property
    def units(self) -> int:
        """How many there are."""
        return self.writer.shape[1] // self.width


def shrink(start: Pruned, recipe: Prune, tokens: Tensor | None, facts: dict[str, Any]) -> Pruned:
    """Make a smaller model with a fraction `density` of the heads or channels; the given one is left alone.

    Raises ModelError where the family's configuration ties what would have to differ (head width in GPT-2, NeoX and
    OPT; norms over all heads in OLMo 2).
    """
    if start.rounded or recipe.keep_dense:
        raise RecipeError("shrink", "quantised weights or keep_dense", "quantise last, and no keep_dense")
    kind = Structure.parse(recipe.structure)
    masked = start.loaded.with_model(copy.deepcopy(start.model))  # units are zeroed here, then left out of the copy
    chosen: dict[str, tuple[Tensor | None, Tensor | None]] = {}
    for block, layer, norms in _walk(masked, recipe, tokens):
        cut = head_cut(block, layer) if kind.kind == "head" else channel_cut(block, layer, masked)
        units = _choose(cut, recipe, norms)
        columns = torch.isin(torch.arange(cut.writer.shape[1]) // cut.width, units)
        cut.writer.weight[:, ~columns.to(cut.writer.weight.device)] = 0
        chosen[cut.writer.name] = (None, columns.nonzero()[:, 0])
        for name, unit in cut.rows.items():
            chosen[name] = (torch.isin(unit, units).nonzero()[:, 0], None)
    config = _config(masked, kind, recipe.density)
    small = reshaped(start.loaded, config)
    _fill_(small.model, masked.model, chosen)
    _check_equal(small.model, masked.model, kind)
    masks = Masks({name: _sliced(pattern, chosen.get(name)) for name, pattern in start.masks.patterns.items()})
    small = replace(small, anatomy=anatomy(small.model))
    return after(start, recipe, loaded=small, masks=masks, config={**start.config, **config}, data=facts)


def reshaped(loaded: Loaded, config: dict[str, Any]) -> Loaded:
    """A model of the same class with some numbers of its configuration changed; its weights are yet to be set."""
    model = loaded.model
    refuse_patterns("make a model smaller", model)  # they were laid for its layers and heads
    smaller = copy.deepcopy(model.config)
    for name, value in config.items():
        setattr(smaller, name, value)
    parameter = next(model.parameters())
    state = torch.get_rng_state()
    fresh = type(model)(smaller).to(dtype=parameter.dtype, device=parameter.device).eval().requires_grad_(False)
    torch.set_rng_state(state)
    fresh.set_attn_implementation(model.config._attn_implementation)
    return replace(loaded, model=fresh, anatomy=anatomy(fresh))


def head_cut(block: Block, layer: Layer) -> Cut:
    """Key/value heads with their query heads."""
    by_name = {matrix.name: matrix for matrix in block.matrices}
    per = layer.heads // layer.kv_heads * layer.width
    query = torch.arange(layer.kv_heads).repeat_interleave(per)
    key = torch.arange(layer.kv_heads).repeat_interleave(layer.width)
    layouts = {len(query): query, len(key): key, len(query) + 2 * len(key): torch.cat([query, key, key])}
    rows = {name: layouts.get(by_name[name].shape[0]) for name in layer.readers if name in by_name}
    writers = [by_name[name] for name in layer.writers if by_name[name].shape[1] == layer.heads * layer.width]
    if len(writers) != 1 or not rows or any(unit is None for unit in rows.values()):
        raise ModelError(f"cut heads in {block.name}", "its projections have another layout", "structure channel")
    return Cut(writers[0], per, rows)  # type: ignore[arg-type]


def channel_cut(block: Block, layer: Layer, loaded: Loaded) -> Cut:
    """Channels of the MLP: gate, up (fused or not) and down."""
    wide, width = _channels(loaded)[1], loaded.anatomy.width
    others = [m for m in block.matrices if not m.name.startswith(f"{layer.module}.")]
    down = [m for m in others if m.shape == (width, wide)]
    ups = {m.name: torch.arange(wide).repeat(m.shape[0] // wide) for m in others if m not in down}
    odd = [m.name for m in others if m not in down and (m.shape[1] != width or m.shape[0] not in (wide, 2 * wide))]
    if len(down) != 1 or odd or wide == width:
        raise ModelError(f"cut channels in {block.name}", f"no plain MLP of {width} to {wide}", "structure head")
    return Cut(down[0], 1, ups)


def _walk(loaded: Loaded, recipe: Prune, tokens: Tensor | None) -> Iterator[tuple[Block, Layer, dict[str, Tensor]]]:
    """Blocks with their layers, and the norms of their inputs where the method wants them."""
    if tokens is None:
        yield from ((block, layer, {}) for block, layer in zip(blocks_of(loaded), loaded.anatomy.layers, strict=True))
        return
    walk = calibrated(loaded, tokens, micro_batch=recipe.micro_batch, precision=recipe.precision)
    for (block, seen), layer in zip(walk, loaded.anatomy.layers, strict=True):
        yield block, layer, {name: inputs.norm for name, inputs in seen.items()}


def _choose(cut: Cut, recipe: Prune, norms: dict[str, Tensor]) -> Int[Tensor, "kept"]:
    """The units to keep, in order."""
    generator = torch.Generator().manual_seed(recipe.seed)
    evidence = Evidence(input_norm=norms.get(cut.writer.name), generator=generator)
    score = SCORES[METHODS[recipe.method].score].of(cut.writer.weight, evidence).square().sum(0)  # (C,)
    units = score.view(1, cut.units, cut.width).sum(-1)
    return select(units, "unstructured", _left(cut.units, recipe.density)).mask()[0].nonzero()[:, 0].cpu()


def _left(units: int, density: float) -> int:
    left = max(1, kept_units(units, density))
    if left == units and density < 1:
        found = f"{units} units in a layer, so none would go"
        raise RecipeError(f"shrink to density {density}", found, "a lower density, or structure channel")
    return left


def _channels(loaded: Loaded) -> tuple[str, int]:
    """The configuration's name for I, and I."""
    config = loaded.model.config
    for name in CHANNELS:
        if hasattr(config, name):
            return name, getattr(config, name) or 4 * loaded.anatomy.width  # GPT-2 writes None for four times
    raise ModelError(f"cut channels of {loaded.name}", f"its configuration has none of {CHANNELS}", "structure head")


def _config(loaded: Loaded, kind: Structure, density: float) -> dict[str, Any]:
    """What changes in the configuration."""
    if kind.kind == "channel":
        name, channels = _channels(loaded)
        return {name: _left(channels, density)}
    layer = loaded.anatomy.layers[0]
    groups = _left(layer.kv_heads, density)
    heads = {"num_attention_heads": groups * (layer.heads // layer.kv_heads), "head_dim": layer.width}
    return {**heads, "num_key_value_heads": groups}


@torch.no_grad()
def _fill_(small: Any, large: Any, chosen: dict[str, tuple[Tensor | None, Tensor | None]]) -> None:
    """Copy every parameter, leaving out the rows and columns that go."""
    targets = dict(small.named_parameters())
    for name, value in large.named_parameters():
        path, _, kind = name.rpartition(".")
        rows, columns = chosen.get(path, (None, None))
        matrix = Matrix(path, large.get_submodule(path))
        flipped = kind == "weight" and path in chosen and matrix.transposed
        first, second = (columns, rows) if flipped else (rows, columns)
        if first is not None:
            value = value[first.to(value.device)]
        if second is not None and value.dim() == 2:
            value = value[:, second.to(value.device)]
        if value.shape != targets[name].shape:
            found = f"{name} would be {tuple(value.shape)}, its configuration makes it {tuple(targets[name].shape)}"
            raise ModelError(f"shrink a {type(large).__name__}", found, "structure channel, or another family")
        targets[name].copy_(value)


@torch.no_grad()
def _check_equal(small: Any, large: Any, kind: Structure) -> None:
    """The small model computes what the large one does with the same units at zero."""
    tokens = example_tokens(large.config.get_text_config().vocab_size).to(large.device)
    mine, wanted = (model(input_ids=tokens, use_cache=False).logits.float() for model in (small, large))
    far = float((mine - wanted).abs().max() / wanted.abs().max())
    limit = EQUAL if large.dtype == torch.float32 else 0.05
    if not far <= limit:
        found = f"logits differ by {far:.1e} of the largest from those with the {kind}s at zero"
        raise ModelError(f"shrink a {type(large).__name__}", found, "a family without norms over all heads")


def _sliced(pattern: Pattern, chosen: tuple[Tensor | None, Tensor | None] | None) -> Pattern:
    return pattern if chosen is None else pattern.permute(*chosen)


# -- whole layers ----------------------------------------------------------------------------------------------


def keep_layers(start: Pruned, layers: tuple[int, ...]) -> Pruned:
    """A model of some of a dense model's layers, in order; the given one is left alone. A stage of distillation."""
    large = start.model
    total = len(start.loaded.anatomy.layers)
    if not layers or layers[-1] >= total:
        raise RecipeError("recipe field layers", f"{list(layers)} of a model with {total}", f"numbers below {total}")
    config: dict[str, Any] = {"num_hidden_layers": len(layers)}
    if kinds := getattr(large.config, "layer_types", None):  # sliding and full attention take turns in some families
        config["layer_types"] = [kinds[number] for number in layers]
    small = reshaped(start.loaded, config)
    where = dict(zip(_layer_paths(small), (_layer_paths(start.loaded)[n] for n in layers), strict=True))
    values = dict(large.named_parameters())
    with torch.no_grad():
        for name, parameter in small.model.named_parameters():
            path = next((path for path in where if name.startswith(f"{path}.")), None)
            parameter.copy_(values[name if path is None else where[path] + name.removeprefix(path)])
    return replace(start, loaded=small, config={**start.config, **config})


def _layer_paths(loaded: Loaded) -> list[str]:
    return [block.name for block in blocks_of(loaded)]
