"""What a run of `hardware` shares over all its rounds, checked: device, type, sizes, densities, ways.

Shapes are written inputs x outputs, as 1024x4096; M is the number of input vectors.
"""

import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewedges import store
from fewedges.errors import RecipeError
from fewedges.measure.clock import FLUSH_MIB, WARM_UPS
from fewedges.measure.ways import WAYS, Way
from fewedges.model.loading import Loaded
from fewedges.sparsify.matrices import matrices_of

SHAPES = ("1024x4096", "4096x1024")
"""Inputs x outputs: the MLP of a GPT-2 medium."""
DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
ROWS = {"cpu": 256, "cuda": 8192}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WAY_SECONDS = 2.0
"""What the warm-ups and repeats of a way may cost in a round: a slow one has fewer repeats, though never fewer than 5.
Before them come its check and the choice among its calls, of a slow one (100 ms) 7 calls at most, else 13."""
QUICK: dict[str, Any] = {"shapes": ("1024x4096",), "densities": (0.01, 0.1, 0.25), "repeats": 10}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every round of a run shares."""

    device: torch.device
    dtype: torch.dtype
    rows: int
    densities: tuple[float, ...]
    repeats: int
    seed: int
    clock: str
    ways: Mapping[str, Way]

    def rounds(self) -> dict[float, list[str]]:
        """By density the ways to run beside dense; a way with one density of its own joins there.

        Without any way: one round, of dense alone.
        """
        found: dict[float, list[str]] = {density: [] for density in self.densities}
        for name, way in self.ways.items():
            for density in self.densities if way.density is None else (way.density,):
                found.setdefault(density, []).append(name)
        return {density: found[density] for density in sorted(found) if found[density]} or {1.0: []}

    def facts(self) -> dict[str, Any]:
        """What is known of a run before it starts, as plain data: machine, sizes, protocol, versions."""
        known = {"M": self.rows, "dtype": str(self.dtype).removeprefix("torch.")}
        known |= {"device": store.device_name(self.device), "itemsize": self.dtype.itemsize}
        known |= {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
        known |= {"densities": list(self.densities), "ways": list(self.ways), "repeats": self.repeats}
        known |= {"way_seconds": WAY_SECONDS, "warm_ups": WARM_UPS, "flush_mib": FLUSH_MIB[self.device.type]}
        known |= {"seed": self.seed, "clock": self.clock, "pass": "forward", "cold_cache": True}
        return {**known, "versions": store.versions()}


def parse_shape(text: str) -> tuple[int, int]:
    """Inputs and outputs of "1024x4096"."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise RecipeError(f"shape {text!r}", "not two sizes", "inputs x outputs, as 1024x4096")
    return int(parts[0]), int(parts[1])


def counts_of(model: str | Loaded) -> tuple[str, Counter[str]]:
    """Name of a model, and how many matrices of each shape its blocks have."""
    if not isinstance(model, Loaded):
        from fewedges.model.loading import load

        model = load(model, probes=False)
    shapes = (matrix.shape for matrix in matrices_of(model).values())
    return model.name, Counter(f"{columns}x{rows}" for rows, columns in shapes)


def resolve(
    *,
    device: str,
    dtype: str | None,
    densities: Sequence[float] | None,
    rows: int | None,
    ways: Sequence[str] | None,
    repeats: int | None,
    quick: bool,
    seed: int,
    clock: str,
) -> Setting:
    """Fill in what was not given, and check all of it. RecipeError names what cannot be."""
    where = _device(device)
    kind = dtype or ("float32" if where.type == "cpu" else "bfloat16")
    if kind not in DTYPES:
        raise RecipeError(f"dtype {kind!r}", "not one that is timed", ", ".join(DTYPES))
    chosen = default("densities", DENSITIES, quick) if densities is None else tuple(sorted(set(densities)))
    if not chosen or not all(0 < density < 1 for density in chosen):
        raise RecipeError(f"densities {chosen}", "a density is between 0 and 1", "0.01 0.1 0.5; dense is always timed")
    runs = default("repeats", 30, quick) if repeats is None else repeats
    count = ROWS[where.type] if rows is None else rows
    if runs < 3 or count < 1:
        raise RecipeError(
            f"{runs} repeats of {count} rows", "too few to time", "at least 3 repeats (30 by default) of 1 row or more"
        )
    wanted = [name for name in WAYS if name != "dense"] if ways is None else list(ways)
    if unknown := [name for name in wanted if name not in WAYS or name == "dense"]:
        found = "dense is always timed" if unknown == ["dense"] else f"no way {', '.join(unknown)}"
        raise RecipeError(f"ways {wanted}", found, ", ".join(name for name in WAYS if name != "dense"))
    fits = {"wall": True, "thread": where.type == "cpu" and torch.get_num_threads() == 1, "graph": where.type == "cuda"}
    if not fits.get(clock):
        found = f"{where.type} with {torch.get_num_threads()} threads"
        hint = "wall; thread, on cpu with OMP_NUM_THREADS=1; graph, on cuda"
        raise RecipeError(f"clock {clock!r}", found, hint)
    known = {name: WAYS[name] for name in wanted}
    shared: dict[str, Any] = {"rows": count, "densities": chosen, "repeats": runs, "seed": seed, "clock": clock}
    return Setting(device=where, dtype=DTYPES[kind], ways=known, **shared)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"device {name!r}", "torch knows no such device", "cpu or cuda") from error
    if device.type not in ROWS or (device.type == "cuda" and not torch.cuda.is_available()):
        found = "no GPU that torch sees" if device.type == "cuda" else "only cpu and cuda are timed"
        raise RecipeError(f"device {name!r}", found, "--device cpu")
    return device


def _processor() -> str:
    """The CPU's name, where Linux says it; a GPU is named by `device`."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def default(name: str, value: Any, quick: bool) -> Any:
    """What stands for a setting that was not given."""
    return QUICK[name] if quick else value
