"""Replace the linear layers of a model by pixelated butterflies, within one budget of parameters.

Chen, Dao et al. 2022 (arXiv:2112.00029), section 3.3: give every type of layer its share of the sparse compute,
spend a quarter to a third of a layer's share on the low rank and the rest on the butterfly, replace, then train. For
a language model that is the query, key, value and output projections and the MLP; the scores stay dense.

Shapes: R outputs, C inputs of a matrix; N windows, T tokens.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fewedges import store
from fewedges.errors import ModelError, RecipeError, StoreError
from fewedges.model.anatomy import anatomy
from fewedges.model.attention import refuse_patterns
from fewedges.model.loading import Loaded
from fewedges.sparsify.allocation import Shape, share
from fewedges.sparsify.butterfly import PixelatedLinear, Plan
from fewedges.sparsify.calibration import calibrated
from fewedges.sparsify.launching import Kernel, choose_kernel
from fewedges.sparsify.matrices import Matrix, chosen, matrices_of, shapes_of
from fewedges.sparsify.projecting import fill_, project

Start = Literal["project", "scratch"]
KIND = "pixelated"
RISING = "rising"
"""Order of the cells in a row as they are saved: by column. A run that does not say so is of before."""
RANKS = 8
"""A rank is a multiple of it where one fits: the kernel copies 16 bytes at a time, 8 numbers of 2 bytes."""


@dataclass(frozen=True, kw_only=True)
class Pixelated:
    """What `pixelate_` did to a model: with its weights, `save` keeps enough to do it again."""

    plans: dict[str, Plan]
    shapes: dict[str, Shape]
    errors: dict[str, float]
    """Relative error of every projection; empty from scratch."""

    @property
    def density(self) -> float:
        """Parameters of the replaced matrices as a fraction of before."""
        now = sum(plan.parameters(*self.shapes[name]) for name, plan in self.plans.items())
        return now / sum(r * c for r, c in self.shapes.values())

    @property
    def rank_share(self) -> float:
        """Fraction of those parameters that the low ranks hold."""
        now = sum(plan.parameters(*self.shapes[name]) for name, plan in self.plans.items())
        return sum(plan.rank * sum(self.shapes[name]) for name, plan in self.plans.items()) / now

    def rows(self) -> list[dict[str, Any]]:
        """One row a matrix: plan, cell, density, cover of the sparse term by 16, 32 and 64, error."""
        return [self._row(name, plan, self.shapes[name]) for name, plan in self.plans.items()]

    def _row(self, name: str, plan: Plan, shape: Shape) -> dict[str, Any]:
        covers = {f"cover({b})": plan.pattern(*shape).cover(b) if plan.grid else 0.0 for b in (16, 32, 64)}
        cell = (shape[0] // plan.grid, shape[1] // plan.grid) if plan.grid else None
        known = {"name": name, "shape": shape, **asdict(plan), "cell": cell, "density": plan.density(*shape)}
        return {**known, **covers, "error": self.errors.get(name)}

    def save(self, folder: Path | str, model: Any, **more: Any) -> Path:
        """Write every parameter and persistent buffer of the model, as now trained, and the plans; `more` are facts."""
        model = model.model if isinstance(model, Loaded) else model
        refuse_patterns(f"save {folder}", model)
        absent = [n for n in self.plans if not isinstance(dict(model.named_modules()).get(n), PixelatedLinear)]
        if absent:
            raise ModelError(f"save {folder}", f"{absent[0]} is not pixelated there", "the model pixelate_ changed")
        facts = {
            "plans": {name: asdict(plan) for name, plan in self.plans.items()},
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "errors": self.errors,
            "cells": RISING,
            "model": type(model).__name__,
            "versions": store.versions(),
            **more,
        }
        store.save(Path(folder), KIND, {"weights": _state(model)}, facts)
        return Path(folder)

    def __str__(self) -> str:
        worst = max(self.errors, key=lambda name: self.errors[name], default=None)
        text = f"{len(self.plans)} matrices at density {self.density:.4f}, {self.rank_share:.0%} of it low rank"
        return text if worst is None else f"{text}; largest projection error {self.errors[worst]:.3f} ({worst})"


def pixelate_(
    model: Any,
    density: float = 0.2,
    *,
    start: Start = "project",
    rank_share: float = 0.25,
    block: int = 32,
    shares: Mapping[str, float] | None = None,
    keep_dense: Iterable[str] = (),
    plans: Mapping[str, Plan] | None = None,
    tokens: Int[Tensor, "N T"] | None = None,
    rounds: int = 20,
    kernel: Kernel = "reference",
) -> Pixelated:
    """Replace every matrix inside the blocks of a model (or `Loaded`) in place; biases stay.

    `start`: project fits the pretrained weights, in the norm of their inputs when calibration `tokens` are given;
    scratch draws new ones as spread as the old. `shares` says how the budget is split between "attention" and "mlp"
    (default: as dense compute is). `plans` decides every layer itself. `kernel` is what the new layers run by once
    they are all there: see `use_kernel_`. Nothing else in the model changes, and new parameters train if the old ones
    did. Raises RecipeError before anything is touched when the budget cannot be met.
    """
    choose_kernel(kernel)
    loaded = model if isinstance(model, Loaded) else _loaded(model)
    if start not in ("project", "scratch") or (tokens is not None and start == "scratch"):
        raise RecipeError(f"start={start!r}", "tokens serve a projection", "project, or scratch without tokens")
    matrices = chosen(matrices_of(loaded), keep_dense)
    shapes = shapes_of(matrices)
    if plans is None:
        densities = layer_densities(loaded, shapes, density, shares)
        plans = {name: plan_for(shape, densities[name], rank_share, block) for name, shape in shapes.items()}
    if set(plans) != set(matrices):
        raise RecipeError("plans", f"they differ in {sorted(set(plans) ^ set(matrices))[:3]}", "one for each matrix")
    layers = {name: _layer(matrix, plans[name]) for name, matrix in matrices.items()}
    errors: dict[str, float] = {}
    if start == "project" and tokens is not None:
        for _, seen in calibrated(loaded, tokens, gram=True):
            for name in seen.keys() & layers.keys():
                errors[name] = _project_(matrices[name], layers[name], seen[name].gram, rounds)
                _replace_(loaded.model, name, layers[name])
    for name in layers.keys() - errors.keys():
        if start == "project":
            errors[name] = _project_(matrices[name], layers[name], None, rounds)
        else:
            _draw_(matrices[name], layers[name])
        _replace_(loaded.model, name, layers[name])
    use_kernel_(loaded, kernel)
    return Pixelated(plans=dict(plans), shapes=shapes, errors={name: errors[name] for name in plans if name in errors})


def use_kernel_(model: Any, kernel: Kernel) -> int:
    """Run every pixelated layer by `reference` (batched products) or `triton` (a GPU); return how many there are."""
    choose_kernel(kernel)
    modules = (model.model if isinstance(model, Loaded) else model).modules()
    layers = [module for module in modules if isinstance(module, PixelatedLinear)]
    for layer in layers:
        layer.kernel = kernel
    return len(layers)


def load_pixelated_(folder: Path | str, model: Any, *, kernel: Kernel = "reference") -> Pixelated:
    """Turn a dense model of the same architecture, in place, into the one saved; its own weights do not matter.

    Values take the model's dtype. Raises StoreError before anything is touched where names or shapes do not fit.
    """
    choose_kernel(kernel)
    saved = store.load(folder, KIND)
    loaded, weights = model if isinstance(model, Loaded) else _loaded(model), saved.tensors["weights"]
    try:
        plans = {name: Plan(**plan) for name, plan in saved.facts["plans"].items()}
        shapes = {name: (int(r), int(c)) for name, (r, c) in saved.facts["shapes"].items()}
        matrices = {name: matrix for name, matrix in matrices_of(loaded).items() if name in plans}
        layers = {name: _layer(matrix, plans[name]) for name, matrix in matrices.items()}
        state = {n: x for n, x in _state(loaded.model).items() if n.rpartition(".")[0] not in plans}
        state |= {f"{name}.{n}": x for name, layer in layers.items() for n, x in layer.state_dict().items()}
        wrong = {n for n in state.keys() | weights.keys() if _shape(state, n) != _shape(weights, n)}
        errors = dict(saved.facts["errors"])
        old = plans if saved.facts.get("cells") != RISING else {}
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"load {folder}", f"its plans cannot be used ({error})", "a fresh copy") from error
    if wrong or shapes_of(matrices) != shapes:
        found = f"another architecture: {sorted(wrong)[:3] or 'matrices'} differ"
        raise StoreError(f"load {folder} into {type(loaded.model).__name__}", found, f"a {saved.facts['model']}")
    for name, layer in layers.items():
        _replace_(loaded.model, name, layer)
    with torch.no_grad():
        for name, value in _state(loaded.model).items():
            path, _, last = name.rpartition(".sparse.")
            value.copy_(_risen(weights[name], old[path]) if last == "weight" and path in old else weights[name])
    use_kernel_(loaded, kernel)
    return Pixelated(plans=plans, shapes=shapes, errors=errors)


def _risen(weight: Float[Tensor, "B h nw"], plan: Plan) -> Float[Tensor, "B h nw"]:
    """Cells by rising column, of a run saved when they came as itself, itself xor 1, xor 2, xor 4, ..."""
    if plan.layout != "butterfly":
        return weight
    flips = torch.tensor([0, *(2**t for t in range(plan.factors))])
    order = (torch.arange(plan.grid)[:, None] ^ flips).argsort(1)
    cells = weight.unflatten(-1, (1 + plan.factors, -1)).transpose(1, 2)  # (B, n, h, w)
    return cells[torch.arange(plan.grid)[:, None], order].transpose(1, 2).flatten(2)


def layer_densities(
    loaded: Loaded, shapes: Mapping[str, Shape], density: float, shares: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Density of every matrix: `shares` of the budget for attention and mlp, by default what they cost dense."""
    modules = tuple(f"{layer.module}." for layer in loaded.anatomy.layers)
    kinds = {name: "attention" if name.startswith(modules) else "mlp" for name in shapes}
    cost = {kind: sum(r * c for name, (r, c) in shapes.items() if kinds[name] == kind) for kind in kinds.values()}
    given = dict(cost) if shares is None else dict(shares)
    if set(given) != set(cost) or min(given.values()) <= 0:
        raise RecipeError(f"shares {given}", "every type of layer needs more than 0", f"shares for {sorted(cost)}")
    return share(shapes, {name: given[kinds[name]] / cost[kinds[name]] for name in shapes}, density)


