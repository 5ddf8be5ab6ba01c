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
from jaxtyping import Float
from torch import Tensor

from fewedges import store
from fewedges.data.batch import Batch, Batches
from fewedges.errors import Interrupted, StoreError, TrainingError
from fewedges.model.loading import Loaded
from fewedges.recipes import SparseAttention, to_dict
from fewedges.sparsify.attention.constraint import Multiplier
from fewedges.sparsify.attention.interface import GatePass
from fewedges.sparsify.attention.student import at_precision, make_student, trained
from fewedges.sparsify.distilling import Losses, losses

log = logging.getLogger(__name__)

Record = dict[str, Any]
BUDGET = ("steps", "tokens", "minutes", "log_every", "checkpoint_every", "micro_batch")
"""Recipe fields that may change when a run is resumed."""


@dataclass(kw_only=True)
class Run:
    """A run in flight: what a checkpoint holds, and what it is made of."""

    recipe: SparseAttention
    dense: Loaded
    student: Any
    data: Batches
    optimizer: torch.optim.Optimizer
    accelerator: Any
    multiplier: Multiplier
    folder: Path | None = None
    gated: bool = True
    step: int = 0
    seconds: float = 0.0
    micro_batch: int = 0
    records: list[Record] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens read so far."""
        return self.step * self.recipe.tokens_per_step

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
    pause_minutes: float | None = None,
    watch: Callable[[Record], None] | None = None,
) -> Trained:
    """Train a sparse copy of `dense` (or, with `control`, a copy without gates on the same data and steps).

    `folder` keeps checkpoints and log.jsonl; a run found there is resumed. `pause_minutes` ends this piece of work
    early. Raises Interrupted after SIGINT or SIGTERM (state saved), TrainingError on NaN, inf or lack of memory.
    """
    run = _start(dense, recipe, data, folder, gated=not control)
    began, piece = time.monotonic() - run.seconds, time.monotonic()
    with _signals() as arrived:
        while run.progress() < 1:
            record = _step(run)
            run.seconds = time.monotonic() - began
            _note(run, record, watch)
            paused = pause_minutes is not None and time.monotonic() - piece > 60 * pause_minutes
            if arrived or paused or run.step % recipe.checkpoint_every == 0 or run.progress() >= 1:
                _save_checkpoint(run)
            if arrived:
                raise _interrupted(run, arrived[0])
            if paused:
                break
    return Trained(model=run.student, records=run.records, finished=run.progress() >= 1)


def _start(dense: Loaded, recipe: SparseAttention, data: Batches, folder: Path | None, *, gated: bool) -> Run:
    from accelerate import Accelerator

    dense = at_precision(dense, recipe)
    accelerator = Accelerator(device_placement=False)  # one shared state a process: nothing of this run goes in
    student = make_student(dense, recipe, gates=gated)
    run = Run(
        recipe=recipe,
        dense=dense,
        student=student,
        data=data,
        optimizer=accelerator.prepare(_optimizer(student, recipe)),
        accelerator=accelerator,
        multiplier=Multiplier(recipe.multiplier_start),
        folder=folder,
        gated=gated,
        micro_batch=recipe.micro_batch or recipe.batch_size,
    )
    if folder is not None and store.is_stored(folder / "checkpoint"):
        _load_checkpoint(run, folder / "checkpoint")
    return run


# -- one step --------------------------------------------------------------------------------------------------


def _step(run: Run) -> Record:
    """One optimiser step: accumulate, check, clip, update, move the price."""
    _set_learning_rates(run)
    batch = run.data.at(run.step, run.recipe.batch_size)
    sums = _accumulate_within_memory(run, batch)
    norm = run.accelerator.clip_grad_norm_(trained(run.student).values(), run.recipe.clip)
    values = dict(zip((*sums, "gradient_norm"), torch.stack([*sums.values(), norm.detach()]).tolist(), strict=True))
    _check_finite(run, values)
    run.optimizer.step()
    if run.gated:
        run.multiplier.update_(run.recipe, values["kl"], values["cross_entropy"] - values["dense_cross_entropy"])
    run.step += 1
    return values


def _accumulate_within_memory(run: Run, batch: Batch) -> dict[str, Tensor]:
    """Accumulate gradients; when memory runs out, halve the micro-batch and keep the batch."""
    while True:
        try:
            run.optimizer.zero_grad(set_to_none=True)
            return _accumulate(run, batch)
        except torch.OutOfMemoryError as error:
            need = f"one window of {run.recipe.context_length} tokens does not fit in memory"
            if run.micro_batch == 1:
                raise TrainingError(f"step {run.step}", need, "a smaller context_length, train=lora, bf16") from error
            run.micro_batch = max(size for size in range(1, run.micro_batch) if run.recipe.batch_size % size == 0)
            log.warning(
                "out of memory: micro_batch is now %d, batch_size stays %d",
                run.micro_batch,
                run.recipe.batch_size,
            )
        torch.cuda.empty_cache()


def _accumulate(run: Run, batch: Batch) -> dict[str, Tensor]:
    device = next(run.student.parameters()).device
    total = int(batch.counts[:, 1:].sum())
    names = ("objective", "kl", "cross_entropy", "dense_cross_entropy", "edges", "expected")
    sums = torch.zeros(len(names), device=device)
    for part, start in enumerate(range(0, len(batch.tokens), run.micro_batch)):
        rows = slice(start, start + run.micro_batch)
        piece = Batch(
            batch.tokens[rows].to(device, non_blocking=True), batch.counts[rows].to(device, non_blocking=True)
        )
        share = len(piece.tokens) / len(batch.tokens)
        compared, gates = _forward(run, piece, part, total)
        priced = run.multiplier.price * share * priced_edges(gates.expected_edges(), run.recipe) if run.gated else 0.0
        run.accelerator.backward(compared.objective + priced)
        edges = (gates.open_edges().mean(), gates.expected_edges().detach().mean()) if run.gated else (sums[0] * 0,) * 2
        now = (compared.objective.detach(), compared.kl, compared.cross_entropy, compared.dense_cross_entropy)
        sums += torch.stack([*now, *(share * x for x in edges)]).float()
    return dict(zip(names, sums.unbind(), strict=True))


def _forward(run: Run, piece: Batch, part: int, total: int) -> tuple[Losses, GatePass]:
    """Both models on one micro-batch."""
    recipe = run.recipe
    gates = GatePass(
        sample=recipe.sampling == "logistic",
        straight_through=True,
        seed=noise_seed(recipe.seed, run.step, part),
        offset=annealed(recipe, run.step),
        kernel=recipe.kernel,
    )
    options = {"gate_pass": gates} if run.gated else {}
    with torch.autocast(piece.tokens.device.type, dtype=torch.bfloat16, enabled=recipe.precision == "bf16"):
        with torch.no_grad():
            dense = run.dense.model(input_ids=piece.tokens, use_cache=False).logits
        student = run.student(input_ids=piece.tokens, use_cache=False, **options).logits
    weights = {"kl_weight": recipe.kl_weight, "loss_weight": recipe.loss_weight}
    fused = recipe.kernel == "triton" and piece.tokens.is_cuda
    return losses(student, dense, piece.tokens, piece.counts, total=total, fused=fused, **weights), gates


def priced_edges(expected: Float[Tensor, "L B H Q"], recipe: SparseAttention) -> Float[Tensor, ""]:
    """The regulariser: expected edges per query per head, weighted by layer and head, meaned over all of them."""
    layers = expected.new_tensor(recipe.layer_weights or (1.0,) * expected.shape[0])
    heads = expected.new_tensor(recipe.head_weights or (1.0,) * expected.shape[2])
    return (expected.mean(dim=(1, 3)) * layers[:, None] * heads).mean()


def annealed(recipe: SparseAttention, step: int) -> float:
    """The extra gate bias of this step."""
    return recipe.anneal_from * max(0.0, 1 - step / recipe.anneal_steps) if recipe.anneal_steps else 0.0


def noise_seed(seed: int, step: int, part: int) -> int:
    """The key of a micro-batch's gate noise, 32 bits."""
    return (seed * 1_000_003 + step * 8_191 + part * 524_287) % 2**32


