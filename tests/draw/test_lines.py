import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewedges.draw import save, training_curve
from fewedges.draw.lines import apart
from fewedges.errors import DataError


def record(step, **rest):
    values = {"kl": 0.1, "margin": 0.1, "multiplier": 0.01, "dense_edges": 256.5, "cross_entropy": 3.1}
    edges = {"edges_per_query_per_head": 100 / (1 + step), "expected_edges": 120 / (1 + step)}
    return {"step": step, "tokens": step * 8192, "loss": 3.2, **values, **edges, **rest}


def line(figure, key):
    found = figure.findobj(lambda artist: artist.get_gid() == key)
    return found[0] if found else None


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.mark.matches
def test_lines_hold_the_recorded_values():
    records = [record(step, kl=0.1 + step / 100) for step in range(0, 50, 5)]
    figure = training_curve(records)
    for key in ("edges_per_query_per_head", "expected_edges", "kl", "margin", "multiplier", "dense_edges"):
        steps, values = line(figure, key).get_data()
        np.testing.assert_array_equal(steps, [one["step"] for one in records])
        np.testing.assert_array_equal(values, [one[key] for one in records])


@pytest.mark.matches
def test_a_label_stands_at_the_end_of_its_line():
    figure = training_curve([record(step, kl=0.5 - step / 100, margin=0.1) for step in range(20)])
    (axes,) = (axes for axes in figure.axes if line(axes, "kl"))
    (label,) = (text for text in axes.texts if text.get_text() == "KL 0.31")
    end = axes.transData.transform((19, 0.31))[1]
    assert axes.transAxes.transform((0, label.get_position()[1]))[1] == pytest.approx(end, abs=0.01)


@pytest.mark.stays
@pytest.mark.parametrize("hole", [float("nan"), None, float("inf"), "missing"])
def test_a_missing_value_leaves_a_gap(hole):
    records = [record(step) for step in range(6)]
    records[2]["kl"] = hole
    if hole == "missing":
        del records[2]["kl"]
    values = line(training_curve(records), "kl").get_ydata()
    np.testing.assert_array_equal(np.isnan(values), [False, False, True, False, False, False])


@pytest.mark.stays
def test_a_value_between_two_gaps_is_a_dot():
    records = [record(step, kl=0.2 if step in (0, 1, 3) else None) for step in range(6)]
    figure = training_curve(records)
    dots = line(figure, "kl-alone")
    assert dots.get_xdata().tolist() == [3]
    assert dots.get_marker() == "."
    assert line(figure, "margin-alone") is None


@pytest.mark.stays
def test_a_log_axis_has_no_place_for_zero():
    records = [record(step, edges_per_query_per_head=[8.0, 0.0, 2.0, 1.0][step]) for step in range(4)]
    figure = training_curve(records)
    edges = line(figure, "edges_per_query_per_head")
    assert edges.axes.get_yscale() == "log"
    assert np.isnan(edges.get_ydata()).tolist() == [False, True, False, False]
    assert line(figure, "kl").axes.get_yscale() == "linear"


@pytest.mark.stays
def test_the_last_record_of_a_step_counts_and_steps_are_sorted():
    records = [record(5), record(0), record(10, kl=9.0), record(10, kl=0.3)]
    steps, values = line(training_curve(records), "kl").get_data()
    assert steps.tolist() == [0, 5, 10]
    assert values.tolist() == [0.1, 0.1, 0.3]


@pytest.mark.stays
def test_budget_and_dense_level_are_dashed():
    figure = training_curve([record(step) for step in range(3)])
    assert [line(figure, key).get_linestyle() for key in ("margin", "dense_edges", "kl")] == ["--", "--", "-"]


@pytest.mark.stays
def test_panels_appear_with_their_values():
    def panels(**rest):
        return len(training_curve([record(step, **rest) for step in range(3)]).axes)

    assert panels() == 3
    assert panels(control_cross_entropy=3.09) == 4
    assert panels(open_heads=81.0) == 4
    assert panels(multiplier=None) == 2
    assert panels(multiplier=None, kl=None) == 1


@pytest.mark.stays
@given(st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_labels_are_pushed_apart_and_keep_their_order(heights):
    heights = np.sort(heights)
    moved = apart(heights, 0.1)
    assert np.all(np.diff(moved) >= 0.1 - 2e-3)  # 100 rounds for 4 labels leave 5e-4 at most
    assert moved.mean() == pytest.approx(heights.mean())
    if np.all(np.diff(heights) >= 0.1):
        np.testing.assert_array_equal(moved, heights)


@pytest.mark.stays
@pytest.mark.parametrize("scale", [1e-6, 1.0, 123456.0])
@pytest.mark.parametrize("last", [1, 100, 500_000])
def test_no_text_is_cut_off(outside, scale, last):
    records = [record(step, multiplier=scale * 1.234567, control_cross_entropy=10.123) for step in (0, last)]
    assert outside(training_curve(records, title="SmolLM2-135M, T = 512")) == []


@pytest.mark.reproduces
def test_same_records_same_bytes(tmp_path):
    records = [record(step) for step in range(30)]
    first, second = (save(training_curve(records), tmp_path / name) for name in "ab")
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.survives
def test_a_log_of_one_record(tmp_path):
    figure = training_curve([record(7)])
    low, high = figure.axes[0].get_xlim()
    assert low < 7 < high
    save(figure, tmp_path / "one")


@pytest.mark.survives
@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "no record"),
        ([{"kl": 0.1}], "step=None"),
        ([{"step": 1, "kl": 0.1}, {"step": float("nan"), "kl": 0.1}], "record 1: step=nan"),
        ([{"step": 1, "loss": 3.0}], "no value to draw in 1 records"),
    ],
)
def test_records_that_cannot_be_drawn_are_refused(records, message):
    with pytest.raises(DataError, match=message):
        training_curve(records)


@pytest.mark.says
def test_lines_are_named_beside_them():
    written = texts(training_curve([record(step, control_cross_entropy=3.09) for step in range(5)]))
    for label in ("dense 256.5", "open 20", "expected", "margin 0.1", "KL 0.1", "control 3.09", "sparse 3.1"):
        assert label in written