def plan_for(shape: Shape, density: float, rank_share: float = 0.25, block: int = 32) -> Plan:
    """The plan that spends a density best, and never more than it.

    The butterfly gets at most 1 - rank_share of it: the densest (1 + k) / B that fits, on ties the smallest grid,
    whose cells are the largest. Cells are multiples of `block` in both directions, or of the largest smaller power of
    two that allows a plan. All that is left goes to the low rank, also what the butterfly's steps leave of its own
    part, so the rank may hold more than its share. It is rounded down: to a multiple of 8 (of the cells' block where
    that is smaller), or where not even one of these fits to a whole number. So less than 8 ranks' parameters are not
    spent, 8 (R + C) / (R C) of the matrix, and there is a low rank wherever its share pays for one of rank 1. With
    `rank_share` 0 there is none, and what the butterfly leaves is not spent.
    Raises RecipeError when no butterfly fits.
    """
    if not 0 < density <= 1 or not 0 <= rank_share < 1 or block < 1:
        found = f"density {density}, rank_share {rank_share}, block {block}"
        raise RecipeError("plan a pixelated layer", found, "0 < density <= 1, 0 <= rank_share < 1, block 32")
    rows, columns = shape
    while block:
        fitting = [p for p in _butterflies(shape, block) if p.density(*shape) <= (1 - rank_share) * density + 1e-12]
        if fitting:
            best = max(fitting, key=lambda plan: (plan.density(*shape), -plan.grid))
            left = density * rows * columns - best.parameters(*shape)
            return Plan(best.grid, best.factors, _rank(left / (rows + columns), block) if rank_share else 0)
        block //= 2
    hint = "a higher density, keep_dense for this matrix, or a plan of your own"
    raise RecipeError(f"a butterfly of density {density:.3f}", f"none fits a {rows} x {columns} matrix", hint)


