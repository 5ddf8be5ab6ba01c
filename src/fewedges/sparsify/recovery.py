"""The loop of every stage that trains: distillation with masks held, and methods whose masks are made in training.

    objective = kl_weight * KL(dense || student) + loss_weight * cross-entropy + hidden_weight * hidden difference

The hidden difference is, at every token and after every block, the squared distance of the student's hidden state
from that of the dense model's block it stands for, over the dense state's own square: a token with a huge state
(an attention sink) counts as much as any other. Everything is a function of (seed, step), so a run that is stopped
and resumed gives the same bits as one that was not (on CPU). Hinton et al. 2015 (arXiv:1503.02531); hidden states as
in Sanh et al. 2019 (arXiv:1910.01108), which also initialises a smaller student with some of the dense layers.
A method that trains is a row of weight_recipes.TRAINED: its score, allocation, schedule and what comes or goes back
say how the mask moves (rewiring.py); nothing else differs from distillation.

Shapes: B batch, T token, D model width.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewedges import store
from fewedges.data.batch import Batch, Batches
from fewedges.errors import ModelError, RecipeError, StoreError, TrainingError
from fewedges.model.attention import refuse_patterns
from fewedges.model.loading import Loaded, fingerprint
from fewedges.model.loading import load as load_dense
from fewedges.recipes import to_dict
from fewedges.sparsify.attention.watching import Record, interrupted, signals
from fewedges.sparsify.distilling import losses
from fewedges.sparsify.lottery import reinitialised_
from fewedges.sparsify.masks import Guard, Masks, held
from fewedges.sparsify.pattern import Pattern
from fewedges.sparsify.pixelated import block_modules, matrix_parameters, recoverable
from fewedges.sparsify.pruned import Pruned, after, begin
from fewedges.sparsify.rewiring import check_pruned, final_masks, first_masks, moving_of
from fewedges.sparsify.schedule import Moving, Rewinding, Schedule, Static, schedule_of
from fewedges.sparsify.shrink import keep_layers
from fewedges.weight_recipes import Distil, Train, Training

CHECKPOINT = "distil-checkpoint"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
MAY_CHANGE = ("log_every", "checkpoint_every", "micro_batch")
"""Recipe fields that may differ when a run is resumed: the step count is not one, the learning rate follows it."""


@dataclass(kw_only=True)
class Run:
    """A stage in flight."""

    recipe: Training
    start: Pruned
    schedule: Schedule
    masks: Masks
    """Those it begins with; of a resumed run, those it goes on with."""
    teacher: Any
    parameters: dict[str, Tensor]
    """What moves, by name."""
    data: Batches
    optimizer: torch.optim.Optimizer
    began: str
    """sha256 of the weights it began with."""
    teachers: list[nn.Module]
    """The dense model's blocks that the student's stand for, in order."""
    folder: Path | None = None
    step: int = 0
    seconds: float = 0.0
    records: list[Record] = field(default_factory=list)
    early: dict[str, Tensor] = field(default_factory=dict)
    """Tickets: the weights that are gone back to, once they are there."""

    @property
    def total(self) -> int:
        """Steps of the stage."""
        return self.schedule.total if isinstance(self.schedule, Rewinding) else self.recipe.steps

    @property
    def clock(self) -> int:
        """The step whose batch and learning rate are due."""
        return self.schedule.clock(self.step) if isinstance(self.schedule, Rewinding) else self.step


def distil_(
    what: Loaded | Pruned,
    recipe: Distil,
    data: Batches,
    *,
    teacher: Loaded | None = None,
    folder: Path | None = None,
    pause_minutes: float | None = None,
    watch: Callable[[Record], None] | None = None,
) -> Pruned:
    """Train a model in place towards `teacher` (default: the dense model it came from), its masks held.

    With `recipe.layers` a smaller student is made first and the given model left alone. `folder` keeps a checkpoint
    and log.jsonl; a run found there is resumed. After `pause_minutes` the result is not `finished`, has no new stage,
    and the same call goes on. Raises Interrupted after a signal (state saved), TrainingError on NaN or inf,
    ModelError for half precision or if a zero is lost, RecipeError after quantisation.
    """
    return train_(what, recipe, data, teacher=teacher, folder=folder, pause_minutes=pause_minutes, watch=watch)


def train_(
    what: Loaded | Pruned,
    recipe: Training,
    data: Batches,
    *,
    teacher: Loaded | None = None,
    folder: Path | None = None,
    pause_minutes: float | None = None,
    watch: Callable[[Record], None] | None = None,
) -> Pruned:
    """Train a model in place by any recipe that trains: static, RigL, SET, gradual pruning, tickets, distillation.

    All as in `distil_`. RecipeError also where the schedule has no room in the steps, or where a model that is
    already pruned does not fit the density.
    """
    run = _start(begin(recoverable(what, recipe, teacher)), recipe, data, teacher, folder)
    began, piece = time.monotonic() - run.seconds, time.monotonic()
    paused = False
    with signals() as arrived, _training(run), held(run.start.model, run.masks, run.optimizer) as guard:
        moving = moving_of(recipe, guard, run.schedule, run.start.model, run.early)
        while run.step < run.total and not paused:
            values = _step(run, moving)
            run.seconds = time.monotonic() - began
            _note(run, values, watch)
            paused = pause_minutes is not None and time.monotonic() - piece > 60 * pause_minutes
            last = run.step == run.total
            if arrived or paused or last or run.step % recipe.checkpoint_every == 0:
                _save(run, guard)
            if arrived and not last:
                raise interrupted(run, arrived[0])  # type: ignore[arg-type]  # it reads step and folder
    if run.step < run.total:
        return replace(run.start, finished=False)
    if folder is not None:
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    return after(run.start, recipe, masks=final_masks(recipe, run.masks, guard), data=run.data.describe())


def dense_of(pruned: Pruned) -> Loaded:
    """The dense model that a result came from, read again and verified. Raises StoreError if it is another."""
    parameter = next(pruned.model.parameters())
    options: dict[str, Any] = {"dtype": parameter.dtype, "device": str(parameter.device), "probes": False}
    dense = load_dense(pruned.base["name"], **options)
    if fingerprint(dense.model) != pruned.base["sha256"]:
        found = f"{pruned.base['name']} now has other weights"
        raise StoreError("read the dense model again", found, f"sha256 {pruned.base['sha256'][:16]}..., or teacher=")
    return dense


# -- the beginning -------------------------------------------------------------------------------------------------


def _start(start: Pruned, recipe: Training, data: Batches, teacher: Loaded | None, folder: Path | None) -> Run:
    _check_start(start, recipe)
    if folder is not None:
        refuse_patterns(f"train in {folder}", start.model)
    layers = recipe.layers if isinstance(recipe, Distil) else ()
    schedule = schedule_of(recipe) if isinstance(recipe, Train) else Static(start.masks.density)
    if teacher is None:
        teacher = start.loaded if layers and not start.stages else dense_of(start)
    if teacher.model is start.model and not layers:
        raise ModelError("distil", "the teacher is the model that is trained", "teacher=a copy, or none")
    blocks = block_modules(teacher)
    if layers:
        start = keep_layers(start, layers)
        blocks = [blocks[number] for number in layers]
    if len(blocks) != len(block_modules(start.loaded)):
        if recipe.hidden_weight:
            raise RecipeError("hidden_weight", "student and teacher differ in layers", "layers=..., or hidden_weight=0")
        blocks = []
    masks = start.masks
    if isinstance(recipe, Train):
        check_pruned(start.masks, recipe, schedule)
        if recipe.from_scratch:
            reinitialised_(start.model, recipe.seed)
        masks = first_masks(start.loaded, start.masks, recipe, schedule)
    parameters = _trained(start, recipe)
    run = Run(
        recipe=recipe,
        start=start,
        schedule=schedule,
        masks=masks,
        teacher=teacher.model,
        parameters=parameters,
        data=data,
        optimizer=_optimizer(parameters, recipe),
        began=fingerprint(start.model),
        teachers=blocks,
        folder=folder,
    )
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        _resume(run, folder)
    return run


def _check_start(start: Pruned, recipe: Training) -> None:
    dtype, verb = next(start.model.parameters()).dtype, type(recipe).__name__.lower()
    if dtype.itemsize < 4:
        raise ModelError(f"{verb} {start.base['name']}", f"its weights are {dtype} in memory", "the float32 model")
    if start.rounded or start.backend != "plain":
        raise RecipeError(verb, "the weights are quantised, training would leave the grid", "quantize last")
    if isinstance(recipe, Distil) and recipe.layers and (start.masks.patterns or start.config):
        raise RecipeError("recipe field layers", "the model is already pruned", "choose layers first, then prune")


def _trained(start: Pruned, recipe: Training) -> dict[str, Tensor]:
    if recipe.train == "all":
        return dict(start.model.named_parameters())
    return matrix_parameters(start.loaded)


def _optimizer(parameters: dict[str, Tensor], recipe: Training) -> torch.optim.AdamW:
    matrices = [p for p in parameters.values() if p.dim() > 1]
    vectors = [p for p in parameters.values() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=recipe.adam_betas, lr=0.0)


@contextmanager
def _training(run: Run) -> Iterator[None]:
    """Gradients for what moves, and for nothing else, while it moves. Dropout stays off."""
    model = run.start.model
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in run.parameters)
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
            parameter.grad = None


# -- one step ------------------------------------------------------------------------------------------------------


def _step(run: Run, moving: Moving) -> dict[str, float]:
    recipe, clock = run.recipe, run.clock
    moving.prepare(run.step)
    for group in run.optimizer.param_groups:
        group["lr"] = recipe.learning_rate * learning_rate_factor(recipe, clock)
    batch = run.data.at(clock, recipe.batch_size)
    run.optimizer.zero_grad(set_to_none=True)
    sums = torch.stack([_piece(run, piece, share) for piece, share in _pieces(run, batch)]).sum(0)
    moved = list(run.parameters.values())
    norm = torch.nn.utils.get_total_norm([p.grad for p in moved if p.grad is not None])
    names = ("objective", "kl", "cross_entropy", "dense_cross_entropy", "hidden", "gradient_norm")
    values: dict[str, float] = dict(zip(names, [*sums.tolist(), float(norm)], strict=True))
    if bad := [name for name, value in values.items() if not math.isfinite(value)]:
        hint = "a smaller learning_rate, precision=fp32"
        raise TrainingError(f"step {run.step}", f"{bad[0]} is not finite; nothing was updated", hint)
    if not moving.rewire_(run.step):
        torch.nn.utils.clip_grads_with_norm_(moved, recipe.clip, norm)
        run.optimizer.step()
        moving.prune_(run.step)
    run.step += 1
    return {**values, "density": moving.density} if isinstance(recipe, Train) and _logged(run, run.step) else values


def learning_rate_factor(recipe: Training, step: int) -> float:
    """Linear warm-up, constant, linear fall to 0 over the last `decay_fraction` of the steps."""
    rise = (step + 1) / max(1, recipe.warmup_steps)
    fall = (recipe.steps - step) / (recipe.decay_fraction * recipe.steps) if recipe.decay_fraction else 1.0
    return min(1.0, rise, fall)


def _pieces(run: Run, batch: Batch) -> Iterator[tuple[Batch, float]]:
    """Micro-batches, each with its share of the batch's counted predictions."""
    device = run.start.model.device
    size, total = run.recipe.micro_batch or len(batch.tokens), int(batch.counts[:, 1:].sum())
    for tokens, counts in zip(batch.tokens.split(size), batch.counts.split(size), strict=True):
        yield Batch(tokens.to(device), counts.to(device)), int(counts[:, 1:].sum()) / max(total, 1)


