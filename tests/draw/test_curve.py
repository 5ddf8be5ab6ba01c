import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg

from fewedges.draw import save
from fewedges.draw.curve import Curve, Effects, explained_effect, ratio, reaches
from fewedges.errors import DataError


def curve(label="sparse", half=30.0, total=10_000, band=True, **rest):
    """A made-up curve that rises to a half at `half` edges."""
    edges = np.unique(np.geomspace(1, total, 15).round())
    effect = (edges / half) / (1 + edges / half) * (1 + half / total)
    ends = {"low": effect - 0.05, "high": effect + 0.05} if band else {}
    return Curve(label=label, edges=edges, effect=effect, **{**ends, **rest})


def task(title="IOI", heads=True, labels=("dense", "control", "sparse"), halves=(300, 250, 10)):
    pairs = list(zip(labels, halves, strict=True))
    few = [curve(label, half / 5, 100) for label, half in pairs]
    return Effects(title=title, edges=[curve(label, half) for label, half in pairs], heads=few if heads else ())


def line(figure, name):
    found = figure.findobj(lambda artist: artist.get_gid() == name)
    return found[0] if found else None


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts] + [x.get_text() for x in figure.texts]


@pytest.mark.matches
def test_lines_hold_the_values_on_a_log_axis():
    one = task()
    figure = explained_effect([one])
    for kind, curves in (("edges", one.edges), ("heads", one.heads)):
        for given_ in curves:
            drawn = line(figure, f"{kind}-0-{given_.label}")
            np.testing.assert_array_equal(drawn.get_xdata(), given_.edges)
            np.testing.assert_array_equal(drawn.get_ydata(), given_.effect)
            assert drawn.axes.get_xscale() == "log"


@pytest.mark.stays
def test_an_empty_circuit_has_no_place_on_a_log_axis():
    figure = explained_effect([Effects(title="x", edges=[Curve(label="dense", edges=[0, 1, 5], effect=[0, 0.5, 1])])])
    assert line(figure, "edges-0-dense").get_xdata().tolist() == [1, 5]


@pytest.mark.matches
@pytest.mark.parametrize(
    ("effect", "size"),
    [
        ([0.0, 0.8, 1.0], 10**1.5),  # half way from 10 to 100 on the log axis
        ([0.0, 0.9, 0.5], 10.0),  # at a point; the first time counts
        ([0.95, 0.9, 1.0], 1.0),  # from the start
        ([0.0, np.nan, 1.0], 10**1.8),  # straight over a gap
        ([0.0, 0.5, 0.89], None),
    ],
)
def test_a_level_is_reached_where_the_drawn_line_comes_to_it(effect, size):
    found = reaches(Curve(label="x", edges=[1, 10, 100], effect=effect), 0.9)
    assert found == (None if size is None else pytest.approx(size, rel=1e-12))


@pytest.mark.matches
def test_where_it_is_reached_may_be_said():
    assert reaches(curve(reached=77.0), 0.9) == 77.0


@pytest.mark.stays
@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=8, unique=True), st.floats(0.02, 0.98))
def test_the_line_has_the_level_where_it_is_said_to_reach_it(effects, level):
    effects, sizes = sorted(effects), 3.0 ** np.arange(len(effects))
    found = reaches(Curve(label="x", edges=sizes, effect=effects), level)
    if effects[-1] < level:
        assert found is None
    else:
        # interpolation and its inverse: measured 2e-15
        there = np.interp(np.log(found), np.log(sizes), effects)
        assert there == pytest.approx(max(level, effects[0]), rel=0, abs=8e-15)


@pytest.mark.matches
def test_the_ratio_is_that_of_the_first_curve_to_the_last():
    one = task()
    figure = explained_effect([one])
    for kind, curves in (("edges", one.edges), ("heads", one.heads)):
        sizes = [reaches(given_, 0.9) for given_ in curves]
        (axes,) = (
            axes for axes in figure.axes if axes.get_xlabel() == f"{'circuit edges' if kind == 'edges' else kind} kept"
        )
        arrow, label = axes.texts[:2] if axes.texts[0].get_text() == "" else axes.texts[1:3]
        assert label.get_text() == ratio(sizes[0], sizes[2])
        assert (arrow.xyann, arrow.xy) == ((sizes[0], 0.9), (sizes[2], 0.9))
        dots = [x.get_xdata()[0] for x in axes.lines if x.get_marker() == "o"]
        assert dots == [sizes[0], sizes[2]]


