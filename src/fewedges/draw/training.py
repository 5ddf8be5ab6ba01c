"""Held-out loss of models trained side by side, against steps and against seconds: who gets there first?

`races` draws what `scripts/train_pixelated.py` writes. Both panels share one scale of loss, cut above what all models
pass in the first sixth of the steps; names stand at the right, at the heights of the last losses.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fewedges.draw.hardware import Look
from fewedges.draw.lines import apart
from fewedges.draw.text import draw_title, legible, wrap
from fewedges.draw.theme import SMALL, TITLE, TWO_COLUMNS, Theme, axes_at, inches, styled
from fewedges.errors import DataError

LEFT, NAMES, GAP, HIGH, BELOW, ABOVE = 0.5, 1.46, 0.14, 2.2, 0.36, 0.26  # inches around the panels
WIDE = (TWO_COLUMNS - LEFT - 2 * NAMES - GAP) / 2
LONGER, BASE = "-longer", "dense"
LONG_DASH: Any = (0, (6, 1.6))
LOOKS = {
    "dense": Look("#1a1a1a", "#f0f0f0", "-", "", 1.3),
    "pixelated": Look("#0072b2", "#56b4e9", "-", "", 1.5),
    "random": Look("#d55e00", "#ff9d5c", (0, (3, 1, 1, 1, 1, 1)), "", 1.2),
    "low-rank": Look("#009e73", "#2fc59b", (0, (1, 1)), "", 1.3),
    "small": Look("#8b5a9f", "#d6a2e8", "-", "", 1.0),
}
WORDS = {"random": "random cells", "low-rank": "low rank only", "small": "smaller dense"}
OTHER = Look("#a6761d", "#e0b860", "-", "", 1.1)


class Arm(NamedTuple):
    """One model's curve over N evaluations, and when it came to the dense model's last loss (None: it did not)."""

    name: str
    step: np.ndarray
    seconds: np.ndarray
    loss: np.ndarray
    reached: float | None
    ratio: float | None

    @property
    def look(self) -> Look:
        """That of its kind; only what was trained longer has long dashes."""
        look = LOOKS.get(self.name.removesuffix(LONGER), OTHER)
        return look._replace(dash=LONG_DASH) if self.name.endswith(LONGER) else look

    @property
    def label(self) -> str:
        """Such as "pixelated, longer"."""
        return label_of(self.name)


def races(found: Mapping[str, Any], *, title: str = "", theme: str = "light") -> Figure:
    """Draw held-out loss against steps and against seconds, a line a model, names and last losses at the right.

    `found` is the json of `scripts/train_pixelated.py`. Over seconds a dashed line is the dense model's last loss; a
    dot is where another first comes to it, and its name says at which part of the dense model's time ("0.70×"), or
    that it is not reached. The learning rate of every arm stands at the bottom. A loss that is no number leaves a gap.
    DataError without a curve.
    """
    arms = arms_of(found)
    with styled(theme) as look:
        foot = [line for text in (facts_of(found), rates_of(found)) for line in wrap(text, TWO_COLUMNS - 0.2, SMALL)]
        bottom = BELOW + 0.12 * len(foot) + 0.06
        figure = Figure(figsize=(TWO_COLUMNS, bottom + HIGH + ABOVE + 0.2 * bool(title)))
        limits = loss_limits(arms)
        for place, (key, name) in enumerate((("step", "step"), ("seconds", "seconds of training"))):
            left = LEFT + place * (WIDE + NAMES + GAP)
            axes = axes_at(figure, left, bottom, WIDE, HIGH)
            draw_lines(axes, arms, key, limits, look)
            dress(axes, name, first=place == 0)
            heading: dict[str, Any] = {"size": TITLE, "weight": "bold", "ha": "center", **inches(figure)}
            figure.text(left + WIDE / 2, bottom + HIGH + 0.08, ("by steps", "by wall clock")[place], **heading)
            labels = [f"{a.label} {a.loss[-1]:.3f}" if key == "step" else timed_label(a) for a in arms]
            draw_names(axes, arms, key, [*labels, ("last loss", "time to dense's last loss")[place]], look)
        draw_reached(figure.axes[1], arms, look)
        figure.text(
            0.06, bottom + HIGH / 2, "held-out loss (nats per byte)", rotation=90, va="center", **inches(figure)
        )
        for index, line in enumerate(reversed(foot)):
            style: dict[str, Any] = {"size": SMALL, "color": look.muted, "ha": "center", "parse_math": False}
            figure.text(TWO_COLUMNS / 2, 0.06 + 0.12 * index, line, **style, **inches(figure))
        draw_title(figure, title, TWO_COLUMNS / 2, "center")
        return figure


def arms_of(found: Mapping[str, Any]) -> list[Arm]:
    """The arms with a finite loss after their first step, as arrays."""
    arms = []
    for name, arm in found.get("arms", {}).items():
        columns = {key: [row.get(key) for row in arm["curve"]] for key in ("step", "seconds", "loss")}
        step, seconds, loss = (np.array(column, dtype=float) for column in columns.values())
        if np.isfinite(loss[1:]).any():
            last = np.flatnonzero(np.isfinite(loss))[-1] + 1
            known = (arm.get("seconds_to_dense_loss"), arm.get("ratio"))
            arms.append(Arm(name, step[:last], seconds[:last], loss[:last], *known))
    if not arms:
        found_there = f"{len(found.get('arms', {}))} arms, none with a loss"
        raise DataError("races(found)", found_there, "the json of scripts/train_pixelated.py")
    return arms


def loss_limits(arms: Sequence[Arm]) -> tuple[float, float]:
    """From a little under the lowest loss to the highest after a sixth of the shortest arm's steps."""
    early = min(arm.step[-1] for arm in arms) / 6
    high = max(np.nanmax(arm.loss[arm.step >= early]) for arm in arms)
    low = min(np.nanmin(arm.loss) for arm in arms)
    room = max(high - low, 1e-3)
    return low - 0.06 * room, high + 0.02 * room


