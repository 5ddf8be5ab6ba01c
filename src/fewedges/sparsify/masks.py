"""Masks that last: applied, held through training, carried through LoRA, saved. A lost zero is an error.

A mask is known by the path of its matrix's module and seen as outputs x inputs, whatever the module stores.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fewedges.errors import ModelError, RecipeError, StoreError
from fewedges.sparsify.matrices import MERGE, Matrix, adapted
from fewedges.sparsify.pattern import Pattern, of_kind

WATCH = "fewedges_watch"
"""The attribute of a model by which `watch_` finds its own hook again, also in a copy."""


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
        """The masked matrices in this model; one missing, of another shape or under adapters is a ModelError."""
        if self.patterns and adapted(model):
            raise ModelError("the masks of a model", "it carries adapters", f"merge them first: {MERGE}")
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
        return self.lost_in(self.matrices(model))

    def lost_in(self, matrices: Mapping[str, Matrix]) -> dict[str, int]:
        """The same of matrices that were found before."""
        counts = {}
        for name, matrix in matrices.items():
            values = matrix.values
            counts[name] = int((values[~self.patterns[name].mask().to(values.device)] != 0).sum())
        return {name: count for name, count in counts.items() if count}

    def check(self, model: Any, after: str = "a change") -> None:
        """Raise ModelError if any masked entry is not zero."""
        _refuse_lost(self.lost(model), after)

    def shuffled(self, seed: int = 0) -> "Masks":
        """The same density in every matrix at random places: the control for a claim about which weights matter."""
        generator = torch.Generator().manual_seed(seed)
        found = {}
        for name, pattern in self.patterns.items():
            places = torch.randperm(pattern.size, generator=generator)
            found[name] = Pattern(pattern.mask().cpu().reshape(-1)[places].view(pattern.shape))
        return Masks(found)

    def kinds(self) -> dict[str, str]:
        """The structure of each mask (`Pattern.kind`), to be saved beside `tensors`."""
        return {name: pattern.kind for name, pattern in self.patterns.items()}

    def tensors(self) -> dict[str, UInt8[Tensor, "n"]]:
        """Eight entries a byte, for safetensors; density is not assumed low."""
        return {name: pack_bits(pattern.mask()) for name, pattern in self.patterns.items()}

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, UInt8[Tensor, "n"]],
        shapes: Mapping[str, tuple[int, ...]],
        kinds: Mapping[str, str] | None = None,
    ) -> "Masks":
        """The inverse of `tensors` and `kinds`; a mask that is not of its kind is a StoreError.

        Without kinds (masks saved before they were kept) every mask is unstructured.
        """
        patterns = {}
        for name, packed in tensors.items():
            mask = unpack_bits(packed, tuple(shapes[name]))
            try:
                patterns[name] = of_kind(mask, (kinds or {}).get(name, "unstructured"))
            except RecipeError as error:
                raise StoreError(f"load the mask of {name}", str(error), "a fresh copy") from error
        return cls(patterns)


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
        stack.enter_context(_unwatched(model, guard))
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


def _refuse_lost(lost: dict[str, int], after: str) -> None:
    if lost:
        name, count = next(iter(lost.items()))
        found = f"{sum(lost.values())} zeros of {len(lost)} matrices are lost, {count} of them in {name}"
        hint = f"train inside fewedges.sparsify.masks.held(...); merge adapters by {MERGE}"
        raise ModelError(f"a sparse model after {after}", found, hint)


# -- LoRA ------------------------------------------------------------------------------------------------------


def merge_masked(adapted: Any, masks: Masks) -> Any:
    """Merge LoRA adapters into a sparse model and keep its zeros: (W + B A) * mask; returns the plain model.

    What the adapters learned at masked places is dropped, so the loss of the merged model has to be measured again.
    """
    tuner = adapted.base_model
    _allow_merge_(tuner.model)
    model = type(tuner).merge_and_unload(tuner)
    masks.apply_(model)
    masks.check(model, "merging adapters")
    return model


def refuse_dense_merge_(model: Any) -> None:
    """Make peft's own merges of the adapters on a model an error: W + B A has no zeros.

    A `Pruned` does it by itself at the first forward pass with adapters.
    """
    _refuse_merge_(adapted(model).values())


def _refuse_merge_(layers: Iterable[nn.Module]) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ModelError("merge LoRA adapters into a sparse model", "W + B A has no zeros", MERGE)

    for layer in layers:
        layer.merge = refuse  # type: ignore[assignment]  # both merge_adapter and merge_and_unload call it first


def _allow_merge_(model: Any) -> None:
    for layer in adapted(model).values():
        vars(layer).pop("merge", None)


# -- watching --------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Watch:
    """What a model with masks runs before a forward pass and before its state is read: see `watch_`."""

    masks: Masks
    matrices: dict[str, Matrix]
    """As they were found: peft moves their modules, and leaves them what they are."""
    places: dict[str, int]
    """One masked entry of each, as a position in storage."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Watch":
        """The matrices of the copied model under the same masks."""
        return Watch(self.masks, copy.deepcopy(self.matrices, memo), self.places)

    def before_forward(self, model: nn.Module, _: Any) -> None:
        """Refuse dense merges while adapters are on, and to run where a merge has filled the zeros."""
        if torch.compiler.is_compiling():
            return
        if "peft_config" in vars(model):
            refuse_dense_merge_(model)
        if self.touched():
            self.check()

    def before_state(self, *_: Any) -> None:
        """Refuse to hand out (save_pretrained, state_dict) weights that have lost zeros."""
        self.check()

    @torch.no_grad()
    def touched(self) -> bool:
        """Whether the one entry looked at in a matrix is not zero; of a matrix in training none is looked at."""
        seen: dict[torch.device, list[Tensor]] = {}
        for name, place in self.places.items():
            weight = self.matrices[name].parameter
            training = weight.requires_grad and torch.is_grad_enabled()
            if not (training or weight.is_meta or is_traceable_wrapper_subclass(weight)):
                seen.setdefault(weight.device, []).append(weight.detach()[divmod(place, weight.shape[1])])
        return any(bool(torch.stack(values).any()) for values in seen.values())

    def check(self) -> None:
        """Raise ModelError if a zero is lost."""
        _refuse_lost(self.masks.lost_in(self.matrices), "training or merging that let go of its masks")


