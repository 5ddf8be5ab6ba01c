"""The connectivity of one prompt: who reads from where, layer by layer, dense beside sparse.

Rows are layers from bottom to top, columns are tokens. Node (l, t) is what layer l reads at token t; the top
row is what leaves the last layer. An open gate (l, head, query, key) is a line from (l, key) up to
(l + 1, query). After the figures of Draye et al. 2025, arXiv:2512.05865.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fewedges.draw.panel import Panel, comparable
from fewedges.draw.text import draw_heading, draw_title, heading, heading_height, text_width, visible
from fewedges.draw.theme import BODY, KEY_WEIGHTS, ONE_COLUMN, SMALL, TWO_COLUMNS, Theme, axes_at, inches, styled
from fewedges.errors import DataError

MOST_EDGES = 1_000_000  # 142,560 lines take 3 to 6 s a file on one slow core
VECTOR_EDGES = 4_000  # more lines than this become an image inside the SVG
FLOOR = 0.6  # opacity of an edge of weight 0: alone, it must still be seen
LEFT, GAP, RIGHT = 0.42, 0.16, 0.08  # inches beside and between the panels
MARGIN = 0.25  # rows left free below the first and above the last
ARROW = 0.11  # inches from the left edge to the arrow


def connectivity(panels: Sequence[Panel], *, title: str = "", theme: str = "light") -> Figure:
    """Draw the attention edges of one prompt, one panel beside the other on one scale of weights.

    Every open gate of every head is one line, the darker (on a dark theme: lighter) and the more opaque the
    larger its attention weight; strong edges lie on top. The lines of different heads are a little apart. A
    node is filled if an open gate reads from it or writes to it (a token attending to itself counts), else
    outlined. Faint vertical lines are the residual stream. The count below a panel is of open gates.

    Panels share prompt and shape (L, H, T, T), else DataError; so too above a million edges in all.
    """
    panels = comparable(panels)
    edges = sum(panel.edges for panel in panels)
    if edges > MOST_EDGES:
        raise DataError("connectivity", f"{edges:,} edges to draw", "a shorter prompt, or fewer layers")
    with styled(theme) as look:
        plan = arrange(panels, title)
        figure = Figure(figsize=(plan.width, plan.height))
        for index, panel in enumerate(panels):
            axes = axes_at(figure, plan.left(index), plan.below, plan.panel_width, plan.panel_height)
            draw_panel(axes, panel, plan, look, index)
            label_panel(figure, panel, plan, look, index)
        draw_layers(figure, plan, look)
        draw_key(figure, plan, look)
        draw_title(figure, title, plan.width / 2, "center")
        return figure


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where everything goes, in inches; sizes of type, lines and dots in points."""

    layers: int
    labels: tuple[str, ...]
    upright: bool
    type_size: float
    column: float
    row: float
    count: int
    above: float
    """Room for the title, and for the title and caption of the panels."""
    below: float
    """Room for tokens, counts and the key."""
    token_height: float

    @property
    def panel_width(self) -> float:
        return self.column * len(self.labels)

    @property
    def panel_height(self) -> float:
        return self.row * (self.layers + 2 * MARGIN)

    @property
    def width(self) -> float:
        return LEFT + self.count * self.panel_width + (self.count - 1) * GAP + RIGHT

    @property
    def height(self) -> float:
        return self.above + self.panel_height + self.below

    @property
    def dot(self) -> float:
        return float(np.clip(72 * 0.36 * min(self.column, self.row), 1.5, 5.0))

    def left(self, index: int) -> float:
        """Left edge of a panel."""
        return LEFT + index * (self.panel_width + GAP)


