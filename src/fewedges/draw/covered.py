"""One red element costs the blue block: which blocks of a matrix its kept weights touch, from a real pattern.

A machine that moves whole blocks pays for `cover(b)`, not for density (`fewedges.sparsify.pattern`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, PathPatch, Rectangle
from matplotlib.path import Path

from fewedges.draw.text import draw_title, legible, text_width
from fewedges.draw.theme import BODY, SMALL, TITLE, Theme, axes_at, inches, styled
from fewedges.errors import DataError

RED = {"light": "#c8102e", "dark": "#ff7a70"}
MOST = 40_000  # single elements: more are not seen, and the file grows
DOT = 0.0055  # inches: an element is drawn at least this large, and where that enlarges it the key says so
SIDE, ZOOM, APART, EDGE = 1.76, 0.86, 0.22, 0.08  # inches: a matrix, one of its blocks, between them, beside all
UNDER, OVER = 0.62, 0.24  # inches: under and over the matrices
KEY = ("kept weight", "the block moved with it", "block left alone")


@dataclass(frozen=True, kw_only=True, eq=False)
class Covered:
    """A pattern of R x C weights and the b x b blocks it touches. DataError if b does not divide it."""

    title: str
    """Such as "1% anywhere"."""
    mask: Bool[np.ndarray, "R C"]
    """The kept weights, as `Pattern.mask()` gives them."""
    block: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", np.asarray(self.mask))
        if self.mask.ndim != 2 or self.mask.dtype != bool or not self.mask.any():
            found = f"{self.mask.dtype} of shape {self.mask.shape}"
            raise DataError(f"Covered({self.title!r})", found, "a boolean matrix with at least one kept weight")
        if any(side % self.block for side in self.mask.shape):
            found = f"{self.mask.shape}, which blocks of {self.block} do not divide"
            raise DataError(f"Covered({self.title!r})", found, "a block that divides both sides")

    @property
    def blocks(self) -> Bool[np.ndarray, "r b c b"]:
        """The mask, cut into blocks."""
        rows, columns = self.mask.shape
        return self.mask.reshape(rows // self.block, self.block, columns // self.block, self.block)

    @property
    def touched(self) -> Bool[np.ndarray, "r c"]:
        """Which blocks hold a kept weight."""
        return np.asarray(self.blocks.any((1, 3)))

    def facts(self) -> tuple[str, str, str]:
        """The lines under the picture: density, cover, and what that makes for one kept weight."""
        kept, moved = int(self.mask.sum()), int(self.touched.sum()) * self.block**2
        density, cover = f"density {percent(self.mask)}", f"cover({self.block}) {percent(self.touched)}"
        return (
            density,
            cover,
            f"{kept:,} kept, {moved:,} moved: {moved / kept:{',.0f' if moved >= 10 * kept else '.2g'}}×",
        )


def percent(kept: np.ndarray) -> str:
    """The fraction that is True: 1.2%; 100% only if it is all, 0% only if it is none."""
    text = f"{100 * kept.mean():.1f}".removesuffix(".0")
    if text == "0" and kept.any():
        return "<0.1%"
    return f"{'99.9' if text == '100' and not kept.all() else text}%"


def covered(panels: Sequence[Covered], *, title: str = "", theme: str = "light") -> Figure:
    """Draw patterns side by side, kept weights red on the pale blue blocks they touch.

    Beside the first, one of its blocks is drawn large, with the fewest kept weights. Under each stand density, cover,
    and how many weights are moved for one that is kept. Weights too small to be seen are drawn larger, and the key
    under all says how much. DataError without a panel.
    """
    panels = list(panels)
    if not panels:
        raise DataError("covered(panels)", "no panel", "at least one Covered")
    with styled(theme) as look:
        width = 2 * EDGE + len(panels) * SIDE + ZOOM + len(panels) * APART
        bottom, extra = UNDER, 0.2 if title else 0.0
        figure = Figure(figsize=(width, UNDER + SIDE + OVER + extra))
        left, drawn = EDGE, []
        for index, panel in enumerate(panels):
            axes = axes_at(figure, left, bottom, SIDE, SIDE)
            draw_pattern(axes, panel, look, SIDE, f"-{index}")
            write_facts(figure, panel, left + SIDE / 2, bottom, look)
            drawn.append(axes)
            left += SIDE + APART + (ZOOM + APART if index == 0 else 0)
        draw_zoom(figure, drawn[0], panels[0], look)
        draw_key(figure, max(map(enlarged, panels)), look)
        draw_title(figure, title, width / 2, "center")
        return figure


def draw_pattern(axes: Axes, panel: Covered, look: Theme, side: float, name: str) -> None:
    """Draw touched blocks, then kept weights: whole blocks as one square, others one by one."""
    rows, columns = panel.mask.shape
    b = panel.block
    whole = panel.blocks.all((1, 3))
    single = panel.mask & ~whole.repeat(b, 0).repeat(b, 1)
    if single.sum() > MOST:
        raise DataError(
            f"Covered({panel.title!r})", f"{single.sum():,} single weights", f"a matrix with up to {MOST:,}"
        )
    red = RED[look.name]
    axes.add_patch(squares(np.argwhere(panel.touched) * b, b, look.ramp[0], gid=f"touched{name}", zorder=1))
    axes.add_patch(squares(np.argwhere(whole) * b, b, red, gid=f"whole{name}", zorder=2))
    axes.add_patch(dots(np.argwhere(single), side / max(rows, columns), red, gid=f"single{name}", zorder=3))
    for place in range(0, max(rows, columns) + 1, b):
        for draw, most, along in ((axes.axhline, rows, columns), (axes.axvline, columns, rows)):
            if place <= most and along:
                draw(place, color=look.paper, lw=0.5 * min(1.0, 16 * b / max(rows, columns)), zorder=4)
    frame(axes, rows, columns, look)


def frame(axes: Axes, rows: int, columns: int, look: Theme) -> None:
    """Rows downwards, no ticks, a thin frame on the ground of untouched blocks."""
    axes.set(xlim=(0, columns), ylim=(rows, 0), aspect="equal", xticks=(), yticks=(), facecolor=look.void)
    for spine in axes.spines.values():
        spine.set(visible=True, color=look.faint, linewidth=0.6)


def squares(places: Any, size: int, colour: str, **style: Any) -> PathPatch:
    """Squares with their upper left corner at (row, column), as one path."""
    corners = size * np.array([(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)])
    points = np.asarray(places).reshape(-1, 1, 2)[..., ::-1] + corners  # (N, 5, 2)
    codes = np.tile([Path.MOVETO, *[Path.LINETO] * 3, Path.CLOSEPOLY], len(points))
    return PathPatch(Path(points.reshape(-1, 2), codes), fc=colour, lw=0, **style)


def dots(places: Any, inch: float, colour: str, **style: Any) -> PathPatch:
    """Single elements of `inch` inches: strokes as wide as long, half the bytes of squares; at least DOT large."""
    wide = enlargement(inch)  # in elements
    ends = np.array([(0.5 - wide / 2, 0.5), (0.5 + wide / 2, 0.5)])
    points = np.asarray(places).reshape(-1, 1, 2)[..., ::-1] + ends  # (N, 2, 2)
    codes = np.tile([Path.MOVETO, Path.LINETO], len(points))
    return PathPatch(
        Path(points.reshape(-1, 2), codes), fc="none", ec=colour, lw=72 * inch * wide, capstyle="butt", **style
    )


def enlargement(inch: float) -> float:
    """How many times larger than it is an element of `inch` inches is drawn."""
    return max(1.0, DOT / inch)


def enlarged(panel: Covered) -> float:
    """How many times larger than they are the single weights of a panel are drawn; 1 where there are none."""
    whole = panel.blocks.all((1, 3), keepdims=True)
    return enlargement(SIDE / max(panel.mask.shape)) if (panel.blocks & ~whole).any() else 1.0


def draw_key(figure: Figure, times: float, look: Theme) -> None:
    """Say what red, blue and pale mean, in one row at the bottom."""
    colours = (RED[look.name], look.ramp[0], look.void)
    names = (KEY[0] + (f" (drawn {times:.2g}× as wide as it is)" if times > 1.05 else ""), *KEY[1:])
    widths = [text_width(name, SMALL) + 0.3 for name in names]
    x, y, place = (figure.get_size_inches()[0] - sum(widths) + 0.16) / 2, 0.08, inches(figure)
    for name, colour, wide in zip(names, colours, widths, strict=True):
        figure.add_artist(Rectangle((x, y), 0.08, 0.08, fc=colour, ec=look.faint, lw=0.4, **place))
        figure.text(x + 0.13, y + 0.04, name, size=SMALL, color=look.ink, va="center_baseline", **place)
        x += wide


def clearest(panel: Covered) -> tuple[int, int]:
    """Row and column of the block to be shown: the fewest kept weights, well inside it, near the right middle."""
    rows, columns = panel.touched.shape

    def order(place: np.ndarray) -> tuple[int, bool, float]:
        r, c = place
        kept = np.argwhere(panel.blocks[r, :, c]) + 0.5
        outside = bool(np.abs(kept - panel.block / 2).max() > panel.block / 4)
        return len(kept), outside, float(abs(r - rows / 2) + abs(columns - c))

    row, column = min(np.argwhere(panel.touched), key=order)
    return int(row), int(column)


def draw_zoom(figure: Figure, axes: Axes, panel: Covered, look: Theme) -> None:
    """Draw one block large beside the first panel, with lines to where it is."""
    b = panel.block
    row, column = clearest(panel)
    part = Covered(title=panel.title, mask=panel.blocks[row, :, column], block=b)
    left, bottom = EDGE + SIDE + APART, UNDER + (SIDE - ZOOM) / 2
    inset = axes_at(figure, left, bottom, ZOOM, ZOOM)
    draw_pattern(inset, part, look, ZOOM, "-zoom")
    for spine in inset.spines.values():
        spine.set(color=look.ink, linewidth=0.8)
    axes.add_patch(Rectangle((column * b, row * b), b, b, fill=False, ec=look.ink, lw=0.8, zorder=6))
    for below in (0, 1):
        ends = ((column + 1) * b, (row + below) * b), (0, 1 - below)
        line = ConnectionPatch(*ends, "data", "axes fraction", axesA=axes, axesB=inset)
        line.set(color=look.ink, linewidth=0.5, zorder=7)
        figure.add_artist(line)
    kept = int(part.mask.sum())
    lines = (f"one {b} × {b} block:", f"{kept:,} weight{'s'[: kept != 1]} kept,", f"{b * b:,} moved")
    for index, text in enumerate(lines):
        place: dict[str, Any] = {"ha": "center", "va": "top", "size": SMALL, "color": look.muted, **inches(figure)}
        figure.text(left + ZOOM / 2, bottom - 0.05 - 0.11 * index, text, **place)


def write_facts(figure: Figure, panel: Covered, middle: float, bottom: float, look: Theme) -> None:
    """The title over a pattern; density and cover under it, and what is moved."""
    style: dict[str, Any] = {"ha": "center", "parse_math": False, **inches(figure)}
    figure.text(middle, bottom + SIDE + 0.07, legible(panel.title), size=TITLE, weight="bold", **style)
    density, cover, moved = panel.facts()
    figure.text(middle, bottom - 0.17, f"{density}     {cover}", size=BODY, color=look.ink, **style)
    figure.text(middle, bottom - 0.31, moved, size=SMALL, color=look.muted, **style)
