import numpy as np
import pytest

from fewedges.draw import Panel


def build(layers=3, heads=2, tokens=6, density=0.2, seed=0, words=None, **rest):
    """A random panel; density 1 opens every causal gate."""
    random = np.random.default_rng(seed)
    causal = np.tril(np.ones((layers, heads, tokens, tokens), dtype=bool))
    open = causal & (random.random(causal.shape) < density)
    scores = np.where(causal, 2 * random.normal(size=causal.shape), -np.inf)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    digits, long = list("17+35=052\n!?")[:tokens], [f" word{index}" for index in range(tokens)]
    words = words or (digits if tokens <= 12 else long)
    rest = {"title": "sparse", "tokens": words, "caption": "0.08 edges per query per head", **rest}
    return Panel(weights=weights * open, open=open, **rest)


@pytest.fixture
def panel():
    return build


@pytest.fixture
def pair():
    return [build(density=1.0, title="dense", seed=1), build(seed=2)]


@pytest.fixture
def outside():
    """List the texts of a figure that reach beyond its edge."""

    def find(figure):
        figure.draw_without_rendering()
        shown = [text for text in written(figure) if text.get_text()]
        assert shown
        return [text.get_text() for text in shown if beyond(text.get_window_extent(), figure.bbox)]

    return find


def written(figure):
    """Texts of a figure and its axes, and the tick labels within view."""
    texts = [*figure.texts]
    for axes in figure.axes:
        texts += [*axes.texts, axes.xaxis.label, axes.yaxis.label]
        for index, axis in enumerate((axes.xaxis, axes.yaxis) if axes.axison else ()):
            low, high = sorted(axis.get_view_interval())
            texts += [label for label in axis.get_ticklabels() if low <= label.get_position()[index] <= high]
    return texts


def beyond(box, frame):
    return box.x0 < frame.x0 or box.y0 < frame.y0 or box.x1 > frame.x1 or box.y1 > frame.y1
