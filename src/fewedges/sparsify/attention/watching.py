"""What is watched while a run trains: its log records, and signals that ask it to stop."""

import json
import logging
import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fewedges.errors import Interrupted

if TYPE_CHECKING:
    from fewedges.sparsify.attention.training import Run

log = logging.getLogger(__name__)

Record = dict[str, Any]


def note(run: "Run", values: dict[str, float], watch: Callable[[Record], None] | None) -> None:
    """Make a log record when one is due; the first process appends it, and shows it to whoever watches."""
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
    if run.gated and run.recipe.target_heads is not None:
        record |= {"open_heads": values["heads"], "head_multiplier": run.head_multiplier.price}
    run.records.append(record)
    if run.folder is not None and run.team.first:
        with open(run.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    if watch is not None and run.team.first:
        watch(record)


def warn_near_chance(run: "Run", dense_cross_entropy: float) -> None:
    """Say so when the dense model cannot read this text: nothing learned from it would mean anything."""
    chance = math.log(run.dense.anatomy.vocabulary)
    if dense_cross_entropy > 0.9 * chance and run.team.first:
        found = f"{dense_cross_entropy:.2f} nats per token, chance is {chance:.2f}"
        log.warning("the dense model predicts this text near chance (%s): wrong tokenizer or text?", found)


@contextmanager
def signals() -> Iterator[list[int]]:
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


def interrupted(run: "Run", number: int) -> Interrupted:
    """What a stopped run raises after its state was saved."""
    kept = f"stopped after step {run.step}, " + (f"saved in {run.folder}" if run.folder else "nothing saved: no folder")
    return Interrupted(signal.Signals(number).name, kept, "the same command again: it resumes", code=128 + number)
