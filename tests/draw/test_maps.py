from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import to_rgba

from fewedges.draw import THEMES, save
from fewedges.draw.heads import mosaic
from fewedges.draw.maps import HeadMaps, maps
from fewedges.errors import DataError

LOOK = THEMES["light"]


@pytest.fixture
def rows(panel):
    """Sparse above dense: 3 layers of 2 heads, 6 tokens; the last token's own edges are marked."""
    sparse, dense = panel(density=0.6, seed=3), panel(density=1.0, title="dense", seed=1)
    place = tuple(map(int, np.argwhere(sparse.open[1, 0] & (np.arange(6) > 0)[:, None])[-1]))
    marks = {(1, 0, *place): 0.5, (2, 1, 5, 5): -0.2}
    marks = {mark: worth for mark, worth in marks.items() if sparse.open[mark]}
    notes = {"a1.h0": ["5 reads 5"]}
    return [
        HeadMaps(panel=sparse, heads=["a1.h0", "a2.h1"], marks=marks, notes=notes),
        HeadMaps(panel=dense, heads=["a1.h0", "a2.h1"], marks={(1, 0, 4, 2): 1.0, (0, 0, 1, 1): 1.0}),
    ]


def artists(figure, name):
    return figure.findobj(lambda artist: artist.get_gid() == name)


def texts(figure):
    return [text.get_text() for axes in (figure, *figure.axes) for text in axes.texts]


@pytest.mark.matches
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_map_has_the_colours_of_the_picture_of_all_heads(rows, theme):
    figure = maps(rows, theme=theme)
    for number, row in enumerate(rows):
        whole = mosaic(row.panel.weights, row.panel.open, THEMES[theme]).reshape(3, 7, 2, 7, 4)[::-1]
        for column, (layer, head) in enumerate(((1, 0), (2, 1))):
            (image,) = artists(figure, f"map-{number}-{column}")
            np.testing.assert_array_equal(image.get_array(), whole[layer, :6, head, :6])


@pytest.mark.matches
def test_a_mark_surrounds_its_cell_and_says_by_its_dash_which_way_it_works(rows):
    figure = maps(rows)
    found = []
    for box in artists(figure, "mark"):
        (x, y), side = box.get_xy(), box.get_width()
        helps = box.get_linestyle() == "-"
        assert box.get_edgecolor() == to_rgba(LOOK.series[1 if helps else 2])
        assert 1 < side < 1.5
        name = box.axes.images[0].get_gid()
        found.append((name, round(y + side / 2), round(x + side / 2), helps))
    wanted = []
    for number, row in enumerate(rows):
        for column, head in enumerate(((1, 0), (2, 1))):
            wanted += [(f"map-{number}-{column}", *m[2:], x > 0) for m, x in row.marks.items() if m[:2] == head]
    assert sorted(found) == sorted(wanted)
    assert len(found) >= 2  # a0.h0 of the dense model is marked, but not drawn


@pytest.mark.stays
def test_tokens_of_marks_are_coloured_and_bold(rows):
    figure = maps([rows[1]])
    bold = {(t.get_text(), t.get_rotation()) for t in figure.texts if t.get_color() == LOOK.series[1]}
    tokens = rows[1].panel.tokens
    assert bold == {(tokens[4], 0.0), (tokens[2], 90.0)}


@pytest.mark.stays
@pytest.mark.parametrize("tokens", [3, 12, 30, 60])
@pytest.mark.parametrize("count", [1, 4, 8])
def test_it_fits_two_columns_and_no_text_is_cut_off(panel, outside, tokens, count):
    one = panel(4, 4, tokens, density=0.3, words=[" considerably"] * tokens, caption="1.79 edges per query per head")
    names = [f"a{n // 4}.h{n % 4}" for n in range(count)]
    marks = {(0, 0, *map(int, place)): 1.0 for place in np.argwhere(one.open[0, 0])[-3:]}
    figure = maps([HeadMaps(panel=one, heads=names, marks=marks, notes={names[0]: ["END reads IO +1.00"] * 9})] * 2)
    assert outside(figure) == []
    assert figure.get_size_inches()[0] <= 7.0


