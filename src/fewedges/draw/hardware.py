"""Speed-up over dense against density on one device, a line a way, under what the device could do at best.

`speedups` draws what `fewedges.measure.hardware.Hardware.to_dict()` holds. The physical limit is the measured dense
time over the time that this device needs at least for the kept weights, by its measured peaks of arithmetic and of
memory: 1/density while arithmetic decides, flat where reading inputs and writing outputs does. A table under the
panels names the lines and says in which range of densities each way pays.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from fewedges.draw.text import draw_title, legible, text_width, wrap
from fewedges.draw.theme import SMALL, TITLE, TWO_COLUMNS, Theme, axes_at, inches, styled
from fewedges.errors import DataError
from fewedges.measure.paying import brief, points, ranges, said

LEFT, RIGHT, GAP, HIGH, BELOW, BETWEEN, ABOVE = 0.54, 0.1, 0.3, 2.3, 0.34, 0.5, 0.24  # inches around panels
LINE, SAMPLE = 0.125, 0.3  # inches: a line of the table, and of the sample before a name
ACROSS = 3  # shapes in a row
LEAST = 4.5  # points: the table of many shapes is not written smaller
LIMIT, DENSE, PAYS = "beyond the limit (all inputs read)", "dense", "pays at density"


class Look(NamedTuple):
    """Colour by theme, dash, marker and width of a way's line."""

    light: str
    dark: str
    dash: Any = "-"
    marker: str = "o"
    width: float = 1.0

    def colour(self, look: Theme) -> str:
        """The colour on this background."""
        return self.dark if look.name == "dark" else self.light


FAMILIES = {
    "masked": Look("#8c8c8c", "#9a9ea2", (0, (1, 1)), "v"),
    "csr": Look("#d55e00", "#ff9d5c", "-", "s"),
    "2:4": Look("#8b5a9f", "#d6a2e8", "-", "D"),
    "bsr": Look("#009e73", "#2fc59b", "-", "^"),
    "butterfly": Look("#0072b2", "#56b4e9", (0, (3, 1.2)), "o", 1.2),
    "pixelated": Look("#0072b2", "#56b4e9", "-", "o", 1.6),
    "monarch": Look("#a6761d", "#e0b860", "-", "X"),
    "butterfly product": Look("#b3478f", "#f0a3d0", (0, (4, 1, 1, 1)), "P"),
}
"""By the name of a way, or its first word; a further member of a family has another dash."""
MEMBERS = {
    "bsr 32": Look("#00543d", "#c9f5e4", "-", "^", 0.9),
    "bsr 64": Look("#009e73", "#2fc59b", "-", "<", 2.0),
    "bsr 128": Look("#8ad6bd", "#17725a", "-", ">", 3.4),
}
"""Blocks of these sizes often cost the same: one shade each, and the thin lies on the wide."""
OTHER = Look("#a6761d", "#e0b860", "-", "P", 1.4)
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.2)), (0, (1.5, 1)), (0, (4, 1, 1, 1)))
OURS = " (triton)"


