"""The verb `sparsify`, one for every method: a recipe, or several in a row (prune, then train, then quantize).

With a folder the result is saved after every stage, and the same call goes on where an earlier one stopped.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

from fewedges import store
from fewedges.data.batch import Batches
from fewedges.errors import ModelError, RecipeError, StoreError
from fewedges.model.attention import refuse_patterns
from fewedges.model.loading import Loaded
from fewedges.recipes import SparseAttention, write_recipe
from fewedges.sparsify.attention import result
from fewedges.sparsify.attention.result import Sparse
from fewedges.sparsify.attention.watching import Record
from fewedges.sparsify.pixelated import PixelatedModel, load_pixelated, recoverable
from fewedges.sparsify.pruned import Pruned, begin, load_pruned
from fewedges.sparsify.pruning import prune_
from fewedges.sparsify.quantizing import quantize_
from fewedges.sparsify.recovery import train_
from fewedges.sparsify.schedule import schedule_of
from fewedges.weight_recipes import Distil, Prune, Quantize, Rewind, Tickets, Train, Training

Stage = Prune | Distil | Quantize | Train
KINDS = "a list of Prune, Distil, Quantize, Train, Rewire, Gradual and Rewind"
Data = str | Path | Batches | None


@overload
def sparsify(model: Loaded | Sparse | Pruned, recipe: SparseAttention | None = None, **options: Any) -> Sparse: ...
@overload
def sparsify(
    model: Loaded | Sparse | Pruned, recipe: Stage | Tickets | Sequence[Stage | Tickets], **options: Any
) -> Pruned: ...
def sparsify(model: Any, recipe: Any = None, **options: Any) -> Any:
    """Make a copy of a model sparse, by any method; `model` is left alone.

    A `SparseAttention` (the default) post-trains attention that keeps few edges and gives a `Sparse`: its options
    are those of `sparsify.attention.result.sparsify`. A `Prune`, `Distil`, `Quantize`, or a recipe that trains with
    a mask (`Train`, `Rewire`, `Gradual`, `Rewind`), or a list of them, works on the weights and gives a `Pruned`:
    `sparsify_weights`. A model that went through `pixelate_` can be distilled.
    """
    model = recoverable(model, recipe)
    if recipe is None or isinstance(recipe, SparseAttention):
        if isinstance(model, Pruned):
            found = "its weights are sparse, and attention training would not hold their zeros"
            raise ModelError("sparsify attention", found, "the dense model")
        return result.sparsify(model, recipe, **options)
    return sparsify_weights(model, recipe, **options)


def sparsify_weights(
    model: Loaded | Pruned,
    stages: Stage | Tickets | Sequence[Stage | Tickets],
    *,
    data: Data = None,
    out: Path | str | None = None,
    max_tokens: int | None = None,
    pause_minutes: float | None = None,
    watch: Callable[[Record], None] | None = None,
) -> Pruned:
    """Work on a copy of a model's weights, stage after stage; `model` is left alone.

    `data` is a text file, folder or hub dataset (training reads at most `max_tokens`), or a source of batches;
    "addition" needs none, nor do random, magnitude and quantization. With `out`, saved there after every stage and
    resumed from there. Where `pause_minutes` ends a training early the result is not `finished`.
    """
    stages = _checked(model, stages)
    model = recoverable(model, stages)
    folder = Path(out) if out is not None else None
    if folder is not None and any(isinstance(stage, Quantize) and stage.backend == "torchao" for stage in stages):
        raise RecipeError("sparsify with a folder", "torchao's tensors are to be run, not saved", "backend reference")
    if folder is not None:
        refuse_patterns(f"sparsify into {folder}", model.model)
    start = model if isinstance(model, Pruned) else begin(model)
    whole = (*start.stages, *stages)
    teacher = model if isinstance(model, Loaded) else None
    now = _resumed(folder, start, whole, data) or replace(start, loaded=_copy(start.loaded))
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_recipe(whole, folder / "recipe.yaml")
    for number in range(len(now.stages), len(whole)):
        stage = whole[number]
        if isinstance(stage, Training):
            beside = None if folder is None else folder / f"{type(stage).__name__.lower()}-{number}"
            batches = _batches(now.loaded, stage, data, max_tokens)
            options: dict[str, Any] = {"pause_minutes": pause_minutes, "watch": watch}
            now = train_(now, stage, batches, teacher=teacher, folder=beside, **options)
        else:
            now = quantize_(now, stage) if isinstance(stage, Quantize) else prune_(now, stage, data)
        if not now.finished:
            return now
        now = replace(now, data={**now.data, "source": _source(data)} if now.data else {})
        if folder is not None and now.backend == "plain":
            now.save(folder)
    return now


def _checked(model: Any, stages: Any) -> tuple[Stage, ...]:
    given = tuple(stages) if isinstance(stages, list | tuple) else (stages,)
    if isinstance(model, Sparse):
        raise ModelError("sparsify weights", "the model has gated attention", "the dense model")
    given = tuple(_stage_of(stage) if isinstance(stage, Tickets) else stage for stage in given)
    for stage in given:
        if not isinstance(stage, Stage):
            raise RecipeError("sparsify in stages", type(stage).__name__, KINDS)
        if isinstance(stage, Train):
            schedule_of(stage)  # refused before anything is done
    if not given:
        raise RecipeError("sparsify", "no stage", KINDS)
    return given


def _stage_of(tickets: Tickets) -> Rewind:
    """The same by density; how it is trained is as `Rewind` has it by default."""
    rule = "global" if tickets.scope == "global" else "uniform"
    density, rounds = tickets.density, tickets.rounds
    return Rewind(density=density, rounds=rounds, rewind=tickets.rewind, steps=tickets.steps, allocation=rule)


def _batches(loaded: Loaded, recipe: Training, data: Any, max_tokens: int | None) -> Batches:
    """The source of batches that `data` names."""
    if hasattr(data, "at"):
        return data
    if data is None and loaded.name == "addition":
        from fewedges.data.addition import Sums

        return Sums(seed=recipe.seed)
    if data is None:
        raise RecipeError(type(recipe).__name__.lower(), "no data", 'data="my_text/" (a file or folder of text)')
    if (longest := loaded.anatomy.positions) is not None and recipe.context_length > longest:
        found = f"{recipe.context_length}, the model has {longest} positions"
        raise RecipeError("recipe field context_length", found, f"at most {longest}")
    from fewedges.data.text import read_text

    options: dict[str, Any] = {"context_length": recipe.context_length, "seed": recipe.seed, "max_tokens": max_tokens}
    return read_text(data, loaded.tokenizer, **options)


def _copy(loaded: Loaded) -> Loaded:
    return loaded.with_model(copy.deepcopy(loaded.model))


def _resumed(folder: Path | None, start: Pruned, whole: tuple[Stage, ...], data: Data) -> Pruned | None:
    """What an earlier call left in the folder, if it is on the way to the same result."""
    if folder is None or not store.is_stored(folder):
        return None
    device = str(next(start.model.parameters()).device)
    read = load_pixelated if isinstance(start, PixelatedModel) else load_pruned
    saved = read(folder, dtype=next(start.model.parameters()).dtype, device=device, probes=False)
    hint = "the same model, recipe and data, or another --out folder"
    if saved.base != start.base:
        raise StoreError(f"resume {folder}", f"it is made from another model, {saved.base['name']}", hint)
    if saved.stages != whole[: len(saved.stages)] or len(saved.stages) < len(start.stages):
        names = ", ".join(str(stage) for stage in saved.stages)
        raise StoreError(f"resume {folder}", f"it holds other stages: {names}", hint)
    if saved.data and saved.data.get("source") != _source(data):
        raise StoreError(f"resume {folder}", f"it read {saved.data.get('source')}", hint)
    return saved


def _source(data: Data) -> str | None:
    """What the user called the data."""
    return str(data) if isinstance(data, str | Path) else None
