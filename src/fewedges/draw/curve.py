"""The explained effect of a circuit against its size, one line per model: how few edges or heads carry a task.

Columns are tasks; the upper row counts circuit edges, the lower one heads. After the figures of Draye et al. 2025,
arXiv:2512.05865.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from fewedges.draw.text import draw_title, legible, text_width
from fewedges.draw.theme import BODY, ONE_COLUMN, SMALL, TITLE, TWO_COLUMNS, Theme, axes_at, inches, styled
from fewedges.errors import DataError

LEFT, RIGHT, GAP = 0.42, 0.1, 0.16  # inches beside and between the panels
HIGH, BETWEEN, BELOW, ABOVE = 1.3, 0.42, 0.62, 0.24  # a panel; between rows; under the last row; over the first
NARROWEST = 1.3  # inches: a panel where four do not fit
KEY, SAMPLE = 0.15, 0.42  # inches: a further line of the key; what an entry takes beside its words
LOWEST, HIGHEST = -0.75, 1.5  # an effect beyond is cut off: a circuit of a few edges can have any


class Look(NamedTuple):
    """Colour (place in the theme), dash and width of a line."""

    colour: int
    dash: Any
    width: float


FIRST, LAST = Look(3, "-", 1.1), Look(0, "-", 1.5)  # dense and sparse
BETWEEN_THEM = (Look(1, (0, (3.5, 1.5)), 1.1), Look(2, (0, (1, 1)), 1.3))  # the control, and one more
RANDOM = "random circuits"
"""Always drawn as the second of these, with a control or without."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """One model on one task: N circuits of growing size. DataError if lengths differ or sizes do not grow."""

    label: str
    """Such as "dense", "control" or "sparse": the same label has the same look in every panel."""
    edges: Float[np.ndarray, "N"]
    """Edges (or heads) kept. Sizes below 1 have no place on a log axis and are not drawn."""
    effect: Float[np.ndarray, "N"]
    """Explained effect: 0 for the empty circuit, 1 for the whole model."""
    low: Float[np.ndarray, "N"] | None = None
    """The lower end of an interval around `effect`, from seeds or a bootstrap."""
    high: Float[np.ndarray, "N"] | None = None
    reached: float | None = None
    """The size at which the effect counts as reached, where that is decided elsewhere; None: read off the line."""

    def __post_init__(self) -> None:
        for name in ("edges", "effect", "low", "high"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=float))
        check_curve(self)


@dataclass(frozen=True, kw_only=True, eq=False)
class Effects:
    """The curves of one task: the first is what the last is compared with."""

    title: str
    """Such as "IOI"."""
    edges: Sequence[Curve] = ()
    heads: Sequence[Curve] = ()


def explained_effect(
    tasks: Sequence[Effects],
    *,
    level: float = 0.9,
    title: str = "",
    interval: str = "95% interval",
    counted: str = "circuit edges",
    theme: str = "light",
) -> Figure:
    """Draw one column per task, over edges and, where there are any, over heads.

    At `level` a dashed line; on it a dot where the first and the last curve reach it, the ratio of their sizes ("12×"
    fewer, "0.8×" more), and where there is room an arrow. A curve that never gets there has none of them.
    `interval` says in the key what the bands are, `counted` what an edge is. DataError without any curve.
    """
    tasks = list(tasks)
    rows = [name for name in ("edges", "heads") if any(getattr(task, name) for task in tasks)]
    if not rows:
        raise DataError("explained_effect(tasks)", f"no curve in {len(tasks)} tasks", "Effects with at least one Curve")
    with styled(theme) as look:
        plan = arrange(tasks, rows, title, interval)
        figure = Figure(figsize=(plan.width, plan.height))
        for row, name in enumerate(rows):
            for column, task in enumerate(tasks):
                if getattr(task, name):
                    axes = axes_at(figure, plan.left(column), plan.bottom(row), plan.panel, HIGH)
                    draw_curves(axes, list(getattr(task, name)), plan, look, level, f"{name}-{column}")
                    dress(axes, plan, level, counted if name == "edges" else name, first=column == 0)
        for column, task in enumerate(tasks):
            middle, top = plan.left(column) + plan.panel / 2, plan.bottom(0) + HIGH + 0.06
            style: dict[str, Any] = {"size": TITLE, "weight": "bold", "ha": "center", "parse_math": False}
            figure.text(middle, top, legible(task.title), **style, **inches(figure))
        draw_key(figure, plan, look)
        draw_title(figure, title, plan.width / 2, "center")
        return figure


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where everything goes, in inches, and what all panels share."""

    panel: float
    count: int
    rows: int
    above: float
    labels: tuple[str, ...]
    key: list[list[tuple[str, str]]]
    """Its lines: label ("" for the bands) and words of every entry."""
    low: float
    high: float

    @property
    def width(self) -> float:
        return LEFT + self.count * self.panel + (self.count - 1) * GAP + RIGHT

    @property
    def height(self) -> float:
        return self.bottom(0) + HIGH + self.above

    def look(self, label: str) -> Look:
        """The same look for a label in every panel."""
        place = self.labels.index(label)
        others = [one for one in self.labels[1:-1] if one != RANDOM]
        middle = BETWEEN_THEM[others.index(label) % len(BETWEEN_THEM) if label in others else 1]
        return FIRST if place == 0 else LAST if place == len(self.labels) - 1 else middle

    def left(self, column: int) -> float:
        """Left edge of a panel."""
        return LEFT + column * (self.panel + GAP)

    def bottom(self, row: int) -> float:
        """Lower edge of a panel."""
        return BELOW + (len(self.key) - 1) * KEY + (self.rows - 1 - row) * (HIGH + BETWEEN)


