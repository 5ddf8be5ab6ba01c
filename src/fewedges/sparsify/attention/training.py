"""Constrained post-training: the fewest attention edges at an unchanged loss.

    objective = kl_weight * KL(dense || sparse) + loss_weight * cross-entropy + price * expected edges

per step, and a price on open heads where the recipe has a target for them; constraint.py moves both. Everything random
is a function of (seed, step): data order, gate noise. So a run that is stopped and resumed, at any step, gives the same
bits as one that was not (on CPU). Several processes share the batch, and sum what they find: parallel.py.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewedges import store
from fewedges.data.batch import Batch, Batches
from fewedges.errors import TrainingError
from fewedges.model.anatomy import plain
from fewedges.model.attention import CAUSAL, attention_by, register_causal
from fewedges.model.loading import Loaded
from fewedges.recipes import SparseAttention, write_recipe
from fewedges.sparsify.attention.checkpoint import load_checkpoint, read_log, save_checkpoint
from fewedges.sparsify.attention.constraint import Multiplier
from fewedges.sparsify.attention.interface import FUSED
from fewedges.sparsify.attention.objective import NAMES, RARE, Graph, Inputs, Objective, compiled_layers
from fewedges.sparsify.attention.parallel import Team, join, micro_batch, placed
from fewedges.sparsify.attention.sharding import check_shardable, shard_, wants_shards, whole
from fewedges.sparsify.attention.student import GATES, at_precision, make_student, start_from_, trained
from fewedges.sparsify.attention.watching import Record, interrupted, note, signals, warn_near_chance

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Run:
    """A run in flight: what a checkpoint holds, and what it is made of."""

    recipe: SparseAttention
    team: Team
    dense: Loaded
    student: Any
    parameters: list[Tensor]
    """What moves."""
    data: Batches
    optimizer: torch.optim.Optimizer
    objective: Objective
    graph: Graph | None = None
    multiplier: Multiplier
    head_multiplier: Multiplier
    folder: Path | None = None
    gated: bool = True
    sharded: bool = False
    start: str | None = None
    """sha256 of the weights it began with, where those are not the dense model's."""
    step: int = 0
    seconds: float = 0.0
    micro_batch: int = 0
    ahead: tuple[int, Batch] | None = None
    """The next step and its batch, prepared while the GPU was busy."""
    records: list[Record] = field(default_factory=list)

    @property
    def windows(self) -> int:
        """Windows of a batch that this process reads."""
        return self.recipe.batch_size // self.team.size

    @property
    def tokens(self) -> int:
        """Tokens read so far."""
        return self.step * self.recipe.batch_size * getattr(self.data, "context_length", self.recipe.context_length)

    def progress(self) -> float:
        """Fraction of the budget used, the largest over its kinds."""
        used = ((self.step, self.recipe.steps), (self.tokens, self.recipe.tokens))
        parts = [done / limit for done, limit in (*used, (self.seconds / 60, self.recipe.minutes)) if limit]
        return max(parts, default=0.0)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What training returns."""

    model: Any
    records: list[Record]
    finished: bool
    """False: paused inside its budget; the same call goes on from the checkpoint."""


def post_train(
    dense: Loaded,
    recipe: SparseAttention,
    data: Batches,
    *,
    folder: Path | None = None,
    control: bool = False,
    start: Any = None,
    pause_minutes: float | None = None,
    watch: Callable[[Record], None] | None = None,
    shard: bool | None = None,
) -> Trained:
    """Train a sparse copy of `dense` (or, with `control`, a copy without gates on the same data and steps).

    `folder` keeps checkpoints and log.jsonl; a run found there is resumed. `start` is a model, trained earlier by the
    same kind of recipe, whose weights the run begins with. `pause_minutes` ends this piece of work
    early. Where a launcher started several processes, they train one model together (parallel.py), and the first one
    alone writes and calls `watch`; `shard` cuts the frozen weights under LoRA into one piece a process (sharding.py;
    None: if `accelerate launch --use_fsdp` says so). Raises Interrupted after SIGINT or SIGTERM in any process (state
    saved), TrainingError on NaN, inf or lack of memory.
    """
    run = _start(dense, recipe, data, folder, gated=not control, start=start, shard=wants_shards(shard))
    began, piece = time.monotonic() - run.seconds, time.monotonic()
    with signals() as arrived, _attention(run), _compiled(run):
        number, paused = 0, False
        while not (number or paused) and run.progress() < 1:
            record = _step(run)
            run.seconds = time.monotonic() - began
            note(run, record, watch)
            over = pause_minutes is not None and time.monotonic() - piece > 60 * pause_minutes
            number, paused = run.team.agree_(run, arrived, over)
            if number or paused or run.step % recipe.checkpoint_every == 0 or run.progress() >= 1:
                run.team.by_first(lambda: save_checkpoint(run))
        number = number or run.team.agree_(run, arrived, False)[0]  # one that came during the last save
        if number:
            raise interrupted(run, number)
    model = whole(run.student, dense, recipe, gates=run.gated) if run.sharded else run.student
    return Trained(model=model, records=run.records, finished=run.progress() >= 1)


@contextmanager
def _attention(run: Run) -> Iterator[None]:
    """For the fused kernel, run both models' attention as plain causal: every window is full, no mask is built."""
    if run.recipe.kernel != "triton":
        yield
        return
    register_causal()
    student = FUSED if run.gated else CAUSAL
    with attention_by(plain(run.dense.model), CAUSAL), attention_by(plain(run.student), student):
        yield


