"""Training curves: how many edges are left, and what the constraint and its multiplier did meanwhile."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fewedges.draw.text import draw_title
from fewedges.draw.theme import ONE_COLUMN, SMALL, Theme, axes_at, styled
from fewedges.errors import DataError

LEFT, RIGHT, BELOW, ABOVE = 0.7, 0.8, 0.4, 0.1  # inches around the axes; direct labels stand at the right
HIGH, GAP = 1.0, 0.14  # inches: one panel, and the space to the next
KNOWN = "records with step and edges_per_query_per_head, open_heads, kl or multiplier"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One quantity: the key in a record, its direct label, its colour (place in the theme) and dash."""

    key: str
    label: str
    colour: int = 0
    dash: str = "-"
    last: bool = False
    """Label it with its last value too."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One panel: what its axis says, whether it is logarithmic, and its lines."""

    name: str
    log: bool
    lines: tuple[Line, ...]
    needs: str
    """The panel is drawn if a record has this."""


CURVES = (
    Rows(
        name="edges per query\nper head",
        needs="edges_per_query_per_head",
        log=True,
        lines=(
            Line(key="edges_per_query_per_head", label="open", last=True),
            Line(key="expected_edges", label="expected", colour=1, dash=":"),
            Line(key="dense_edges", label="dense", colour=3, dash="--", last=True),
        ),
    ),
    Rows(name="open heads", needs="open_heads", log=False, lines=(Line(key="open_heads", label="", last=True),)),
    Rows(
        name="KL to dense\n(nats per token)",
        needs="kl",
        log=False,
        lines=(
            Line(key="kl", label="KL", last=True),
            Line(key="margin", label="margin", colour=1, dash="--", last=True),
        ),
    ),
    Rows(
        name="cross-entropy\n(nats per token)",
        needs="control_cross_entropy",
        log=False,
        lines=(
            Line(key="cross_entropy", label="sparse", last=True),
            Line(key="control_cross_entropy", label="control", colour=1, dash="--", last=True),
        ),
    ),
    Rows(name="multiplier", needs="multiplier", log=True, lines=(Line(key="multiplier", label="", last=True),)),
)


def training_curve(records: Sequence[Mapping[str, Any]], *, title: str = "", theme: str = "light") -> Figure:
    """Draw a training log over steps: edges (log), KL with its margin, multiplier (log).

    A record has `step` and any of `edges_per_query_per_head` (hard, open gates), `expected_edges`,
    `dense_edges`, `open_heads`, `kl`, `margin`, `multiplier`; where some record has `control_cross_entropy`, a panel
    compares it with `cross_entropy`. A value that is missing, null, not finite, or not positive on a log
    axis leaves a gap; a value between two gaps is a dot. Of records with the same step, as after a resume,
    the last one counts. A panel without values is left out. DataError if none is left, or if a step is no
    number.
    """
    columns = tabulate(records)
    rows = [row for row in CURVES if np.isfinite(drawable(columns[row.needs], row.log)).any()]
    if not rows:
        raise DataError("training_curve(records)", f"no value to draw in {len(records)} records", KNOWN)
    with styled(theme) as look:
        above = ABOVE + (0.2 if title else 0.0)
        height = BELOW + len(rows) * HIGH + (len(rows) - 1) * GAP + above
        figure = Figure(figsize=(ONE_COLUMN, height))
        for index, row in enumerate(rows):
            bottom = height - above - HIGH - index * (HIGH + GAP)
            axes = axes_at(figure, LEFT, bottom, ONE_COLUMN - LEFT - RIGHT, HIGH)
            draw_row(axes, row, columns, look)
            dress(axes, columns["step"], last=index == len(rows) - 1)
        draw_title(figure, title, LEFT, "left")
        return figure


def tabulate(records: Sequence[Mapping[str, Any]]) -> dict[str, Float[np.ndarray, "N"]]:
    """Return one column per known key in order of steps, NaN where there is no finite number."""
    records = list(records)
    if not records:
        raise DataError("training_curve(records)", "no record", "the lines of a training log")
    by_step: dict[float, Mapping[str, Any]] = {}
    for index, record in enumerate(records):
        step = number(record.get("step"))
        if np.isnan(step):
            raise DataError(f"record {index}", f"step={record.get('step')!r}", "a number under 'step' in every record")
        by_step[step] = record
    steps = sorted(by_step)
    keys = [line.key for row in CURVES for line in row.lines]
    columns = {key: np.array([number(by_step[step].get(key)) for step in steps]) for key in keys}
    return {"step": np.array(steps), **columns}


