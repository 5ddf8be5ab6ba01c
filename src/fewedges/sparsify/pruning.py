"""One-shot pruning: a method is a row of weight_recipes.METHODS, score x group x allocation x update, run here.

Methods that look at inputs go block after block (calibration.py), each block measured on what the blocks before it
have become. The others score the whole model at once.

Shapes: N windows, T tokens, R outputs, C inputs.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewedges.data.batch import Batches
from fewedges.errors import DataError, RecipeError
from fewedges.model.loading import Loaded
from fewedges.sparsify import allocation
from fewedges.sparsify.calibration import Inputs, calibrated
from fewedges.sparsify.masks import Masks
from fewedges.sparsify.matrices import Matrix, chosen, matrices_of, shapes_of, write_
from fewedges.sparsify.obs import Factor, factorise, prune_columns
from fewedges.sparsify.pattern import Pattern, of_kind_if_so
from fewedges.sparsify.pruned import Pruned, after, begin
from fewedges.sparsify.rounding import Rounded, rounded
from fewedges.sparsify.score import SCORES, Evidence
from fewedges.sparsify.select import select, select_global
from fewedges.sparsify.shrink import shrink
from fewedges.weight_recipes import METHODS, Prune, Structure

log = logging.getLogger(__name__)
READ = 8
"""Windows of text that are tokenised for one that is used."""


def prune_(what: Loaded | Pruned, recipe: Prune, data: Any = None) -> Pruned:
    """Prune a model's matrices in place and return the result that saves, loads and exports.

    `data` is text (file, folder, hub dataset), a source of batches, or windows of tokens (N, T); random and
    magnitude need none. A pruned model may be pruned again: what is zero stays zero. Structures head and channel
    make a smaller model and leave the given one alone. Raises RecipeError, DataError, or ModelError when a Hessian
    cannot be inverted: no method is ever replaced by another.
    """
    start = begin(what)
    kind = Structure.parse(recipe.structure)
    tokens, facts = calibration_tokens(start.loaded, recipe, data)
    if kind.kind in ("head", "channel"):
        return shrink(start, recipe, tokens, facts)
    matrices = chosen(matrices_of(start.loaded), recipe.keep_dense)
    before = {name: start.masks.patterns[name].mask() for name in matrices if name in start.masks.patterns}
    row = METHODS[recipe.method]
    if SCORES[row.score].needs in ("input_norm", "gram"):
        patterns, codes = _by_blocks_(start.loaded, recipe, matrices, before, tokens)
    else:
        patterns, codes = _at_once_(start.loaded, recipe, matrices, before, tokens), {}
    masks = Masks({**start.masks.patterns, **patterns})
    masks.check(start.model, "pruning")
    kept = {name: r for name, r in start.rounded.items() if name not in patterns}
    return after(start, recipe, masks=masks, rounded={**kept, **codes}, data=facts)


def needs_data(recipe: Prune) -> bool:
    """Whether the method looks at text."""
    return SCORES[METHODS[recipe.method].score].needs is not None


def calibration_tokens(
    loaded: Loaded, recipe: Prune, data: str | Path | Batches | Tensor | None
) -> tuple[Int[Tensor, "N T"] | None, dict[str, Any]]:
    """The windows to calibrate on and what they are, or None for a method that needs none.

    Of a text the first 8 N T tokens are read and N windows drawn from them.
    """
    if not needs_data(recipe):
        return None, {}
    if isinstance(data, Tensor):
        return data[: recipe.calibration_windows], {"name": "tokens", "windows": len(data)}
    source = data if hasattr(data, "at") else _text(loaded, recipe, data)  # type: ignore[arg-type]
    windows = getattr(source, "windows", None)
    if windows is not None and windows < recipe.calibration_windows:
        found = f"{windows} windows of {recipe.context_length} tokens, {recipe.calibration_windows} are asked"
        raise DataError("calibration", found, "more text, fewer calibration_windows, or a smaller context_length")
    tokens = source.at(0, recipe.calibration_windows).tokens  # type: ignore[union-attr]
    return tokens, {**source.describe(), "windows": len(tokens)}  # type: ignore[union-attr]


def _text(loaded: Loaded, recipe: Prune, data: str | Path | None) -> Batches:
    if data is None and loaded.name == "addition":
        from fewedges.data.addition import Sums

        return Sums(seed=recipe.seed)
    if data is None:
        raise RecipeError(
            f"prune by {recipe.method}", "no data", 'data="my_text/" (text to calibrate on), or magnitude'
        )
    if (longest := loaded.anatomy.positions) is not None and recipe.context_length > longest:
        found = f"{recipe.context_length}, the model has {longest} positions"
        raise RecipeError("recipe field context_length", found, f"at most {longest}")
    from fewedges.data.text import read_text

    limit = READ * recipe.calibration_windows * recipe.context_length
    options: dict[str, Any] = {"context_length": recipe.context_length, "seed": recipe.seed, "max_tokens": limit}
    return read_text(data, loaded.tokenizer, **options)


def densities(recipe: Prune, matrices: dict[str, Matrix]) -> dict[str, float]:
    """The density of each matrix, by the recipe's allocation (one that scores do not decide)."""
    rule = METHODS[recipe.method].allocation if recipe.allocation == "method" else recipe.allocation
    return allocation.shares(rule, shapes_of(matrices), recipe.density, recipe.price)