def learning_rate_factor(recipe: SparseAttention, step: int, progress: float) -> float:
    """Linear warm-up, constant, linear fall to 0 over the last `decay_fraction` of the budget."""
    rise = min(1.0, (step + 1) / max(1, recipe.warmup_steps))
    fall = (1 - progress) / recipe.decay_fraction if recipe.decay_fraction else 1.0
    return max(0.0, min(rise, fall, 1.0))


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
        run.folder.mkdir(parents=True, exist_ok=True)
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


# -- checkpoints -----------------------------------------------------------------------------------------------


def _save_checkpoint(run: Run) -> None:
    if run.folder is None:
        return
    parameters = trained(run.student)
    bad = next((name for name, p in parameters.items() if not bool(torch.isfinite(p).all())), None)
    if bad is not None:
        raise TrainingError(
            f"step {run.step}", f"{bad} is not finite; the last checkpoint is kept", "a smaller learning_rate"
        )
    moments = {
        f"{name}.{key}": run.optimizer.state[parameter][key]
        for name, parameter in parameters.items()
        for key in ("exp_avg", "exp_avg_sq", "step")
    }
    facts = {
        "recipe": to_dict(run.recipe),
        "data": run.data.describe(),
        "base": run.dense.name,
        "gated": run.gated,
        "step": run.step,
        "seconds": run.seconds,
        "micro_batch": run.micro_batch,
        "multiplier": run.multiplier.state(),
        "versions": store.versions(),
    }
    tensors = {"parameters": {name: p.detach() for name, p in parameters.items()}, "moments": moments}
    store.save(run.folder / "checkpoint", "checkpoint", tensors, facts)