def number(value: Any) -> float:
    """A finite float, or NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        return np.nan
    return float(value) if np.isfinite(value) else np.nan


def drawable(values: Float[np.ndarray, "N"], log: bool) -> Float[np.ndarray, "N"]:
    """Put NaN where an axis has no place for a value."""
    return np.where(values > 0, values, np.nan) if log else values


def draw_row(axes: Axes, row: Rows, columns: Mapping[str, np.ndarray], look: Theme) -> None:
    """Draw the lines of one panel and name them at their right ends."""
    labels = []
    for line in row.lines:
        values = drawable(columns[line.key], row.log)  # (N,)
        if np.isfinite(values).any():
            draw_line(axes, line, columns["step"], values, look)
            labels.append((values[np.isfinite(values)][-1], line))
    axes.margins(y=0.12)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    if row.log:
        scale_log(axes)
    x = (0.05 - LEFT) / (ONE_COLUMN - LEFT - RIGHT)
    place: dict[str, Any] = {"transform": axes.transAxes, "ha": "left", "va": "center", "multialignment": "center"}
    axes.text(x, 0.5, row.name, rotation=90, **place)
    label_ends(axes, labels, look)


def draw_line(axes: Axes, line: Line, steps: np.ndarray, values: np.ndarray, look: Theme) -> None:
    """Draw one curve with its gaps; a value alone between gaps becomes a dot."""
    colour, width = look.series[line.colour], 1.3 if line.dash == "-" else 1.0
    axes.plot(steps, values, color=colour, ls=line.dash, lw=width, gid=line.key, zorder=2 + line.colour)
    missing = np.isnan(np.concatenate([[np.nan], values, [np.nan]]))
    alone = ~missing[1:-1] & missing[:-2] & missing[2:]
    if alone.any():
        axes.plot(steps[alone], values[alone], ".", color=colour, ms=3, gid=f"{line.key}-alone")


def scale_log(axes: Axes) -> None:
    """Use a log axis with plain numbers: 1, 10, 100; also 3, 30 if it is short; even steps if very short."""
    axes.set_yscale("log", nonpositive="mask")
    low, high = axes.get_ylim()
    subs = (1.0,) if high / low > 300 else (1.0, 3.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=6) if high / low > 10 else MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def label_ends(axes: Axes, labels: list[tuple[float, Line]], look: Theme) -> None:
    """Write names and last values beside the right ends of the lines, apart where they would overlap."""
    axes.get_ylim()  # matplotlib settles the limits only when asked
    labels = sorted(labels, key=lambda label: label[0])
    places = axes.transAxes.inverted().transform(axes.transData.transform([(0, value) for value, _ in labels]))
    heights = apart(places[:, 1], 1.25 * SMALL / 72 / HIGH)
    for height, (value, line) in zip(heights, labels, strict=True):
        text = f"{line.label} {value:.4g}".strip() if line.last else line.label
        colour = look.series[line.colour]
        axes.text(1.03, height, text, transform=axes.transAxes, size=SMALL, color=colour, va="center_baseline")


def apart(heights: Float[np.ndarray, "N"], least: float) -> Float[np.ndarray, "N"]:
    """Push sorted heights apart until neighbours are `least` from each other; the rest stays where it is."""
    moved = np.array(heights, dtype=float)
    for _ in range(100):
        for index, gap in enumerate(np.diff(moved)):
            push = max(0.0, least - gap) / 2
            moved[index : index + 2] += (-push, push)
    return moved


def dress(axes: Axes, steps: np.ndarray, *, last: bool) -> None:
    """Share the x axis: numbers and name only under the last panel."""
    alone = steps[-1] == steps[0]
    axes.set_xlim(steps[0] - alone, steps[-1] + alone)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.tick_params(axis="x", labelbottom=last)
    if last:
        axes.set_xlabel("step", labelpad=2)
