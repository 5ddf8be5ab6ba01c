"""Time a linear layer on this device, dense and by every way of keeping a part of its weights: `hardware`.

A round is one shape at one density: all ways and dense run interleaved, so that whatever else the machine does meets
them alike, and a speed-up is a ratio of medians of one round. A way that cannot be had is a row that says why.

Shapes: M input vectors, C inputs, R outputs.
"""

import os
import platform
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewedges import store
from fewedges.errors import RecipeError
from fewedges.measure.clock import FLUSH_MIB, WARM_UPS, Run, interleaved, peak_bytes, peaks
from fewedges.measure.hardware import Hardware, Row
from fewedges.measure.setting import SHAPES, Setting, counts_of, default, parse_shape, resolve
from fewedges.measure.ways import WAYS, Built, Call, Case, Way
from fewedges.model.loading import Loaded

WRONG = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""A relative error beyond this is a wrong result, not rounding (float32: tf32 gives 3e-4; bfloat16: 3e-3)."""
CHECKED_ROWS = 64
MIB = 2**20
Tell = Callable[[str], None]


def hardware(
    model: str | Loaded | None = None,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    shapes: Sequence[str] | None = None,
    densities: Sequence[float] | None = None,
    rows: int | None = None,
    ways: Sequence[str] | None = None,
    repeats: int | None = None,
    quick: bool = False,
    seed: int = 0,
    clock: str = "wall",
    watch: Tell | None = None,
) -> Hardware:
    """Time a linear layer by every way, and say at which density each starts to pay on this device.

    `shapes` are inputs x outputs ("1024x4096"); with a model its own matrices are timed. `rows` is M, the number of
    input vectors (default 256 on CPU, 8192 on a GPU); `dtype` float32, bfloat16 (default on a GPU) or float16.
    `quick` takes one shape, three densities and 10 repeats where these are not given. `clock` "thread" counts only
    CPU time of the one thread, for a machine that others use too. Raises RecipeError for what cannot be timed at all;
    a way that cannot be had is a row with its reason.
    """
    if model is not None and shapes is not None:
        raise RecipeError("hardware with a model and shapes", "a model has shapes of its own", "one of the two")
    given = default("shapes", SHAPES, quick) if shapes is None else shapes
    name, counts = (None, Counter(given)) if model is None else counts_of(model)
    sides = {shape: parse_shape(shape) for shape in counts}
    asked: dict[str, Any] = {"device": device, "dtype": dtype, "densities": densities, "rows": rows, "ways": ways}
    setting = resolve(**asked, repeats=repeats, quick=quick, seed=seed, clock=clock)
    started, load = time.time(), _load()
    found = peaks(setting.device, setting.dtype, quick, clock)
    timed = []
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # torch calls its sparse layouts a beta on first use
        for shape in sides:
            timed += time_shape(shape, sides[shape], setting, watch or (lambda _: None))
    again = peaks(setting.device, setting.dtype, quick, clock)
    best = {name: max(value, again[name]) for name, value in found.items()}
    facts = _facts(setting, best) | {"load": [load, _load()], "seconds": round(time.time() - started, 1)}
    facts |= {} if name is None else {"model": {"name": name, "counts": dict(counts)}}
    return Hardware(rows=[_rated(row, setting, best) for row in timed], facts=facts)


def time_shape(shape: str, sides: tuple[int, int], setting: Setting, tell: Tell) -> list[Row]:
    """All rows of one shape: dense first, with the times of all rounds together."""
    inputs, outputs = sides
    generator = torch.Generator().manual_seed(setting.seed)
    like: dict[str, Any] = {"device": setting.device, "dtype": setting.dtype}
    x = torch.randn(setting.rows, inputs, generator=generator).to(**like)
    weight = (torch.randn(outputs, inputs, generator=generator) * inputs**-0.5).to(**like)
    rows, dense_times = [], []
    for density, names in setting.rounds().items():
        found, times = time_round(Case(x, weight, density, setting.seed), names, setting)
        dense_times += times
        rows += [{"shape": shape, **row} for row in found]
        tell(f"{shape} density {density:g}: " + ", ".join(_told(row) for row in found))
    if not dense_times:
        dense_times = time_round(Case(x, weight, 1.0), [], setting)[1]
    order = list(setting.ways)
    rows.sort(key=lambda row: (order.index(row["what"]), row["asked"]))
    reference, _ = attempt(WAYS["dense"], Case(x, weight, 1.0), setting)
    reference = {"what": "dense", "shape": shape, **reference, **_spread(dense_times, "ms"), "asked": None}
    return [{**reference, "repeats": len(dense_times), "speedup": 1.0}, *rows]


def time_round(case: Case, names: Sequence[str], setting: Setting) -> tuple[list[Row], list[float]]:
    """Rows of these ways at one density, and the times of the dense layer that ran in between."""
    rows: dict[str, Row] = {}
    runs: dict[str, Run] = {"dense": WAYS["dense"].build(case).calls["F.linear(x, W)"]}
    for name in names:
        row, run = attempt(setting.ways[name], case, setting)
        rows[name] = {"what": name, "asked": case.density, **row}
        if run is not None:
            runs[name] = run
    if names and len(runs) == 1:
        return list(rows.values()), []
    times = interleaved(runs, setting.device, setting.repeats, seed=setting.seed, clock=setting.clock)
    for name in runs.keys() - {"dense"}:
        ratios = [a / b for a, b in zip(times["dense"], times[name], strict=True)]
        dense, ours = (statistics.median(times[which]) for which in ("dense", name))
        rows[name] |= _spread(times[name], "ms") | _spread(ratios, "speedup")
        rows[name] |= {"repeats": setting.repeats, "dense_ms_p50": dense, "speedup": dense / ours}
        del rows[name]["speedup_p50"]
    return list(rows.values()), times["dense"]


def attempt(way: Way, case: Case, setting: Setting) -> tuple[Row, Run | None]:
    """Build a way and check its result: what is known before it is timed, and its fastest call; or why not."""
    try:
        built = way.build(case)
        how, call = _fastest(built, case, setting)
        error = _error(built, call, case)
        if not error <= WRONG[setting.dtype]:  # NaN fails too
            raise ArithmeticError(f"its result is wrong: relative error {error:.1e}")
        held = built.stored + case.x.numel() * case.x.element_size() + peak_bytes(call, setting.device)
    except Exception as error:  # whatever a device, a torch build or a shape refuses
        return {"why": _reason(error)}, None
    facts = {"density": built.parameters / case.weight.numel(), "parameters": built.parameters}
    facts |= {} if built.pattern is None else {f"cover({b})": built.pattern.cover(b) for b in (16, 32, 64)}
    facts |= {"stored_mib": built.stored / MIB, "peak_mib": held / MIB, "error": error}
    return {**facts, "how": ", ".join(filter(None, (how, built.how)))}, call


def _fastest(built: Built, case: Case, setting: Setting) -> tuple[str, Call]:
    """The one of a way's calls that is fastest here; calls that fail are out while one is left."""
    works, first = {}, None
    for how, call in built.calls.items():
        try:
            _check_shape(call(), case)
            works[how] = call
        except Exception as error:
            first = first or error
    if not works:
        raise first or ValueError("it has no call")
    if len(works) == 1:
        return next(iter(works.items()))
    times = interleaved(works, setting.device, 3, warm_ups=1, clock=setting.clock)
    best = min(works, key=lambda how: min(times[how]))
    return best, works[best]