@pytest.mark.stays
def test_notes_stay_clear_of_the_diagonal(panel):
    one = panel(1, 1, 12, density=1.0)
    figure = maps([HeadMaps(panel=one, heads=["a0.h0"], notes={"a0.h0": ["END reads S2 +2.30"] * 30})])
    figure.draw_without_rendering()
    axes = artists(figure, "map-0-0")[0].axes
    assert 3 <= len(axes.texts) < 30
    for text in axes.texts:
        box = text.get_window_extent().transformed(axes.transData.inverted())
        assert box.x0 > max(box.y0, box.y1) + 0.5 - 1  # right of the last cell of the row it reaches down to


@pytest.mark.stays
def test_where_tokens_are_too_fine_only_those_of_marks_are_written(panel):
    one = panel(1, 1, 90, density=1.0, words=[f"w{n}" for n in range(90)])
    marks = {(0, 0, 80, 20): 1.0, (0, 0, 79, 50): 1.0}
    figure = maps([HeadMaps(panel=one, heads=["a0.h0"], marks=marks)])
    written = [text for text in texts(figure) if text.startswith("w")]
    assert sorted(written) == ["w20", "w50", "w80"]  # w79 would overlap w80


@pytest.mark.stays
def test_heads_are_named_once_where_rows_show_the_same_ones(rows):
    assert texts(maps(rows)).count("a1.h0") == 1
    other = replace(rows[1], heads=["a1.h0", "a0.h1"], marks={})
    figure = maps([rows[0], other])
    assert texts(figure).count("a1.h0") == 2
    assert texts(figure).count("a0.h1") == 1


@pytest.mark.reproduces
def test_same_rows_same_bytes(rows, tmp_path):
    first, second = (save(maps(rows, title="IOI"), tmp_path / name) for name in "ab")
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.survives
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": ["a3.h0"]}, "no head 'a3.h0'"),
        ({"heads": ["m1"]}, "no head 'm1'"),
        ({"heads": ["a1.h0<q>0"]}, "no head"),
        ({"heads": []}, "0 heads"),
        ({"heads": ["a0.h0", "a0.h0"]}, "1 to 8 different"),
        ({"marks": {(1, 0, 2, 4): 1.0}}, "is a closed gate"),
        ({"marks": {(1, 0, 9, 4): 1.0}}, "below"),
        ({"marks": {(1, 0, 4): 1.0}}, "below"),
    ],
)
def test_what_the_model_has_not_is_refused(rows, changes, message):
    with pytest.raises(DataError, match=message):
        replace(rows[1], **changes)


@pytest.mark.survives
def test_rows_that_do_not_belong_together_are_refused(rows, panel):
    with pytest.raises(DataError, match="no row"):
        maps([])
    with pytest.raises(DataError, match="the same prompt"):
        maps([rows[0], HeadMaps(panel=panel(words=list("aaaaaa")), heads=["a1.h0", "a2.h1"])])
    with pytest.raises(DataError, match="as many heads"):
        maps([rows[0], replace(rows[1], heads=["a1.h0"], marks={})])


@pytest.mark.says
def test_the_key_names_outlines_only_where_there_are_any(rows):
    plain = [replace(row, marks={}) for row in rows]
    assert {"attention weight", "closed gate", "closed head"} <= set(texts(maps(plain)))
    assert not {"helps the task", "works against it"} & set(texts(maps(plain)))
    assert "helps the task" in texts(maps(rows))
    assert "works against it" not in texts(maps([rows[1]]))
    against = replace(rows[1], marks={(1, 0, 4, 2): -1.0})
    assert "works against it" in texts(maps([against]))
