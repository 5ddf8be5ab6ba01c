import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewedges.draw import save
from fewedges.draw.covered import DOT, SIDE, Covered, covered
from fewedges.errors import DataError
from fewedges.measure.ways import examples


def random_panel(density=0.05, rows=64, columns=96, block=8, seed=0, **rest):
    mask = np.random.default_rng(seed).random((rows, columns)) < density
    mask[0, 0] = True
    return Covered(**{"title": "5% anywhere", "mask": mask, "block": block, **rest})


def block_panel(block=8):
    cells = np.eye(8, dtype=bool)
    return Covered(title="blocks", mask=cells.repeat(block, 0).repeat(block, 1), block=block)


def part(figure, name):
    (found,) = figure.findobj(lambda artist: artist.get_gid() == name)
    return found.get_path().vertices


def middles(vertices, corners):
    """Middles of squares of 5 corners, or of strokes of 2 ends, as (row, column)."""
    points = vertices.reshape(-1, corners, 2)
    return {tuple(point[::-1]) for point in (points.min(1) + points.max(1)) / 2}


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts] + [x.get_text() for x in figure.texts]


@pytest.mark.stays
@given(st.floats(0.001, 0.9), st.integers(0, 9), st.sampled_from([4, 8, 16, 32]))
def test_touched_blocks_are_those_with_a_kept_weight(density, seed, block):
    panel = random_panel(density, seed=seed, block=block)
    touched = {(row // block, column // block) for row, column in np.argwhere(panel.mask)}
    assert {tuple(place) for place in np.argwhere(panel.touched)} == touched


@pytest.mark.matches
def test_every_kept_weight_and_every_touched_block_is_drawn_where_it_is():
    panel = random_panel()
    figure = covered([panel])
    assert middles(part(figure, "single-0"), 2) == {(r + 0.5, c + 0.5) for r, c in np.argwhere(panel.mask)}
    assert middles(part(figure, "touched-0"), 5) == {(8 * r + 4, 8 * c + 4) for r, c in np.argwhere(panel.touched)}
    assert len(part(figure, "whole-0")) == 0


@pytest.mark.matches
def test_whole_blocks_are_one_square_and_no_single_weights():
    figure = covered([random_panel(), block_panel()])
    assert middles(part(figure, "whole-1"), 5) == {(8 * k + 4, 8 * k + 4) for k in range(8)}
    assert len(part(figure, "single-1")) == 0


@pytest.mark.matches
def test_the_block_drawn_large_is_the_one_marked_in_the_first_panel():
    panel = random_panel(0.1)
    figure = covered([panel])
    (frame,) = (patch for patch in figure.axes[0].patches if type(patch).__name__ == "Rectangle")
    column, row = (int(value) // 8 for value in frame.get_xy())
    inside = panel.mask[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
    assert middles(part(figure, "single-zoom"), 2) == {(r + 0.5, c + 0.5) for r, c in np.argwhere(inside)}
    said = "1 weight kept," if inside.sum() == 1 else f"{inside.sum()} weights kept,"
    assert said in texts(figure)
    touched = panel.blocks.sum((1, 3))
    assert inside.sum() == touched[touched > 0].min()


@pytest.mark.matches
def test_the_diagram_of_one_percent_shows_one_weight_that_costs_its_block():
    kept = examples()["1% anywhere"]
    shown = texts(covered([Covered(title="1% anywhere", mask=kept.mask().numpy(), block=16)]))
    assert {"one 16 × 16 block:", "1 weight kept,", "256 moved"} <= set(shown)


@pytest.mark.says
def test_the_key_explains_the_colours_and_says_when_weights_are_drawn_larger():
    true = texts(covered([random_panel(), block_panel()]))
    assert {"kept weight", "the block moved with it", "block left alone"} <= set(true)
    large = np.zeros((1024, 1024), dtype=bool)
    large[3, 5] = True
    times = DOT / (SIDE / 1024)
    assert f"kept weight (drawn {times:.2g}× as wide as it is)" in texts(covered([Covered(title="x", mask=large)]))
    whole = Covered(title="x", mask=np.ones((1024, 1024), dtype=bool))  # squares are never enlarged
    assert "kept weight" in texts(covered([whole]))


@pytest.mark.says
def test_numbers_under_the_pictures():
    mask = np.zeros((64, 64), dtype=bool)
    mask[3, 5] = mask[40, 40] = True
    assert Covered(title="x", mask=mask).facts() == ("density <0.1%", "cover(32) 50%", "2 kept, 2,048 moved: 1,024×")
    shown = texts(covered([random_panel(), block_panel()]))
    assert any("density 12.5%" in text and "cover(8) 12.5%" in text for text in shown)
    assert "512 kept, 512 moved: 1×" in shown
    nearly = np.ones((64, 64), dtype=bool)
    nearly[0, 0] = False
    assert Covered(title="x", mask=nearly).facts()[0] == "density 99.9%"


@pytest.mark.stays
def test_single_weights_are_never_drawn_smaller_than_they_are():
    for side in (32, 64, 512):
        mask = np.zeros((side, side), dtype=bool)
        mask[1, 1] = True
        (dot,) = covered([Covered(title="x", mask=mask)]).findobj(lambda artist: artist.get_gid() == "single-0")
        assert dot.get_linewidth() >= 72 * SIDE / side * (1 - 1e-9)


@pytest.mark.stays
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("title", ["", "One red element costs the blue block"])
def test_no_text_leaves_the_picture(outside, theme, title):
    assert outside(covered([random_panel(), block_panel(), random_panel(0.5)], title=title, theme=theme)) == []


@pytest.mark.reproduces
def test_the_same_pattern_gives_the_same_bytes(tmp_path):
    one, two = (save(covered([random_panel()]), tmp_path / name) for name in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


@pytest.mark.survives
@pytest.mark.parametrize(
    "wrong",
    [
        {"mask": np.zeros((64, 64), dtype=bool)},
        {"mask": np.ones((64, 64))},
        {"mask": np.ones(64, dtype=bool)},
        {"block": 7},
    ],
)
def test_a_pattern_that_cannot_be_drawn_is_refused(wrong):
    with pytest.raises(DataError):
        random_panel(**wrong)


@pytest.mark.survives
def test_nothing_and_too_much_are_refused():
    with pytest.raises(DataError, match="no panel"):
        covered([])
    with pytest.raises(DataError, match="single weights"):
        covered([random_panel(0.9, 512, 512)])
