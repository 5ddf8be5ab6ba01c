"""What sparsity pays on one device: a row for every way, shape and density, where each starts to pay, and advice.

Shapes are written inputs x outputs, as 1024x4096; M is the number of input vectors.
"""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewedges import store
from fewedges.errors import DataError

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
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Times of a linear layer, by way, shape and density, on one device."""

    rows: list[Row]
    """By name as in FIELDS. A way that cannot be had has `why` and no times."""
    facts: dict[str, Any] = field(default_factory=dict)
    """M, dtype, device, processor, threads, load, flops and bandwidth (measured), repeats, seed, clock, versions; of a
    model its name and `counts`, matrices by shape."""

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

    def break_even(self) -> dict[str, dict[str, float | None]]:
        """By shape and way: the density below which it is faster than dense; None if it never is.

        Straight between the measured points on log axes. A way that is still faster at the highest density it was
        timed at has that density: a lower bound.
        """
        ways = [what for what in self.ways() if what != "dense"]
        return {shape: {what: crossing(self.timed(shape, what)) for what in ways} for shape in self.shapes()}

    def advice(self) -> list[str]:
        """Where each way starts to pay here, a sentence a line; then the model's matrices together, if there is one."""
        lines = [self._shape_advice(shape) for shape in self.shapes()]
        if "model" in self.facts:
            lines += self._model_advice()
        return [*lines, *self._refusals()]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: rows, break-even densities, advice, facts."""
        return {"rows": self.rows, "break_even": self.break_even(), "advice": self.advice(), "facts": self.facts}

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
        """Write hardware.json and hardware.csv into a folder; return their paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        store.write_text(folder / JSON, self.json() + "\n")
        store.write_text(folder / CSV, self.csv())
        return [folder / JSON, folder / CSV]

    @classmethod
    def load(cls, path: Path | str) -> "Hardware":
        """Read what `save` wrote, by its folder or its json. DataError if it is not that."""
        path = Path(path)
        path = path / JSON if path.is_dir() else path
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            rows, facts = found["rows"], found["facts"]
            if not isinstance(facts, dict) or any(missing := {"what", "shape"} - set(row) for row in rows):
                raise KeyError(*missing)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"load {path}", repr(error), f"the {JSON} that Hardware.save wrote") from error
        return cls(rows=rows, facts=facts)

    def tables(self) -> list[tuple[list[str], list[list[str]]]]:
        """Header and rows as text: what was timed, a table a shape; what was not, and why; break-even densities."""
        found = [self._shape_table(shape) for shape in self.shapes()]
        if any(row.get("why") for row in self.rows):
            found.append((["not timed", "where", "why"], self._why_not()))
        even = self.break_even()
        ways = [what for what in self.ways() if what != "dense" and any(self.timed(s, what) for s in even)]
        lines = [[what, *(self._even(shape, what, even[shape][what]) for shape in even)] for what in ways]
        return [*found, (["pays below density", *even], lines)]

    def protocol(self) -> str:
        """How it was measured, in one line."""
        facts = {"M": "?", "dtype": "?", "device": "?", "repeats": "?", "flops": math.nan, "bandwidth": math.nan}
        facts |= self.facts
        where = f"{facts['device']}, {facts['dtype']}, M = {facts['M']} input vectors, forward"
        clock = "CPU time of the one thread" if facts.get("clock") == "thread" else "wall time"
        how = f"{clock}, median of {facts['repeats']} runs, ways and dense interleaved, a cold cache before each"
        peaks = f"measured peaks {_si(facts['flops'])}FLOP/s and {_si(facts['bandwidth'])}B/s"
        return f"{where}; {how}; {peaks}; errors against float64."

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

    def _even(self, shape: str, what: str, even: float | None) -> str:
        rows = self.timed(shape, what)
        if not rows:
            return "cannot be had"
        return "never" if even is None else f"{'>= ' if even == rows[-1]['density'] else ''}{even:.3f}"

    def _shape_advice(self, shape: str) -> str:
        pays, not_ = [], []
        for what, even in self.break_even()[shape].items():
            if not (rows := self.timed(shape, what)):
                continue
            best = max(rows, key=lambda row: row["speedup"])
            if even is None:
                not_.append(f"{what} ({best['speedup']:.2f}x at best)")
            else:
                where = "up to" if even == rows[-1]["density"] else "below"
                gain = f"{best['speedup']:.1f}x at {best['density']:.2g}"
                pays.append(f"{what} {where} density {even:.2g} ({gain})")
        text = f"{shape}: " + (f"faster than dense: {', '.join(pays)}" if pays else "nothing is faster than dense")
        return text + (f"; never faster: {', '.join(not_)}" if not_ else "") + "."

    def _model_advice(self) -> list[str]:
        """All matrices of the model together, at every density asked for: the sum of medians."""
        model, counts = self.facts["model"]["name"], self.facts["model"]["counts"]
        total = sum(counts.values())
        lines = []
        for asked in sorted({row["asked"] for row in self.rows if row.get("asked") is not None}):
            gains = {what: gain for what in self.ways() if (gain := self._gain(what, asked, counts)) is not None}
            if gains:
                best = max(gains, key=lambda what: gains[what])
                each = ", ".join(f"{what} {gain:.2f}x" for what, gain in gains.items())
                verdict = f"best {best}" if gains[best] > 1 else "dense stays fastest"
                lines.append(f"{model}, its {total} matrices at density {asked:g}: {each}; {verdict}.")
        return lines

    def _gain(self, what: str, asked: float, counts: dict[str, int]) -> float | None:
        """Dense time over this way's, summed over the model's matrices; None if one of them has no time."""
        if what == "dense":
            return None
        found = {row["shape"]: row for shape in counts for row in self.timed(shape, what) if row["asked"] == asked}
        if set(found) != set(counts):
            return None
        dense, ours = (sum(found[s][name] * n for s, n in counts.items()) for name in ("dense_ms_p50", "ms_p50"))
        return dense / ours

    def _refusals(self) -> list[str]:
        """Ways that no shape could have, with the reason."""
        without = [what for what in self.ways() if not any(self.timed(shape, what) for shape in self.shapes())]
        reasons = {row["what"]: row["why"] for row in self.rows if row["what"] in without}
        return [f"{what} cannot be had here: {why.rstrip('.')}." for what, why in reasons.items()]


def crossing(rows: Sequence[Row]) -> float | None:
    """The density at which the speed-up of rows, sorted by density, last comes down through 1."""
    faster = [index for index, row in enumerate(rows) if row["speedup"] >= 1]
    if not faster:
        return None
    low = rows[faster[-1]]
    if faster[-1] == len(rows) - 1:
        return low["density"]
    high = rows[faster[-1] + 1]
    share = math.log(low["speedup"]) / math.log(low["speedup"] / high["speedup"])
    return low["density"] * (high["density"] / low["density"]) ** share


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