def draw_lines(axes: Axes, arms: Sequence[Arm], key: str, limits: tuple[float, float], look: Theme) -> None:
    """Draw the curves, each with a dot at its end."""
    axes.set(xlim=(0, 1.02 * max(getattr(arm, key)[-1] for arm in arms)), ylim=limits)
    for arm in arms:
        style, x = arm.look, getattr(arm, key)
        colour = style.colour(look)
        axes.plot(
            x, arm.loss, color=colour, ls=style.dash, lw=style.width, zorder=3 + style.width, gid=f"{key}-{arm.name}"
        )
        axes.plot(x[-1:], arm.loss[-1:], "o", ms=2.8, mfc=colour, mec=look.paper, mew=0.4, zorder=7)


def draw_names(axes: Axes, arms: Sequence[Arm], key: str, labels: Sequence[str], look: Theme) -> None:
    """Write each label at the right at the height of its arm's end, apart from the others, a thin line leading there.

    The last label says what the numbers are, and stands above the others.
    """
    order = sorted(range(len(arms)), key=lambda place: arms[place].loss[-1])
    ends = [axes.transAxes.inverted().transform(axes.transData.transform(end_of(arms[place], key))) for place in order]
    heights = apart(np.array([end[1] for end in ends]), 1.3 * SMALL / 72 / HIGH)
    heights += max(0.0, 0.01 - heights[0])
    for place, end, height in zip(order, ends, heights, strict=True):
        colour = arms[place].look.colour(look)
        x, y = [end[0], 1.0, 1.05], [end[1], end[1], height]
        axes.plot(x, y, color=colour, lw=0.4, alpha=0.5, transform=axes.transAxes, clip_on=False, zorder=2)
        write_name(axes, height, labels[place], colour)
    write_name(axes, heights[-1] + 1.6 * SMALL / 72 / HIGH, labels[-1], look.muted)


def write_name(axes: Axes, height: float, text: str, colour: str) -> None:
    """One line at the right of a panel."""
    style: dict[str, Any] = {"size": SMALL, "color": colour, "va": "center_baseline", "parse_math": False}
    axes.text(1.065, height, legible(text), transform=axes.transAxes, **style)


def end_of(arm: Arm, key: str) -> tuple[float, float]:
    """The last point of a curve."""
    return float(getattr(arm, key)[-1]), float(arm.loss[-1])


def timed_label(arm: Arm) -> str:
    """The name, and when the dense model's last loss was reached, as a part of its time."""
    if arm.name == BASE:
        return arm.label
    return f"{arm.label} {arm.ratio:.2f}×" if arm.ratio is not None else f"{arm.label}: not reached"


def draw_reached(axes: Axes, arms: Sequence[Arm], look: Theme) -> None:
    """The dense model's last loss as a dashed line, and dots where others come to it."""
    dense = [arm for arm in arms if arm.name == BASE]
    if not dense:
        return
    level = dense[0].loss[-1]
    axes.axhline(level, color=look.muted, lw=0.6, ls=(0, (4, 2)), zorder=1, gid="dense-loss")
    for arm in arms:
        if arm.reached is not None and arm.name != BASE:
            colour = arm.look.colour(look)
            mark: dict[str, Any] = {"ms": 3.6, "mfc": look.paper, "mec": colour, "mew": 1.0}
            axes.plot([arm.reached], [level], "o", zorder=8, gid=f"reached-{arm.name}", **mark)


def dress(axes: Axes, name: str, *, first: bool) -> None:
    """Plain numbers; losses at the first panel only."""
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.tick_params(labelsize=SMALL, labelleft=first)
    axes.set_xlabel(name, labelpad=1.5)


def facts_of(found: Mapping[str, Any]) -> str:
    """One line: where, what, and what the device would allow."""
    protocol, arms = found.get("protocol", {}), found.get("arms", {})
    known = [found.get("device")]
    if {"width", "layers", "batch", "length"} <= protocol.keys():
        known.append(f"GPT-2 layout, {protocol['layers']} layers of width {protocol['width']:,}")
        known.append(f"{protocol['batch'] * protocol['length']:,} bytes a step")
    if BASE in arms and "pixelated" in arms:
        sizes = [arms[name]["parameters"] / 1e6 for name in (BASE, "pixelated")]
        known.append(f"{sizes[0]:,.0f} M parameters dense, {sizes[1]:,.0f} M pixelated")
        paces = [arms[name]["ms_p50"] for name in (BASE, "pixelated")]
        limit = f" (limit {arms['pixelated']['limit']:.2f}×)" if "limit" in arms["pixelated"] else ""
        known.append(f"a step {paces[0] / paces[1]:.2f}× faster{limit}")
    return "; ".join(filter(None, known))


def rates_of(found: Mapping[str, Any]) -> str:
    """The learning rate of every arm, of one trained longer where it is another: a lead may be one of the rate."""
    rates = {name: arm["learning_rate"] for name, arm in found.get("arms", {}).items() if "learning_rate" in arm}
    alike = {name for name in rates if name.endswith(LONGER) and rates.get(name.removesuffix(LONGER)) == rates[name]}
    known = [f"{label_of(name)} {rate:g}" for name, rate in rates.items() if name not in alike]
    return f"learning rates: {', '.join(known)}" if known else ""


def label_of(name: str) -> str:
    """An arm's name in words, such as "pixelated, longer"."""
    kind = name.removesuffix(LONGER)
    return WORDS.get(kind, kind) + (", longer" if name.endswith(LONGER) else "")
