"""Speed-up over dense against density on one device, a line a way, under what the device could do at best.

`speedups` draws what `fewedges.measure.hardware.Hardware.to_dict()` holds. The physical limit is the measured dense
time over the time that this device needs at least for the kept weights, by its measured peaks of arithmetic and of
memory: 1/density while arithmetic decides, flat where reading inputs and writing outputs does.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from fewedges.draw.text import draw_title, legible, text_width, wrap
from fewedges.draw.theme import SMALL, TITLE, TWO_COLUMNS, Theme, axes_at, inches, styled
from fewedges.errors import DataError

LEFT, RIGHT, GAP, HIGH, BELOW, BETWEEN, ABOVE = 0.46, 0.1, 0.3, 2.3, 0.34, 0.5, 0.24  # inches around panels
ACROSS = 3  # shapes in a row
LIMIT, DENSE = "physical limit", "dense"


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
}
"""By the first word of a way's name; a further member of a family (bsr 64) has another dash."""
OTHER = Look("#a6761d", "#e0b860", "-", "P", 1.4)
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.2)), (0, (1.5, 1)), (0, (4, 1, 1, 1)))
OURS = " (triton)"


def speedups(
    found: Mapping[str, Any], *, shapes: Sequence[str] | None = None, title: str = "", theme: str = "light"
) -> Figure:
    """Draw speed-up over dense against density, a panel a shape and a line a way, under the physical limit.

    `found` is `Hardware.to_dict()` or what its json holds. Bands reach from the 20th to the 80th percentile of the
    ratios of runs that followed each other; where a line comes down through 1, a tick says at which density. A way
    that could not be had is not drawn and is named under the picture. DataError if there is nothing to draw.
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
        key = key_lines(list(looks), across)
        foot = 0.16 * len(key) + 0.24 + 0.12 * (len(absent) > 2)
        panel = (TWO_COLUMNS - LEFT - RIGHT - (ACROSS - 1) * GAP) / ACROSS
        width = LEFT + across * panel + (across - 1) * GAP + RIGHT
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
        draw_key(figure, key, looks, foot, look)
        write_facts(figure, found["facts"], list(absent), look)
        draw_title(figure, title, width / 2, "center")
        return figure


def looks_of(ways: Sequence[str]) -> dict[str, Look]:
    """A look for every way: its family's colour, its own dash within the family; our kernels wider, with a star."""
    found: dict[str, Look] = {}
    members: dict[tuple[str, bool], int] = {}
    for way in dict.fromkeys(ways):
        family = way.removesuffix(OURS)
        family = family if family in FAMILIES else family.split()[0]
        key = family, way.endswith(OURS)
        place = members[key] = members.get(key, -1) + 1
        look = FAMILIES.get(family, OTHER)
        look = look._replace(dash=DASHES[place % len(DASHES)]) if place else look
        found[way] = look._replace(width=2.0, marker="*", dash=DASHES[place % len(DASHES)]) if key[1] else look
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
    draw_even(axes, found.get("break_even", {}).get(rows[0]["shape"], {}), rows, looks, look)
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
    axes.plot(*column.values(), color=colour, ls=style.dash, lw=style.width, zorder=4 + style.width, gid=name, **marks)


def draw_even(
    axes: Axes,
    even: Mapping[str, float | None],
    rows: Sequence[Mapping[str, Any]],
    looks: Mapping[str, Look],
    look: Theme,
) -> None:
    """Mark where each way comes down through 1, and list those densities at the top right, where nothing can be."""
    entries = [("pays below density", look.muted)]
    for what in (what for what in looks if what in even):
        own = [row["density"] for row in rows if row["what"] == what]
        if not own:
            continue
        at, colour = even[what], looks[what].colour(look)
        said = "never" if at is None else f"≥ {at:.2f}" if at >= max(own) else f"{at:.2f}"
        if at is not None and at < max(own):
            axes.plot([at], [1], "o", ms=3.4, mfc=look.paper, mec=colour, mew=1.0, zorder=9, gid=f"even-{what}")
        entries.append((f"{what} {said}", colour))
    for index, (text, colour) in enumerate(entries):
        style: dict[str, Any] = {"size": SMALL, "color": colour, "ha": "right", "va": "top", "parse_math": False}
        offset: dict[str, Any] = {"xytext": (-2, -2 - 7.6 * index), "textcoords": "offset points"}
        axes.annotate(legible(text), (1, 1), xycoords="axes fraction", zorder=9, **offset, **style)


