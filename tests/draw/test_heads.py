from itertools import product

import numpy as np
import pytest
from matplotlib.colors import to_rgba

from fewedges.draw import THEMES, heads, save
from fewedges.draw.heads import mosaic, pooled, sides
from fewedges.errors import DataError

LOOK = THEMES["light"]


def image(figure, name):
    (artist,) = figure.findobj(lambda artist: artist.get_gid() == name)
    return np.asarray(artist.get_array())


def maps(picture, layers, count, tokens):
    """Cut a mosaic into (L, H, T, T, 4), first layer at the bottom."""
    step = sides(tokens)
    cut = picture.reshape(layers, step, count, step, 4).transpose(0, 2, 1, 3, 4)[::-1]
    return cut[:, :, :tokens, :tokens]


def slow_colour(one, layer, head, query, key, look):
    if key > query:
        return to_rgba(look.paper)
    if not one.open[layer, head].any():
        return to_rgba(look.closed)
    if not one.open[layer, head, query, key]:
        return to_rgba(look.void)
    return tuple(look.weight_colours(one.weights[layer, head, query, key]))


@pytest.mark.matches
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("density", [0.05, 1.0])
def test_each_cell_has_the_colour_of_a_slow_loop(panel, theme, density):
    one = panel(layers=4, density=density)
    drawn = maps(image(heads([one], theme=theme), "heads-0"), 4, 2, 6)
    for place in product(*map(range, one.open.shape)):
        np.testing.assert_allclose(drawn[place], slow_colour(one, *place, THEMES[theme]), atol=1e-12)


@pytest.mark.matches
def test_pooling_takes_the_largest_weight_of_a_square():
    values = np.random.default_rng(0).random((1, 1, 7, 7))
    small = pooled(values, 3)
    assert small.shape == (1, 1, 3, 3)
    for row, column in product(range(3), repeat=2):
        square = values[0, 0, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
        assert small[0, 0, row, column] == square.max()


@pytest.mark.stays
def test_closed_heads_are_grey_and_others_are_not(panel):
    one = panel(layers=5, density=0.02, seed=3)
    closed = ~one.open.any(axis=(2, 3))
    assert 0 < closed.sum() < closed.size
    drawn = maps(mosaic(one.weights, one.open, LOOK), 5, 2, 6)
    grey = np.all(drawn == to_rgba(LOOK.closed), axis=-1)  # (L, H, T, T)
    np.testing.assert_array_equal(grey.sum(axis=(2, 3)), np.where(closed, 21, 0))


@pytest.mark.stays
def test_no_edge_is_lost_where_maps_are_tiny(panel):
    one = panel(layers=30, heads=9, tokens=64, density=0.0005)
    picture = image(heads([one]), "heads-0")
    background = [to_rgba(colour) for colour in (LOOK.paper, LOOK.void, LOOK.closed)]
    inked = ~np.any([np.all(np.isclose(picture, colour), axis=-1) for colour in background], axis=0)
    step = picture.shape[0] // 30
    per_head = inked.reshape(30, step, 9, step).any(axis=(1, 3))[::-1]
    assert step < sides(64)
    np.testing.assert_array_equal(per_head, one.open.any(axis=(2, 3)))


@pytest.mark.stays
def test_chosen_layers_are_drawn_bottom_to_top(panel):
    one = panel(layers=4, density=0.5)
    few = maps(image(heads([one], layers=[3, 1]), "heads-0"), 2, 2, 6)
    all_layers = maps(image(heads([one]), "heads-0"), 4, 2, 6)
    np.testing.assert_array_equal(few, all_layers[[3, 1]])


@pytest.mark.stays
@pytest.mark.parametrize("shape", [(4, 4, 10), (1, 1, 1), (2, 1, 3), (30, 9, 32), (2, 32, 16)])
@pytest.mark.parametrize("count", [1, 2])
def test_no_text_is_cut_off(panel, outside, shape, count):
    layers, many, tokens = shape
    figure = heads([panel(layers, many, tokens, density=0.01)] * count)
    assert outside(figure) == []


@pytest.mark.stays
def test_thirty_layers_of_nine_heads_fit_a_page(panel):
    one = panel(30, 9, 32, density=0.01)
    width, height = heads([one, one]).get_size_inches()
    assert width <= 7.0
    assert height <= 9.5


@pytest.mark.reproduces
def test_same_panels_same_bytes(pair, tmp_path):
    first, second = (save(heads(pair), tmp_path / name) for name in "ab")
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.survives
@pytest.mark.parametrize("layers", [[], [3], [-1], [0, 7]])
def test_layers_the_model_has_not_are_refused(panel, layers):
    with pytest.raises(DataError, match="0 to 2"):
        heads([panel(layers=3)], layers=layers)


@pytest.mark.survives
def test_panels_of_other_shape_are_refused(panel):
    with pytest.raises(DataError, match="the same layers and heads"):
        heads([panel(heads=2), panel(heads=3)])


@pytest.mark.says
def test_the_colour_bar_goes_from_0_to_1(pair):
    figure = heads(pair)
    (bar,) = (axes for axes in figure.axes if axes.get_xlim() == (0.0, 1.0))
    assert [label.get_text() for label in bar.get_xticklabels()] == ["0", "0.1", "0.3", "1"]


@pytest.mark.says
def test_the_key_says_when_cells_are_pooled(panel):
    def names(figure):
        return [text.get_text() for text in figure.texts]

    assert "attention weight" in names(heads([panel()]))
    assert "largest weight in 2×2" in names(heads([panel(30, 9, 32)] * 2))
