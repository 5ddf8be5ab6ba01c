"""The attention maps of a circuit's heads over the tokens of a prompt: sparse above, dense below.

A row per model, a column per head; in a map, queries run down and keys run right. The attention edges that carry the
task are outlined (dashed: those that work against it), their tokens coloured at the margins, and what there is to say
about them stands in the empty corner of the map.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fewedges.draw.circuit import NODE
from fewedges.draw.heads import DOTS, mosaic
from fewedges.draw.panel import Panel
from fewedges.draw.text import LEADING, Words, draw_title, legible, text_width, visible, wrap
from fewedges.draw.theme import (
    CAPTION,
    GAMMA,
    KEY_WEIGHTS,
    ONE_COLUMN,
    SMALL,
    TITLE,
    TWO_COLUMNS,
    Theme,
    axes_at,
    inches,
    styled,
)
from fewedges.errors import DataError

MOST = 8  # heads in a row
WIDEST = 1.75  # inches: the side of a map
GAP, BETWEEN, RIGHT, KEY = 0.1, 0.16, 0.06, 0.4  # inches: between maps, between rows, right of them, the key
BAR, HIGH = 0.85, 0.09  # inches: the colour bar, and its height
WEIGHT = "attention weight"
CLOSED = ("closed gate", "closed head")
OUTLINED = ("helps the task", "works against it")
LINE = 0.13  # inches from line to line of a row's name
NOTES = (5.2, 4.7, 4.2)  # points: the largest in which a note's first line fits
FINEST, LARGEST = 4.0, 6.0  # points of a token at the margin; finer ones are left out but for those of marks


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadMaps:
    """Some heads of one model: a row of the picture. DataError for a head it has not, or a mark at a closed gate."""

    panel: Panel
    heads: Sequence[str]
    """Such as a23.h3, left to right."""
    marks: Mapping[tuple[int, int, int, int], float] = field(default_factory=dict)
    """(layer, head, query, key) of the edges to outline -> what they are worth to the task, of which the sign is
    drawn; edges of heads that are not drawn are left out."""
    notes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Per head, lines for the empty corner of its map; those that do not fit there are left out."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", tuple(self.heads))
        places = [self.place(name) for name in self.heads]
        asked = f"maps of {self.panel.title!r}"
        if not 1 <= len(places) <= MOST or len(set(places)) < len(places):
            raise DataError(asked, f"{len(places)} heads", f"1 to {MOST} different ones in a row")
        for mark in self.marks:
            if len(mark) != 4 or min(mark) < 0 or any(np.array(mark) >= self.panel.open.shape):
                raise DataError(asked, f"mark {mark}", f"(layer, head, query, key) below {self.panel.open.shape}")
            if not self.panel.open[mark]:
                raise DataError(asked, f"mark {mark} is a closed gate", "edges of the same model and prompt")

    def place(self, name: str) -> tuple[int, int]:
        """(layer, head) of a name such as a3.h7."""
        found = NODE.fullmatch(name)
        layers, heads = self.panel.open.shape[:2]
        if not found or found[2] != "h" or int(found[1]) >= layers or int(found[3]) >= heads:
            raise DataError(
                f"maps of {self.panel.title!r}", f"no head {name!r}", f"a0.h0 to a{layers - 1}.h{heads - 1}"
            )
        return int(found[1]), int(found[3])

    def marked(self, name: str) -> dict[tuple[int, int], float]:
        """(query, key) -> worth of the marks of a head."""
        return {mark[2:]: worth for mark, worth in self.marks.items() if mark[:2] == self.place(name)}


def maps(rows: Sequence[HeadMaps], *, title: str = "", theme: str = "light") -> Figure:
    """Draw a row of maps per model, on one scale of weights; at most two columns of a paper wide.

    Colours are those of `heads`: a closed gate is nearly paper, a head without open gates grey. DataError if rows
    differ in prompt or in their number of heads.
    """
    rows = list(rows)
    shapes = {(row.panel.tokens, len(row.heads)) for row in rows}
    if len(shapes) != 1:
        found = f"{len(shapes)} different prompts or numbers of heads" if shapes else "no row"
        raise DataError("maps of heads", found, "one or more rows with the same prompt and as many heads each")
    with styled(theme) as look:
        plan = arrange(rows, title)
        figure = Figure(figsize=(plan.width, plan.height))
        for number, row in enumerate(rows):
            draw_row(figure, row, plan, look, number, named=number == 0 or row.heads != rows[0].heads)
        for column in range(plan.count):
            keys = best([(key, x) for row in rows for (_, key), x in row.marked(row.heads[column]).items()])
            draw_keys(figure, plan, look, column, keys)
        worth = [x for row in rows for name in row.heads for x in row.marked(name).values()]
        draw_key(figure, plan, look, worth)
        draw_title(figure, title, plan.width / 2, "center")
        return figure


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where everything goes, in inches."""

    tokens: tuple[str, ...]
    """As they are written at the margins."""
    count: int
    rows: int
    side: float
    size: float
    """Of a token in points."""
    names: float
    """Room for the names of rows at the left."""
    margin: float
    """Room for tokens at the left, and below the last row."""
    head: float
    """Room for names above each row but the first, which always has it."""
    above: float

    @property
    def cell(self) -> float:
        return self.side / len(self.tokens)

    @property
    def width(self) -> float:
        return max(ONE_COLUMN, self.drawn)

    @property
    def drawn(self) -> float:
        """Width of a row with its margins."""
        return self.names + self.margin + self.count * self.side + (self.count - 1) * GAP + RIGHT

    @property
    def key(self) -> float:
        """Room for the key: one line, or two."""
        return KEY if key_width((*CLOSED, *OUTLINED)) <= self.width else KEY + 0.18

    @property
    def height(self) -> float:
        return self.key + self.margin + self.rows * (self.side + BETWEEN + self.head) + self.above - BETWEEN - self.head

    def left(self, column: int) -> float:
        """Left edge of a map."""
        return (self.width - self.drawn) / 2 + self.names + self.margin + column * (self.side + GAP)

    def bottom(self, row: int) -> float:
        """Lower edge of a map; rows run down."""
        return self.key + self.margin + (self.rows - 1 - row) * (self.side + BETWEEN + self.head)


