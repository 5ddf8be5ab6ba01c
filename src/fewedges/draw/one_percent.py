"""Is a layer with 1% of its weights as slow as a dense one? One panel a device, one row a shape and batch.

`one_percent` draws what `scripts/one_percent.py` writes. In every row stand the speed-ups of several ways to run as
many weights, and as a tick what the device's measured peaks would allow; left of the line at 1 the claim holds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from fewedges.draw.hardware import FAMILIES, OTHER, Look
from fewedges.draw.text import draw_title, legible, text_width, wrap
from fewedges.draw.theme import SMALL, TITLE, TWO_COLUMNS, Theme, axes_at, inches, styled
from fewedges.errors import DataError

NAMES, GAP, RIGHT, ROW, BELOW, ABOVE = 1.16, 0.12, 0.1, 0.165, 0.34, 0.26  # inches around panels
WORDS = {
    "masked": "dense, masked",
    "csr": "anywhere (CSR)",
    "bsr 32": "blocks of 32 (BSR)",
    "bsr 128": "blocks of 128 (BSR)",
    "butterfly": "butterfly (batched products)",
}
LIMIT = "what the peaks allow"


def one_percent(found: Sequence[Mapping[str, Any]], *, title: str = "", theme: str = "light") -> Figure:
    """Draw speed-up over dense at 1 % of the weights, a panel a device; all panels share the logarithmic axis.

    `found` are jsons of `scripts/one_percent.py`. A mark is the ratio of medians, its line the 20th to the 80th
    percentile of paired ratios. Rows go by number of input vectors, then shape. DataError if there is nothing to draw.
    """
    panels = [rows_of(one) for one in found]
    values = [way["speedup"] for rows in panels for row in rows for way in row["ways"].values() if "speedup" in way]
    if not values:
        raise DataError("one_percent(found)", f"{len(found)} records, no speed-up", "jsons of scripts/one_percent.py")
    limits = min(values) / 1.6, max(row["limit"] for rows in panels for row in rows) * 1.6
    with styled(theme) as look:
        width = (TWO_COLUMNS - len(panels) * NAMES - (len(panels) - 1) * GAP - RIGHT) / len(panels)
        high = ROW * max(map(len, panels))
        facts = [wrap(facts_of(one), NAMES + width, SMALL) for one in found]
        foot = 0.26 + 0.12 * max(map(len, facts))
        figure = Figure(figsize=(TWO_COLUMNS, foot + BELOW + high + ABOVE + 0.2 * bool(title)))
        for place, (rows, lines) in enumerate(zip(panels, facts, strict=True)):
            left = NAMES + place * (width + NAMES + GAP)
            axes = axes_at(figure, left, foot + BELOW + high - ROW * len(rows), width, ROW * len(rows))
            draw_rows(axes, rows, limits, look)
            heading: dict[str, Any] = {"size": TITLE, "weight": "bold", "ha": "center", **inches(figure)}
            figure.text(left + width / 2, foot + BELOW + high + 0.08, legible(device_of(found[place])), **heading)
            small: dict[str, Any] = {"size": SMALL, "color": look.muted, "ha": "center", "parse_math": False}
            for index, line in enumerate(reversed(lines)):
                figure.text(left + (width - NAMES) / 2, 0.05 + 0.12 * index, line, **small, **inches(figure))
        draw_key(figure, foot - 0.07, look)
        draw_title(figure, title, TWO_COLUMNS / 2, "center")
        return figure


def rows_of(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Cases by number of input vectors, then as they were measured."""
    return sorted(found.get("cases", ()), key=lambda case: case["M"])


def device_of(found: Mapping[str, Any]) -> str:
    """The processor, and how many of its cores where it is a CPU."""
    facts = found["runs"][0]["facts"]
    device, threads = facts["device"], facts.get("threads")
    return f"{facts['processor']}, {threads} core{'s'[: threads != 1]}" if device.startswith("CPU") else device


