"""Words in a picture: tokens made visible, texts measured and broken to fit, the heading of a panel."""

from functools import cache
from typing import Any, NamedTuple

from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.textpath import text_to_path

from fewedges.draw.panel import Panel
from fewedges.draw.theme import CAPTION, FONT, TITLE, Theme, inches

SPACES = str.maketrans({" ": "␣", "\n": "⏎", "\r": "↵", "\t": "⇥", "\xa0": "␣"})
LEADING = 1.2 / 72  # inches from line to line per point of size


class Words(NamedTuple):
    """One line of a heading: its text, size in points, and weight."""

    text: str
    size: float
    weight: str


def heading(panel: Panel, width: float) -> list[Words]:
    """The lines of a panel's title and caption in `width` inches, top to bottom."""
    title = [Words(line, TITLE, "bold") for line in wrap(panel.title, width, TITLE, "bold")]
    return title + [Words(line, CAPTION, "normal") for line in wrap(panel.caption, width, CAPTION)]


def heading_height(lines: list[Words]) -> float:
    """Height of a heading in inches."""
    return sum(line.size for line in lines) * LEADING


def draw_heading(figure: Figure, lines: list[Words], middle: float, bottom: float, look: Theme) -> None:
    """Write a heading centred on `middle`, its last line standing on `bottom` (inches)."""
    for text, size, weight in reversed(lines):
        style: dict[str, Any] = {
            "size": size,
            "weight": weight,
            "color": look.ink if weight == "bold" else look.muted,
        }
        figure.text(middle, bottom, text, ha="center", parse_math=False, **style, **inches(figure))
        bottom += size * LEADING


def visible(token: str, limit: int = 12) -> str:
    """Show a token: whitespace as symbols (␣ ⏎ ⇥), at most `limit` characters, an empty one as ∅."""
    token = legible(token.translate(SPACES)) or "∅"
    return token if len(token) <= limit else token[: limit - 1] + "…"


def legible(text: str) -> str:
    """Replace what the font cannot draw by ▯; matplotlib would warn and draw an empty box."""
    return "".join(c if c == "\n" or ord(c) in glyphs() else "▯" for c in text)


@cache
def glyphs() -> frozenset[int]:
    """The code points of the font."""
    path = font_manager.findfont(font_manager.FontProperties(family=FONT))
    return frozenset(code for code in font_manager.get_font(path).get_charmap() if code >= 32)


def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Width in inches of one line of text at `size` points."""
    font = font_manager.FontProperties(family=FONT, size=size, weight=weight)
    return text_to_path.get_text_width_height_descent(text, font, False)[0] / 72


def draw_title(figure: Figure, title: str, x: float, ha: str) -> None:
    """Write the title of a whole picture at its top, `x` inches from the left."""
    top = figure.get_size_inches()[1] - 0.06
    style: dict[str, Any] = {"size": TITLE, "ha": ha, "va": "top", "parse_math": False}
    figure.text(x, top, legible(title), **style, **inches(figure))


def wrap(text: str, width: float, size: float, weight: str = "normal") -> list[str]:
    """Break a text into lines of at most `width` inches; a longer word stays whole. No text, no line."""
    lines: list[str] = []
    for paragraph in legible(text).splitlines():
        lines.append("")
        for word in paragraph.split():
            longer = f"{lines[-1]} {word}".strip()
            fits = not lines[-1] or text_width(longer, size, weight) <= width
            lines = [*lines[:-1], longer] if fits else [*lines, word]
    return lines
