"""Time a linear layer on this device, dense and by every way of keeping a part of its weights: `hardware`.

A round is one shape at one density: all ways and dense run interleaved, so that whatever else the machine does meets
them alike, and a speed-up is a ratio of medians of one round. A way that is very slow takes part in the first repeats
only, and is compared with dense in these. A way that cannot be had is a row that says why.

Shapes: M input vectors, C inputs, R outputs.
"""

import gc
import os
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewedges.errors import RecipeError
from fewedges.measure.clock import SLOW_MS, WARM_UPS, Run, interleaved, peak_bytes, peaks
from fewedges.measure.hardware import Hardware, Row
from fewedges.measure.setting import SHAPES, WAY_SECONDS, Setting, counts_of, default, parse_shape, resolve
from fewedges.measure.ways import WAYS, Built, Call, Case, Way
from fewedges.model.loading import Loaded
from fewedges.sparsify.launching import captured

WRONG = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""A relative error beyond this is a wrong result, not rounding (float32: tf32 gives 3e-4; bfloat16: 3e-3)."""
CHECKED_ROWS = 64
REPLAYED = ", replayed"
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
    out: Path | str | None = None,
    watch: Tell | None = None,
) -> Hardware:
    """Time a linear layer by every way, and say at which density each starts to pay on this device.

    `shapes` are inputs x outputs ("1024x4096"); with a model its own matrices are timed. `rows` is M, the number of
    input vectors (default 256 on CPU, 8192 on a GPU); `dtype` float32, bfloat16 (default on a GPU) or float16.
    `quick` takes one shape, three densities and 10 repeats where these are not given. `clock` "thread" counts only
    CPU time of the one thread, for a machine that others use too; "graph" replays calls as CUDA graphs, as compiled
    models do, so that what Python takes to launch them does not count. Into the folder `out` the table is written after
    every round, and a run that was stopped goes on there: rounds that it holds are not timed again. Raises RecipeError
    for what cannot be timed at all, or if `out` holds a run of other settings; a way that cannot be had is a row with
    its reason.
    """
    if model is not None and shapes is not None:
        raise RecipeError("hardware with a model and shapes", "a model has shapes of its own", "one of the two")
    given = default("shapes", SHAPES, quick) if shapes is None else shapes
    name, counts = (None, Counter(given)) if model is None else counts_of(model)
    sides = {shape: parse_shape(shape) for shape in counts}
    asked: dict[str, Any] = {"device": device, "dtype": dtype, "densities": densities, "rows": rows, "ways": ways}
    setting = resolve(**asked, repeats=repeats, quick=quick, seed=seed, clock=clock)
    facts = setting.facts() | {"shapes": list(sides), "quick": quick}
    facts |= {} if name is None else {"model": {"name": name, "counts": dict(counts)}}
    before, tell = None if out is None else Hardware.resume(out, facts), watch or (lambda _: None)
    if before is not None:
        tell(f"{out}: {before.unfinished or 'all rounds'} done before, not timed again")
        if not before.unfinished:
            return before
    sheet = Sheet(facts, len(sides) * len(setting.rounds()), out, before)
    sheet.write(peaks(setting.device, setting.dtype, quick, clock))
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # torch calls its sparse layouts a beta on first use
        for shape in sides:
            time_shape(shape, sides[shape], setting, sheet, tell)
    return sheet.write(peaks(setting.device, setting.dtype, quick, clock), finished=True)


class Sheet:
    """The table of a run as it grows, from where an earlier start of the run left it; written if it has a folder."""

    def __init__(self, facts: Mapping[str, Any], rounds: int, out: Path | str | None, before: Hardware | None):
        found = {"flops": 0.0, "bandwidth": 0.0, "starts": 0, "seconds": 0.0, "load": [_load()]}
        found |= {} if before is None else {name: before.facts[name] for name in found}
        self.facts = {**facts, **found, "starts": found["starts"] + 1}
        self.rounds, self.out, self.began = rounds, out, time.time() - found["seconds"]
        known = [] if before is None else before.facts["unfinished"]["rounds"]
        self.done: dict[tuple[str, float], list[float]] = {(r["shape"], r["density"]): r["dense_ms"] for r in known}
        self.rows: list[Row] = [] if before is None else before.rows

    def add(self, shape: str, density: float, rows: Sequence[Row], dense_ms: list[float]) -> None:
        """Take a round up: its rows, dense's own among them, and the times of the dense layer in it; write."""
        self.done[shape, density] = dense_ms
        kept = [row for row in self.rows if (row["shape"], row["what"]) != (shape, "dense")]
        fresh = [{"shape": shape, **row} for row in rows if row["what"] != "dense" or self.dense_ms(shape)]
        self.rows = kept + fresh
        self.write()

    def dense_ms(self, shape: str) -> list[float]:
        """The times of the dense layer in all rounds of a shape."""
        return [ms for (name, _), times in self.done.items() if name == shape for ms in times]

    def write(self, best: Mapping[str, float] | None = None, *, finished: bool = False) -> Hardware:
        """The table so far, each row rated by the best peaks that are known by now; saved if there is a folder."""
        self.facts |= {name: max(self.facts[name], value) for name, value in (best or {}).items()}
        self.facts |= {"load": [self.facts["load"][0], _load()], "seconds": round(time.time() - self.began, 1)}
        rounds = [{"shape": s, "density": d, "dense_ms": times} for (s, d), times in self.done.items()]
        facts = self.facts if finished else {**self.facts, "unfinished": {"of": self.rounds, "rounds": rounds}}
        rows = [self._joined(row) if row["what"] == "dense" else row for row in self.rows]
        shapes, ways = facts["shapes"], ["dense", *facts["ways"]]
        rows.sort(key=lambda row: (shapes.index(row["shape"]), ways.index(row["what"]), row["asked"] or 0.0))
        found = Hardware(rows=[_rated(row, facts) for row in rows], facts=facts)
        if self.out is not None:
            found.save(self.out)
        return found

    def _joined(self, row: Row) -> Row:
        """Dense's row, of the times of all rounds together."""
        times = self.dense_ms(row["shape"])
        return {**row, **_spread(times, "ms"), "repeats": len(times), "speedup": 1.0}