def arrange(tasks: list[Effects], rows: list[str], title: str, interval: str) -> Plan:
    """Choose sizes: one column of a paper for one or two tasks, two for more; one scale of effects for all."""
    curves = [curve for task in tasks for name in rows for curve in getattr(task, name)]
    count = len(tasks)
    room = (ONE_COLUMN if count <= 2 else TWO_COLUMNS) - LEFT - RIGHT - (count - 1) * GAP
    shown = [(curve, x) for curve in curves for x in (curve.effect, curve.low, curve.high) if x is not None]
    values = np.concatenate([np.clip(x[curve.edges >= 1], LOWEST, HIGHEST) for curve, x in shown])
    values = values[np.isfinite(values)]
    last = next(group[-1].label for name in rows for task in tasks if (group := getattr(task, name)))
    labels = (*(label for label in dict.fromkeys(curve.label for curve in curves) if label != last), last)
    bands = any(curve.low is not None and curve.high is not None for curve in curves)
    entries = [(label, legible(label)) for label in labels] + [("", interval)] * bands
    return Plan(
        panel=max(NARROWEST, room / count),
        count=count,
        rows=len(rows),
        above=ABOVE + (0.2 if title else 0.0),
        labels=labels,
        key=list(broken(entries, room + count * GAP)),
        low=min(0.0, *values) - 0.04,
        high=max(1.0, *values) + 0.06,
    )


def draw_curves(axes: Axes, curves: list[Curve], plan: Plan, look: Theme, level: float, name: str) -> None:
    """Draw the lines of one panel with their bands, the dashed line at the level, and the ratio on it."""
    axes.set_xscale("log")
    axes.axhline(level, color=look.muted, lw=0.6, ls=(0, (4, 2)), zorder=1)
    for curve in curves:
        style, kept = plan.look(curve.label), curve.edges >= 1
        colour, width = look.series[style.colour], style.width
        axes.plot(
            curve.edges[kept],
            curve.effect[kept],
            color=colour,
            ls=style.dash,
            lw=width,
            zorder=3 + width,
            gid=f"{name}-{curve.label}",
        )
        if curve.low is not None and curve.high is not None:
            ends = curve.low[kept], curve.high[kept]
            axes.fill_between(curve.edges[kept], *ends, color=colour, alpha=0.18, lw=0, zorder=2)
    axes.set_ylim(plan.low, plan.high)
    draw_ratio(axes, curves, plan, look, level)


LEAST = 7.0
"""Points between two dots that an arrow needs: 4.5 that it keeps off them, and its head. A shorter one points back."""


def points_between(axes: Axes, start: float, end: float) -> float:
    """How many points of a page lie between two places on the x axis, as it is now."""
    axes.autoscale_view()
    (left, _), (right, _) = axes.transData.transform([(start, 0.5), (end, 0.5)])
    return abs(right - left) * 72 / axes.figure.dpi


def draw_ratio(axes: Axes, curves: list[Curve], plan: Plan, look: Theme, level: float) -> None:
    """Mark where the first and the last curve reach the level, and write how many times fewer the last one needs."""
    ends = [(curve, reaches(curve, level)) for curve in dict.fromkeys((curves[0], curves[-1]))]
    found = [(curve, size) for curve, size in ends if size is not None]
    for curve, size in found:
        colour = look.series[plan.look(curve.label).colour]
        axes.plot([size], [level], "o", ms=3.2, mfc=colour, mec=look.paper, mew=0.5, zorder=7)
    if len(found) < 2:
        return
    start, end = found[0][1], found[1][1]
    arrow = {
        "arrowstyle": "-|>,head_length=0.32,head_width=0.16",
        "color": look.ink,
        "lw": 0.8,
        "shrinkA": 2.5,
        "shrinkB": 2.0,
    }
    if points_between(axes, start, end) > LEAST:
        axes.annotate("", (end, level), (start, level), arrowprops=arrow, zorder=6)
    write_ratio(axes, min(start, end), (start * end) ** 0.5, level, ratio(start, end), look)