def arrange(panels: Sequence[Panel], title: str) -> Plan:
    """Choose sizes: one column of a paper for short prompts, two for longer ones, wider if type got tiny."""
    layers, _, tokens, _ = panels[0].weights.shape
    count = len(panels)
    width = ONE_COLUMN if count * tokens <= 24 else TWO_COLUMNS
    column = max((width - LEFT - RIGHT - (count - 1) * GAP) / (count * tokens), 5.4 / 72)
    size = min(BODY, 72 * column * 0.92)
    labels = tuple(visible(token) for token in panels[0].tokens)
    widest = max(text_width(label, size) for label in labels)
    upright = widest <= 0.95 * column
    tall = max(heading_height(heading(panel, column * tokens + GAP)) for panel in panels)
    token_height = size / 72 if upright else widest
    return Plan(
        layers=layers,
        labels=labels,
        upright=upright,
        type_size=size,
        column=column,
        row=float(np.clip(4.3 / layers, 0.1, 0.36)),
        count=count,
        above=0.08 + tall + (0.22 if title else 0.0),
        below=0.5 + token_height,
        token_height=token_height,
    )


def draw_panel(axes: Axes, panel: Panel, plan: Plan, look: Theme, index: int) -> None:
    """Draw guides, edges and nodes of one panel into an empty square of columns and rows."""
    tokens = len(plan.labels)
    axes.set_axis_off()
    axes.set_xlim(-0.5, tokens - 0.5)
    axes.set_ylim(-MARGIN, plan.layers + MARGIN)
    axes.vlines(np.arange(tokens), 0, plan.layers, color=look.faint, lw=0.4, zorder=0)
    axes.add_collection(edge_lines(panel, plan, look, f"edges-{index}"), autolim=False)
    used = used_nodes(panel.open)
    row, column = np.nonzero(used)  # a rim of paper sets the dots off from dark edges
    dots = axes.scatter(column, row, s=(plan.dot + 0.6) ** 2, c=look.ink, edgecolors=look.paper, lw=0.4, zorder=3)
    dots.set_gid(f"used-{index}")
    row, column = np.nonzero(~used)
    dots = axes.scatter(column, row, s=plan.dot**2, c=look.paper, edgecolors=look.faint, lw=0.5, zorder=3)
    dots.set_gid(f"unused-{index}")


def edge_lines(panel: Panel, plan: Plan, look: Theme, name: str) -> LineCollection:
    """Return one line per open gate, weak ones first."""
    spread = min(0.24, plan.dot / (72 * plan.column))
    segments, weights = edge_segments(panel.weights, panel.open, spread)
    width = float(np.clip(72 * plan.column * 0.085, 0.55, 0.9))
    lines = LineCollection(
        list(segments), colors=edge_colours(weights, look), linewidths=width, capstyle="round", zorder=2
    )
    lines.set_rasterized(len(segments) > VECTOR_EDGES)
    lines.set_gid(name)
    return lines


def edge_colours(weights: Float[np.ndarray, "N"], look: Theme) -> Float[np.ndarray, "N 4"]:
    """RGBA of edges: shade and opacity both grow with the attention weight."""
    colours = look.weight_colours(weights)
    colours[:, 3] = FLOOR + (1 - FLOOR) * np.clip(weights, 0, 1)
    return colours


def edge_segments(
    weights: Float[np.ndarray, "L H T T"], open: Bool[np.ndarray, "L H T T"], spread: float
) -> tuple[Float[np.ndarray, "N 2 2"], Float[np.ndarray, "N"]]:
    """List the N open gates as segments ((x, y), (x, y)) in columns and rows, by growing weight.

    `spread` is the distance in columns between the first and the last head.
    """
    layer, head, query, key = np.nonzero(open)
    weight = weights[layer, head, query, key].astype(np.float64)
    shift = spread * (head / max(open.shape[1] - 1, 1) - 0.5) if open.shape[1] > 1 else 0.0 * head
    ends = [np.stack([key + shift, layer], axis=-1), np.stack([query + shift, layer + 1], axis=-1)]
    order = np.argsort(weight, kind="stable")
    return np.stack(ends, axis=1)[order], weight[order]