def time_shape(shape: str, sides: tuple[int, int], setting: Setting, sheet: Sheet, tell: Tell) -> None:
    """Time those rounds of one shape that the sheet has not got."""
    inputs, outputs = sides
    rounds = {density: names for density, names in setting.rounds().items() if (shape, density) not in sheet.done}
    if not rounds:
        return
    generator = torch.Generator().manual_seed(setting.seed)
    like: dict[str, Any] = {"device": setting.device, "dtype": setting.dtype}
    x = torch.randn(setting.rows, inputs, generator=generator).to(**like)
    weight = (torch.randn(outputs, inputs, generator=generator) * inputs**-0.5).to(**like)
    whole = Case(x, weight, 1.0)
    dense = {"what": "dense", "asked": None, **attempt(WAYS["dense"], whole, setting)[0]}
    for density, names in rounds.items():
        rows, times = time_round(Case(x, weight, density, setting.seed), names, setting)
        if density == max(rounds) and not times and not sheet.dense_ms(shape):
            times = time_round(whole, [], setting)[1]  # no way could be had at any density
        sheet.add(shape, density, [dense, *rows], times)
        if setting.clock == "graph":
            gc.collect()  # graphs of cycles not yet collected keep their memory: 73 GiB after 17 rounds on an H100
        tell(f"{shape} density {density:g}: " + (", ".join(_told(row) for row in rows) or "dense"))


def time_round(case: Case, names: Sequence[str], setting: Setting) -> tuple[list[Row], list[float]]:
    """Rows of these ways at one density, and the times of the dense layer that ran in between."""
    rows: dict[str, Row] = {}
    dense = WAYS["dense"].build(case).calls["F.linear(x, W)"]
    runs: dict[str, Run] = {"dense": replayed(dense) if setting.clock == "graph" else dense}
    for name in names:
        row, run = attempt(setting.ways[name], case, setting)
        rows[name] = {"what": name, "asked": case.density, **row}
        if run is not None:
            runs[name] = run
    if names and len(runs) == 1:
        return list(rows.values()), []
    bounded: dict[str, Any] = {"seconds": WAY_SECONDS, "always": ["dense"]}
    times = interleaved(runs, setting.device, setting.repeats, seed=setting.seed, clock=setting.clock, **bounded)
    for name in runs.keys() - {"dense"}:
        ours = times[name]
        dense = times["dense"][: len(ours)]  # the same repeats
        rows[name] |= _spread(ours, "ms") | _spread([a / b for a, b in zip(dense, ours, strict=True)], "speedup")
        rows[name] |= {"repeats": len(ours), "dense_ms_p50": statistics.median(dense)}
        rows[name]["speedup"] = rows[name]["dense_ms_p50"] / statistics.median(ours)
        del rows[name]["speedup_p50"]
    return list(rows.values()), times["dense"]