def _piece(run: Run, piece: Batch, share: float) -> Float[Tensor, "5"]:
    """Gradients of a micro-batch; objective, KL, both cross-entropies and hidden difference, times its share."""
    recipe, student = run.recipe, run.start.model
    mine = block_modules(run.start.loaded) if recipe.hidden_weight else []
    theirs = run.teachers if recipe.hidden_weight else []
    asked = recipe.kl_weight or recipe.hidden_weight or _logged(run, run.step + 1)  # else nobody reads the dense model
    with torch.autocast(piece.tokens.device.type, dtype=torch.bfloat16, enabled=recipe.precision == "bf16"):
        with torch.no_grad(), outputs_of(theirs) as wanted:
            dense = run.teacher(input_ids=piece.tokens, use_cache=False).logits if asked else None
        with outputs_of(mine) as seen:
            logits = student(input_ids=piece.tokens, use_cache=False).logits
    weights: dict[str, Any] = {"kl_weight": recipe.kl_weight, "loss_weight": recipe.loss_weight}
    found = losses(logits, logits.detach() if dense is None else dense, piece.tokens, piece.counts, **weights)
    hidden = hidden_difference(seen, wanted) if recipe.hidden_weight else torch.zeros(())
    objective = found.objective + recipe.hidden_weight * hidden
    (share * objective).backward()
    numbers = (objective, found.kl, found.cross_entropy, found.dense_cross_entropy, hidden)
    return share * torch.stack([x.detach().float().cpu() for x in numbers])


