"""A pixelated model as a result: distilled towards its dense model, saved, loaded, and counted.

    loaded = fe.load("addition")
    fe.pixelate_(loaded, density=0.5)
    result = fe.sparsify(loaded, fe.Distil(steps=200, batch_size=128, learning_rate=3e-3), out="runs/pixelated")
    print(fe.measure(result))

`pixelate_` changes a model in place, so the dense one is read again by its name: as the teacher, and to be measured
beside. What is trained is all there is in the pixelated model, cells, factors and gammas included.

Shapes: R outputs, C inputs of a matrix.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from fewedges import store
from fewedges.errors import ModelError, RecipeError, StoreError
from fewedges.model.loading import Loaded, fingerprint
from fewedges.model.loading import load as load_dense
from fewedges.model.probes import check as check_probes
from fewedges.recipes import from_dict, to_dict
from fewedges.sparsify.butterfly import PixelatedLinear
from fewedges.sparsify.matrices import Matrix, _block_name, adapted, blocks_of, bytes_of, matrices_of, shapes_of
from fewedges.sparsify.pattern import dense
from fewedges.sparsify.pixelate import Pixelated, load_pixelated_
from fewedges.sparsify.pruned import Pruned
from fewedges.weight_recipes import Distil

COVERS = (16, 32, 64)


@dataclass(frozen=True, kw_only=True)
class PixelatedModel(Pruned):
    """A model with pixelated layers, the dense one it came from, and what was done since. No masks, no digests."""

    pixelated: Pixelated
    """Plan and shape of every pixelated matrix."""

    def rows(self) -> list[dict[str, Any]]:
        """One row a matrix of the blocks: see `rows_of`."""
        return rows_of(self.loaded)

    def save(self, folder: Path | str) -> Path:
        """Write all weights, the plans and the way back to the dense model; `load_pixelated_` reads it too."""
        self.check("work on it, before saving")
        dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        known = {"base": self.base, "dtype": dtype, "stages": [to_dict(stage) for stage in self.stages]}
        return self.pixelated.save(folder, self.model, **known, data=self.data, results=self.results)

    def export(self, folder: Path | str) -> Path:
        """Refuse: a plain checkpoint has no place for cells and factors."""
        hint = "save, and fewedges.load"
        raise ModelError(f"export {folder}", "plain transformers has no pixelated layers", hint)

    def __str__(self) -> str:
        made = ", then ".join(["pixelated", *(type(stage).__name__.lower() for stage in self.stages)])
        return f"{self.base['name']}: {made}; {self.pixelated}"


# -- from what pixelate_ left ------------------------------------------------------------------------------------------


def layers_in(model: nn.Module) -> dict[str, PixelatedLinear]:
    """The pixelated layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PixelatedLinear)}


def is_pixelated(what: Any) -> TypeGuard[PixelatedModel | Loaded]:
    """Whether a result, or a `Loaded`, has pixelated layers."""
    return isinstance(what, PixelatedModel) or (isinstance(what, Loaded) and bool(layers_in(what.model)))


def begin_pixelated(loaded: Loaded, teacher: Loaded | None = None) -> PixelatedModel:
    """The result of `pixelate_` on a `Loaded`, beside its dense model: `teacher`, or what is loaded by its name.

    Projection errors are not in it: they are told by what `pixelate_` returned. Raises ModelError where the dense
    model is not there or has other matrices.
    """
    layers = layers_in(loaded.model)
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    teacher = _dense_of(loaded) if teacher is None else teacher
    known = shapes_of(matrices_of(teacher))
    wrong = [name for name, shape in shapes.items() if known.get(name) != shape]
    if wrong or not shapes:
        found = f"{wrong[0]} is another there" if wrong else "nothing in it is pixelated"
        raise ModelError(f"pixelated {loaded.name}", found, f"fewedges.pixelate_ on fewedges.load({loaded.name!r})")
    plans = {name: layer.plan for name, layer in layers.items()}
    base = {"name": teacher.name, "sha256": fingerprint(teacher.model)}
    return PixelatedModel(
        loaded=loaded, base=base, digests={}, pixelated=Pixelated(plans=plans, shapes=shapes, errors={})
    )


def recoverable(model: Any, recipe: Any, teacher: Loaded | None = None) -> Any:
    """A pixelated model as a result that can be distilled; any other model as it is.

    Raises RecipeError for what cannot be done to a pixelated one.
    """
    if not is_pixelated(model):
        return model
    for stage in recipe if isinstance(recipe, list | tuple) else [recipe]:
        if not isinstance(stage, Distil) or stage.layers:
            asked = "SparseAttention" if stage is None else str(stage)
            raise RecipeError(f"sparsify a pixelated model by {asked}", "not built", "Distil, of all its layers")
    return model if isinstance(model, PixelatedModel) else begin_pixelated(model, teacher)


def _dense_of(loaded: Loaded) -> Loaded:
    parameter = next(loaded.model.parameters())
    return load_dense(loaded.name, dtype=parameter.dtype, device=str(parameter.device), probes=False)