def _compiled(run: Run) -> AbstractContextManager[None]:
    if not run.recipe.compiled:
        return nullcontext()
    return compiled_layers([run.dense.model, run.student], run.dense.anatomy)


def _start(
    dense: Loaded,
    recipe: SparseAttention,
    data: Batches,
    folder: Path | None,
    *,
    gated: bool,
    start: Any = None,
    shard: bool = False,
) -> Run:
    team = join(dense.model, shard=shard)
    if shard:
        check_shardable(dense, recipe, team)
    dense = at_precision(dense if shard else placed(dense, team), recipe)
    student = make_student(dense, recipe, gates=gated)
    digest = None if start is None else start_from_(student, start)
    passes = (dense.model, student) if not shard else shard_(student, plain(dense.model), dense.anatomy, team)
    accelerator = team.accelerator  # one shared state a process: nothing of this run goes in
    backward = accelerator.backward
    run = Run(
        objective=Objective(recipe=recipe, dense=passes[0], student=passes[1], gated=gated, backward=backward),
        recipe=recipe,
        team=team,
        sharded=shard,
        dense=dense,
        student=student,
        parameters=list(trained(student).values()),
        data=data,
        optimizer=accelerator.prepare_optimizer(_optimizer(student, recipe)),
        multiplier=Multiplier(recipe.multiplier_start),
        head_multiplier=Multiplier(recipe.head_multiplier_start),
        folder=folder,
        gated=gated,
        start=digest,
        micro_batch=micro_batch(recipe, team),
    )
    _resume(run)
    return run


def _resume(run: Run) -> None:
    """Go on from the folder's checkpoint, if there is one; the first process puts its log and recipe in order."""
    folder = run.folder
    if folder is not None and store.is_stored(folder / "checkpoint"):
        load_checkpoint(run, folder / "checkpoint")
        run.micro_batch = micro_batch(run.recipe, run.team, before=run.micro_batch)
    run.team.check_same_start(run)
    run.records = run.team.by_first(lambda: read_log(run))
    if folder is not None and run.team.first:
        folder.mkdir(parents=True, exist_ok=True)
        write_recipe(run.recipe, folder / "recipe.yaml")


# -- one step --------------------------------------------------------------------------------------------------


