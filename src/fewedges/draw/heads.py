"""The attention maps of all heads at a glance, dense beside sparse.

A block per panel; in it a row per layer (bottom to top, as in the connectivity picture), a column per head.
In a map, queries run down and keys run right. A block is one image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fewedges.draw.panel import Panel, comparable
from fewedges.draw.text import draw_heading, heading, heading_height, text_width
from fewedges.draw.theme import GAMMA, KEY_WEIGHTS, ONE_COLUMN, SMALL, TWO_COLUMNS, Theme, axes_at, inches, styled
from fewedges.errors import DataError

FINEST = 0.012  # inches: a smaller cell cannot be seen in print
DOTS = 200  # per inch, of a PNG: cells are whole dots wide
TALLEST = 8.0  # inches of maps: with titles and key still one page
LEFT, GAP, RIGHT, BELOW = 0.42, 0.2, 0.08, 0.46  # inches around and between the blocks


def heads(panels: Sequence[Panel], *, layers: Sequence[int] | None = None, theme: str = "light") -> Figure:
    """Draw the attention map of every head, or of the heads of `layers` in the order given, bottom to top.

    One scale of weights from 0 to 1 for all. A head without an open gate is grey all over; a closed gate is
    nearly the colour of the paper; above the diagonal there is nothing. Where maps get tiny a cell shows the
    largest weight of a square of entries (the key says which), so that no edge is lost.

    DataError if panels differ in prompt or shape (L, H, T, T), or if a layer is not in [0, L).
    """
    panels = comparable(panels)
    layers = chosen_layers(panels, layers)
    with styled(theme) as look:
        plan = arrange(panels, layers)
        figure = Figure(figsize=(plan.width, plan.height))
        for index, panel in enumerate(panels):
            draw_block(figure, panel, plan, look, index)
            label_block(figure, panel, plan, look, index)
        place = {"ha": "center", "va": "center", **inches(figure)}
        figure.text(0.11, BELOW + plan.block_height / 2, "Layer", rotation=90, **place)
        draw_key(figure, plan, look)
        return figure


def chosen_layers(panels: list[Panel], layers: Sequence[int] | None) -> list[int]:
    """Return the layers to draw; DataError for none, or for one the model does not have."""
    count = panels[0].weights.shape[0]
    chosen = list(range(count)) if layers is None else [int(layer) for layer in layers]
    strange = [layer for layer in chosen if not 0 <= layer < count]
    if strange or not chosen:
        raise DataError(f"heads(layers={chosen})", f"{count} layers", f"one or more of 0 to {count - 1}")
    return chosen


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where everything goes, in inches."""

    layers: list[int]
    heads: int
    cell: float
    """Side of one map with the gap after it."""
    block: int
    """A cell of a map shows the largest of block x block entries."""
    count: int
    pitch: float
    """From the left edge of a block to that of the next."""
    above: float
    width: float

    @property
    def block_width(self) -> float:
        return self.cell * self.heads

    @property
    def block_height(self) -> float:
        return self.cell * len(self.layers)

    @property
    def height(self) -> float:
        return self.above + self.block_height + BELOW

    def left(self, index: int) -> float:
        """Left edge of a block."""
        return LEFT + index * self.pitch


