"""The connectivity of circuits: which component reads from which, the circuits of two models side by side.

A row per layer, from the input at the bottom to the logits at the top; in it a column per head (circles) and one for
the MLP (squares, a little higher: it reads what the heads of its layer write). An edge of the circuit is a line from
the writer up to the reader; the query, key and value input of a head are its left, middle and right. What a group of
heads reads together is a line to each of them that is used. After the figures of Draye et al. 2025, arXiv:2512.05865.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fewedges.draw.text import Words, draw_heading, draw_title, heading_height, legible, text_width, wrap
from fewedges.draw.theme import BODY, CAPTION, ONE_COLUMN, SMALL, TITLE, TWO_COLUMNS, Theme, axes_at, inches, styled
from fewedges.errors import DataError

LEFT, GAP, RIGHT, BELOW = 0.42, 0.28, 0.1, 0.3  # inches beside, between and below the panels
MARGIN = 0.15  # inches left free below the input and above the logits
ASIDE = 2.0  # columns from the last head to the right edge: the MLP, and the arcs from MLP to MLP
LIFT = 0.42  # rows by which an MLP stands above the heads of its layer
MLP, ARC = 0.35, 0.6  # columns from the place of one more head to the MLP; of the widest arc
ARROW = 0.11  # inches from the left edge to the arrow
VECTOR_EDGES = 4_000  # more lines than this become an image inside the SVG
FULL = 60  # edges that are drawn at full strength; with more, all are the fainter
NODE = re.compile(r"(?:a(\d+)\.([hg])(\d+)|m(\d+)|(input|embed)|(logits))(?:<([qkv])>)?")
SIDES = {"q": -1.0, "k": 0.0, "v": 1.0}  # from the middle of a head to where it reads, in radii


@dataclass(frozen=True, kw_only=True, eq=False)
class CircuitPicture:
    """The circuit of one model with L layers of H heads.

    Raises DataError for an edge whose ends the model does not have, or that runs downward.
    """

    title: str
    """Such as "Sparse SmolLM2-135M" or "SmolLM2-135M (baseline)"."""
    layers: int
    heads: int
    edges: Sequence[str]
    """Edges as `a3.h7->a5.h2<q>`, `input->m0`, `m4->logits`; `a5.g1<k>` is read by a group of heads."""
    key_readers: int | None = None
    """Key/value heads of a layer, where edges name groups; None: as many as heads."""
    nodes: Sequence[str] = ()
    """More nodes to be shown as used, besides the ends of the edges."""
    caption: str = ""
    """A short line under title and count, such as "0.9 of the effect explained"."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "edges", tuple(self.edges))
        object.__setattr__(self, "nodes", tuple(self.nodes))
        if min(self.layers, self.heads, self.groups) < 1 or self.heads % self.groups:
            found = f"{self.layers} layers, {self.heads} heads, {self.groups} key readers"
            raise DataError(f"circuit of {self.title}", found, "at least one of each, and heads a multiple of groups")
        check_edges(self)

    @property
    def groups(self) -> int:
        """Key/value readers of a layer."""
        return self.heads if self.key_readers is None else self.key_readers


