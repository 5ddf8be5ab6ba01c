"""Checkpoints of a training run: what it takes to go on with the same bits.

Parameters that move, their Adam moments, the multiplier, the step. Data order and gate noise are functions of
(seed, step) and need no state.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fewedges import store
from fewedges.errors import StoreError, TrainingError
from fewedges.recipes import from_dict, to_dict
from fewedges.sparsify.attention.constraint import Multiplier
from fewedges.sparsify.attention.student import trained

if TYPE_CHECKING:
    from fewedges.sparsify.attention.training import Run

MAY_CHANGE = (
    *("steps", "tokens", "minutes", "kl_margin", "loss_margin", "target_edges", "target_heads"),
    *("head_multiplier_start", "log_every", "checkpoint_every", "micro_batch", "graph", "saved"),
)
"""Recipe fields that may differ when a run is resumed; the log keeps the margin of every record."""


def save_checkpoint(run: "Run") -> None:
    """Write the state of a run to its folder, if it has one; never one with NaN or inf in it."""
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
        "start": run.start,
        "step": run.step,
        "seconds": run.seconds,
        "micro_batch": run.micro_batch,
        "multiplier": run.multiplier.state(),
        "head_multiplier": run.head_multiplier.state(),
        "versions": store.versions(),
    }
    tensors = {"parameters": {name: p.detach() for name, p in parameters.items()}, "moments": moments}
    store.save(run.folder / "checkpoint", "checkpoint", tensors, facts)


def load_checkpoint(run: "Run", folder: Path) -> None:
    """Put a run back where it stopped; a folder of another run is an error."""
    saved = store.load(folder, "checkpoint")
    _check_same_run(run, folder, saved.facts)
    parameters = trained(run.student)
    if set(parameters) != set(saved.tensors["parameters"]):
        raise StoreError(
            f"resume {folder}", "it holds other parameters than this recipe trains", "another --out folder"
        )
    fused = run.optimizer.param_groups[0].get("fused")  # counts its steps on the GPU
    with torch.no_grad():
        for name, parameter in parameters.items():
            where = parameter.device if fused else "cpu"
            parameter.copy_(saved.tensors["parameters"][name])
            moments = {key: saved.tensors["moments"][f"{name}.{key}"] for key in ("exp_avg", "exp_avg_sq", "step")}
            on = {key: x.to(where if key == "step" else parameter.device) for key, x in moments.items()}
            run.optimizer.state[parameter] = on
    run.step, run.seconds = saved.facts["step"], saved.facts["seconds"]
    run.micro_batch = min(run.micro_batch, saved.facts["micro_batch"])
    run.multiplier = Multiplier(**saved.facts["multiplier"])
    heads = Multiplier(**saved.facts.get("head_multiplier", run.head_multiplier.state()))
    run.head_multiplier = run.head_multiplier if heads.mean is None else heads  # its start counts until it has moved


def _check_same_run(run: "Run", folder: Path, facts: dict[str, Any]) -> None:
    mine = {"base": run.dense.name, "gated": run.gated, "start": run.start, "data": run.data.describe()}
    now = {**mine, **to_dict(run.recipe)}
    then = {**{name: facts[name] for name in mine}, **to_dict(from_dict(facts["recipe"]))}
    for name in now:
        if name not in MAY_CHANGE and json.dumps(now[name]) != json.dumps(then.get(name)):
            found = f"it was started with {name}={then.get(name)!r}, now {now[name]!r}"
            raise StoreError(f"resume {folder}", found, "the same settings, or another --out folder")


def read_log(run: "Run") -> list[dict[str, Any]]:
    """Records up to the checkpoint; later ones (lost steps) are cut from the file."""
    path = run.folder / "log.jsonl" if run.folder else None
    if path is None or not path.exists():
        return []
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    records = [record for line in lines if (record := json.loads(line))["step"] <= run.step]
    store.write_text(path, "".join(json.dumps(record) + "\n" for record in records))
    return records