@pytest.mark.matches
@pytest.mark.parametrize(
    ("first", "last", "text"),
    [(97.04, 1, "97×"), (8.64, 1, "8.6×"), (9.96, 1, "10×"), (1, 1.25, "0.8×"), (12_345, 1, "12,345×"), (1, 1, "1.0×")],
)
def test_a_ratio_has_two_digits(first, last, text):
    assert ratio(first, last) == text


@pytest.mark.stays
def test_without_both_ends_there_is_no_ratio():
    short = Curve(label="dense", edges=[1, 10], effect=[0, 0.5])
    for curves in ([short, curve()], [curve()]):
        figure = explained_effect([Effects(title="IOI", edges=curves)])
        assert [text for text in texts(figure) if "×" in text] == []
        assert sum(x.get_marker() == "o" for x in figure.axes[0].lines) == 1


@pytest.mark.stays
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_label_looks_the_same_in_every_panel(theme):
    figure = explained_effect([task(), task("Docstring", labels=("dense", "sparse"), halves=(50, 5))], theme=theme)
    for label in ("dense", "sparse"):
        looks = {
            (drawn.get_color(), drawn.get_linestyle(), drawn.get_linewidth())
            for kind in ("edges", "heads")
            for drawn in (line(figure, f"{kind}-{column}-{label}") for column in (0, 1))
        }
        assert len(looks) == 1
    colours = [line(figure, f"edges-0-{label}").get_color() for label in ("dense", "control", "sparse")]
    assert len(set(colours)) == 3


@pytest.mark.stays
def test_all_panels_have_one_scale_of_effects_that_holds_them_up_to_a_bound():
    wild = Curve(label="dense", edges=[1, 10, 100], effect=[-0.3, 7.0, 1.0])
    figure = explained_effect([task(), Effects(title="wild", edges=[wild])])
    limits = {axes.get_ylim() for axes in figure.axes}
    assert len(limits) == 1
    low, high = limits.pop()
    assert low < -0.3
    assert 1.5 < high < 1.6


@pytest.mark.stays
@pytest.mark.parametrize(("low", "floor"), [(-0.3, -0.34), (-9.0, -0.79)])
def test_a_band_below_its_line_is_inside_the_panel_up_to_the_bound(low, floor):
    deep = Curve(label="sparse", edges=[1, 10, 100], effect=[0.0, 0.1, 1.0], low=[low, 0.0, 1.0], high=[0.1, 0.2, 1.0])
    axes = explained_effect([Effects(title="x", edges=[curve("dense", 300), deep])]).axes[0]
    assert axes.get_ylim()[0] == pytest.approx(floor)


@pytest.mark.stays
def test_rows_and_columns_without_curves_stay_empty():
    assert len(explained_effect([task(heads=False)] * 3).axes) == 3
    assert len(explained_effect([task(), task(heads=False)]).axes) == 3
    only_heads = Effects(title="x", heads=[curve()])
    assert [axes.get_xlabel() for axes in explained_effect([only_heads]).axes] == ["heads kept"]


@pytest.mark.stays
@pytest.mark.parametrize("count", [1, 2, 4, 6])
@pytest.mark.parametrize("total", [40, 30_000_000])
def test_no_text_is_cut_off(outside, count, total):
    ends = [curve("dense", total / 20, total), curve("sparse", total / 90, total)]
    tasks = [Effects(title=f"Greater Than {index}", edges=ends, heads=ends) for index in range(count)]
    assert outside(explained_effect(tasks, title="SmolLM2-135M, counterfactual ablation")) == []


@pytest.mark.stays
def test_a_ratio_without_room_beside_its_arrow_stands_below_the_line():
    at_once = Curve(label="sparse", edges=[1, 10], effect=[0.95, 1])
    figure = explained_effect([Effects(title="x", edges=[curve("dense"), at_once])])
    (label,) = (text for text in figure.axes[0].texts if "×" in text.get_text())
    assert label.get_va() == "top"
    (label,) = (text for text in explained_effect([task()]).axes[0].texts if "×" in text.get_text())
    assert label.get_va() == "bottom"


