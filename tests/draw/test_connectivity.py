import importlib
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest

from fewedges.draw import connectivity, save
from fewedges.draw.connectivity import edge_segments, used_nodes
from fewedges.errors import DataError


def find(figure, name):
    (artist,) = figure.findobj(lambda artist: artist.get_gid() == name)
    return artist


def texts(figure):
    return [text.get_text() for text in figure.texts]


@pytest.mark.matches
def test_segments_equal_a_slow_loop(panel):
    one = panel(density=0.5)
    segments, weights = edge_segments(one.weights, one.open, 0.0)
    drawn = sorted((*a, *b, w) for (a, b), w in zip(segments.tolist(), weights.tolist(), strict=True))
    slow = []
    for layer, head, query, key in product(*map(range, one.open.shape)):
        if one.open[layer, head, query, key]:
            slow.append((key, layer, query, layer + 1, one.weights[layer, head, query, key]))
    assert drawn == sorted(slow)


@pytest.mark.matches
def test_a_picture_has_one_line_per_open_gate(pair):
    figure = connectivity(pair)
    for index, one in enumerate(pair):
        assert len(find(figure, f"edges-{index}").get_segments()) == one.open.sum() > 0


@pytest.mark.matches
@pytest.mark.parametrize("density", [0.0, 0.05, 0.4, 1.0])
def test_used_nodes_equal_a_slow_loop_and_are_filled(panel, density):
    one = panel(density=density)
    slow = np.zeros((4, 6), dtype=bool)
    for layer, head, query, key in product(*map(range, one.open.shape)):
        if one.open[layer, head, query, key]:
            slow[layer, key] = slow[layer + 1, query] = True
    np.testing.assert_array_equal(used_nodes(one.open), slow)
    figure = connectivity([one])
    for name, nodes in (("used-0", slow), ("unused-0", ~slow)):
        offsets = {(row, column) for column, row in find(figure, name).get_offsets().tolist()}
        assert offsets == set(zip(*map(np.ndarray.tolist, np.nonzero(nodes)), strict=True))


@pytest.mark.stays
def test_weak_edges_come_first_and_opacity_grows(panel):
    lines = find(connectivity([panel(density=1.0)]), "edges-0")
    opacity = lines.get_colors()[:, 3]
    assert opacity.min() > 0.5  # a single weak edge can be seen
    assert np.all(np.diff(opacity) >= 0)
    assert opacity[-1] > opacity[0] + 0.2


@pytest.mark.stays
def test_the_scale_is_the_same_in_every_panel_and_picture(panel):
    strong = panel(density=1.0)
    weak = replace(strong, weights=strong.weights * 0.1)
    together = find(connectivity([strong, weak]), "edges-1").get_colors()
    np.testing.assert_array_equal(together, find(connectivity([weak]), "edges-0").get_colors())
    assert together[-1, 3] < find(connectivity([strong]), "edges-0").get_colors()[-1, 3]


@pytest.mark.stays
def test_heads_lie_side_by_side(panel):
    one = panel(layers=1, heads=3, tokens=1, density=1.0)
    segments, _ = edge_segments(one.weights, one.open, 0.2)
    assert sorted(segments[:, 0, 0].round(6).tolist()) == [-0.1, 0.0, 0.1]
    np.testing.assert_array_equal(segments[:, 0, 0], segments[:, 1, 0])


@pytest.mark.stays
@pytest.mark.parametrize("shape", [(4, 4, 10), (1, 1, 1), (2, 1, 3), (30, 9, 40), (12, 2, 64)])
@pytest.mark.parametrize("count", [1, 2])
def test_no_text_is_cut_off(panel, outside, shape, count):
    layers, heads, tokens = shape
    one = panel(layers, heads, tokens, density=0.01)
    assert outside(connectivity([one] * count, title="17 + 35 = 052")) == []


@pytest.mark.stays
@pytest.mark.parametrize("tokens", [10, 32, 40])
def test_tokens_do_not_overlap(panel, tokens):
    one = panel(4, 2, tokens, density=0.05)
    figure = connectivity([one, one])
    labels = figure.texts[:tokens]
    boxes = [label.get_window_extent() for label in labels]
    leading = 1.2 * labels[0].get_fontsize() / 72 * figure.dpi  # a box has room for ascenders and descenders
    ink = leading - labels[0].get_fontsize() / 72 * figure.dpi
    assert all(left.x1 - ink <= right.x0 for left, right in pairwise(boxes))
    assert labels[0].get_fontsize() >= 4.9


@pytest.mark.stays
def test_many_lines_become_an_image_and_few_stay_lines(panel):
    haze, few = panel(10, 9, 16, density=1.0), panel(10, 9, 16, density=0.01)
    figure = connectivity([haze, few])
    assert find(figure, "edges-0").get_rasterized()
    assert not find(figure, "edges-1").get_rasterized()


@pytest.mark.reproduces
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_same_panels_same_bytes(pair, tmp_path, theme):
    first, second = (save(connectivity(pair, theme=theme), tmp_path / name) for name in "ab")
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.survives
def test_a_model_without_any_edge(panel, tmp_path):
    figure = connectivity([panel(density=0.0)])
    assert len(find(figure, "used-0").get_offsets()) == 0
    assert "0 attention edges" in texts(figure)
    save(figure, tmp_path / "none")


@pytest.mark.survives
def test_tokens_that_look_like_mathematics_or_have_no_glyph(panel, tmp_path):
    one = panel(tokens=4, words=["$a$", "漢", "", "\n\t "], title="$x", caption="50 $ $")
    figure = connectivity([one], title="$\\frac")
    save(figure, tmp_path / "odd")
    assert texts(figure)[:4] == ["$a$", "▯", "∅", "⏎⇥␣"]


@pytest.mark.survives
def test_panels_of_different_prompts_are_refused(panel):
    with pytest.raises(DataError, match="the same prompt"):
        connectivity([panel(tokens=5), panel(tokens=6)])
    with pytest.raises(DataError, match="the same prompt"):
        connectivity([panel(), panel(words=list("aaaaaa"))])
    with pytest.raises(DataError, match="at least one Panel"):
        connectivity([])


@pytest.mark.survives
def test_more_lines_than_can_be_drawn_are_refused(panel, monkeypatch):
    module = importlib.import_module("fewedges.draw.connectivity")
    monkeypatch.setattr(module, "MOST_EDGES", 10)
    with pytest.raises(DataError, match="a shorter prompt"):
        connectivity([panel(density=1.0)])


@pytest.mark.says
def test_the_count_stands_under_each_panel(pair, panel):
    written = texts(connectivity(pair))
    assert f"{pair[0].open.sum()} attention edges" in written
    assert f"{pair[1].open.sum()} attention edges" in written
    assert "1 attention edge" in texts(connectivity([panel(1, 1, 1, density=1.0)]))


@pytest.mark.says
def test_layers_are_numbered_from_the_bottom(panel):
    figure = connectivity([panel(layers=3)])
    assert "Layers" in texts(figure)
    rows = [text for text in figure.texts if text.get_text() in ("0", "1", "2", "out")]
    rows = [text for text in rows if text.get_horizontalalignment() == "right"]
    rows.sort(key=lambda row: row.get_position()[1])
    assert [row.get_text() for row in rows] == ["0", "1", "2", "out"]