def circuits(pictures: Sequence[CircuitPicture], *, title: str = "", theme: str = "light") -> Figure:
    """Draw circuits side by side on one scale, with the number of edges above each.

    A component at an end of an edge is outlined, the others are grey. The more edges, the fainter each line, alike in
    all panels. DataError if the models differ in layers or heads.
    """
    pictures = list(pictures)
    shapes = {(picture.layers, picture.heads) for picture in pictures}
    if len(shapes) != 1:
        found = f"(layers, heads) {sorted(shapes)}" if shapes else "no circuit"
        raise DataError("circuits side by side", found, "one or more circuits in models of one shape")
    with styled(theme) as look:
        plan = arrange(pictures, title)
        figure = Figure(figsize=(plan.width, plan.height))
        drawn = [lines_of(picture, plan.dot / 144 / plan.column) for picture in pictures]
        strength = strength_of([len(lines) for lines in drawn])
        for index, (picture, lines) in enumerate(zip(pictures, drawn, strict=True)):
            axes = axes_at(figure, plan.left(index), BELOW, plan.panel_width, plan.panel_height)
            draw_edges(axes, lines, strength, plan, look, index)
            draw_nodes(axes, picture, plan, look, index)
            middle, top = plan.left(index) + plan.panel_width / 2, BELOW + plan.panel_height + 0.05
            draw_heading(figure, heading_of(picture, plan.panel_width + GAP), middle, top, look)
        draw_layers(figure, plan, look)
        draw_key(figure, plan, look)
        draw_title(figure, title, plan.width / 2, "center")
        return figure


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where everything goes, in inches."""

    layers: int
    heads: int
    column: float
    row: float
    count: int
    above: float

    @property
    def panel_width(self) -> float:
        return self.column * (self.heads - 0.2 + ASIDE)

    @property
    def panel_height(self) -> float:
        return self.row * (self.layers + 1) + 2 * MARGIN

    @property
    def width(self) -> float:
        return LEFT + self.count * self.panel_width + (self.count - 1) * GAP + RIGHT

    @property
    def height(self) -> float:
        return BELOW + self.panel_height + self.above

    @property
    def dot(self) -> float:
        """Size of a used node in points."""
        return float(np.clip(72 * 0.5 * min(self.column, self.row), 2.0, 7.0))

    def left(self, index: int) -> float:
        """Left edge of a panel."""
        return LEFT + index * (self.panel_width + GAP)


def arrange(pictures: list[CircuitPicture], title: str) -> Plan:
    """Choose sizes: one column of a paper for few heads, two for more; at most 5 inches high."""
    count, layers, heads = len(pictures), pictures[0].layers, pictures[0].heads
    width = ONE_COLUMN if count * heads <= 12 else TWO_COLUMNS
    column = max((width - LEFT - RIGHT - (count - 1) * GAP) / (count * (heads - 0.2 + ASIDE)), 0.07)
    tall = max(heading_height(heading_of(picture, column * (heads - 0.2 + ASIDE) + GAP)) for picture in pictures)
    return Plan(
        layers=layers,
        heads=heads,
        column=column,
        row=float(np.clip(4.6 / (layers + 2), 0.09, 0.4)),
        count=count,
        above=0.1 + tall + (0.22 if title else 0.0),
    )


def heading_of(picture: CircuitPicture, width: float) -> list[Words]:
    """Title, number of edges, and caption of a panel, broken to fit."""
    count = f"{len(picture.edges):,} circuit edge{'s' * (len(picture.edges) != 1)}"
    lines = [Words(line, TITLE, "bold") for line in wrap(picture.title, width, TITLE, "bold")]
    return lines + [
        Words(line, CAPTION, "normal") for text in (count, picture.caption) for line in wrap(text, width, CAPTION)
    ]


# -- where a component stands ------------------------------------------------------------------------------------


def place_of(picture: CircuitPicture, node: str) -> tuple[float, float]:
    """(column, row) of a component or of one of its inputs. DataError for one that the model does not have."""
    found = NODE.fullmatch(node)
    layer, kind, number, mlp, start, end, _ = found.groups() if found else (None,) * 7
    middle = (picture.heads - 1) / 2
    if start or end:
        return middle, 0.0 if start else picture.layers + 1.0
    if mlp is not None and int(mlp) < picture.layers:
        return picture.heads + MLP, int(mlp) + 1 + LIFT
    many = picture.groups if kind == "g" else picture.heads
    if layer is None or number is None or int(layer) >= picture.layers or int(number) >= many:
        hint = f"input, logits, m0 to m{picture.layers - 1}, a0.h0 to a{picture.layers - 1}.h{picture.heads - 1}"
        raise DataError(f"circuit of {picture.title}", f"no component {node!r}", hint)
    share = picture.heads // many
    return int(number) * share + (share - 1) / 2, int(layer) + 1.0


def check_edges(picture: CircuitPicture) -> None:
    """Raise DataError unless every edge runs upward between components that the model has."""
    for edge in picture.edges:
        writer, arrow, reader = edge.partition("->")
        if not arrow or place_of(picture, reader)[1] <= place_of(picture, writer)[1]:
            hint = "writer->reader, from lower layers to higher ones, or from a head to the MLP of its layer"
            raise DataError(f"circuit of {picture.title}", f"edge {edge!r} does not run upward", hint)
    used_nodes(picture)


def used_nodes(picture: CircuitPicture) -> set[tuple[float, float]]:
    """The places of the components at the ends of edges; a group of heads that is read is no component."""
    ends = [end for edge in picture.edges for end in edge.split("->")]
    return {place_of(picture, name) for name in (*ends, *picture.nodes) if ".g" not in name}


def readers_of(picture: CircuitPicture, reader: str, used: set[tuple[float, float]]) -> list[tuple[float, float]]:
    """Where an edge ends: at its component, or at the used heads of a group (at its middle if none is)."""
    place = place_of(picture, reader)
    if ".g" not in reader:
        return [place]
    reach = (picture.heads // picture.groups - 1) / 2
    heads = [(float(head), place[1]) for head in range(round(place[0] - reach), round(place[0] + reach) + 1)]
    return [head for head in heads if head in used] or [place]


def lines_of(picture: CircuitPicture, radius: float = 0.2) -> list[Float[np.ndarray, "M 2"]]:
    """The edges as lines in columns and rows, from the writer up to the reader; `radius` of a head in columns."""
    used, lines = used_nodes(picture), []
    for edge in picture.edges:
        writer, _, reader = edge.partition("->")
        role = reader[-2] if reader.endswith(">") else "k"
        for column, row in readers_of(picture, reader, used):
            lines.append(line(place_of(picture, writer), (column + SIDES[role] * radius, row), picture.layers))
    return lines


def line(start: tuple[float, float], end: tuple[float, float], layers: int) -> Float[np.ndarray, "M 2"]:
    """A straight line; within a column an arc to the right, the wider the further it goes."""
    inside = start[1] > 0 and end[1] < layers + 1
    if abs(end[0] - start[0]) > 0.5 or end[1] - start[1] <= 1 or not inside:
        return np.array([start, end])
    share = np.linspace(0, 1, 13)[:, None]
    wide = ARC * ((end[1] - start[1]) / layers) ** 0.5 * np.array([[1.0, 0.0]])
    return (1 - share) * start + share * np.array(end) + 4 * share * (1 - share) * wide


# -- drawing -----------------------------------------------------------------------------------------------------


def strength_of(counts: Sequence[int]) -> float:
    """How opaque a line is, for panels of so many lines: by their geometric mean, so that ink compares."""
    middle = float(np.exp(np.mean(np.log(np.maximum(counts, 1)))))
    return float(np.clip((FULL / middle) ** 0.5, 0.12, 0.9))


def draw_edges(
    axes: Axes, paths: Sequence[Float[np.ndarray, "M 2"]], strength: float, plan: Plan, look: Theme, index: int
) -> None:
    """Set up a panel, and draw the edges of its circuit."""
    axes.set_axis_off()
    axes.set_xlim(-0.7, plan.heads - 0.9 + ASIDE)
    axes.set_ylim(-MARGIN / plan.row, plan.layers + 1 + MARGIN / plan.row)
    lines = LineCollection(list(paths), colors=look.series[0], alpha=strength, linewidths=0.55, zorder=1)
    lines.set_rasterized(len(paths) > VECTOR_EDGES)
    lines.set_gid(f"circuit-edges-{index}")
    axes.add_collection(lines, autolim=False)


def draw_nodes(axes: Axes, picture: CircuitPicture, plan: Plan, look: Theme, index: int) -> None:
    """Draw heads as circles, MLPs as squares, input and logits as words; outlined if used, else grey."""
    used = used_nodes(picture)
    heads = [(float(head), layer + 1.0) for layer in range(plan.layers) for head in range(plan.heads)]
    mlps = [(plan.heads + MLP, layer + 1 + LIFT) for layer in range(plan.layers)]
    for name, marker, places in (("head", "o", heads), ("mlp", "s", mlps)):
        for known, size, face, rim in (
            (False, 0.62 * plan.dot, look.closed, "none"),
            (True, plan.dot, look.paper, look.ink),
        ):
            some = np.array([place for place in places if (place in used) == known]).reshape(-1, 2)
            dots = axes.scatter(*some.T, s=size**2, marker=marker, c=face, edgecolors=rim, lw=0.8, zorder=3)
            dots.set_gid(f"{name}-{'used' if known else 'unused'}-{index}")
    for name, row in (("input", 0.0), ("logits", plan.layers + 1.0)):
        known = ((plan.heads - 1) / 2, row) in used
        rim = {"facecolor": look.paper, "edgecolor": look.ink if known else look.faint, "lw": 0.8}
        box = {"boxstyle": "round,pad=0.25", **rim}
        colour = look.ink if known else look.muted
        axes.text(
            (plan.heads - 1) / 2, row, name, size=SMALL, color=colour, ha="center", va="center", bbox=box, zorder=4
        )


def draw_layers(figure: Figure, plan: Plan, look: Theme) -> None:
    """Draw the arrow of the layers and number the rows at the left."""
    bottom, top = (BELOW + MARGIN + row * plan.row for row in (1, plan.layers + LIFT))
    place = inches(figure)
    figure.add_artist(Line2D([ARROW] * 2, [bottom, top - 0.03], color=look.muted, lw=0.7, **place))
    figure.add_artist(Line2D([ARROW], [top - 0.02], color=look.muted, marker="^", ms=3.2, mew=0, **place))
    box = {"facecolor": look.paper, "edgecolor": "none", "pad": 2.0}
    style: dict[str, Any] = {"size": BODY, "rotation": 90, "ha": "center", "va": "center", "bbox": box}
    figure.text(ARROW, (bottom + top) / 2, "Layers", **style, **place)
    step = next(nice for nice in (1, 2, 5, 10, 20, 50, 100) if nice >= SMALL * 1.5 / 72 / plan.row)
    small: dict[str, Any] = {"size": SMALL, "color": look.muted, "ha": "right", "va": "center_baseline"}
    for layer in range(0, plan.layers, step):
        figure.text(LEFT - 0.02, bottom + layer * plan.row, str(layer), **small, **place)


def draw_key(figure: Figure, plan: Plan, look: Theme) -> None:
    """Explain circles, squares and greys in one line at the bottom."""
    used = {"mfc": look.paper, "mec": look.ink, "ms": 4.2, "mew": 0.8}
    signs = [("head", "o", used), ("MLP", "s", used), ("unused", "o", {"mfc": look.closed, "mew": 0, "ms": 3.2})]
    widths = [text_width(legible(name), SMALL) + 0.28 for name, _, _ in signs]
    x, y, place = (plan.width - sum(widths)) / 2, 0.12, inches(figure)
    for (name, marker, style), width in zip(signs, widths, strict=True):
        figure.add_artist(Line2D([x], [y], marker=marker, ls="none", **style, **place))
        figure.text(x + 0.08, y, name, size=SMALL, color=look.muted, va="center_baseline", **place)
        x += width