def _step(run: Run) -> Record:
    """One optimiser step: accumulate, clip, update unless something is not finite, check, move the price."""
    _set_learning_rates(run)
    sums = run.team.sum_(run.parameters, _accumulate_within_memory(run, _batch(run)))
    norm = torch.nn.utils.get_total_norm([p.grad for p in run.parameters if p.grad is not None])
    found = torch.cat([norm.detach()[None], sums])
    _update(run, norm, found)
    if run.recipe.graph:
        run.ahead = (run.step + 1, run.data.at(run.step + 1, run.recipe.batch_size))  # while the GPU works
    numbers: list[float] = found.tolist()  # the step's only wait for the GPU
    values: Record = dict(zip(("gradient_norm", *NAMES), numbers, strict=False))
    values["heads"] = float(sum(edges > RARE for edges in numbers[1 + len(NAMES) :]))
    if run.step == 0:
        warn_near_chance(run, values["dense_cross_entropy"])
    _check_finite(run, values)
    if run.gated:
        excess = values["cross_entropy"] - values["dense_cross_entropy"]
        fall = learning_rate_fall(run.recipe, run.progress())
        run.multiplier.update_(run.recipe, values["kl"], excess, fall, values["edges"])
        if run.recipe.target_heads is not None:
            run.head_multiplier.towards_(run.recipe, float(run.recipe.target_heads), values["heads"])
    run.step += 1
    return values


def _batch(run: Run) -> Batch:
    """This step's batch, prepared ahead or now."""
    step, batch = run.ahead or (None, None)
    return batch if step == run.step and batch is not None else run.data.at(run.step, run.recipe.batch_size)


def _update(run: Run, norm: Tensor, found: Tensor) -> None:
    """Clip and update; where anything `found` is not finite, leave the parameters and their moments alone.

    The fused optimiser decides that on the GPU, as it does for torch's GradScaler, so that the host need not wait.
    """
    optimizer: Any = run.optimizer.optimizer  # type: ignore[attr-defined]  # inside accelerate's wrapper
    if optimizer.param_groups[0]["fused"]:
        optimizer.found_inf = 1.0 - found.isfinite().all().float()
        optimizer.grad_scale = ((norm + 1e-6) / run.recipe.clip).clamp(min=1.0)
    elif not found.isfinite().all():
        return
    else:
        torch.nn.utils.clip_grads_with_norm_(run.parameters, run.recipe.clip, norm)
    run.optimizer.step()


def _accumulate_within_memory(run: Run, batch: Batch) -> Tensor:
    """Accumulate gradients; when memory runs out, halve the micro-batch and keep the batch."""
    while True:
        try:
            return _accumulate(run, batch)
        except torch.OutOfMemoryError as error:
            need = f"one window of {run.recipe.context_length} tokens does not fit in memory"
            if run.micro_batch == 1:
                raise TrainingError(f"step {run.step}", need, "a smaller context_length, train=lora, bf16") from error
            run.micro_batch = max(size for size in range(1, run.micro_batch) if run.windows % size == 0)
            run.graph = None
            sizes = (run.micro_batch, run.recipe.batch_size)
            log.warning("out of memory: micro_batch is now %d, batch_size stays %d", *sizes)
        torch.cuda.empty_cache()


def _accumulate(run: Run, batch: Batch) -> Tensor:
    """Gradients of this process's windows, micro-batch by micro-batch, and what they contribute to the record."""
    if run.graph is None:
        run.optimizer.zero_grad(set_to_none=True)
    return torch.stack([_piece(run)(given) for given in _inputs(run, batch)]).sum(0)


def _piece(run: Run) -> Callable[[Inputs], Tensor]:
    return run.objective if run.graph is None else run.graph