def attempt(way: Way, case: Case, setting: Setting) -> tuple[Row, Run | None]:
    """Build a way and check its result: what is known before it is timed, and its fastest call; or why not."""
    try:
        built = way.build(case)
        how, call = _fastest(built.calls, case, setting)
        error = _error(built, call, case)
        if not error <= WRONG[setting.dtype]:  # NaN fails too
            raise ArithmeticError(f"its result is wrong: relative error {error:.1e}")
        called = built.calls[how.removesuffix(REPLAYED)]
        held = built.stored + case.x.numel() * case.x.element_size() + peak_bytes(called, setting.device)
    except Exception as error:  # whatever a device, a torch build or a shape refuses
        return {"why": _reason(error)}, None
    facts = {"density": built.parameters / case.weight.numel(), "parameters": built.parameters}
    facts |= {} if built.pattern is None else {f"cover({b})": built.pattern.cover(b) for b in (16, 32, 64)}
    facts |= {"stored_mib": built.stored / MIB, "peak_mib": held / MIB, "error": error}
    return {**facts, "how": ", ".join(filter(None, (how, built.how)))}, call


def _fastest(calls: Mapping[str, Call], case: Case, setting: Setting) -> tuple[str, Call]:
    """The one of a way's calls that is fastest here; calls that fail are out while one is left, slow ones run once."""
    works, first = {}, None
    for how, call in calls.items():
        try:
            _check_shape(call(), case)
            works[how] = call
            if setting.clock == "graph":
                works[how + REPLAYED] = replayed(call)
                del works[how]
        except Exception as error:  # of a call that works and cannot be captured too: it is timed as it is
            first = first or error
    if not works:
        raise first or ValueError("it has no call")
    if len(works) == 1:
        return next(iter(works.items()))
    tried: dict[str, Any] = {"warm_ups": 0, "clock": setting.clock}  # each has just been made
    times = interleaved(works, setting.device, 1, **tried)
    quick = {how: call for how, call in works.items() if times[how][0] < SLOW_MS}
    if len(quick) > 1:
        times, works = interleaved(quick, setting.device, 3, **tried), quick
    best = min(works, key=lambda how: min(times[how]))
    return best, works[best]


def replayed(call: Call) -> Call:
    """The call's launches as one CUDA graph. It reads what the call reads, so it keeps the call."""
    for _ in range(WARM_UPS):
        call()
    graph, y = captured(call)

    def replay(_: Call = call) -> Tensor:
        graph.replay()
        return y

    return replay


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


def _rated(row: Row, facts: Mapping[str, Any]) -> Row:
    """Add what the device would need at least for the kept weights: arithmetic or bytes, whichever takes longer."""
    row = {**row, "dtype": facts["dtype"], "device": facts["device"], "torch": torch.__version__, "M": facts["M"]}
    if "ms_p50" not in row:
        return row
    best = {name: facts[name] for name in ("flops", "bandwidth")}
    floor = floor_ms(parse_shape(row["shape"]), row["density"], facts["M"], facts["itemsize"], best)
    row |= {"floor_ms": floor, "roofline": floor / row["ms_p50"]}
    return row | {"limit": row.get("dense_ms_p50", row["ms_p50"]) / floor}


def floor_ms(sides: tuple[int, int], density: float, rows: int, itemsize: int, best: Mapping[str, float]) -> float:
    """The roofline: 2 M C R d operations, and M C + M R + C R d numbers through memory, indices not counted."""
    inputs, outputs = sides
    kept = density * inputs * outputs
    moved = itemsize * (rows * (inputs + outputs) + kept)
    return 1e3 * max(2 * rows * kept / best["flops"], moved / best["bandwidth"])


def _load() -> float | None:
    """Processes that want a core, over the last minute: above the number of cores, times are of a busy machine."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _spread(values: Sequence[float], name: str) -> dict[str, float]:
    """The 20th, 50th and 80th percentile."""
    cuts = statistics.quantiles(values, n=10)
    return {f"{name}_p20": cuts[1], f"{name}_p50": cuts[4], f"{name}_p80": cuts[7]}


def _told(row: Row) -> str:
    return f"{row['what']} {row['speedup']:.2f}x" if "speedup" in row else f"{row['what']} -"
