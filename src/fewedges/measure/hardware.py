"""What sparsity pays on one device: a row for every way, shape and density, where each starts to pay, and advice.

Shapes are written inputs x outputs, as 1024x4096; M is the number of input vectors.
"""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewedges import store
from fewedges.errors import DataError, RecipeError, StoreError
from fewedges.measure.paying import Point, Range, points, ranges, said, together

COLUMNS = {
    "what": ("way", "{}"),
    "density": ("density", "{:.4f}"),
    "cover(32)": ("cover(32)", "{:.3f}"),
    "ms_p50": ("ms", "{:.4g}"),
    "spread": ("p20-p80", "{}"),
    "speedup": ("speed-up", "{:.2f}"),
    "roofline": ("roofline", "{:.1%}"),
    "error": ("error", "{:.0e}"),
    "peak_mib": ("peak MiB", "{:.1f}"),
}
FIELDS = [
    *("what shape dtype device torch ms_p20 ms_p50 ms_p80 peak_mib M asked density".split()),
    *("cover(16) cover(32) cover(64) parameters stored_mib dense_ms_p50 speedup speedup_p20 speedup_p80".split()),
    *("floor_ms limit roofline error repeats how why".split()),
]
"""Columns of the CSV; a cell that does not apply is empty."""
JSON, CSV = "hardware.json", "hardware.csv"
MEASURED = {"load", "seconds", "starts", "flops", "bandwidth", "unfinished"}
"""Facts that come of a run; all others are known before it, and agree where a run goes on."""
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Times of a linear layer, by way, shape and density, on one device."""

    rows: list[Row]
    """By name as in FIELDS. A way that cannot be had has `why` and no times."""
    facts: dict[str, Any] = field(default_factory=dict)
    """M, dtype, device, processor, threads, load, flops and bandwidth (measured), repeats, seed, clock, versions; of a
    model its name and `counts`, matrices by shape. `starts`: how often the run was started until it was finished.
    While it is not, `unfinished` holds `of`, the number of rounds, and `rounds`, those done: shape, density and the
    milliseconds of the dense layer in each (`dense_ms`), of which dense's row is made."""

    @property
    def unfinished(self) -> str:
        """How many of its rounds (a shape at a density) were timed, in words; empty if the run is finished."""
        if "unfinished" not in self.facts:
            return ""
        known = self.facts["unfinished"]
        return f"{len(known['rounds'])} of {known['of']} rounds"

    def shapes(self) -> list[str]:
        """The shapes, in the order they were timed."""
        return list(dict.fromkeys(row["shape"] for row in self.rows))

    def ways(self) -> list[str]:
        """The ways, in the order of the registry; those that cannot be had too."""
        return list(dict.fromkeys(row["what"] for row in self.rows))

    def timed(self, shape: str, what: str) -> list[Row]:
        """The rows that have times, from sparse to dense."""
        found = [row for row in self.rows if (row["shape"], row["what"]) == (shape, what) and not row.get("why")]
        return sorted(found, key=lambda row: row["density"])

    def break_even(self) -> dict[str, dict[str, list[Range]]]:
        """By shape and way: the ranges of density in which it is faster than dense; none if it never is.

        Straight between the measured points on log axes. An end that is None lies beyond the densities timed.
        """
        ways = [what for what in self.ways() if what != "dense"]
        return {shape: {what: ranges(points(self.timed(shape, what))) for what in ways} for shape in self.shapes()}

    def whole(self) -> dict[str, Any] | None:
        """The model's matrices together, each shape as often as the model has it; None without a model, or unfinished.

        `ways` holds by way its points (density asked for, density and speed-up of all together), the ranges in which
        it makes the model faster, and those in words (`pays`); `missing` the ways that some of its shapes cannot
        have; `take` the way that pays up to the highest density, and so asks for the fewest zeros; None if none does.
        """
        if "model" not in self.facts or self.unfinished:
            return None
        name, counts = self.facts["model"]["name"], self.facts["model"]["counts"]
        timed = {what: [row for shape in counts for row in self.timed(shape, what)] for what in self.ways()}
        found = {what: together(rows, counts) for what, rows in timed.items() if what != "dense"}
        ways = {what: _summary(line) for what, line in found.items() if line}
        missing = [what for what, line in found.items() if timed[what] and not line]
        last = {what: (way["highest"], way["points"][-1]["speedup"]) for what, way in ways.items() if way["ranges"]}
        take = max(last, key=lambda what: last[what], default=None)
        return {"name": name, "matrices": sum(counts.values()), "ways": ways, "missing": missing, "take": take}

    def advice(self) -> list[str]:
        """Where each way starts to pay here, a sentence a line; then the model's matrices together, if there is one."""
        lines = [f"Unfinished: {self.unfinished} were timed."] if self.unfinished else []
        lines += [self._shape_advice(shape) for shape in self.shapes()]
        if "model" in self.facts and not self.unfinished:
            lines += self._model_advice()
        return [*lines, *self._refusals()]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: rows, ranges of density that pay, the model as a whole, advice, facts."""
        found = {"rows": self.rows, "break_even": self.break_even(), "advice": self.advice(), "facts": self.facts}
        return found if (whole := self.whole()) is None else {**found, "whole": whole}

    def json(self) -> str:
        """The same as one json object."""
        return json.dumps(self.to_dict(), indent=1)

    def csv(self) -> str:
        """The rows, one line each."""
        text = io.StringIO()
        writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _short(row.get(name)) for name in FIELDS} for row in self.rows)
        return text.getvalue()

    def save(self, folder: Path | str) -> list[Path]:
        """Write hardware.json and hardware.csv into a folder, each at once or not at all; return their paths."""
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            store.write_text(folder / CSV, self.csv())
            store.write_text(folder / JSON, self.json() + "\n")  # last: a run goes on by it
        except OSError as error:
            raise StoreError(f"save {folder}", str(error), "a folder that can be written") from error
        return [folder / JSON, folder / CSV]

    @classmethod
    def load(cls, path: Path | str) -> "Hardware":
        """Read what `save` wrote, by its folder or its json. DataError if it is not that."""
        path = Path(path)
        path = path / JSON if path.is_dir() else path
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            rows, facts = found["rows"], found["facts"]
            begun = facts.get("unfinished", {"of": 0, "rounds": []})
            parts = [(row, {"what", "shape"}) for row in rows] + [(begun, {"of", "rounds"})]
            parts += [(done, {"shape", "density", "dense_ms"}) for done in begun["rounds"]]
            if any(missing := names - set(part) for part, names in parts):
                raise KeyError(*missing)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"load {path}", repr(error), f"the {JSON} that Hardware.save wrote") from error
        return cls(rows=rows, facts=facts)

    @classmethod
    def resume(cls, folder: Path | str, facts: Mapping[str, Any]) -> "Hardware | None":
        """What a run of which these facts were known before it has left in a folder; None if there is nothing.

        RecipeError if it is of another run, since two are never mixed; DataError if it cannot be read.
        """
        if not (Path(folder) / JSON).exists():
            return None
        found = cls.load(folder)
        if other := _differences(found.facts, facts):
            hint = "another folder, or the settings of that run"
            raise RecipeError(f"hardware with out={folder}", f"{JSON} there has {', '.join(other)}", hint)
        return found

    def tables(self) -> list[tuple[list[str], list[list[str]]]]:
        """Header and rows as text: what was timed, a table a shape; what was not, and why; where it pays."""
        found = [self._shape_table(shape) for shape in self.shapes()]
        if any(row.get("why") for row in self.rows):
            found.append((["not timed", "where", "why"], self._why_not()))
        shapes = self.shapes()
        ways = [what for what in self.ways() if what != "dense" and any(self.timed(s, what) for s in shapes)]
        lines = [[what, *(self._pays(shape, what) for shape in shapes)] for what in ways]
        return [*found, (["pays at density", *shapes], lines)]

    def protocol(self) -> str:
        """How it was measured, in one line."""
        facts = {"M": "?", "dtype": "?", "device": "?", "repeats": "?", "flops": math.nan, "bandwidth": math.nan}
        facts |= self.facts
        where = f"{facts['device']}, {facts['dtype']}, M = {facts['M']} input vectors, forward"
        clocks = {"thread": "CPU time of the one thread", "graph": "replayed as CUDA graphs"}
        clock = clocks.get(facts.get("clock", ""), "wall time")
        how = f"{clock}, median of {facts['repeats']} runs{self._fewer()}, ways and dense interleaved"
        peaks = f"measured peaks {_si(facts['flops'])}FLOP/s and {_si(facts['bandwidth'])}B/s"
        state = f" Unfinished: {self.unfinished}." if self.unfinished else ""
        return f"{where}; {how}, a cold cache before each; {peaks}; errors against float64.{state}"

    def markdown(self) -> str:
        """The tables, the advice and the protocol."""
        lines: list[str] = []
        for header, rows in self.tables():
            lines += [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)] + [""]
        return "\n".join([*lines, *(f"- {line}" for line in self.advice()), "", self.protocol()])

    def __str__(self) -> str:
        return self.markdown()

    def _repr_html_(self) -> str:
        parts = []
        for header, rows in self.tables():
            head = "".join(f"<th>{cell}</th>" for cell in header)
            body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
            parts.append(f"<table><tr>{head}</tr>{body}</table>")
        advice = "".join(f"<li>{line}</li>" for line in self.advice())
        return f"{''.join(parts)}<ul>{advice}</ul><p>{self.protocol()}</p>"

    def _shape_table(self, shape: str) -> tuple[list[str], list[list[str]]]:
        header = [COLUMNS[name][0] for name in COLUMNS]
        rows = [row for what in self.ways() for row in self.timed(shape, what)]
        return [shape, *header[1:]], [[_cell(row, name) for name in COLUMNS] for row in rows]

    def _fewer(self) -> str:
        """The ways too slow for all repeats, with how many they had."""
        found: dict[str, list[int]] = {}
        for row in self.rows:
            if row["what"] != "dense" and (had := row.get("repeats")) and had < self.facts.get("repeats", had):
                found.setdefault(row["what"], []).append(had)
        spans = [f"{w} {min(n)}" + (f" to {max(n)}" if min(n) < max(n) else "") for w, n in found.items()]
        return f" (slow ways fewer: {', '.join(spans)})" if spans else ""

    def _why_not(self) -> list[list[str]]:
        """One line for every way and reason: all of its rows, or which."""
        found: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            if row.get("why"):
                found.setdefault((row["what"], row["why"]), []).append(f"{row['shape']} at {row['asked']:g}")
        counts = {what: sum(row["what"] == what for row in self.rows) for what in self.ways()}
        return [
            [what, "everywhere" if len(at) == counts[what] else ", ".join(at), why] for (what, why), at in found.items()
        ]

    def _pays(self, shape: str, what: str) -> str:
        rows = self.timed(shape, what)
        return said(points(rows)) if rows else "cannot be had"

    def _shape_advice(self, shape: str) -> str:
        lines = {what: points(self.timed(shape, what)) for what in self.ways() if what != "dense"}
        return f"{shape}: {_advised({what: line for what, line in lines.items() if line})}."

    def _model_advice(self) -> list[str]:
        """All matrices of the model together: at every density asked for, then over all of them, and what to take."""
        whole = self.whole() or {}
        lines, name = [], f"{whole['name']}, its {whole['matrices']} matrices"
        for asked in sorted({point["asked"] for way in whole["ways"].values() for point in way["points"]}):
            at = {
                what: [p["speedup"] for p in way["points"] if p["asked"] == asked]
                for what, way in whole["ways"].items()
            }
            gains = {what: found[0] for what, found in at.items() if found}
            best = max(gains, key=lambda what: gains[what])
            each = ", ".join(f"{what} {gain:.2f}x" for what, gain in gains.items())
            verdict = f"best {best}" if gains[best] > 1 else "dense stays fastest"
            lines.append(f"{name} at density {asked:g}: {each}; {verdict}.")
        together = _advised({what: _line(way["points"]) for what, way in whole["ways"].items()})
        missing = f"; not for all of them: {', '.join(whole['missing'])}" if whole["missing"] else ""
        return [*lines, f"{name} as a whole: {together}{missing}.", *_recommended(whole)]

    def _refusals(self) -> list[str]:
        """Ways that no shape could have, with the reason."""
        without = [what for what in self.ways() if not any(self.timed(shape, what) for shape in self.shapes())]
        reasons = {row["what"]: row["why"] for row in self.rows if row["what"] in without}
        return [f"{what} cannot be had here: {why.rstrip('.')}." for what, why in reasons.items()]


def _differences(found: Mapping[str, Any], asked: Mapping[str, Any], inside: str = "") -> list[str]:
    """Facts known before a run that a file says otherwise, each with what it says and what is asked for."""
    lines: list[str] = []
    for name in [name for name in {**asked, **found} if name not in MEASURED]:
        there, here = found.get(name), asked.get(name)
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            lines += _differences(there, here, f"{inside}{name} ")
        elif there != here:
            lines.append(f"no {inside}{name}" if there is None else f"{inside}{name} {there} (asked {here})")
    return lines


def _line(whole: Sequence[Mapping[str, float]]) -> list[Point]:
    return [(point["density"], point["speedup"]) for point in whole]


def _summary(whole: list[dict[str, float]]) -> dict[str, Any]:
    """What one way does to a whole model; `highest` is the highest density known to pay."""
    line = _line(whole)
    found = ranges(line)
    highest = None if not found else line[-1][0] if found[-1].high is None else found[-1].high
    return {"points": whole, "ranges": found, "pays": said(line), "highest": highest}


def _advised(lines: Mapping[str, Sequence[Point]]) -> str:
    """Which ways are faster than dense at which densities, with their best; and which never are."""
    best = {what: max(line, key=lambda point: point[1]) for what, line in lines.items()}
    pays = [f"{w} {said(line)} ({best[w][1]:.1f}x at {best[w][0]:.2g})" for w, line in lines.items() if ranges(line)]
    never = [f"{what} ({best[what][1]:.2f}x at best)" for what, line in lines.items() if not ranges(line)]
    text = f"faster than dense at density: {', '.join(pays)}" if pays else "nothing is faster than dense"
    return text + (f"; never faster: {', '.join(never)}" if never else "")


def _recommended(whole: Mapping[str, Any]) -> list[str]:
    """One line: the way that asks for the fewest zeros, and the fastest where that is another."""
    take, ways = whole["take"], whole["ways"]
    if take is None:
        return [f"{whole['name']}: for speed leave it dense on this device."]
    best = {what: max(way["points"], key=lambda point: point["speedup"]) for what, way in ways.items()}
    fastest = max(best, key=lambda what: best[what]["speedup"])
    text = f"{whole['name']}: for speed take {take}, which makes the whole faster {ways[take]['pays']}"
    top = f"{best[fastest]['speedup']:.1f}x at {best[fastest]['density']:.2g}"
    return [f"{text}: no other way pays at a higher density; fastest of all: {fastest}, {top}."]


def _cell(row: Row, name: str) -> str:
    value = f"{row['ms_p20']:.3g}-{row['ms_p80']:.3g}" if name == "spread" else row.get(name)
    return "" if value is None else COLUMNS[name][1].format(value)


def _short(value: Any) -> Any:
    """Five digits are more than a time has."""
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else value


def _si(value: float) -> str:
    """1.5e12 as "1.5 T"."""
    power = min(max(int(math.log10(value) // 3), 0), 5) if value > 0 else 0
    return f"{value / 1000**power:.3g} {['', 'k', 'M', 'G', 'T', 'P'][power]}"
