"""Run a block-pruned model by its blocks: kept blocks alone are stored and multiplied.

A pruned matrix is a dense tensor with zeros in it, which costs what a dense one costs. Where its zeros are whole
b x b blocks (pruned with `structure="64x64"`, say), a `BlockLinear` in its place holds the kept ones.

Shapes: R outputs, C inputs; N kept blocks of b x b.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewedges.errors import RecipeError
from fewedges.sparsify.block_kernel import (
    BLOCKS,
    KERNELS,
    BlockIndex,
    BlockKernel,
    block_product,
    gather_blocks,
    index_blocks,
)
from fewedges.sparsify.launching import as_autocast, choose_kernel
from fewedges.sparsify.masks import Masks, watch_
from fewedges.sparsify.matrices import Matrix
from fewedges.sparsify.pattern import Blocks, Pattern
from fewedges.sparsify.pruned import Pruned


class BlockLinear(nn.Module):
    """A linear layer of kept blocks, run by `kernel` as `block_product` knows it; it may be set at any time."""

    def __init__(self, values: Float[Tensor, "N b b"], index: BlockIndex, bias: Tensor | None, kernel: BlockKernel):
        super().__init__()
        self.index, self.kernel = index.to(values.device), choose_kernel(kernel, KERNELS)
        self.out_features, self.in_features = index.shape
        self.values = nn.Parameter(values)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch R"]:
        """x W^T + bias."""
        x, values, bias = as_autocast(x, self.values, self.bias)
        y = block_product(x, values, self.index, kernel=self.kernel)  # type: ignore[call-arg]
        return y if bias is None else y + bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BlockLinear":
        """Where the values go, their places go."""
        super()._apply(fn, recurse)
        self.index = self.index.to(self.values.device)
        return self

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        b, density = self.index.block, self.index.density
        blocks = f"{self.index.blocks} blocks of {b}, density={density:.4f}, kernel={self.kernel}"
        return f"{self.in_features}, {self.out_features}, {blocks}"


def by_blocks(pruned: Pruned, *, block: int | None = None, kernel: BlockKernel | None = None) -> Any:
    """A copy of a pruned model that stores and multiplies kept blocks: to be run or trained on, not saved.

    Matrices whose masks are of kind 32x32, 64x64 or 128x128 are replaced, and all others stay as they are. `block`
    takes any mask instead, as the blocks of that side that it touches: what is paid is then its `cover(block)`.
    `kernel` runs them: without it `triton` where a matrix lies on a GPU now, and `batched`, which runs anywhere, where
    it does not; a printed layer says which, and a model moved later keeps it. Raises RecipeError where no matrix has
    such blocks.
    """
    if kernel is not None:
        choose_kernel(kernel, KERNELS)
    sides = {name: block or _side(pattern) for name, pattern in pruned.masks.patterns.items()}
    fitting = {name: b for name, b in sides.items() if b in BLOCKS and _tiles(pruned.masks.patterns[name], b)}
    if not fitting:
        kinds = sorted(set(pruned.masks.kinds().values())) or ["none"]
        hint = 'a model pruned with structure="64x64", or block=64 for masks that leave whole blocks empty'
        found = f"masks of kind {', '.join(kinds)}" + (f", no matrix in whole blocks of {block}" if block else "")
        raise RecipeError("run by blocks", found, hint)
    pruned.check_zeros("work on it, before it is run by blocks")
    model = copy.deepcopy(pruned.model)
    watch_(model, Masks())  # the copy has no masks to lose
    for name, b in fitting.items():
        matrix, pattern = Matrix(name, model.get_submodule(name)), pruned.masks.patterns[name]
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _layer(matrix, pattern, b, kernel))
    return model


def kernel_for(device: torch.device) -> BlockKernel:
    """What `by_blocks` takes where it is not told: triton on a GPU, batched products elsewhere."""
    return "triton" if device.type == "cuda" else "batched"


def _layer(matrix: Matrix, pattern: Pattern, block: int, kernel: BlockKernel | None) -> BlockLinear:
    index = index_blocks(pattern, block).to(matrix.parameter.device)
    bias: Any = matrix.module.bias
    values = gather_blocks(matrix.weight, index).contiguous()
    chosen = kernel or kernel_for(matrix.parameter.device)
    layer = BlockLinear(values, index, None if bias is None else bias.detach().clone(), chosen)
    layer.values.requires_grad_(matrix.parameter.requires_grad)
    if layer.bias is not None and bias is not None:
        layer.bias.requires_grad_(bias.requires_grad)
    return layer.train(matrix.module.training)


def _side(pattern: Pattern) -> int | None:
    """The side of the blocks a mask is made of; None where they are not square, or it is of another kind."""
    return pattern.height if isinstance(pattern, Blocks) and pattern.height == pattern.width else None


def _tiles(pattern: Pattern, block: int) -> bool:
    rows, columns = pattern.shape[-2:]
    return len(pattern.shape) == 2 and rows % block == 0 and columns % block == 0
