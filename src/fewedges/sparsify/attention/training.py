"""Constrained post-training: the fewest attention edges at an unchanged loss.

    objective = kl_weight * KL(dense || sparse) + loss_weight * cross-entropy + price * expected edges

per step, with the price moved by constraint.py. Everything random is a function of (seed, step): data order, gate
noise. So a run that is stopped and resumed, at any step, gives the same bits as one that was not (on CPU).
"""

import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewedges import store
from fewedges.data.batch import Batch, Batches
from fewedges.errors import Interrupted, TrainingError
from fewedges.model.anatomy import plain
from fewedges.model.attention import CAUSAL, attention_by, register_causal
from fewedges.model.loading import Loaded
from fewedges.recipes import SparseAttention, write_recipe
from fewedges.sparsify.attention.checkpoint import load_checkpoint, read_log, save_checkpoint
from fewedges.sparsify.attention.constraint import Multiplier
from fewedges.sparsify.attention.interface import FUSED
from fewedges.sparsify.attention.objective import NAMES, Graph, Inputs, Objective
from fewedges.sparsify.attention.student import at_precision, make_student, start_from_, trained

log = logging.getLogger(__name__)

Record = dict[str, Any]


@dataclass(kw_only=True)
class Run:
    """A run in flight: what a checkpoint holds, and what it is made of."""

    recipe: SparseAttention
    dense: Loaded
    student: Any
    data: Batches
    optimizer: torch.optim.Optimizer
    objective: Objective
    graph: Graph | None = None
    multiplier: Multiplier
    folder: Path | None = None
    gated: bool = True
    start: str | None = None
    """sha256 of the weights it began with, where those are not the dense model's."""
    step: int = 0
    seconds: float = 0.0
    micro_batch: int = 0
    records: list[Record] = field(default_factory=list)

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
) -> Trained:
    """Train a sparse copy of `dense` (or, with `control`, a copy without gates on the same data and steps).

    `folder` keeps checkpoints and log.jsonl; a run found there is resumed. `start` is a model, trained earlier by the
    same kind of recipe, whose weights the run begins with. `pause_minutes` ends this piece of work
    early. Raises Interrupted after SIGINT or SIGTERM (state saved), TrainingError on NaN, inf or lack of memory.
    """
    run = _start(dense, recipe, data, folder, gated=not control, start=start)
    began, piece = time.monotonic() - run.seconds, time.monotonic()
    with _signals() as arrived, _attention(run):
        while run.progress() < 1:
            record = _step(run)
            run.seconds = time.monotonic() - began
            _note(run, record, watch)
            paused = pause_minutes is not None and time.monotonic() - piece > 60 * pause_minutes
            if arrived or paused or run.step % recipe.checkpoint_every == 0 or run.progress() >= 1:
                save_checkpoint(run)
            if arrived:
                raise _interrupted(run, arrived[0])
            if paused:
                break
    return Trained(model=run.student, records=run.records, finished=run.progress() >= 1)


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


def _start(
    dense: Loaded, recipe: SparseAttention, data: Batches, folder: Path | None, *, gated: bool, start: Any = None
) -> Run:
    from accelerate import Accelerator

    dense = at_precision(dense, recipe)
    accelerator = Accelerator(device_placement=False)  # one shared state a process: nothing of this run goes in
    student = make_student(dense, recipe, gates=gated)
    backward = accelerator.backward
    run = Run(
        objective=Objective(recipe=recipe, dense=dense.model, student=student, gated=gated, backward=backward),
        recipe=recipe,
        dense=dense,
        student=student,
        data=data,
        optimizer=accelerator.prepare(_optimizer(student, recipe)),
        multiplier=Multiplier(recipe.multiplier_start),
        folder=folder,
        gated=gated,
        start=None if start is None else start_from_(student, start),
        micro_batch=recipe.micro_batch or recipe.batch_size,
    )
    if folder is not None and store.is_stored(folder / "checkpoint"):
        load_checkpoint(run, folder / "checkpoint")
    run.records = read_log(run)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_recipe(recipe, folder / "recipe.yaml")
    return run


# -- one step --------------------------------------------------------------------------------------------------


def _step(run: Run) -> Record:
    """One optimiser step: accumulate, check, clip, update, move the price."""
    _set_learning_rates(run)
    batch = run.data.at(run.step, run.recipe.batch_size)
    sums = _accumulate_within_memory(run, batch)
    parameters = list(trained(run.student).values())
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    values = dict(zip((*sums, "gradient_norm"), torch.stack([*sums.values(), norm.detach()]).tolist(), strict=True))
    if run.step == 0:
        _warn_near_chance(run, values["dense_cross_entropy"])
    _check_finite(run, values)  # before clipping, which would spread one NaN over all gradients
    torch.nn.utils.clip_grads_with_norm_(parameters, run.recipe.clip, norm)
    run.optimizer.step()
    if run.gated:
        excess = values["cross_entropy"] - values["dense_cross_entropy"]
        run.multiplier.update_(run.recipe, values["kl"], excess, learning_rate_fall(run.recipe, run.progress()))
    run.step += 1
    return values