# -- what is trained ---------------------------------------------------------------------------------------------------


def block_modules(loaded: Loaded) -> list[nn.Module]:
    """The blocks of a model in order, pixelated or not."""
    if not layers_in(loaded.model):
        return [block.module for block in blocks_of(loaded)]
    if adapted(loaded.model):
        raise ModelError(f"distil {loaded.name}", "it carries adapters", "merge or drop them first")
    return [loaded.model.get_submodule(_block_name(loaded.model, x.module)) for x in loaded.anatomy.layers]


def matrix_parameters(loaded: Loaded) -> dict[str, Tensor]:
    """What the matrices of the blocks consist of: weights, and of pixelated ones cells, factors and gamma."""
    if not layers_in(loaded.model):
        return {f"{name}.weight": matrix.parameter for name, matrix in matrices_of(loaded).items()}
    inside = {id(p) for block in block_modules(loaded) for p in block.parameters()}
    every = {name: p for name, p in loaded.model.named_parameters() if id(p) in inside}
    return {name: p for name, p in every.items() if p.dim() > 1 or name.endswith(".gamma")}


# -- what it costs -----------------------------------------------------------------------------------------------------


def rows_of(loaded: Loaded) -> list[dict[str, Any]]:
    """One row a matrix of the blocks, also of those left dense (their `cells` is None).

    parameters R C; nnz, numbers stored, without bias and gamma; density nnz / (R C), the sum of `cells` and
    `low_rank`; cover(b) of the cells alone; bytes of all that is stored, gamma included and the bias not.
    """
    return [_row(name, module) for name, module in _matrix_modules(loaded)]


def _matrix_modules(loaded: Loaded) -> Iterator[tuple[str, nn.Module]]:
    """Pixelated layers and matrices left dense, in the model's order."""
    from transformers.pytorch_utils import Conv1D

    inside = {id(module) for block in block_modules(loaded) for module in block.modules()}
    for name, module in loaded.model.named_modules():
        if id(module) in inside and isinstance(module, nn.Linear | Conv1D | PixelatedLinear):
            yield name, module


def _row(name: str, module: nn.Module) -> dict[str, Any]:
    if not isinstance(module, PixelatedLinear):
        matrix = Matrix(name, module)
        whole = dense(matrix.shape)
        known = {"name": name, "shape": matrix.shape, "parameters": whole.size, "nnz": whole.size, "density": 1.0}
        known |= {
            "flops": whole.flops(1),
            "cells": None,
            "low_rank": 0.0,
            "rank": 0,
            **{f"cover({b})": 1.0 for b in COVERS},
        }
        return {**known, "bytes": bytes_of(matrix.parameter)}
    shape, plan = (module.out_features, module.in_features), module.plan
    low, stored = plan.rank * sum(shape), plan.parameters(*shape)
    size = shape[0] * shape[1]
    known = {"name": name, "shape": shape, "parameters": size, "nnz": stored, "density": stored / size}
    known["flops"] = module.flops(1)
    known |= {"cells": (stored - low) / size, "low_rank": low / size, "rank": plan.rank}
    covers = {f"cover({b})": plan.pattern(*shape).cover(b) if plan.grid else 0.0 for b in COVERS}
    parts = [p for part, p in module.named_parameters() if part != "bias"]
    return {**known, **covers, "bytes": sum(p.numel() * p.element_size() for p in parts)}


# -- what is kept ------------------------------------------------------------------------------------------------------


def load_pixelated(
    folder: Path | str, *, dtype: str | torch.dtype = "float32", device: str = "cpu", probes: bool = True
) -> PixelatedModel:
    """Load a saved result on its base. Raises StoreError where either does not fit.

    The base's weights are verified where they are loaded in the dtype of the run; in another they cannot be.
    """
    facts = store.read_manifest(Path(folder))["facts"]
    if "base" not in facts:
        hint = "fewedges.sparsify.pixelate.load_pixelated_(folder, a model of that architecture)"
        raise StoreError(f"load {folder}", "it does not say which dense model it came from", hint)
    base = facts["base"]
    loaded = load_dense(base["name"], dtype=dtype, device=device, probes=False)
    same = next(loaded.model.parameters()).dtype == getattr(torch, facts["dtype"])
    if same and fingerprint(loaded.model) != base["sha256"]:
        found = f"the base {base['name']} is not the one it was made from (other weights)"
        raise StoreError(f"load {folder}", found, f"the base with sha256 {base['sha256'][:16]}...")
    pixelated = load_pixelated_(folder, loaded)
    if probes:
        check_probes(loaded.model, loaded.anatomy)
    stages = tuple(from_dict(stage) for stage in facts["stages"])
    known = {"data": facts["data"], "results": facts["results"]}
    return PixelatedModel(loaded=loaded, base=base, digests={}, pixelated=pixelated, stages=stages, **known)