def _check_shape(y: Tensor, case: Case) -> None:
    wanted = (case.x.shape[0], case.weight.shape[0])
    if tuple(y.shape) != wanted or y.layout != torch.strided or not y.is_contiguous():
        raise ValueError(f"it gives {y.layout} of shape {tuple(y.shape)}, not {wanted}, contiguous")


def _error(built: Built, call: Call, case: Case) -> float:
    """Relative 2-norm against the product in float64, of rows spread over the batch; NaN if any entry is."""
    y, step = call(), max(1, len(case.x) // CHECKED_ROWS)
    exact = case.x[::step].double() @ built.exact().T
    found = y[::step].double()
    return float((found - exact).norm() / exact.norm()) if bool(y.isfinite().all()) else float("nan")


def _reason(error: Exception) -> str:
    """The first line of a message, without torch's advice."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= 160 else text[:157] + "..."


def _rated(row: Row, setting: Setting, best: Mapping[str, float]) -> Row:
    """Add what the device would need at least for the kept weights: arithmetic or bytes, whichever takes longer."""
    facts = {"dtype": _dtype_name(setting.dtype), "device": store.device_name(setting.device)}
    row = {**row, **facts, "torch": torch.__version__, "M": setting.rows}
    if "ms_p50" not in row:
        return row
    floor = floor_ms(parse_shape(row["shape"]), row["density"], setting.rows, setting.dtype.itemsize, best)
    row |= {"floor_ms": floor, "roofline": floor / row["ms_p50"]}
    return row | {"limit": row.get("dense_ms_p50", row["ms_p50"]) / floor}


def floor_ms(sides: tuple[int, int], density: float, rows: int, itemsize: int, best: Mapping[str, float]) -> float:
    """The roofline: 2 M C R d operations, and M C + M R + C R d numbers through memory, indices not counted."""
    inputs, outputs = sides
    kept = density * inputs * outputs
    moved = itemsize * (rows * (inputs + outputs) + kept)
    return 1e3 * max(2 * rows * kept / best["flops"], moved / best["bandwidth"])


def _facts(setting: Setting, best: Mapping[str, float]) -> dict[str, Any]:
    known = {"M": setting.rows, "dtype": _dtype_name(setting.dtype), "device": store.device_name(setting.device)}
    known |= {"itemsize": setting.dtype.itemsize, "processor": _processor(), "cores": os.cpu_count()}
    known |= {"threads": torch.get_num_threads(), "repeats": setting.repeats, "warm_ups": WARM_UPS}
    known |= {"flush_mib": FLUSH_MIB[setting.device.type], "seed": setting.seed, **best, "clock": setting.clock}
    return {**known, "pass": "forward", "cold_cache": True, "versions": store.versions()}


def _processor() -> str:
    """The CPU's name, where Linux says it; a GPU is named by `device`."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _load() -> float | None:
    """Processes that want a core, over the last minute: above the number of cores, times are of a busy machine."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _spread(values: Sequence[float], name: str) -> dict[str, float]:
    """The 20th, 50th and 80th percentile."""
    cuts = statistics.quantiles(values, n=10)
    return {f"{name}_p20": cuts[1], f"{name}_p50": cuts[4], f"{name}_p80": cuts[7]}


def _told(row: Row) -> str:
    return f"{row['what']} {row['speedup']:.2f}x" if "speedup" in row else f"{row['what']} -"