def hidden_difference(student: list[Float[Tensor, "B T D"]], dense: list[Float[Tensor, "B T D"]]) -> Float[Tensor, ""]:
    """|s - d|^2 / |d|^2 at every token, its mean over tokens and blocks."""
    parts = [
        ((s - d).float().square().sum(-1) / d.float().square().sum(-1).clamp(min=1e-12)).mean()
        for s, d in zip(student, dense, strict=True)
    ]
    return torch.stack(parts).mean()


@contextmanager
def outputs_of(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the hidden states that leave each block, in order."""
    seen: list[Tensor] = []

    def hear(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    hooks = [module.register_forward_hook(hear) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


# -- what is kept --------------------------------------------------------------------------------------------------


def _logged(run: Run, step: int) -> bool:
    return step % run.recipe.log_every == 0 or step in (1, run.total)


def _note(run: Run, values: dict[str, float], watch: Callable[[Record], None] | None) -> None:
    """Make a log record when one is due."""
    if not _logged(run, run.step):
        return
    tokens = run.step * run.recipe.batch_size * getattr(run.data, "context_length", run.recipe.context_length)
    record = {"step": run.step, "tokens": tokens, "seconds": round(run.seconds, 3), "loss": values.pop("objective")}
    record |= {**values, "edges_per_query_per_head": None, "learning_rate": run.optimizer.param_groups[0]["lr"]}
    record |= {"tokens_per_second": round(tokens / max(run.seconds, 1e-9)), "progress": run.step / run.total}
    run.records.append(record)
    if run.folder is not None:
        with open(run.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    if watch is not None:
        watch(record)


def _identity(run: Run) -> dict[str, Any]:
    """What must be the same for a run to go on."""
    recipe = {name: value for name, value in to_dict(run.recipe).items() if name not in MAY_CHANGE}
    facts = {**recipe, "data": run.data.describe(), "base": run.start.base, "began with": run.began}
    return json.loads(json.dumps(facts))


def _save(run: Run, guard: Guard) -> None:
    """Parameters, their moments and masks that move, if there is a folder to keep them in."""
    if run.folder is None:
        return
    moments = {f"{n}.{key}": run.optimizer.state[p][key] for n, p in run.parameters.items() for key in MOMENTS}
    tensors = {"parameters": {n: p.detach() for n, p in run.parameters.items()}, "moments": moments}
    if not isinstance(run.schedule, Static):
        tensors |= {"kept": guard.kept, "early": run.early}
    facts = {"run": _identity(run), "step": run.step, "seconds": run.seconds, "versions": store.versions()}
    store.save(run.folder / "checkpoint", CHECKPOINT, tensors, facts)


def _resume(run: Run, folder: Path) -> None:
    """Go on from the folder's checkpoint, if there is one; cut the log to it."""
    log = folder / "log.jsonl"
    if store.is_stored(folder / "checkpoint"):
        saved = store.load(folder / "checkpoint", CHECKPOINT)
        _check_same(_identity(run), saved.facts["run"], folder)
        with torch.no_grad():
            for name, parameter in run.parameters.items():
                parameter.copy_(saved.tensors["parameters"][name])
                state = {key: saved.tensors["moments"][f"{name}.{key}"] for key in MOMENTS}
                on = {key: x if key == "step" else x.to(parameter.device) for key, x in state.items()}
                run.optimizer.state[parameter] = on
        kept, run.early = (saved.tensors.get(part, {}) for part in ("kept", "early"))
        run.masks = Masks({name: Pattern(kept[name]) for name in run.masks.patterns}) if kept else run.masks
        run.step, run.seconds = saved.facts["step"], saved.facts["seconds"]
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    run.records = [record for record in records if record["step"] <= run.step]
    store.write_text(log, "".join(json.dumps(record) + "\n" for record in run.records))


def _check_same(now: dict[str, Any], then: dict[str, Any], folder: Path) -> None:
    for name in now:
        if now[name] != then.get(name):
            found = f"it was started with {name}={then.get(name)!r}, now {now[name]!r}"
            raise StoreError(f"resume {folder}", found, "the same settings, or another --out folder")