def used_nodes(open: Bool[np.ndarray, "L H T T"]) -> Bool[np.ndarray, "L+1 T"]:
    """Mark nodes an open gate reads from (layer, key) or writes to (layer + 1, query), be they one token."""
    layers, _, tokens, _ = open.shape
    used = np.zeros((layers + 1, tokens), dtype=bool)
    used[:-1] |= open.any(axis=(1, 2))
    used[1:] |= open.any(axis=(1, 3))
    return used


def label_panel(figure: Figure, panel: Panel, plan: Plan, look: Theme, index: int) -> None:
    """Write tokens and edge count below a panel, title and caption above it."""
    place = {"va": "top", "ha": "center", "parse_math": False, **inches(figure)}
    left, middle = plan.left(index), plan.left(index) + plan.panel_width / 2
    for column, label in enumerate(plan.labels):
        where = left + (column + 0.5) * plan.column, plan.below - 0.03
        angle = 0 if plan.upright else 90
        figure.text(*where, label, size=plan.type_size, rotation=angle, **place)
    bottom = plan.below + plan.panel_height + 0.05
    draw_heading(figure, heading(panel, plan.panel_width + GAP), middle, bottom, look)
    count = f"{panel.edges:,} attention edge{'s' * (panel.edges != 1)}"
    figure.text(middle, plan.below - plan.token_height - 0.11, count, **place)


def draw_layers(figure: Figure, plan: Plan, look: Theme) -> None:
    """Draw the arrow of the layers and number the rows at the left."""
    bottom, top = plan.below + MARGIN * plan.row, plan.below + (plan.layers + MARGIN) * plan.row
    middle = (bottom + top) / 2
    place = inches(figure)
    figure.add_artist(Line2D([ARROW] * 2, [bottom, top - 0.03], color=look.muted, lw=0.7, **place))
    figure.add_artist(Line2D([ARROW], [top - 0.02], color=look.muted, marker="^", ms=3.2, mew=0, **place))
    box = {"facecolor": look.paper, "edgecolor": "none", "pad": 2.0}
    figure.text(ARROW, middle, "Layers", rotation=90, ha="center", va="center", bbox=box, **place)
    step = max(1, int(np.ceil(SMALL * 1.7 / 72 / plan.row)))
    step = next(nice for nice in (1, 2, 5, 10, 20, 50, 100) if nice >= step)
    names = [(row, str(row)) for row in range(0, plan.layers, step) if row == 0 or plan.layers - row >= step]
    for row, name in [*names, (plan.layers, "out")]:
        height = bottom + row * plan.row
        figure.text(LEFT - 0.03, height, name, size=SMALL, color=look.muted, ha="right", va="center_baseline", **place)


def draw_key(figure: Figure, plan: Plan, look: Theme) -> None:
    """Explain shade and dots in one line at the bottom."""
    place = inches(figure)
    style = {"size": SMALL, "color": look.muted, "va": "center", **place}
    colours = edge_colours(np.array(KEY_WEIGHTS), look)
    x, y = max(ARROW, plan.width / 2 - 1.6), 0.1
    figure.text(x, y, "attention weight", **style)
    x += text_width("attention weight", SMALL) + 0.08
    for weight, colour in zip(KEY_WEIGHTS, colours, strict=True):
        figure.add_artist(Line2D([x, x + 0.15], [y, y], color=colour, lw=1.2, **place))
        figure.text(x + 0.18, y, f"{weight:g}", **style)
        x += 0.24 + text_width(f"{weight:g}", SMALL)
    for name, face, edge in (("used", look.ink, look.ink), ("unused", look.paper, look.faint)):
        x += 0.1
        figure.add_artist(Line2D([x], [y], marker="o", ms=3.5, mfc=face, mec=edge, mew=0.5, **place))
        figure.text(x + 0.06, y, name, **style)
        x += 0.08 + text_width(name, SMALL)