def write_ratio(axes: Axes, left: float, middle: float, level: float, text: str, look: Theme) -> None:
    """Write the ratio left of the arrow, above the dashed line, where no curve is; without room there, below it."""
    axes.get_xlim()  # matplotlib settles the limits only when asked
    room = axes.transData.transform((left, level))[0] - axes.bbox.x0  # at the figure's own dots per inch
    beside = room / axes.figure.dpi > text_width(text, BODY, "bold") + 0.1
    edge = [withStroke(linewidth=1.8, foreground=look.paper)]
    style: dict[str, Any] = {"size": BODY, "weight": "bold", "path_effects": edge, "textcoords": "offset points"}
    if beside:
        axes.annotate(text, (left, level), (-4, 2), ha="right", va="bottom", zorder=8, **style)
    else:
        axes.annotate(text, (middle, level), (10, -4), ha="left", va="top", zorder=8, **style)


def ratio(first: float, last: float) -> str:
    """How many times fewer the last one needs: three digits at most, as 97×, 8.6×, 0.8×."""
    times = first / last
    return f"{times:,.0f}×" if times >= 9.95 else f"{times:.1f}×"


def reaches(curve: Curve, level: float) -> float | None:
    """The size at which the drawn line first comes to `level`, straight between points on the log axis."""
    if curve.reached is not None:
        return curve.reached
    kept = (curve.edges >= 1) & np.isfinite(curve.effect)
    sizes, effect = np.log(curve.edges[kept]), curve.effect[kept]
    above = np.flatnonzero(effect >= level)
    if not len(above):
        return None
    if (after := above[0]) == 0:
        return float(np.exp(sizes[0]))
    before = after - 1
    share = (level - effect[before]) / (effect[after] - effect[before])
    return float(np.exp(sizes[before] + share * (sizes[after] - sizes[before])))


def dress(axes: Axes, plan: Plan, level: float, name: str, *, first: bool) -> None:
    """Label the axes: effects at the left panel only, plain numbers of edges or heads at all."""
    ticks = [0, 0.5, level, *([1] if abs(level - 1) > 0.06 else [])]
    axes.set_yticks(ticks, [f"{tick:g}" if first else "" for tick in ticks])
    axes.set_xlabel(f"{name} kept", labelpad=1.5)
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 60 else (1.0, 2.0, 5.0), numticks=7))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=SMALL)
    if first:
        place: dict[str, Any] = {"rotation": 90, "ha": "left", "va": "center", "transform": axes.transAxes}
        axes.text((0.04 - LEFT) / plan.panel, 0.5, "explained effect", **place)


def short(value: float) -> str:
    """A size on the axis: 1, 20, 500, 1k, 30k."""
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def broken(entries: list[tuple[str, str]], room: float) -> Iterator[list[tuple[str, str]]]:
    """The entries of the key as lines that fit into so many inches, at least one entry a line."""
    line: list[tuple[str, str]] = []
    for entry in entries:
        if line and sum(text_width(words, SMALL) + SAMPLE for _, words in [*line, entry]) > room:
            yield line
            line = []
        line.append(entry)
    yield line


def draw_key(figure: Figure, plan: Plan, look: Theme) -> None:
    """Name the lines and bands at the bottom."""
    place = inches(figure)
    for number, entries in enumerate(reversed(plan.key)):
        widths = [text_width(words, SMALL) + SAMPLE for _, words in entries]
        x, y = (plan.width - sum(widths) + 0.14) / 2, 0.12 + number * KEY
        for (label, words), width in zip(entries, widths, strict=True):
            if label:
                style = plan.look(label)
                line: dict[str, Any] = {"color": look.series[style.colour], "ls": style.dash, "lw": style.width}
                figure.add_artist(Line2D([x, x + 0.22], [y, y], **line, **place))
            else:
                figure.add_artist(Rectangle((x, y - 0.04), 0.22, 0.08, fc=look.muted, alpha=0.25, lw=0, **place))
            figure.text(
                x + 0.26, y, words, size=SMALL, color=look.muted, va="center_baseline", parse_math=False, **place
            )
            x += width


def check_curve(curve: Curve) -> None:
    """Raise DataError unless sizes grow, all has one length, and something can be drawn."""
    asked = f"Curve({curve.label!r})"
    shapes = {x.shape for x in (curve.edges, curve.effect, curve.low, curve.high) if x is not None}
    if len(shapes) != 1 or curve.edges.ndim != 1:
        raise DataError(asked, f"shapes {', '.join(map(str, sorted(shapes)))}", "lists of one length")
    if not np.all(np.diff(curve.edges) > 0):  # NaN fails too
        raise DataError(asked, "sizes that do not grow", "circuits in order of size, each size once")
    if not np.isfinite(curve.effect[curve.edges >= 1]).any():
        raise DataError(asked, f"no finite effect at a size of 1 or more, of {len(curve.edges)}", "at least one")