# -- all matrices at once --------------------------------------------------------------------------------------


@torch.no_grad()
def _at_once_(
    loaded: Loaded, recipe: Prune, matrices: dict[str, Matrix], before: dict[str, Tensor], tokens: Tensor | None
) -> dict[str, Pattern]:
    """Score every matrix, select, write the zeros."""
    row, kind = METHODS[recipe.method], Structure.parse(recipe.structure)
    scores = _scores(loaded, recipe, matrices, tokens)
    for name, mask in before.items():
        scores[name] = scores[name].masked_fill(~mask.to(scores[name].device), -torch.inf)
    rule = row.allocation if recipe.allocation == "method" else recipe.allocation
    if rule == "global" and kind.kind != "n:m":
        patterns = select_global(scores, kind, recipe.density)
    else:
        group = row.group if recipe.group == "method" else recipe.group
        share = dict.fromkeys(matrices, recipe.density) if kind.kind == "n:m" else densities(recipe, matrices)
        patterns = {name: select(score, kind, share[name], group) for name, score in scores.items()}
    return {name: _written_(matrices[name], pattern, before.get(name)) for name, pattern in patterns.items()}


def _scores(loaded: Loaded, recipe: Prune, matrices: dict[str, Matrix], tokens: Tensor | None) -> dict[str, Tensor]:
    score = SCORES[METHODS[recipe.method].score]
    generator = torch.Generator().manual_seed(recipe.seed)
    slopes: dict[str, Tensor] = {}
    if score.needs == "gradient":
        assert tokens is not None
        slopes = gradients(loaded, matrices, tokens, recipe.micro_batch)
    return {
        name: score.of(matrix.weight, Evidence(gradient=slopes.get(name), generator=generator))
        for name, matrix in matrices.items()
    }


@torch.enable_grad()
def gradients(
    loaded: Loaded, matrices: dict[str, Matrix], tokens: Int[Tensor, "N T"], micro_batch: int
) -> dict[str, Float[Tensor, "R C"]]:
    """dL/dW of each matrix, L the mean next-token cross-entropy over all windows: averaged before any |.|."""
    parameters = [matrix.parameter for matrix in matrices.values()]
    states = [p.requires_grad for p in parameters]
    sums = [torch.zeros_like(p) for p in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for piece in tokens.to(loaded.model.device).split(micro_batch):
            logits = loaded.model(input_ids=piece, use_cache=False).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), piece[:, 1:].flatten())
            for total, slope in zip(sums, torch.autograd.grad(loss, parameters), strict=True):
                total.add_(slope, alpha=len(piece) / len(tokens))
    finally:
        for parameter, state in zip(parameters, states, strict=True):
            parameter.requires_grad_(state)
    return {name: matrix.oriented(total) for (name, matrix), total in zip(matrices.items(), sums, strict=True)}