def dress(axes: Axes, limits: Any) -> None:
    """Plain numbers on both log axes."""
    steps = [m * 10.0**e for e in range(-4, 4) for m in (1, 2, 5)]
    for axis, (low, high), every in ((axes.xaxis, limits[0], (1, 3)), (axes.yaxis, limits[1], (1, 2, 5))):
        wanted = [s for s in (steps if len(every) == 3 else [m * 10.0**e for e in range(-4, 1) for m in every])]
        axis.set_major_locator(FixedLocator([s for s in wanted if low <= s <= high * 1.0001]))
        axis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.set_xlabel("density", labelpad=1.5)
    axes.tick_params(labelsize=SMALL)


def key_lines(names: list[str], across: int) -> list[list[str]]:
    """The entries of the key in as few rows as fit the width, about equally long."""
    names = [*names, LIMIT, DENSE]
    widths = [entry_width(name) for name in names]
    count = -(-sum(widths) // (TWO_COLUMNS * across / ACROSS - 0.1))
    rows = [int((sum(widths[:place]) + width / 2) / sum(widths) * count) for place, width in enumerate(widths)]
    return [[name for name, own in zip(names, rows, strict=True) if own == row] for row in dict.fromkeys(rows)]


def entry_width(name: str) -> float:
    """Inches of one entry: line, name and space."""
    return text_width(legible(name), SMALL) + 0.45


def draw_key(figure: Figure, key: list[list[str]], looks: Mapping[str, Look], foot: float, look: Theme) -> None:
    """Name the lines in rows under the panels."""
    place = inches(figure)
    for index, names in enumerate(key):
        x = (figure.get_size_inches()[0] - sum(map(entry_width, names)) + 0.14) / 2
        y = foot - 0.1 - 0.16 * index
        for name in names:
            line = Line2D([x, x + 0.13, x + 0.26], [y, y, y], **entry_style(name, looks, look), **place)
            figure.add_artist(line)
            figure.text(x + 0.31, y, legible(name), size=SMALL, color=look.muted, va="center_baseline", **place)
            x += entry_width(name)


def entry_style(name: str, looks: Mapping[str, Look], look: Theme) -> dict[str, Any]:
    """How the line of an entry looks: a way's with its mark, the limit's, or that at 1."""
    if name in looks:
        own = looks[name]
        mark = {"marker": own.marker, "ms": 2.6, "mec": look.paper, "mew": 0.4, "markevery": [1]}
        return {"color": own.colour(look), "ls": own.dash, "lw": own.width, **mark}
    return {"color": look.ink, "lw": 0.7, "ls": (0, (4, 2))} if name == DENSE else {"color": look.muted, "lw": 0.9}


def write_facts(figure: Figure, facts: Mapping[str, Any], absent: list[str], look: Theme) -> None:
    """One line at the bottom: where it was measured, and what could not be had there."""
    known = [facts.get("device"), facts.get("dtype"), f"{facts['M']:,} input vectors"]
    known += [f"median of {facts['repeats']} runs, band p20 to p80"] if "repeats" in facts else []
    known += [f"not here: {', '.join(absent)}"] if absent else []
    style: dict[str, Any] = {"size": SMALL, "color": look.muted, "ha": "center", "parse_math": False}
    text = legible("; ".join(filter(None, known)))
    width = figure.get_size_inches()[0]
    for index, line in enumerate(reversed(wrap(text, width - 0.1, SMALL))):
        figure.text(width / 2, 0.06 + 0.12 * index, line, **style, **inches(figure))
