"""Quantisation: the matrices rounded to 8 or 4 bits; zeros stay zeros.

The plain backend rounds in float (rounding.py) and keeps codes and scales to be saved; the model stays an ordinary
one. torchao's backend replaces the weights by its tensors, to be run where its kernels are; the ledger counts their
bytes as they lie in memory (IntxWeightOnly keeps 4-bit codes in a byte each).
"""

from typing import Any

import torch

from fewedges.errors import ModelError, RecipeError
from fewedges.model.loading import Loaded
from fewedges.sparsify.matrices import Matrix, matrices_of, write_
from fewedges.sparsify.pruned import Pruned, after, begin
from fewedges.sparsify.rounding import rounded
from fewedges.weight_recipes import Quantize


@torch.no_grad()
def quantize_(what: Loaded | Pruned, recipe: Quantize) -> Pruned:
    """Round every matrix of the blocks in place; embeddings and the output layer stay as they are.

    Raises ModelError if a zero is lost, RecipeError where the backend or the group size does not fit.
    """
    start = begin(what)
    matrices = matrices_of(start.loaded)
    if recipe.backend == "torchao":
        _by_torchao_(start, matrices, recipe)
        return after(start, recipe, backend="torchao", rounded={})
    codes = {name: rounded(matrix.weight, recipe.bits, recipe.group_size) for name, matrix in matrices.items()}
    for name, code in codes.items():
        write_(matrices[name], code.dequantise())
    start.masks.check(start.model, "quantising")
    return after(start, recipe, rounded=codes)


def _by_torchao_(start: Pruned, matrices: dict[str, Matrix], recipe: Quantize) -> None:
    if conv := [name for name, matrix in matrices.items() if matrix.transposed]:
        raise ModelError("quantize by torchao", f"{conv[0]} is no nn.Linear", "backend reference")
    try:
        import torchao.quantization as ao  # type: ignore[import-not-found]
    except ImportError as error:
        raise RecipeError("backend torchao", "the package is missing", "pip install 'fewedges[quantize]'") from error
    chosen = {id(matrix.module) for matrix in matrices.values()}
    ao.quantize_(start.model, _config(ao, recipe), filter_fn=lambda module, _: id(module) in chosen)
    if lost := start.masks.lost(start.model):
        name, count = next(iter(lost.items()))
        raise ModelError(f"quantize {name} by torchao", f"{count} zeros are lost", "backend reference")


def _config(ao: Any, recipe: Quantize) -> Any:
    """torchao's configuration: weights only, integer or 8-bit float."""
    if recipe.format == "fp8":
        return ao.Float8WeightOnlyConfig()
    if recipe.bits == 8 and recipe.group_size is None:
        return ao.Int8WeightOnlyConfig()
    granularity = ao.PerAxis(0) if recipe.group_size is None else ao.PerGroup(recipe.group_size)
    return ao.IntxWeightOnlyConfig(getattr(torch, f"int{recipe.bits}"), granularity)