# -- block after block -----------------------------------------------------------------------------------------


def _by_blocks_(
    loaded: Loaded, recipe: Prune, matrices: dict[str, Matrix], before: dict[str, Tensor], tokens: Tensor | None
) -> tuple[dict[str, Pattern], dict[str, Rounded]]:
    """Measure a block's inputs, prune its matrices, go on with what it now computes."""
    assert tokens is not None
    share = densities(recipe, matrices)
    obs = METHODS[recipe.method].update == "obs"
    patterns: dict[str, Pattern] = {}
    codes: dict[str, Rounded] = {}
    options: dict[str, Any] = {"micro_batch": recipe.micro_batch, "precision": recipe.precision}
    for block, seen in calibrated(loaded, tokens, gram=obs, **options):
        prunes = [matrix for matrix in block.matrices if matrix.name in matrices]
        if obs:
            done = _solve_block_(prunes, seen, recipe, share, before, len(tokens))
            patterns.update({name: pattern for name, (pattern, _) in done.items()})
            codes.update({name: code for name, (_, code) in done.items() if code is not None})
        else:
            patterns.update({m.name: _select_by_norm(m, seen[m.name], recipe, share, before) for m in prunes})
        log.info("pruned %s by %s", block.name, recipe.method)
    return patterns, codes


def _select_by_norm(
    matrix: Matrix, inputs: Inputs, recipe: Prune, share: dict[str, float], before: dict[str, Tensor]
) -> Pattern:
    """Wanda: no survivor moves."""
    row, density, allowed = METHODS[recipe.method], share[matrix.name], before.get(matrix.name)
    score = SCORES[row.score].of(matrix.weight, Evidence(input_norm=inputs.norm))
    if allowed is not None:
        score = score.masked_fill(~allowed.to(score.device), -torch.inf)
    group = row.group if recipe.group == "method" else recipe.group
    return _written_(matrix, select(score, recipe.structure, density, group), allowed)


def _solve_block_(
    matrices: list[Matrix],
    seen: dict[str, Inputs],
    recipe: Prune,
    share: dict[str, float],
    before: dict[str, Tensor],
    windows: int,
) -> dict[str, tuple[Pattern, Rounded | None]]:
    """SparseGPT of a block's matrices; those with the same inputs share a factor, and none outlives the block."""
    factors: dict[int, Factor] = {}
    done = {}
    for matrix in matrices:
        inputs = seen[matrix.name]
        if id(inputs) not in factors:
            factors[id(inputs)] = factorise(inputs.gram, windows, recipe.damping, matrix.name)
        done[matrix.name] = _solve_(matrix, factors[id(inputs)], recipe, share[matrix.name], before.get(matrix.name))
    return done


def _solve_(
    matrix: Matrix, factor: Factor, recipe: Prune, density: float, allowed: Tensor | None
) -> tuple[Pattern, Rounded | None]:
    """SparseGPT: the survivors make good what goes."""
    solved = prune_columns(
        matrix.weight,
        factor,
        density=density,
        structure=recipe.structure,
        block=recipe.block,
        bits=recipe.bits,
        group_size=recipe.group_size,
        allowed=None if allowed is None else allowed.to(matrix.weight.device),
    )
    pattern = of_kind_if_so(solved.mask, recipe.structure)  # an earlier mask may have broken its blocks
    if recipe.bits is None or solved.scales is None:
        write_(matrix, solved.weight)
        return pattern, None
    code = rounded(solved.weight, recipe.bits, scales=solved.scales)
    write_(matrix, code.dequantise())
    return pattern, code


@torch.no_grad()
def _written_(matrix: Matrix, pattern: Pattern, allowed: Tensor | None) -> Pattern:
    """Write a pattern's zeros; what was already masked stays so."""
    if allowed is not None:
        pattern = of_kind_if_so(pattern.mask() & allowed.to(pattern.kept.device), pattern.kind)
    matrix.weight.masked_fill_(~pattern.mask(), 0)
    return pattern