def arrange(rows: list[HeadMaps], title: str) -> Plan:
    """Choose the side of a map so that all fit two columns, and cells that are whole dots of a PNG."""
    tokens = tuple(visible(token) for token in rows[0].panel.tokens)
    count, widest = len(rows[0].heads), max(text_width(token, LARGEST, "bold") for token in tokens)
    names = [0.06 + LINE * len(name_of(row, min(WIDEST, 5.2 / count))) for row in rows]
    room = (TWO_COLUMNS - max(names) - widest - 0.07 - RIGHT - (count - 1) * GAP) / count
    cell = max(1, int(min(room, WIDEST) * DOTS / len(tokens))) / DOTS
    size = float(np.clip(0.8 * 72 * cell, FINEST, LARGEST))
    return Plan(
        tokens=tokens,
        count=count,
        rows=len(rows),
        side=cell * len(tokens),
        size=size,
        names=0.06 + LINE * max(len(name_of(row, cell * len(tokens))) for row in rows),
        margin=max(text_width(token, size, "bold") for token in tokens) + 0.07,
        head=0.16 if any(row.heads != rows[0].heads for row in rows) else 0.0,
        above=0.2 + (0.22 if title else 0.0),
    )


def name_of(row: HeadMaps, width: float) -> list[Words]:
    """A row's name in lines: title, then caption."""
    lines = [Words(line, TITLE, "bold") for line in wrap(row.panel.title, width, TITLE, "bold")]
    return lines + [Words(line, CAPTION, "normal") for line in wrap(row.panel.caption, width, CAPTION)]