def _inputs(run: Run, batch: Batch) -> Iterator[Inputs]:
    """This process's share of the batch cut into micro-batches, on the device; numbered as in the whole batch."""
    device = run.parameters[0].device
    total = int(batch.counts[:, 1:].sum())
    mine = run.team.share(len(batch.tokens))
    for start in range(mine.start, mine.stop, run.micro_batch):
        rows, part = slice(start, min(start + run.micro_batch, mine.stop)), start // run.micro_batch
        numbers = (total, len(batch.tokens[rows]) / len(batch.tokens), *prices(run), annealed(run.recipe, run.step))
        total_, share, price, head_price, offset = torch.tensor(numbers, dtype=torch.float32).to(device).unbind()
        given = Inputs(
            tokens=batch.tokens[rows].to(device),
            counts=batch.counts[rows].to(device),
            total=total_,
            share=share,
            price=price,
            head_price=head_price,
            offset=offset,
            seed=torch.tensor(noise_seed(run.recipe.seed, run.step, part), dtype=torch.int32, device=device),
        )
        if run.recipe.graph and run.graph is None and run.micro_batch == run.windows:
            run.graph = Graph(run.objective, given, run.parameters)
        yield given


def annealed(recipe: SparseAttention, step: int) -> float:
    """The extra gate bias of this step."""
    return recipe.anneal_from * max(0.0, 1 - step / recipe.anneal_steps) if recipe.anneal_steps else 0.0


def noise_seed(seed: int, step: int, part: int) -> int:
    """The key of a micro-batch's gate noise: 32 bits, signed as torch keeps them."""
    return (seed * 1_000_003 + step * 8_191 + part * 524_287 + 2**31) % 2**32 - 2**31


def learning_rate_factor(recipe: SparseAttention, step: int, progress: float) -> float:
    """Linear warm-up, constant, linear fall to 0 over the last `decay_fraction` of the budget."""
    return min((step + 1) / max(1, recipe.warmup_steps), learning_rate_fall(recipe, progress))


def learning_rate_fall(recipe: SparseAttention, progress: float) -> float:
    """The last part of that alone: 1, then linearly to 0."""
    return max(0.0, min(1.0, (1 - progress) / recipe.decay_fraction)) if recipe.decay_fraction else 1.0


def prices(run: Run) -> tuple[float, float]:
    """What an edge and what the heads cost in this step's objective: the multipliers, cooled if the recipe says so."""
    heat = learning_rate_fall(run.recipe, run.progress()) if run.recipe.cooling else 1.0
    heads = 0.0 if run.recipe.target_heads is None else run.head_multiplier.price
    return heat * run.multiplier.price, heat * heads


def _set_learning_rates(run: Run) -> None:
    factor = learning_rate_factor(run.recipe, run.step, run.progress())
    for group in run.optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def _optimizer(student: Any, recipe: SparseAttention) -> torch.optim.AdamW:
    matrices, vectors, biases = [], [], []
    for name, parameter in trained(student).items():
        plain_ = parameter.dim() > 1 and not name.endswith(GATES)
        (biases if name.endswith("gate_bias") else matrices if plain_ else vectors).append(parameter)
    groups = [
        {"params": matrices, "peak": recipe.learning_rate, "weight_decay": recipe.weight_decay},
        {"params": vectors, "peak": recipe.learning_rate, "weight_decay": 0.0},
        {"params": biases, "peak": recipe.bias_learning_rate, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, betas=recipe.adam_betas, fused=_fused(student))


def _fused(student: Any) -> bool:
    """Whether the optimiser runs as one kernel, which can also decide not to update."""
    return next(student.parameters()).is_cuda


# -- what is watched -------------------------------------------------------------------------------------------


def _check_finite(run: Run, values: dict[str, float]) -> None:
    """Stop when anything was NaN or inf (the update left such a step out), and name the first tensor that was."""
    if all(math.isfinite(value) for value in values.values()):
        return
    named = trained(run.student).items()
    suspects = [(f"parameter {name}", p) for name, p in named]
    suspects += [(f"gradient of {name}", p.grad) for name, p in named if p.grad is not None]
    found = next((name for name, x in suspects if not bool(torch.isfinite(x).all())), None)
    found = found or next(name for name, value in values.items() if not math.isfinite(value))
    raise TrainingError(
        f"step {run.step}",
        f"{found} is not finite; nothing was updated",
        "a smaller learning_rate, precision=fp32",
    )