def _accumulate_within_memory(run: Run, batch: Batch) -> dict[str, Tensor]:
    """Accumulate gradients; when memory runs out, halve the micro-batch and keep the batch."""
    while True:
        try:
            return _accumulate(run, batch)
        except torch.OutOfMemoryError as error:
            need = f"one window of {run.recipe.context_length} tokens does not fit in memory"
            if run.micro_batch == 1:
                raise TrainingError(f"step {run.step}", need, "a smaller context_length, train=lora, bf16") from error
            run.micro_batch = max(size for size in range(1, run.micro_batch) if run.recipe.batch_size % size == 0)
            run.graph = None
            sizes = (run.micro_batch, run.recipe.batch_size)
            log.warning("out of memory: micro_batch is now %d, batch_size stays %d", *sizes)
        torch.cuda.empty_cache()


def _accumulate(run: Run, batch: Batch) -> dict[str, Tensor]:
    """Gradients of the whole batch, micro-batch by micro-batch, and what each contributes to the record."""
    if run.graph is None:
        run.optimizer.zero_grad(set_to_none=True)
    sums = [_piece(run)(given) for given in _inputs(run, batch)]
    return dict(zip(NAMES, torch.stack(sums).sum(0).unbind(), strict=True))


def _piece(run: Run) -> Callable[[Inputs], Tensor]:
    return run.objective if run.graph is None else run.graph


def _inputs(run: Run, batch: Batch) -> Iterator[Inputs]:
    """The batch cut into micro-batches, on the device."""
    device = next(run.student.parameters()).device
    total = int(batch.counts[:, 1:].sum())
    for part, start in enumerate(range(0, len(batch.tokens), run.micro_batch)):
        rows = slice(start, start + run.micro_batch)
        numbers = (total, len(batch.tokens[rows]) / len(batch.tokens), price(run), annealed(run.recipe, run.step))
        total_, share, price_, offset = torch.tensor(numbers, dtype=torch.float32).to(device).unbind()
        given = Inputs(
            tokens=batch.tokens[rows].to(device),
            counts=batch.counts[rows].to(device),
            total=total_,
            share=share,
            price=price_,
            offset=offset,
            seed=torch.tensor(noise_seed(run.recipe.seed, run.step, part), dtype=torch.int32, device=device),
        )
        if run.recipe.graph and run.graph is None and run.micro_batch == run.recipe.batch_size:
            run.graph = Graph(run.objective, given, list(trained(run.student).values()))
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


def price(run: Run) -> float:
    """What an edge costs in this step's objective: the multiplier, cooled if the recipe says so."""
    return run.multiplier.price * (learning_rate_fall(run.recipe, run.progress()) if run.recipe.cooling else 1.0)


def _set_learning_rates(run: Run) -> None:
    factor = learning_rate_factor(run.recipe, run.step, run.progress())
    for group in run.optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def _optimizer(student: Any, recipe: SparseAttention) -> torch.optim.AdamW:
    matrices, vectors, biases = [], [], []
    for name, parameter in trained(student).items():
        (biases if name.endswith("gate_bias") else matrices if parameter.dim() > 1 else vectors).append(parameter)
    groups = [
        {"params": matrices, "peak": recipe.learning_rate, "weight_decay": recipe.weight_decay},
        {"params": vectors, "peak": recipe.learning_rate, "weight_decay": 0.0},
        {"params": biases, "peak": recipe.bias_learning_rate, "weight_decay": 0.0},
    ]
    on_gpu = next(student.parameters()).is_cuda
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=recipe.adam_betas, fused=on_gpu)


def _warn_near_chance(run: Run, dense_cross_entropy: float) -> None:
    """Say so when the dense model cannot read this text: nothing learned from it would mean anything."""
    chance = math.log(run.dense.anatomy.vocabulary)
    if dense_cross_entropy > 0.9 * chance:
        found = f"{dense_cross_entropy:.2f} nats per token, chance is {chance:.2f}"
        log.warning("the dense model predicts this text near chance (%s): wrong tokenizer or text?", found)


# -- what is watched -------------------------------------------------------------------------------------------


def _check_finite(run: Run, values: dict[str, float]) -> None:
    """Stop before the update when anything is NaN or inf, and name the first tensor that is."""
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


def _note(run: Run, values: dict[str, float], watch: Callable[[Record], None] | None) -> None:
    """Make a log record when one is due: append it, and show it to whoever watches."""
    due = run.step % run.recipe.log_every == 0 or run.step == 1 or run.progress() >= 1
    if not due:
        return
    record = {
        "step": run.step,
        "tokens": run.tokens,
        "seconds": round(run.seconds, 3),
        "loss": values["objective"],
        "kl": values["kl"],
        "cross_entropy": values["cross_entropy"],
        "dense_cross_entropy": values["dense_cross_entropy"],
        "edges_per_query_per_head": values["edges"] if run.gated else None,
        "expected_edges": values["expected"] if run.gated else None,
        "multiplier": run.multiplier.price if run.gated else None,
        "margin": run.recipe.kl_margin,
        "gradient_norm": values["gradient_norm"],
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        "tokens_per_second": round(run.tokens / max(run.seconds, 1e-9)),
        "progress": run.progress(),
    }
    run.records.append(record)
    if run.folder is not None:
        with open(run.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    if watch is not None:
        watch(record)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them, so that the step in flight can end."""
    arrived: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield arrived
        return
    before = {
        number: signal.signal(number, lambda n, _: arrived.append(n)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupted(run: Run, number: int) -> Interrupted:
    kept = f"stopped after step {run.step}, " + (f"saved in {run.folder}" if run.folder else "nothing saved: no folder")
    return Interrupted(signal.Signals(number).name, kept, "the same command again: it resumes", code=128 + number)