@pytest.mark.reproduces
def test_same_curves_same_bytes(tmp_path):
    first, second = (save(explained_effect([task()]), tmp_path / name) for name in "ab")
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.survives
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"edges": [1, 2], "effect": [1.0]}, "lists of one length"),
        ({"edges": [1, 2], "effect": [0, 1], "low": [0.0]}, "lists of one length"),
        ({"edges": [2, 1], "effect": [0, 1]}, "do not grow"),
        ({"edges": [1, 1], "effect": [0, 1]}, "do not grow"),
        ({"edges": [1, np.nan], "effect": [0, 1]}, "do not grow"),
        ({"edges": [0, 1], "effect": [1, np.nan]}, "no finite effect"),
        ({"edges": [], "effect": []}, "no finite effect"),
    ],
)
def test_curves_that_cannot_be_drawn_are_refused(wrong, message):
    with pytest.raises(DataError, match=message):
        Curve(label="x", **wrong)


@pytest.mark.survives
@pytest.mark.parametrize("tasks", [[], [Effects(title="empty")]])
def test_nothing_to_draw_is_refused(tasks):
    with pytest.raises(DataError, match="no curve in"):
        explained_effect(tasks)


@pytest.mark.survives
def test_a_curve_of_one_circuit_and_bands_with_gaps_are_drawn(tmp_path):
    one = Curve(label="dense", edges=[3], effect=[0.4])
    holes = curve("sparse", low=np.full(15, np.nan), high=np.full(15, np.nan))
    save(explained_effect([Effects(title="x", edges=[one, holes])]), tmp_path / "one")


@pytest.mark.says
def test_lines_bands_axes_and_tasks_are_named():
    written = texts(explained_effect([task("IOI"), task("Docstring")], title="SmolLM2", interval="3 seeds"))
    for label in ("IOI", "Docstring", "SmolLM2", "dense", "control", "sparse", "3 seeds", "explained effect"):
        assert label in written
    bare = [curve(label, band=False) for label in ("dense", "sparse")]
    assert "95% interval" not in texts(explained_effect([Effects(title="IOI", edges=bare)]))


@pytest.mark.stays
@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_key_stays_on_the_paper(count):
    labels = ("dense", "control", "random circuits", "another one", "sparse")
    curves = [Curve(label=label, edges=[1, 9], effect=[0.1, 1], low=[0, 1], high=[0.2, 1]) for label in labels]
    figure = explained_effect([Effects(title=str(n), edges=curves) for n in range(count)])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    words = [text for text in figure.texts if text.get_text() in (*labels, "95% interval")]
    assert len(words) == 6
    edges = [text.get_window_extent() for text in words]
    assert min(box.x0 for box in edges) > 0
    assert max(box.x1 for box in edges) < figure.bbox.width
    axes = [box for axis in figure.axes if (box := axis.get_tightbbox()) is not None]
    assert max(box.y1 for box in edges) < min(box.y0 for box in axes)


@pytest.mark.stays
def test_random_circuits_look_alike_with_a_control_and_without():
    without = explained_effect([task(labels=("dense", "random circuits", "sparse"))])
    labels = ("dense", "control", "random circuits", "sparse")
    with_one = explained_effect([task(labels=labels, halves=(300, 250, 900, 10))])
    looks = [line(figure, "edges-0-random circuits") for figure in (without, with_one)]
    assert looks[0].get_color() == looks[1].get_color() != line(with_one, "edges-0-control").get_color()
    assert looks[0].get_linestyle() == looks[1].get_linestyle()


@pytest.mark.stays
def test_a_control_that_only_later_tasks_have_takes_no_other_look():
    few, more = task("a", labels=("dense", "sparse"), halves=(300, 10)), task("b")
    seen = explained_effect([few, more])
    alone = explained_effect([more])
    for label in ("dense", "control", "sparse"):
        assert line(seen, f"edges-1-{label}").get_color() == line(alone, f"edges-0-{label}").get_color()


@pytest.mark.stays
@pytest.mark.parametrize(("halves", "arrows"), [((11, 11, 10), 0), ((300, 250, 10), 1)])
def test_dots_that_touch_have_no_arrow_between_them(halves, arrows):
    """An arrow shorter than its own head would point backwards."""
    figure = explained_effect([task(heads=False, halves=halves)])
    assert sum(text.get_text() == "" for axes in figure.axes for text in axes.texts) == arrows
    assert any("×" in text for text in texts(figure))
