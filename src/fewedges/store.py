"""Save folders atomically, load them verified: safetensors files and one manifest.json.

A folder is what its manifest says. Files are written first, under names that hold their sha256; then the manifest
replaces the old one in a single rename. A process killed at any moment leaves the folder at the old or the new
state. On load every byte is checked against the manifest, and the manifest against its own checksum: a damaged,
truncated, renamed, foreign or newer folder raises StoreError and nothing else. No pickle is read or written.
"""

import datetime
import hashlib
import json
import os
import platform
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewedges.errors import StoreError

FORMAT, VERSION = "fewedges", 1
MANIFEST = "manifest.json"
STORED_NAME = re.compile(r"[A-Za-z0-9_]+-[0-9a-f]{12}\.safetensors")
LEFT_BEHIND = re.compile(r"\.([A-Za-z0-9_]+-[0-9a-f]{12}\.safetensors|manifest\.json)\.[0-9]+")
"""What a process killed in the middle of a save leaves: the next save removes it."""

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Stored:
    """A verified folder: its facts, and its files' tensors by stem."""

    kind: str
    facts: dict[str, Any]
    tensors: dict[str, Tensors]


def save(folder: Path | str, kind: str, tensors: dict[str, Tensors], facts: dict[str, Any]) -> None:
    """Write `tensors` (file stem -> names -> tensors) and `facts` (plain data) as a folder of this kind."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = dict(_write_tensors(folder, stem, named) for stem, named in tensors.items())
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "kind": kind,
            "created": _now(),
            "files": files,
            "facts": facts,
        }
        manifest["checksum"] = _checksum(manifest)
        _replace(folder / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False).encode())
    except (OSError, ValueError) as error:
        raise StoreError(f"save {folder}", str(error), "a folder that can be written, with room on its disk") from error
    for stale in folder.iterdir():
        old = STORED_NAME.fullmatch(stale.name) and stale.name not in files
        if old or LEFT_BEHIND.fullmatch(stale.name):
            stale.unlink(missing_ok=True)


def load(folder: Path | str, kind: str | None = None) -> Stored:
    """Read a folder and verify every byte of it. `kind` is what it must hold; None: anything."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    if kind is not None and manifest["kind"] != kind:
        raise _damaged(
            folder,
            f"it holds {manifest['kind']!r}, not {kind!r}",
            "the folder that `fewedges` wrote for this",
        )
    tensors = {name.rpartition("-")[0]: _read_tensors(folder, name, facts) for name, facts in manifest["files"].items()}
    return Stored(manifest["kind"], manifest["facts"], tensors)


def is_stored(folder: Path | str) -> bool:
    """Whether the folder claims to be one of ours (its manifest may still prove damaged)."""
    return (Path(folder) / MANIFEST).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, checked for format, version, checksum and safe file names."""
    try:
        raw = (folder / MANIFEST).read_bytes()
        manifest = json.loads(raw, parse_constant=_no_constant)
        checksum = _checksum(manifest) if isinstance(manifest, dict) else ""
    except FileNotFoundError as error:
        raise _damaged(folder, f"no {MANIFEST}", "the folder given as --out") from error
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(folder, f"{MANIFEST} cannot be read ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise _damaged(folder, f"{MANIFEST} was not written by fewedges")
    if manifest.get("version") != VERSION:
        found = f"format version {manifest.get('version')!r}, this package reads {VERSION}"
        raise _damaged(folder, found, "a newer fewedges: pip install -U fewedges")
    if manifest.get("checksum") != checksum:
        raise _damaged(folder, f"{MANIFEST} was changed after it was written")
    _check_shape(folder, manifest)
    return manifest


def _check_shape(folder: Path, manifest: dict[str, Any]) -> None:
    """A checksum proves that nothing changed, not that the writer was honest."""
    kinds = {"kind": str, "facts": dict, "files": dict}
    if wrong := next((name for name, kind in kinds.items() if not isinstance(manifest.get(name), kind)), None):
        raise _damaged(folder, f"{MANIFEST} has no proper {wrong!r}")
    for name, facts in manifest["files"].items():
        if not STORED_NAME.fullmatch(name):
            raise _damaged(folder, f"unsafe file name {name!r}")
        if not isinstance(facts, dict) or {"sha256", "bytes"} - set(facts):
            raise _damaged(folder, f"{MANIFEST} has no checksum for {name}")


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no number of json")


def versions() -> dict[str, str]:
    """What a result was made with."""
    packages = ("fewedges", "torch", "transformers", "safetensors", "accelerate", "peft", "triton", "numpy")
    return {"python": platform.python_version(), **{name: v for name in packages if (v := _version(name))}}


def sha256_of(path: Path | str) -> str:
    """sha256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """Where fetched models and token files are kept: $FEWEDGES_CACHE or ~/.cache/fewedges."""
    return Path(os.environ.get("FEWEDGES_CACHE", Path.home() / ".cache" / "fewedges"))


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    _replace(path, text.encode())


def _write_tensors(folder: Path, stem: str, named: Tensors) -> tuple[str, dict[str, Any]]:
    from safetensors.torch import save as to_bytes

    data = to_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in named.items()})
    digest = hashlib.sha256(data).hexdigest()
    name = f"{stem}-{digest[:12]}.safetensors"
    _replace(folder / name, data)
    return name, {"sha256": digest, "bytes": len(data)}


def _read_tensors(folder: Path, name: str, facts: dict[str, Any]) -> Tensors:
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise _damaged(folder, f"{name} cannot be read ({error.strerror})") from error
    if len(data) != facts["bytes"] or hashlib.sha256(data).hexdigest() != facts["sha256"]:
        raise _damaged(folder, f"{name} is not the file that was saved ({len(data)} of {facts['bytes']} bytes)")
    try:
        return from_bytes(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise _damaged(folder, f"{name} is no safetensors file ({error})") from error


def _replace(path: Path, data: bytes) -> None:
    """Write beside, flush to disk, rename over: never a half-written file under the final name."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    with open(fresh, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def _checksum(manifest: dict[str, Any]) -> str:
    rest = {name: value for name, value in manifest.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _damaged(folder: Path, found: str, hint: str = "a fresh copy, or train again") -> StoreError:
    return StoreError(f"load {folder}", found, hint)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def device_name(device: str | torch.device) -> str:
    """The device a number was measured on, in words."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