def draw_row(figure: Figure, row: HeadMaps, plan: Plan, look: Theme, number: int, *, named: bool) -> None:
    """Draw the maps of one model, its name and its query tokens at the left."""
    bottom = plan.bottom(number)
    for column, name in enumerate(row.heads):
        axes = axes_at(figure, plan.left(column), bottom, plan.side, plan.side)
        draw_map(axes, row, name, plan, look)
        axes.images[0].set_gid(f"map-{number}-{column}")
        if named:
            middle = plan.left(column) + plan.side / 2
            figure.text(
                middle, bottom + plan.side + 0.05, name, ha="center", size=TITLE, weight="bold", **inches(figure)
            )
    queries = best([(query, x) for name in row.heads for (query, _), x in row.marked(name).items()])
    for token in shown(plan, queries):
        height = bottom + plan.side - (token + 0.5) * plan.cell
        style = token_style(look, plan, queries.get(token))
        figure.text(plan.left(0) - 0.04, height, plan.tokens[token], ha="right", **style, **inches(figure))
    style = {"rotation": 90, "ha": "center", "va": "center", "parse_math": False, **inches(figure)}
    for line, (text, size, weight) in enumerate(name_of(row, plan.side)):
        colour = look.ink if weight == "bold" else look.muted
        x, y = plan.left(0) - plan.margin - plan.names + 0.09 + line * LINE, bottom + plan.side / 2
        figure.text(x, y, text, size=size, weight=weight, color=colour, **style)


def draw_map(axes: Axes, row: HeadMaps, name: str, plan: Plan, look: Theme) -> None:
    """Draw one head: weights, outlines of the marked edges with their way to the margins, and its note."""
    axes.set_axis_off()
    (layer, head), tokens = row.place(name), len(plan.tokens)
    one = np.s_[layer : layer + 1, head : head + 1]
    image = mosaic(row.panel.weights[one], row.panel.open[one], look)[:tokens, :tokens]
    axes.imshow(image, aspect="auto", interpolation="none")
    thick = float(np.clip(72 * plan.cell * 0.16, 0.5, 1.0))
    wide = 1 + thick / (72 * plan.cell)  # around the cell, not over it
    for (query, key), worth in row.marked(name).items():
        colour, dash = outline(look, worth)
        guide: dict[str, Any] = {"color": colour, "lw": 0.35, "alpha": 0.6, "dashes": (2, 2)}
        axes.plot([-0.5, key - 0.5], [query, query], **guide)
        axes.plot([key, key], [query + 0.5, tokens - 0.5], **guide)
        box: dict[str, Any] = {"fc": "none", "ec": colour, "ls": dash, "lw": thick, "clip_on": False, "zorder": 3}
        x, y = key - wide / 2, query - wide / 2
        axes.add_patch(Rectangle((x, y), wide, wide, gid="mark", **box))
    axes.set_xlim(-0.5, tokens - 0.5)
    axes.set_ylim(tokens - 0.5, -0.5)
    place: dict[str, Any] = {"ha": "right", "va": "top", "transform": axes.transAxes, "parse_math": False}
    lines, size = fitting(row.notes.get(name, ()), plan)
    for line, text in enumerate(lines):
        height = 1 - (0.02 + line * LEADING * size) / plan.side
        axes.text(1.0, height, text, size=size, color=look.muted, **place)


def fitting(notes: Sequence[str], plan: Plan) -> tuple[list[str], float]:
    """The first lines of a note that stay clear of the diagonal, and their size."""
    for size in NOTES:
        wide = [text_width(legible(text), size) + 0.02 + n * LEADING * size for n, text in enumerate(notes, 1)]
        if wide and wide[0] + plan.cell <= plan.side:
            many = next((n for n, x in enumerate(wide) if x + plan.cell > plan.side), len(wide))
            return [legible(text) for text in notes[:many]], size
    return [], NOTES[-1]


def best(worths: Sequence[tuple[int, float]]) -> dict[int, float]:
    """Per token, the largest worth of its marks."""
    return {token: max(x for other, x in worths if other == token) for token, _ in worths}


def outline(look: Theme, worth: float) -> tuple[str, Any]:
    """Colour and dash of what helps the task, or works against it."""
    return (look.series[1], "-") if worth >= 0 else (look.series[2], (0, (1.6, 0.9)))