def _rank(most: float, block: int) -> int:
    """The largest rank of at most so many, in the largest steps that give one."""
    whole, step = int(most + 1e-9), min(RANKS, block)
    return whole // step * step or whole


def _butterflies(shape: Shape, block: int) -> list[Plan]:
    """All butterflies whose cells are multiples of a block."""
    plans, grid = [], 2
    while shape[0] % (grid * block) == 0 and shape[1] % (grid * block) == 0:
        plans += [Plan(grid, factors, 0) for factors in range(1, grid.bit_length())]
        grid *= 2
    return plans


def _loaded(model: Any) -> Loaded:
    return Loaded(name=type(model).__name__, model=model, tokenizer=None, anatomy=anatomy(model))


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer once: tied ones by their first name."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return parameters | {name: x for name, x in model.state_dict().items() if name not in tied}


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(state[name].shape) if name in state else None


def _layer(matrix: Matrix, plan: Plan) -> PixelatedLinear:
    """A new layer beside the old: its bias, device, type and whether it trains."""
    rows, columns = matrix.shape
    bias: Tensor | None = getattr(matrix.module, "bias", None)
    old = matrix.parameter
    layer = PixelatedLinear(columns, rows, plan, bias=bias is not None)
    layer = layer.to(device=old.device, dtype=old.dtype).requires_grad_(old.requires_grad)
    if layer.bias is not None and bias is not None:
        layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
    return layer.train(matrix.module.training)


def _project_(matrix: Matrix, layer: PixelatedLinear, gram: Tensor | None, rounds: int) -> float:
    fit = project(matrix.weight, layer.plan, gram, rounds=rounds)
    fill_(layer, fit)
    return fit.error


@torch.no_grad()
def _draw_(matrix: Matrix, layer: PixelatedLinear) -> None:
    """Draw weights as spread as the dense ones, and keep the bias."""
    bias = None if layer.bias is None else layer.bias.clone()
    layer.reset_(float(matrix.weight.float().std()))
    if layer.bias is not None and bias is not None:
        layer.bias.copy_(bias)


def _replace_(model: nn.Module, name: str, layer: PixelatedLinear) -> None:
    parent, _, child = name.rpartition(".")
    if not hasattr(model.get_submodule(parent), child):
        raise ModelError(f"replace {name}", "its parent has no such child", "a model whose names are its own")
    setattr(model.get_submodule(parent), child, layer)
