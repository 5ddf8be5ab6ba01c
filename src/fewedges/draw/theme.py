"""How every picture looks, and how it is written: colours, sizes, reproducible files.

A drawing function works inside `styled(theme)`: matplotlib's settings are put back afterwards, and whatever
the user has in a matplotlibrc stays out of the picture. `save` writes the same bytes for the same figure.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from fewedges.errors import RecipeError

ONE_COLUMN, TWO_COLUMNS = 3.4, 7.0  # inches: the widths of a two-column paper
TITLE, BODY, CAPTION, SMALL = 8.0, 7.0, 6.5, 6.0  # points
FONT = "DejaVu Sans"  # the one font that comes with matplotlib
FAMILY: dict[Any, Any] = {"font.family": "sans-serif", "font.sans-serif": [FONT, "Verdana", "Arial"]}
FILES: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "fewedges", "pdf.fonttype": 42}
GAMMA = 0.4  # ink = weight ** GAMMA: a weight of 0.05 must be told from 0
KEY_WEIGHTS = (0.01, 0.1, 0.3, 1.0)  # the weights that a key shows
METADATA = {"svg": {"Date": None}, "png": {}, "pdf": {"CreationDate": None}}  # no time of day


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of one look. `series` is from Okabe and Ito; lines that meet differ in dash as well."""

    name: str
    paper: str
    ink: str
    muted: str
    faint: str
    """Guides, frames and the outline of unused nodes."""
    void: str
    """A closed gate."""
    closed: str
    """A head without any open gate."""
    series: tuple[str, ...]
    ramp: tuple[str, ...]
    """Attention weight 0 to 1, in even steps of ink."""

    @property
    def colours(self) -> LinearSegmentedColormap:
        """The ramp as a colour map of ink in [0, 1]."""
        return LinearSegmentedColormap.from_list(f"fewedges-{self.name}", self.ramp)

    def weight_colours(self, weights: np.ndarray) -> np.ndarray:
        """RGBA of attention weights in [0, 1], any shape (...) to (..., 4): one scale for every picture."""
        return self.colours(np.clip(weights, 0, 1) ** GAMMA)


LIGHT = Theme(
    name="light",
    paper="#ffffff",
    ink="#1a1a1a",
    muted="#595959",
    faint="#c4c4c4",
    void="#f4f4f4",
    closed="#d3cfc8",
    series=("#0072b2", "#d55e00", "#009e73", "#595959"),
    ramp=("#b4d3ea", "#7ab4dc", "#3a8fc7", "#00609c", "#00213d"),
)
DARK = Theme(
    name="dark",
    paper="#14171a",
    ink="#f0f0f0",
    muted="#b0b4b8",
    faint="#646a71",
    void="#1f2327",
    closed="#4b4843",
    series=("#56b4e9", "#e69f00", "#2fc59b", "#b0b4b8"),
    ramp=("#2a577d", "#3880b3", "#5caede", "#a3d6f4", "#eef8ff"),
)
THEMES = {theme.name: theme for theme in (LIGHT, DARK)}


@contextmanager
def styled(theme: str) -> Iterator[Theme]:
    """Set matplotlib's style for the length of a block and hand over the theme. RecipeError if unknown."""
    if theme not in THEMES:
        raise RecipeError(f"theme={theme!r}", "no such theme", f"one of {', '.join(THEMES)}")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings(THEMES[theme]))
        yield THEMES[theme]


def settings(theme: Theme) -> dict[Any, Any]:
    """The matplotlib settings of a theme."""
    ink = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.labelcolor", "ytick.labelcolor")
    sizes = ("font.size", "axes.labelsize", "xtick.labelsize", "ytick.labelsize")
    return {
        **dict.fromkeys(ink, theme.ink),
        **dict.fromkeys(sizes, BODY),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), theme.paper),
        **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), theme.muted),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
        **dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width"), 0.6),
        **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 2.5),
        **FAMILY,
        "figure.dpi": 100,
    }


def inches(figure: Figure) -> dict[str, Any]:
    """Keywords that place an artist in inches from the lower left corner."""
    return {"transform": figure.dpi_scale_trans}


def axes_at(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Add axes at a place given in inches."""
    wide, high = figure.get_size_inches()
    return figure.add_axes((left / wide, bottom / high, width / wide, height / high))


def save(figure: Figure, path_stem: str | Path, formats: Sequence[str] = ("svg", "png")) -> list[Path]:
    """Write `path_stem`.svg, .png (200 dots per inch), .pdf; return the paths in the order of `formats`.

    Same figure, same matplotlib: same bytes. Text in an SVG stays text. Folders are made; a file appears only
    when it is whole. RecipeError for a format that is not svg, png or pdf.
    """
    formats = [formats] if isinstance(formats, str) else list(formats)
    unknown = [name for name in formats if name not in METADATA]
    if unknown or not formats:
        raise RecipeError(f"formats={formats!r}", f"cannot write {unknown or 'nothing'}", "svg, png or pdf")
    stem = Path(path_stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    return [write(figure, stem.parent / f"{stem.name}.{name}", name) for name in formats]


def write(figure: Figure, path: Path, name: str) -> Path:
    """Write one file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(FILES | FAMILY)
        try:
            figure.savefig(part, format=name, dpi=200, metadata=METADATA[name])
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    return path