def draw_keys(figure: Figure, plan: Plan, look: Theme, column: int, marked: Mapping[int, float]) -> None:
    """Write the key tokens below a column."""
    for place in shown(plan, marked):
        x = plan.left(column) + (place + 0.5) * plan.cell
        style = {**token_style(look, plan, marked.get(place)), "va": "top", "ha": "center", "rotation": 90}
        figure.text(x, plan.bottom(plan.rows - 1) - 0.04, plan.tokens[place], **style, **inches(figure))


def shown(plan: Plan, marked: Iterable[int]) -> list[int]:
    """The tokens that are written at a margin: all where they fit, else those of marks that do not overlap."""
    if 72 * plan.cell >= plan.size:
        return list(range(len(plan.tokens)))
    kept: list[int] = []
    for place in sorted(marked, reverse=True):
        if not kept or 72 * plan.cell * (kept[-1] - place) >= plan.size:
            kept.append(place)
    return kept


def token_style(look: Theme, plan: Plan, worth: float | None) -> dict[str, Any]:
    """How a token is written at a margin; None: none of its edges is marked."""
    colour, weight = (look.muted, "normal") if worth is None else (outline(look, worth)[0], "bold")
    return {"color": colour, "weight": weight, "size": plan.size, "va": "center_baseline", "parse_math": False}


def draw_key(figure: Figure, plan: Plan, look: Theme, worths: Sequence[float]) -> None:
    """Explain colours, and outlines if there are any, at the bottom."""
    void, closed = (
        (name, face, (look.faint, "-")) for name, face in zip(CLOSED, (look.void, look.closed), strict=True)
    )
    marks = [(name, "none", outline(look, x)) for name, x in zip(OUTLINED, (1.0, -1.0), strict=True)]
    marks = [mark for mark, helps in zip(marks, (True, False), strict=True) if any((x >= 0) == helps for x in worths)]
    single = plan.key == KEY
    words = [void, closed, *(marks if single else [])]
    y = plan.key - 0.2
    x = (plan.width - key_width([word[0] for word in words])) / 2
    figure.text(x, y + HIGH / 2, WEIGHT, va="center", size=SMALL, color=look.muted, **inches(figure))
    x += text_width(WEIGHT, SMALL) + 0.08
    bar = axes_at(figure, x, y, BAR, HIGH)
    shades = ScalarMappable(norm=PowerNorm(GAMMA, 0, 1), cmap=look.colours)
    figure.colorbar(shades, cax=bar, orientation="horizontal")
    bar.set_xticks([0, *KEY_WEIGHTS[1:]], [f"{weight:g}" for weight in (0, *KEY_WEIGHTS[1:])])
    bar.tick_params(labelsize=SMALL, labelcolor=look.muted, length=2, pad=1.5)
    bar.minorticks_off()
    draw_swatches(figure, words, x + BAR + 0.12, y, look)
    if not single:
        draw_swatches(figure, marks, (plan.width - sum(swatch_width(mark[0]) for mark in marks)) / 2, y - 0.3, look)


def draw_swatches(figure: Figure, words: Sequence[tuple[str, str, Any]], x: float, y: float, look: Theme) -> None:
    """Write names beside small squares, left to right: (name, face, (edge, dash))."""
    for name, face, (edge, dash) in words:
        figure.add_artist(Rectangle((x, y), HIGH, HIGH, fc=face, ec=edge, ls=dash, lw=0.8, **inches(figure)))
        style = {"va": "center", "size": SMALL, "color": look.muted, **inches(figure)}
        figure.text(x + HIGH + 0.04, y + HIGH / 2, name, **style)
        x += swatch_width(name)


def key_width(names: Sequence[str]) -> float:
    """Inches of the key in one line."""
    return text_width(WEIGHT, SMALL) + 0.2 + BAR + sum(map(swatch_width, names))


def swatch_width(name: str) -> float:
    """Inches of a square with its name, and the space after it."""
    return HIGH + 0.16 + text_width(name, SMALL)