def facts_of(found: Mapping[str, Any]) -> str:
    """One line: dtype, clock and runs."""
    facts = found["runs"][0]["facts"]
    clocks = {"thread": "the thread's CPU time", "wall": "wall time", "graph": "replayed as CUDA graphs"}
    clock = clocks[facts.get("clock", "wall")]
    return f"{facts['dtype']}; {clock}, median of {facts['repeats']} runs, line p20 to p80, cold cache"


def draw_rows(axes: Axes, rows: Sequence[Mapping[str, Any]], limits: tuple[float, float], look: Theme) -> None:
    """Draw the marks of every case, the limit as a tick, and the half where the claim holds, tinted."""
    axes.set(xscale="log", xlim=limits, ylim=(len(rows) - 0.5, -0.5))
    axes.axvspan(limits[0], 1, color=look.void, lw=0, zorder=0)
    axes.axvline(1, color=look.ink, lw=0.7, ls=(0, (4, 2)), zorder=2)
    for place, row in enumerate(rows):
        new = place and row["M"] != rows[place - 1]["M"]
        axes.axhline(place - 0.5, color=look.faint, lw=0.7 if new else 0.25, zorder=1)
        axes.plot(
            [row["limit"]] * 2, [place - 0.34, place + 0.34], color=look.muted, lw=1.2, zorder=3, gid=f"limit-{place}"
        )
        for what in (what for what in WORDS if "speedup" in row["ways"].get(what, {})):
            draw_mark(axes, place, what, row["ways"][what], look)
    axes.set_yticks(range(len(rows)), [f"M = {row['M']:,}   {row['shape'].replace('x', ' → ')}" for row in rows])
    axes.tick_params(axis="y", length=0, labelsize=SMALL)
    axes.tick_params(axis="x", labelsize=SMALL)
    axes.xaxis.set_major_locator(LogLocator(10, (1.0,)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.set_xlabel("speed-up over dense", labelpad=1.5)


def draw_mark(axes: Axes, place: int, what: str, way: Mapping[str, Any], look: Theme) -> None:
    """One way's speed-up, with the spread of paired ratios."""
    own = look_of(what)
    height = place + 0.11 * (list(WORDS).index(what) - (len(WORDS) - 1) / 2)
    ends = [way.get(name, way["speedup"]) for name in ("speedup_p20", "speedup_p80")]
    axes.plot(ends, [height, height], color=own.colour(look), lw=0.8, zorder=4)
    mark: dict[str, Any] = {"marker": own.marker, "ms": 3.4, "mec": look.paper, "mew": 0.4, "ls": ""}
    axes.plot([way["speedup"]], [height], color=own.colour(look), zorder=5, gid=f"{what}-{place}", **mark)


def look_of(what: str) -> Look:
    """Its family's colour; larger blocks have another mark."""
    look = FAMILIES.get(what, FAMILIES.get(what.split()[0], OTHER))
    return look._replace(marker="D") if what == "bsr 128" else look


def draw_key(figure: Figure, y: float, look: Theme) -> None:
    """Name marks and tick in one row."""
    place = inches(figure)
    entries = [*WORDS.values(), LIMIT]
    widths = [text_width(entry, SMALL) + 0.28 for entry in entries]
    x = (TWO_COLUMNS - sum(widths) + 0.14) / 2
    for entry, what, wide in zip(entries, [*WORDS, None], widths, strict=True):
        if what is None:
            figure.add_artist(Line2D([x + 0.04] * 2, [y - 0.05, y + 0.05], color=look.muted, lw=1.2, **place))
        else:
            own = look_of(what)
            mark: dict[str, Any] = {"marker": own.marker, "ms": 3.4, "mec": look.paper, "mew": 0.4, "ls": ""}
            figure.add_artist(Line2D([x + 0.04], [y], color=own.colour(look), **mark, **place))
        figure.text(x + 0.11, y, entry, size=SMALL, color=look.muted, va="center_baseline", **place)
        x += wide