def _load_checkpoint(run: Run, folder: Path) -> None:
    """Put a run back where it stopped; a folder of another run is an error."""
    saved = store.load(folder, "checkpoint")
    _check_same_run(run, folder, saved.facts)
    parameters = trained(run.student)
    if set(parameters) != set(saved.tensors["parameters"]):
        raise StoreError(
            f"resume {folder}", "it holds other parameters than this recipe trains", "another --out folder"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved.tensors["parameters"][name])
            moments = {key: saved.tensors["moments"][f"{name}.{key}"] for key in ("exp_avg", "exp_avg_sq", "step")}
            on = {key: x if key == "step" else x.to(parameter.device) for key, x in moments.items()}
            run.optimizer.state[parameter] = on
    run.step, run.seconds = saved.facts["step"], saved.facts["seconds"]
    run.micro_batch = min(run.micro_batch, saved.facts["micro_batch"])
    run.multiplier = Multiplier(**saved.facts["multiplier"])
    run.records = _read_log(run)


def _check_same_run(run: Run, folder: Path, facts: dict[str, Any]) -> None:
    now = {"base": run.dense.name, "gated": run.gated, "data": run.data.describe(), **to_dict(run.recipe)}
    then = {"base": facts["base"], "gated": facts["gated"], "data": facts["data"], **facts["recipe"]}
    for name in now:
        if name not in BUDGET and json.dumps(now[name]) != json.dumps(then.get(name)):
            found = f"it was started with {name}={then.get(name)!r}, now {now[name]!r}"
            raise StoreError(f"resume {folder}", found, "the same settings, or another --out folder")


def _read_log(run: Run) -> list[Record]:
    """Records up to the checkpoint; later ones (lost steps) are cut from the file."""
    path = run.folder / "log.jsonl" if run.folder else None
    if path is None or not path.exists():
        return []
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    records = [record for line in lines if (record := json.loads(line))["step"] <= run.step]
    store.write_text(path, "".join(json.dumps(record) + "\n" for record in records))
    return records
