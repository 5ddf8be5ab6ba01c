"""Masks that last: applied, held through training, carried through LoRA, saved. A lost zero is an error.

A mask is known by the path of its matrix's module and seen as outputs x inputs, whatever the module stores.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from fewedges.errors import ModelError, StoreError
from fewedges.sparsify.matrices import Matrix
from fewedges.sparsify.pattern import Pattern


@dataclass(frozen=True)
class Masks:
    """Kept entries by matrix name."""

    patterns: Mapping[str, Pattern] = field(default_factory=dict)

    @property
    def nnz(self) -> int:
        """Kept entries over all matrices."""
        return sum(pattern.nnz for pattern in self.patterns.values())

    @property
    def size(self) -> int:
        """Entries of all masked matrices."""
        return sum(pattern.size for pattern in self.patterns.values())

    @property
    def density(self) -> float:
        """Fraction kept over all masked matrices; 1 where there is none."""
        return self.nnz / self.size if self.patterns else 1.0

    def matrices(self, model: Any) -> dict[str, Matrix]:
        """The masked matrices in this model; one that is missing or of another shape is a ModelError."""
        found = {}
        for name, pattern in self.patterns.items():
            try:
                found[name] = Matrix(name, model.get_submodule(name))
                shape: Any = found[name].shape
            except AttributeError:
                shape = "nothing"
            if shape != pattern.shape:
                raise ModelError(
                    f"mask {name}", f"{shape} there, the mask is {pattern.shape}", "the model it was made for"
                )
        return found

    @torch.no_grad()
    def apply_(self, model: Any) -> None:
        """Write the zeros."""
        for name, matrix in self.matrices(model).items():
            matrix.weight.masked_fill_(~self.patterns[name].mask().to(matrix.weight.device), 0)

    def lost(self, model: Any) -> dict[str, int]:
        """How many zeros each matrix has lost (NaN counts as lost)."""
        counts = {
            name: int((matrix.weight[~self.patterns[name].mask().to(matrix.weight.device)] != 0).sum())
            for name, matrix in self.matrices(model).items()
        }
        return {name: count for name, count in counts.items() if count}

    def check(self, model: Any, after: str = "a change") -> None:
        """Raise ModelError if any masked entry is not zero."""
        if lost := self.lost(model):
            name, count = next(iter(lost.items()))
            found = f"{sum(lost.values())} zeros of {len(lost)} matrices are lost, {count} of them in {name}"
            raise ModelError(
                f"a sparse model after {after}", found, "train inside masks.held(...), merge by merge_masked"
            )

    def shuffled(self, seed: int = 0) -> "Masks":
        """The same density in every matrix at random places: the control for a claim about which weights matter."""
        generator = torch.Generator().manual_seed(seed)
        found = {}
        for name, pattern in self.patterns.items():
            places = torch.randperm(pattern.size, generator=generator)
            found[name] = Pattern(pattern.mask().cpu().reshape(-1)[places].view(pattern.shape))
        return Masks(found)

    def tensors(self) -> dict[str, UInt8[Tensor, "n"]]:
        """Eight entries a byte, for safetensors; density is not assumed low."""
        return {name: pack_bits(pattern.mask()) for name, pattern in self.patterns.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, UInt8[Tensor, "n"]], shapes: Mapping[str, tuple[int, ...]]) -> "Masks":
        """The inverse of `tensors`."""
        return cls({name: Pattern(unpack_bits(packed, tuple(shapes[name]))) for name, packed in tensors.items()})


@dataclass(eq=False)
class Guard:
    """Masks while a model trains: `kept` may be replaced (RigL does), by name and in (R, C)."""

    matrices: dict[str, Matrix]
    kept: dict[str, Bool[Tensor, "R C"]]
    optimizer: torch.optim.Optimizer | None = None
    dense_gradients: bool = False
    """Let gradients of masked entries through, for the step that looks at them."""

    def masks(self) -> Masks:
        """The masks as they now are."""
        return Masks({name: Pattern(kept.clone()) for name, kept in self.kept.items()})

    @torch.no_grad()
    def clear_(self) -> None:
        """Zero what is masked: weights, and every optimiser state of the same shape (momenta, second moments)."""
        for name, matrix in self.matrices.items():
            gone = matrix.oriented(~self.kept[name])
            matrix.parameter.masked_fill_(gone, 0)
            for value in self.state_of(matrix):
                value.masked_fill_(gone, 0)

    def state_of(self, matrix: Matrix) -> list[Tensor]:
        """The optimiser's tensors for this matrix, in storage order."""
        state = {} if self.optimizer is None else self.optimizer.state.get(matrix.parameter, {})
        return [x for x in state.values() if torch.is_tensor(x) and x.shape == matrix.parameter.shape]

    def mask_gradient_(self, name: str) -> None:
        """Zero the gradient of masked entries, before anything (clipping, momentum) sees it."""
        matrix = self.matrices[name]
        if matrix.parameter.grad is not None and not self.dense_gradients:
            matrix.parameter.grad.masked_fill_(matrix.oriented(~self.kept[name]), 0)


@contextmanager
def held(model: Any, masks: Masks, optimizer: torch.optim.Optimizer | None = None) -> Iterator[Guard]:
    """Keep masked entries at zero while a model trains: gradients, weights and optimiser state, step after step.

    State dict keys stay as they are (no parametrisation). On the way out a lost zero is an error. Without an
    optimiser only gradients are masked and the zeros checked.
    """
    matrices = masks.matrices(model)
    kept = {name: masks.patterns[name].mask().to(matrix.weight.device) for name, matrix in matrices.items()}
    guard = Guard(matrices, kept, optimizer)
    guard.clear_()
    with ExitStack() as stack:
        for name, matrix in matrices.items():
            if matrix.parameter.requires_grad:
                hook = matrix.parameter.register_post_accumulate_grad_hook(
                    lambda _, name=name: guard.mask_gradient_(name)
                )
                stack.callback(hook.remove)
        if optimizer is not None:
            stack.callback(optimizer.register_step_post_hook(lambda *_: guard.clear_()).remove)
        yield guard
    guard.masks().check(model, "training")


# -- LoRA ------------------------------------------------------------------------------------------------------


def merge_masked(adapted: Any, masks: Masks) -> Any:
    """Merge LoRA adapters into a sparse model and keep its zeros: (W + B A) * mask; returns the plain model.

    What the adapters learned at masked places is dropped, so the loss of the merged model has to be measured again.
    """
    tuner = adapted.base_model
    model = type(tuner).merge_and_unload(tuner)
    masks.apply_(model)
    masks.check(model, "merging adapters")
    return model


def refuse_dense_merge_(adapted: Any) -> None:
    """Make peft's own merges of this model an error: W + B A has no zeros."""

    def refuse(*_: Any, **__: Any) -> None:
        raise ModelError("merge LoRA adapters into a sparse model", "W + B A has no zeros", "masks.merge_masked")

    for holder in (adapted, adapted.base_model):
        holder.merge_and_unload = holder.merge_adapter = refuse


# -- bits ------------------------------------------------------------------------------------------------------


def pack_bits(mask: Bool[Tensor, "..."]) -> UInt8[Tensor, "n"]:
    """Eight entries a byte, row order."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


def unpack_bits(packed: UInt8[Tensor, "n"], shape: tuple[int, ...]) -> Bool[Tensor, "..."]:
    """The inverse of `pack_bits`; another size is a StoreError."""
    count = int(np.prod(shape))
    if packed.numel() != -(-count // 8):
        raise StoreError("load a mask", f"{packed.numel()} bytes for {shape}", "a fresh copy")
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=count).astype(bool)).view(shape)