def speedups(
    found: Mapping[str, Any], *, shapes: Sequence[str] | None = None, title: str = "", theme: str = "light"
) -> Figure:
    """Draw speed-up over dense against density, a panel a shape and a line a way, under the limit of the peaks.

    `found` is `Hardware.to_dict()` or what its json holds. Bands reach from the 20th to the 80th percentile of the
    ratios of runs that followed each other; rings stand where a line goes through 1, and the table under the panels
    says between which densities a way pays. The limit reads all inputs once; a few blocks need not, and may pass it.
    A way that could not be had is not drawn and is named at the bottom.
    DataError if there is nothing to draw.
    """
    rows = [row for row in found.get("rows", ()) if shapes is None or row["shape"] in shapes]
    timed = [row for row in rows if row.get("speedup") is not None and row["what"] != "dense"]
    if not timed:
        raise DataError("speedups(found)", f"{len(rows)} rows, none with a speed-up", "Hardware.to_dict() of a run")
    names = list(dict.fromkeys(row["shape"] for row in timed))
    looks = looks_of([row["what"] for row in timed])
    absent = {row["what"]: None for row in rows if row.get("why") and row["what"] not in looks}
    with styled(theme) as look:
        across = min(ACROSS, len(names))
        down = -(-len(names) // across)
        panel = (TWO_COLUMNS - LEFT - RIGHT - (ACROSS - 1) * GAP) / ACROSS
        width = LEFT + across * panel + (across - 1) * GAP + RIGHT
        facts = wrap(facts_of(found["facts"], looks, list(absent), timed), width - 0.1, SMALL)
        foot = 0.1 + 0.12 * len(facts) + LINE * (len(looks) + 1.5)
        figure = Figure(figsize=(width, foot + BELOW + down * HIGH + (down - 1) * BETWEEN + ABOVE + bool(title) * 0.2))
        limits = axis_limits(timed, found["facts"])
        for index, shape in enumerate(names):
            left = LEFT + (index % across) * (panel + GAP)
            bottom = foot + BELOW + (down - 1 - index // across) * (HIGH + BETWEEN)
            axes = axes_at(figure, left, bottom, panel, HIGH)
            draw_shape(axes, [row for row in timed if row["shape"] == shape], found, looks, look, limits)
            axes.tick_params(labelleft=index % across == 0)
            style: dict[str, Any] = {"size": TITLE, "weight": "bold", "ha": "center", **inches(figure)}
            figure.text(left + panel / 2, bottom + HIGH + 0.07, shape.replace("x", " → "), **style)
        for row in range(down):
            middle = foot + BELOW + row * (HIGH + BETWEEN) + HIGH / 2
            figure.text(0.05, middle, "speed-up over dense", rotation=90, va="center", **inches(figure))
        draw_table(figure, timed, looks, foot, look)
        write_facts(figure, facts, look)
        draw_title(figure, title, width / 2, "center")
        return figure


def looks_of(ways: Sequence[str]) -> dict[str, Look]:
    """A look for every way: its family's colour, its own shade or dash within it; our kernels have a star."""
    found: dict[str, Look] = {}
    members: dict[tuple[str, bool], int] = {}
    for way in dict.fromkeys(ways):
        family = way.removesuffix(OURS)
        family = family if family in FAMILIES else family.split()[0]
        key = family, way.endswith(OURS)
        place = members[key] = members.get(key, -1) + 1
        look = MEMBERS.get(way.removesuffix(OURS), FAMILIES.get(family, OTHER))
        look = look if way in MEMBERS or not place else look._replace(dash=DASHES[place % len(DASHES)])
        found[way] = look._replace(width=2.0, marker="*") if key[1] else look
    return found


def axis_limits(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> tuple[Any, Any]:
    """One scale for all panels: all measured points, and the limit at the lowest density."""
    density, speed = ([row[name] for row in rows] for name in ("density", "speedup"))
    low = min(density) / 1.25
    best = max(limit_line(row, facts, low, 1.0)[1][0] for row in rows)
    return (low, 1.0), (min(0.5, min(speed) / 1.3), max(2.0, *speed, best) * 1.3)


def draw_shape(
    axes: Axes,
    rows: list[Mapping[str, Any]],
    found: Mapping[str, Any],
    looks: Mapping[str, Look],
    look: Theme,
    limits: Any,
) -> None:
    """Draw one panel: the limit, the line at 1, every way with its band, and break-even densities."""
    axes.set(xscale="log", yscale="log", xlim=limits[0], ylim=limits[1])
    density, best = limit_line(rows[0], found["facts"], *limits[0])
    axes.fill_between(density, best, limits[1][1], color=look.void, lw=0, zorder=0)
    axes.plot(density, best, color=look.muted, lw=0.9, zorder=2, gid=f"limit-{rows[0]['shape']}")
    axes.axhline(1, color=look.ink, lw=0.7, ls=(0, (4, 2)), zorder=2)
    for what in looks:
        own = sorted((row for row in rows if row["what"] == what), key=lambda row: row["density"])
        if own:
            draw_way(axes, own, looks[what], look)
            draw_even(axes, own, looks[what], look)
    name_bounds(axes, look)
    dress(axes, limits)


def limit_line(row: Mapping[str, Any], facts: Mapping[str, Any], low: float, high: float) -> tuple[Any, Any]:
    """Densities, and dense time over the least time: 2 M C R d operations, or all numbers once through memory."""
    inputs, outputs = map(int, row["shape"].split("x"))
    kept = np.geomspace(low, high, 200) * inputs * outputs
    moved = facts["itemsize"] * (facts["M"] * (inputs + outputs) + kept)
    least = 1e3 * np.maximum(2 * facts["M"] * kept / facts["flops"], moved / facts["bandwidth"])
    return kept / (inputs * outputs), row["dense_ms_p50"] / least


def draw_way(axes: Axes, rows: Sequence[Mapping[str, Any]], style: Look, look: Theme) -> None:
    """Draw one line with its band; a way with one density is a mark."""
    column = {name: np.array([row[name] for row in rows]) for name in ("density", "speedup")}
    colour = style.colour(look)
    ends = [np.array([row.get(name, row["speedup"]) for row in rows]) for name in ("speedup_p20", "speedup_p80")]
    axes.fill_between(column["density"], ends[0], ends[1], color=colour, alpha=0.15, lw=0, zorder=3)
    marks: dict[str, Any] = {
        "marker": style.marker,
        "ms": 5.0 if style.marker == "*" else 2.6,
        "mec": look.paper,
        "mew": 0.4,
    }
    name = f"{rows[0]['what']}-{rows[0]['shape']}"
    under = 7 - style.width / 2  # the thin is drawn over the wide
    axes.plot(*column.values(), color=colour, ls=style.dash, lw=style.width, zorder=under, gid=name, **marks)


def draw_even(axes: Axes, rows: Sequence[Mapping[str, Any]], style: Look, look: Theme) -> None:
    """A ring wherever a way comes up or down through 1."""
    at = [end for found in ranges(points(rows)) for end in found if end is not None]
    ring: dict[str, Any] = {"ms": 3.4, "mfc": look.paper, "mec": style.colour(look), "mew": 1.0, "ls": ""}
    if at:
        axes.plot(at, [1] * len(at), marker="o", zorder=9, gid=f"even-{rows[0]['what']}", **ring)


def name_bounds(axes: Axes, look: Theme) -> None:
    """Name what lies above the limit, and the line at 1."""
    style: dict[str, Any] = {"size": SMALL, "ha": "right", "va": "top", "textcoords": "offset points", "zorder": 9}
    axes.annotate(LIMIT, (1, 1), xycoords="axes fraction", xytext=(-3, -3), color=look.muted, **style)
    right = axes.get_yaxis_transform()
    axes.annotate(DENSE, (1, 1), xycoords=right, xytext=(-1, -2), color=look.ink, **style)


def dress(axes: Axes, limits: Any) -> None:
    """Plain numbers on both log axes; on a long one powers of ten alone."""
    long = limits[1][1] > 1000 * limits[1][0]
    for axis, (low, high), every in (
        (axes.xaxis, limits[0], (1, 3)),
        (axes.yaxis, limits[1], (1,) if long else (1, 2, 5)),
    ):
        wanted = [m * 10.0**e for e in range(-4, 4) for m in every]
        axis.set_major_locator(FixedLocator([s for s in wanted if low <= s <= high * 1.0001]))
        axis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.set_xlabel("density", labelpad=1.5)
    axes.tick_params(labelsize=SMALL)


def draw_table(
    figure: Figure, rows: Sequence[Mapping[str, Any]], looks: Mapping[str, Look], top: float, look: Theme
) -> None:
    """A line a way under the panels: how it is drawn, its name, and by shape at which densities it pays."""
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    left = 0.1 + SAMPLE + max(text_width(legible(name), SMALL) for name in (*looks, PAYS)) + 0.12
    column = (figure.get_size_inches()[0] - left - 0.06) / len(shapes)
    place = inches(figure)
    style: dict[str, Any] = {"va": "center_baseline", "parse_math": False, **place}
    for index, what in enumerate((None, *looks)):
        y = top - 0.06 - LINE * index
        if what is not None:
            x = [0.1, 0.1 + SAMPLE / 2 - 0.03, 0.1 + SAMPLE - 0.06]
            figure.add_artist(Line2D(x, [y] * 3, **entry_style(looks[what], look), **place))
        figure.text(0.1 + SAMPLE, y, legible(what or PAYS), size=SMALL, color=look.ink, **style)
        for number, shape in enumerate(shapes):
            text = pays(rows, shape, what, column - 0.06) if what else shape.replace("x", " → ")
            colour = look.muted if text in ("never", "-") else look.ink
            size = max(LEAST, SMALL * min(1.0, (column - 0.06) / text_width(text, SMALL)))
            figure.text(left + column * (number + 0.5), y, text, size=size, color=colour, ha="center", **style)


def pays(rows: Sequence[Mapping[str, Any]], shape: str, what: str, width: float) -> str:
    """At which densities a way is faster than dense, in signs where words are wider; "-" where it has no time."""
    line = points([row for row in rows if (row["shape"], row["what"]) == (shape, what)])
    text = said(line) if line else "-"
    return text if text_width(text, SMALL) <= width else brief(line)


def entry_style(own: Look, look: Theme) -> dict[str, Any]:
    """How the line of a way looks in the table, with its mark."""
    mark = {"marker": own.marker, "ms": 5.0 if own.marker == "*" else 3.0, "mec": look.paper, "mew": 0.4}
    return {"color": own.colour(look), "ls": own.dash, "lw": own.width, "markevery": [1], **mark}


def facts_of(
    facts: Mapping[str, Any], timed: Collection[str], absent: Sequence[str], rows: Sequence[Mapping[str, Any]] = ()
) -> str:
    """Where it was measured, how, and what could not be had there."""
    known = [device_of(facts), facts.get("dtype"), f"{facts['M']:,} input vectors"]
    clocks = {"thread": ", CPU time of the thread", "graph": " replayed as CUDA graphs"}
    clock = clocks.get(facts.get("clock", ""), "")
    repeats = facts.get("repeats")
    fewer = " (slow ways fewer)" if any(0 < (row.get("repeats") or 0) < (repeats or 0) for row in rows) else ""
    known += [f"median of {repeats} runs{fewer}{clock}, band p20 to p80"] if repeats else []
    known += ["unfinished"] if "unfinished" in facts else []
    if not any(what.endswith(OURS) for what in timed) and any(what.endswith(OURS) for what in absent):
        absent = [*(what for what in absent if not what.endswith(OURS)), "the triton kernels"]
    known += [f"not here: {', '.join(absent)}"] if absent else []
    return "; ".join(filter(None, known))


def device_of(facts: Mapping[str, Any]) -> str | None:
    """The GPU; of a CPU the processor, and how many threads it ran."""
    device, threads = facts.get("device"), facts.get("threads")
    if not str(device).startswith("CPU") or "processor" not in facts:
        return device
    return f"{facts['processor']}, {threads} thread{'s'[: threads != 1]}"


def write_facts(figure: Figure, lines: Sequence[str], look: Theme) -> None:
    """The facts, at the bottom."""
    style: dict[str, Any] = {"size": SMALL, "color": look.muted, "ha": "center", "parse_math": False}
    for index, line in enumerate(reversed(lines)):
        figure.text(figure.get_size_inches()[0] / 2, 0.06 + 0.12 * index, line, **style, **inches(figure))
