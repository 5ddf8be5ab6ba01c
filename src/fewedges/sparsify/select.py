"""The only top-k in the package: score + structure + budget + comparison group -> Pattern.

Budgets are exact, also where scores are equal: of equal scores the later ones (in row order) are kept, as a stable
ascending sort that zeroes from its front would do.

Shapes: R rows (outputs), C columns (inputs).
"""

import math
from fractions import Fraction

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fewedges.errors import ModelError, RecipeError
from fewedges.sparsify.pattern import NM, Blocks, Pattern
from fewedges.weight_recipes import Structure


def select(
    score: Float[Tensor, "R C"],
    structure: str | Structure = "unstructured",
    budget: float | int | None = None,
    group: str = "matrix",
) -> Pattern:
    """Keep the highest scores of a matrix, or of any slice of it.

    `budget` is a density (float) or a number of units to keep in each group (int); a unit is an entry or a block,
    whose score is the sum over it. N:M has its own budget. `group` is "matrix" or "row" (of entries or blocks).
    Raises RecipeError when the structure does not divide the matrix, ModelError when a score is NaN.
    """
    kind = structure if isinstance(structure, Structure) else Structure.parse(structure)
    units = unit_scores(score, kind)  # (r, c), or (R, C/M, M)
    if kind.kind == "n:m":
        return NM(keep_largest(units, kind.n).flatten(-2), kind.n, kind.m)
    if budget is None:
        raise RecipeError(f"select with structure {kind}", "no budget", "a density such as 0.5, or a count")
    rows = units if group == "row" else units.reshape(1, -1)
    kept = budget if isinstance(budget, int) else kept_units(rows.shape[-1], budget)
    return _pattern(keep_largest(rows, kept).view(units.shape), kind)


def select_global(
    scores: dict[str, Float[Tensor, "_ _"]], structure: str | Structure, budget: float | int
) -> dict[str, Pattern]:
    """Keep the highest scores over all matrices together; each gets the density its scores earn.

    `budget` is a density (float) or a number of units (int) over all.
    """
    kind = structure if isinstance(structure, Structure) else Structure.parse(structure)
    if kind.kind == "n:m":
        raise RecipeError(f"select {kind} globally", "N:M fixes the density of every matrix", "allocation uniform")
    units = {name: unit_scores(score, kind) for name, score in scores.items()}
    line = torch.cat([x.reshape(-1).cpu() for x in units.values()])
    kept = budget if isinstance(budget, int) else kept_units(len(line), budget)
    masks = keep_largest(line, kept).split([x.numel() for x in units.values()])
    return {
        name: _pattern(mask.view(x.shape).to(x.device), kind)
        for (name, x), mask in zip(units.items(), masks, strict=True)
    }


def keep_largest(score: Float[Tensor, "*groups U"], kept: int) -> Bool[Tensor, "*groups U"]:
    """Mark exactly `kept` of the last axis, the highest; of equals the later ones."""
    units = score.shape[-1]
    if not 0 <= kept <= units:
        raise RecipeError(f"keep {kept} of {units}", "no such number of units", f"0 to {units}")
    score = score.float() if score.dtype.itemsize < 4 else score
    if score.isnan().any():
        raise ModelError(
            "select by score", f"{int(score.isnan().sum())} scores are NaN", "a model and data without NaN"
        )
    if kept in (0, units):
        return torch.full(score.shape, kept > 0, device=score.device)
    threshold = score.kthvalue(units - kept, dim=-1, keepdim=True).values  # the highest score that goes
    above = score > threshold
    missing = kept - above.sum(-1, keepdim=True)  # (*groups, 1); 0 unless equals stand on both sides of the cut
    if not missing.any():
        return above
    tied = score == threshold
    rank = tied.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1)  # 1 for the last of the equals
    return above | (tied & (rank <= missing))


def kept_units(units: int, density: float) -> int:
    """units - floor((1 - density) * units), the density read as the decimal it is written as (1 - .9 is .1)."""
    if not 0 <= density <= 1:
        raise RecipeError(f"density {density}", "not a fraction", "a number in [0, 1]")
    return units - math.floor(units * (1 - Fraction(str(float(density)))))


def unit_scores(score: Float[Tensor, "R C"], kind: Structure) -> Tensor:
    """Scores by unit: entries (R, C), blocks (R/h, C/w) as sums, or groups of M (R, C/M, M)."""
    if kind.kind == "unstructured":
        return score
    if kind.kind not in ("n:m", "block"):
        raise RecipeError(f"a mask of structure {kind}", "it removes rows and columns", "shrink.shrink(loaded, recipe)")
    high, wide = (1, kind.m) if kind.kind == "n:m" else (kind.n, kind.m)
    if score.shape[-2] % high or score.shape[-1] % wide:
        found = f"a matrix of {score.shape[-2]} x {score.shape[-1]}, which {high} x {wide} does not divide"
        raise RecipeError(f"structure {kind}", found, "a structure that divides it, or keep_dense with its name")
    if kind.kind == "n:m":
        return score.unflatten(-1, (-1, kind.m))
    return score.unflatten(-1, (-1, wide)).unflatten(-3, (-1, high)).sum((-1, -3))


def _pattern(mask: Tensor, kind: Structure) -> Pattern:
    return Blocks(mask, kind.n, kind.m) if kind.kind == "block" else Pattern(mask)
