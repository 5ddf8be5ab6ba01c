"""What a result explains and how: the run and its files, settings, call, versions, device, seed and date.

facts = facts_of(what, prompts, train, test, search, options, manifest_of(what, source, call))

A run is told from another by the checksum of its manifest and the sha256 of its files where its folder is known
(`source`), and by the sha256 of its weights in memory always. Files of before this existed have no `manifest`.
"""

import datetime
import hashlib
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import torch

from fewedges import store
from fewedges.explain.tasks.prompts import Prompts
from fewedges.measure.report import models_of
from fewedges.model.attention import refuse_patterns
from fewedges.model.loading import ASSETS, Loaded, fingerprint
from fewedges.recipes import CircuitSearch
from fewedges.sparsify.attention.result import SHIPPED, Sparse

GATES = ("gate_bias", "gate_query")


def manifest_of(what: Sparse | Loaded, source: Path | str | None, call: str) -> dict[str, Any]:
    """The models that are explained, by name and sha256, and the saved run they came from (None: only in memory)."""
    models = models_of(what)
    refuse_patterns("explain a model", *(loaded.model for loaded in models.values()))
    weights = {label: {"weights_sha256": fingerprint(loaded.model)} for label, loaded in models.items()}
    weights["dense"]["name"] = models["dense"].name
    if "sparse" in weights:
        weights["sparse"]["gates_sha256"] = _gates(models["sparse"].model)
    made = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    run = None if source is None else {"name": str(source), **_saved(source)}
    return {"run": run, "models": weights, "call": call, "created": made}


def facts_of(
    what: Any,
    prompts: Prompts,
    train: Prompts,
    test: Prompts,
    search: CircuitSearch,
    options: dict[str, Any],
    manifest: dict[str, Any],
) -> dict[str, Any]:
    """Settings, prompts, device, versions and manifest, as plain data."""
    device = store.device_name(next(models_of(what)["dense"].model.parameters()).device)
    halves = {"count": len(prompts), "prompts": prompts.describe(), "train": len(train), "test": len(test)}
    made = {"device": device, "versions": store.versions(), "manifest": manifest}
    return {**asdict(search), **halves, "options": plain(options), **made}


def plain(options: dict[str, Any]) -> dict[str, Any]:
    """Options as json can hold them."""
    known = str | int | float | bool | list | None
    return {name: value if isinstance(value, known) else str(value) for name, value in options.items()}


def call_of(task: str | Path, search: CircuitSearch, options: dict[str, Any], *, verb: str = "explain") -> str:
    """The call in Python, with the settings that are not defaults."""
    chosen = ", ".join(f"{name}={value!r}" for name, value in changed(search).items())
    others = "".join(f", {name}={value!r}" for name, value in options.items())
    return f"{verb}(..., {str(task)!r}, CircuitSearch({chosen}){others})"


def command_of(run: str, task: str, search: CircuitSearch, flags: list[str]) -> list[str]:
    """The words of the command line, with the settings that are not defaults; `flags` are the verb's own."""
    words = ["fewedges", "explain", run, "--task", task]
    for name, value in changed(search).items():
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words + flags


def changed(search: CircuitSearch) -> dict[str, Any]:
    """The settings that are not defaults."""
    defaults = {field.name: field.default for field in fields(search) if field.default is not MISSING}
    return {name: value for name, value in asdict(search).items() if value != defaults[name]}


def described(facts: dict[str, Any]) -> str:
    """One line: which run was explained; empty for results that do not say."""
    manifest = facts.get("manifest") or {}
    run, dense = manifest.get("run"), manifest.get("models", {}).get("dense", {})
    if run is None:
        return f"weights {dense['weights_sha256'][:12]}, {manifest['created']}" if dense else ""
    check = f" (manifest {run['checksum'][:12]})" if "checksum" in run else ""
    return f"run {run['name']}{check}, dense base {dense['name']}, {manifest['created']}"


def _saved(source: Path | str) -> dict[str, Any]:
    """The manifest of a saved run and of the control in it; nothing for a dense model."""
    folder = ASSETS / source if str(source) in SHIPPED else Path(source)
    if not store.is_stored(folder):
        return {}
    control = folder / "control"
    beside = {"control": _files(control)} if store.is_stored(control) else {}
    base = store.read_manifest(folder)["facts"].get("base", {})
    return {**_files(folder), "base": base, **beside}


def _files(folder: Path) -> dict[str, Any]:
    manifest = store.read_manifest(folder)
    files = {name: facts["sha256"] for name, facts in manifest["files"].items()}
    return {"kind": manifest["kind"], "created": manifest["created"], "checksum": manifest["checksum"], "files": files}


def _gates(model: Any) -> str:
    """sha256 over the gate parameters, which `fingerprint` leaves out."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.endswith(GATES):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