def arrange(panels: list[Panel], layers: list[int]) -> Plan:
    """Choose the size of a map so that all fit one column of a paper, or two, and one page."""
    count, (_, heads, tokens, _) = len(panels), panels[0].weights.shape
    width = ONE_COLUMN if count * heads <= 12 and tokens <= 24 else TWO_COLUMNS
    room = (width - LEFT - RIGHT - (count - 1) * GAP) / count
    cell = max(0.12, min(room / heads, TALLEST / len(layers), 0.9))
    block = int(np.ceil(tokens * FINEST / (cell * 0.9)))
    steps = sides(-(-tokens // block))
    cell = max(1, round(cell * DOTS / steps)) * steps / DOTS
    pitch = max(cell * heads, min(room, 1.3)) + GAP
    tall = max(heading_height(heading(panel, pitch)) for panel in panels)
    width = LEFT + count * pitch - GAP + RIGHT
    return Plan(
        layers=layers,
        heads=heads,
        cell=cell,
        block=block,
        count=count,
        pitch=pitch,
        above=0.22 + tall,
        width=max(width, ONE_COLUMN),
    )


def draw_block(figure: Figure, panel: Panel, plan: Plan, look: Theme, index: int) -> None:
    """Draw the maps of one panel as one image."""
    axes = axes_at(figure, plan.left(index), BELOW, plan.block_width, plan.block_height)
    axes.set_axis_off()
    image = mosaic(panel.weights[plan.layers], panel.open[plan.layers], look, plan.block)
    axes.imshow(image, aspect="auto", interpolation="none").set_gid(f"heads-{index}")


def mosaic(
    weights: Float[np.ndarray, "L H T T"], open: Bool[np.ndarray, "L H T T"], look: Theme, block: int = 1
) -> Float[np.ndarray, "Y X 4"]:
    """Lay the maps out as one RGBA image, first layer at the bottom, each with a margin right and below."""
    causal = np.tril(np.ones(open.shape, dtype=bool))
    weights, open, causal = (pooled(maps, block) for maps in (weights, open, causal))
    layers, heads, side, _ = open.shape
    colours = look.weight_colours(weights)  # (L, H, T, T, 4)
    colours[causal & ~open] = to_rgba(look.void)
    silent = ~open.any(axis=(2, 3), keepdims=True)
    colours[causal & silent] = to_rgba(look.closed)
    colours[~causal] = to_rgba(look.paper)
    step = sides(side)
    image = np.empty((layers, heads, step, step, 4))
    image[:] = to_rgba(look.paper)
    image[:, :, :side, :side] = colours
    return image[::-1].transpose(0, 2, 1, 3, 4).reshape(layers * step, heads * step, 4)


def sides(cells: int) -> int:
    """Cells from one map to the next: the map and a gap."""
    return cells + max(1, round(cells / 8))


def pooled(maps: np.ndarray, block: int) -> np.ndarray:
    """Take the maximum over squares of block x block entries: T becomes ceil(T / block), twice."""
    layers, heads, tokens, _ = maps.shape
    side = -(-tokens // block)
    pad = side * block - tokens
    maps = np.pad(maps, ((0, 0), (0, 0), (0, pad), (0, pad)))
    return maps.reshape(layers, heads, side, block, side, block).max(axis=(3, 5))


def label_block(figure: Figure, panel: Panel, plan: Plan, look: Theme, index: int) -> None:
    """Number layers and heads, write title and caption above."""
    place = inches(figure)
    small = {"size": SMALL, "color": look.muted, **place}
    left, top = plan.left(index), BELOW + plan.block_height
    step = 1 if plan.cell > 0.12 else 5
    for head in range(0, plan.heads, step):
        figure.text(left + (head + 0.44) * plan.cell, top + 0.03, str(head), ha="center", **small)
    for row, layer in enumerate(plan.layers if index == 0 else []):
        height = BELOW + (row + 0.56) * plan.cell
        figure.text(left - 0.05, height, str(layer), ha="right", va="center_baseline", **small)
    if index == 0:
        figure.text(left - 0.05, top + 0.03, "head", ha="right", **small)
    draw_heading(figure, heading(panel, plan.pitch), left + plan.block_width / 2, top + 0.17, look)


def draw_key(figure: Figure, plan: Plan, look: Theme) -> None:
    """Draw the colour bar of weights and the two greys at the bottom."""
    place = {"va": "center", **inches(figure)}
    name = "attention weight" if plan.block == 1 else f"largest weight in {plan.block}×{plan.block}"
    greys = (("closed gate", look.void), ("closed head", look.closed))
    high, texts = 0.09, sum(text_width(text, SMALL) for text in (name, *dict(greys)))
    x, y = (plan.width - texts - 1.4) / 2, 0.21  # 1.4: bar, swatches and spaces
    figure.text(x, y + high / 2, name, size=SMALL, color=look.muted, **place)
    x += text_width(name, SMALL) + 0.08
    bar = axes_at(figure, x, y, 0.85, high)
    shades = ScalarMappable(norm=PowerNorm(GAMMA, 0, 1), cmap=look.colours)
    figure.colorbar(shades, cax=bar, orientation="horizontal", ticks=[0, *KEY_WEIGHTS[1:]])
    bar.set_xticks([0, *KEY_WEIGHTS[1:]], [f"{weight:g}" for weight in (0, *KEY_WEIGHTS[1:])])
    bar.tick_params(labelsize=SMALL, labelcolor=look.muted, length=2, pad=1.5)
    bar.minorticks_off()
    x += 0.95
    for name, colour in greys:
        swatch = Rectangle((x, y), high, high, fc=colour, ec=look.faint, lw=0.4, **inches(figure))
        figure.add_artist(swatch)
        figure.text(x + high + 0.04, y + high / 2, name, size=SMALL, color=look.muted, **place)
        x += high + 0.12 + text_width(name, SMALL)
