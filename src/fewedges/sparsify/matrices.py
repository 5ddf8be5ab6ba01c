"""The matrices of a decoder's blocks, each seen as outputs x inputs whatever its class stores (Conv1D: inputs first).

What can be pruned is every matrix inside a block; embeddings and the output layer (often one tied tensor) are not
among them. A block that holds matrices of another kind is refused: they would silently stay dense.

Shapes: R outputs, C inputs.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fewedges.errors import ModelError, RecipeError
from fewedges.model.loading import Loaded

MERGE = "fewedges.sparsify.masks.merge_masked(adapted, pruned.masks), which keeps the zeros"
"""What to do with adapters on a sparse model."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """One matrix of a model, by the path of its module."""

    name: str
    module: nn.Module

    @property
    def parameter(self) -> nn.Parameter:
        """The stored tensor; Conv1D stores it (C, R)."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def transposed(self) -> bool:
        """Whether inputs come first in storage, as in transformers' Conv1D (GPT-2)."""
        return not isinstance(self.module, nn.Linear)

    @property
    def weight(self) -> Float[Tensor, "R C"]:
        """The values as (R, C): a view, so writing into it writes the model."""
        return self.oriented(self.parameter.detach())

    @property
    def values(self) -> Float[Tensor, "R C"]:
        """The same to be read only, also where codes and scales (torchao's) stand for the numbers."""
        parameter = self.parameter.detach()
        return self.oriented(parameter.dequantize() if is_traceable_wrapper_subclass(parameter) else parameter)

    @property
    def shape(self) -> tuple[int, int]:
        """(R, C)."""
        rows, columns = self.weight.shape
        return rows, columns

    def oriented(self, tensor: Tensor) -> Tensor:
        """From storage order to (R, C), and back."""
        return tensor.T if self.transposed else tensor


@dataclass(frozen=True, eq=False)
class Block:
    """One transformer block: attention and MLP."""

    name: str
    module: nn.Module
    matrices: tuple[Matrix, ...]


def blocks_of(loaded: Loaded) -> list[Block]:
    """The blocks of a model in order, with their matrices.

    Raises ModelError for adapters, for blocks outside a ModuleList, and for weights that no Linear or Conv1D holds.
    """
    model = loaded.model
    if hasattr(model, "get_base_model") or adapted(model):
        hint = f"merge them first: {MERGE}; merge_and_unload() where the model is dense"
        raise ModelError(f"prune {loaded.name}", "it carries adapters", hint)
    names = [_block_name(model, layer.module) for layer in loaded.anatomy.layers]
    found = [Block(name, module := model.get_submodule(name), _matrices(name, module)) for name in names]
    parameters = [id(matrix.parameter) for block in found for matrix in block.matrices]
    if len(set(parameters)) < len(parameters):
        raise ModelError(f"prune {loaded.name}", "blocks share their matrices", "a model whose blocks are its own")
    return found


def matrices_of(loaded: Loaded, keep_dense: Iterable[str] = ()) -> dict[str, Matrix]:
    """All matrices of all blocks by name, without those whose name ends in one of `keep_dense`."""
    every = {matrix.name: matrix for block in blocks_of(loaded) for matrix in block.matrices}
    return chosen(every, keep_dense)


def chosen(matrices: dict[str, Matrix], keep_dense: Iterable[str]) -> dict[str, Matrix]:
    """Leave out what is to stay dense; an ending that fits nothing is an error."""
    endings = tuple(keep_dense)
    for ending in endings:
        if not any(name.endswith(ending) for name in matrices):
            names = ", ".join(sorted({name.rpartition(".")[2] for name in matrices}))
            raise RecipeError(f"keep_dense {ending!r}", "no matrix has such a name", f"one of {names}")
    return {name: matrix for name, matrix in matrices.items() if not (endings and name.endswith(endings))}


def adapted(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that peft has put around others (LoRA), by path."""
    inner = [path for path, _ in model.named_modules() if path.rpartition(".")[2] == "base_layer"]
    return {(path := name.rpartition(".")[0]): model.get_submodule(path) for name in inner}


def bytes_of(tensor: Tensor) -> int | None:
    """Bytes a tensor takes up; of one that is made of others (torchao's codes and scales), theirs together.

    None where it is of a kind that does not say what it is made of.
    """
    if type(tensor) in (Tensor, nn.Parameter):
        return tensor.numel() * tensor.element_size()
    if not is_traceable_wrapper_subclass(tensor):
        return None
    parts = [bytes_of(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]]
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _block_name(model: Any, attention: str) -> str:
    """The innermost ancestor of an attention module that is an entry of a ModuleList."""
    parts = attention.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if isinstance(model.get_submodule(".".join(parts[: end - 1])), nn.ModuleList):
            return ".".join(parts[:end])
    raise ModelError(f"find the block of {attention}", "no ModuleList above it", "a decoder that is a stack of blocks")


def _matrices(name: str, block: nn.Module) -> tuple[Matrix, ...]:
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, Conv1D)
    held = {f"{path}.weight" for path, module in block.named_modules() if isinstance(module, kinds)}
    odd = [path for path, p in block.named_parameters() if p.dim() > 1 and path not in held]
    if odd:
        hint = "a model of Linear or Conv1D layers (experts kept as one tensor are not supported)"
        raise ModelError(f"prune {name}", f"{odd[0]} is a matrix of no known layer", hint)
    modules = [(path, module) for path, module in block.named_modules() if isinstance(module, kinds)]
    return tuple(Matrix(f"{name}.{path}", module) for path, module in modules)


def shapes_of(matrices: dict[str, Matrix]) -> dict[str, tuple[int, int]]:
    """(R, C) by name."""
    return {name: matrix.shape for name, matrix in matrices.items()}


@torch.no_grad()
def write_(matrix: Matrix, weight: Float[Tensor, "R C"]) -> None:
    """Replace a matrix's values in place."""
    matrix.weight.copy_(weight)