def watch_(model: Any, masks: Masks) -> None:
    """Let a model notice by itself, from now on, that it has lost zeros of these masks.

    Before a forward pass one masked entry of every matrix is read (a merged adapter fills all of them; 1.3 ms for 210
    matrices on one core), before state_dict and save_pretrained all. Not seen: a forward pass under torch.compile, and
    few zeros lost elsewhere in a matrix until the state is read. `held` suspends it. The latest masks count.
    """
    known = vars(model).get(WATCH)
    if known is not None and known.masks is masks:
        return
    matrices = masks.matrices(model)
    places = {name: _masked_place(matrix, masks.patterns[name]) for name, matrix in matrices.items()}
    watch = Watch(masks, matrices, {name: place for name, place in places.items() if place is not None})
    if known is not None:
        known.__dict__.update(watch.__dict__)
        return
    setattr(model, WATCH, watch)
    model.register_forward_pre_hook(watch.before_forward)
    model.register_state_dict_pre_hook(watch.before_state)


def _masked_place(matrix: Matrix, pattern: Pattern) -> int | None:
    """A masked entry, as a position in storage; None where all is kept."""
    gone = ~matrix.oriented(pattern.mask()).reshape(-1)
    place = int(gone.to(torch.uint8).argmax())
    return place if gone[place] else None


@contextmanager
def _unwatched(model: Any, guard: Guard) -> Iterator[None]:
    """Masks in the hands of `held`: they may move, so the model is watched again by what they are at the end."""
    known = vars(model).get(WATCH)
    if known is not None:
        known.__dict__.update(Watch(Masks(), {}, {}).__dict__)
    try:
        yield
    finally:
        if known is not None:
            watch_(model, guard.masks())


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
