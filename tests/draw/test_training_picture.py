import itertools

import numpy as np
import pytest

from fewedges.draw import save
from fewedges.draw.training import LONG_DASH, arms_of, races
from fewedges.errors import DataError

PACES = {"dense": 0.04, "pixelated": 0.018, "random": 0.018, "low-rank": 0.016, "small": 0.011}
PACES |= {"pixelated-longer": 0.018, "small-longer": 0.011}
LAST = {"dense": 1.1, "pixelated": 1.14, "random": 1.15, "low-rank": 1.2, "small": 1.16}
LAST |= {"pixelated-longer": 1.05, "small-longer": 1.06}


def arm(name, rows=12, reached=None, ratio=None):
    steps = np.arange(rows + 1) * (170 if name.endswith("longer") else 100)
    loss = LAST[name] + 4 * np.exp(-np.arange(rows + 1) / 2)
    loss[-1] = LAST[name]
    curve = [
        {"step": int(step), "seconds": step * PACES[name], "loss": float(value)}
        for step, value in zip(steps, loss, strict=True)
    ]
    sizes = {"parameters": 2e8, "ms_p50": 1e3 * PACES[name], "limit": 2.6}
    return {"curve": curve, "seconds_to_dense_loss": reached, "ratio": ratio, **sizes}


def run(names=tuple(PACES)):
    arms = {name: arm(name) for name in names}
    for name in arms:
        if name.endswith("longer"):
            arms[name] |= {"seconds_to_dense_loss": 31.2, "ratio": 0.65}
    protocol = {"width": 2048, "layers": 4, "batch": 32, "length": 512}
    return {"device": "one GPU", "protocol": protocol, "arms": arms}


def part(figure, name):
    found = figure.findobj(lambda artist: artist.get_gid() == name)
    return found[0] if found else None


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts] + [x.get_text() for x in figure.texts]


@pytest.mark.matches
def test_lines_hold_the_curves_over_steps_and_over_seconds():
    found = run()
    figure = races(found)
    for name, each in found["arms"].items():
        for key in ("step", "seconds"):
            line = part(figure, f"{key}-{name}")
            assert list(line.get_xdata()) == [row[key] for row in each["curve"]]
            assert list(line.get_ydata()) == [row["loss"] for row in each["curve"]]
    assert part(figure, "step-dense").axes is not part(figure, "seconds-dense").axes


@pytest.mark.matches
def test_a_dot_on_the_dense_models_last_loss_stands_where_it_is_reached():
    figure = races(run())
    dot = part(figure, "reached-pixelated-longer")
    assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (31.2, 1.1)
    assert set(part(figure, "dense-loss").get_ydata()) == {1.1}
    assert part(figure, "reached-pixelated") is None
    assert part(figure, "reached-dense") is None


@pytest.mark.says
def test_names_carry_last_losses_and_parts_of_the_dense_models_time():
    said = texts(races(run()))
    assert {"low rank only 1.200", "random cells 1.150", "dense 1.100", "pixelated, longer 1.050"} <= set(said)
    assert {"pixelated, longer 0.65×", "smaller dense: not reached", "dense", "time to dense's last loss"} <= set(said)
    assert any("one GPU; GPT-2 layout, 4 layers of width 2,048; 16,384 bytes a step" in text for text in said)
    assert "a step 2.22× faster (limit 2.60×)" in " ".join(said)


@pytest.mark.says
def test_the_learning_rate_of_every_arm_is_said_once():
    found = run()
    for name, each in found["arms"].items():
        each["learning_rate"] = 6e-4 if name.startswith("pixelated") else 3e-4
    said = " ".join(texts(races(found)))
    assert "learning rates: dense 0.0003, pixelated 0.0006, random cells 0.0003" in said
    assert "longer 0.0003" not in said
    found["arms"]["small-longer"]["learning_rate"] = 1e-4
    assert "smaller dense, longer 0.0001" in " ".join(texts(races(found)))


@pytest.mark.stays
def test_only_what_was_trained_longer_has_long_dashes_and_no_two_arms_look_alike():
    arms = arms_of(run())
    assert {arm.name for arm in arms if arm.look.dash == LONG_DASH} == {"pixelated-longer", "small-longer"}
    for theme in ("light", "dark"):
        assert len({(getattr(arm.look, theme), str(arm.look.dash)) for arm in arms}) == len(arms)


@pytest.mark.stays
def test_no_name_comes_near_the_edge():
    """A tenth of an inch at least is free at the right of every label."""
    figure = races(run())
    figure.draw_without_rendering()
    ends = [text.get_window_extent().x1 for axes in figure.axes for text in axes.texts]
    assert max(ends) <= figure.bbox.x1 - 0.1 * figure.dpi


@pytest.mark.stays
def test_both_panels_share_a_scale_that_holds_all_last_losses():
    figure = races(run())
    low, high = figure.axes[0].get_ylim()
    assert figure.axes[1].get_ylim() == (low, high)
    assert low < min(LAST.values())
    assert high > max(LAST.values())
    assert high < 5  # the first loss is cut off


@pytest.mark.stays
def test_no_name_stands_on_another_and_the_order_is_that_of_the_losses():
    found = run()
    for each in found["arms"].values():
        each["curve"][-1]["loss"] = 1.1 + 1e-4 * each["ms_p50"]
    figure = races(found)
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
        assert all(below.y1 <= above.y0 + 1 for below, above in itertools.pairwise(boxes))
    named = {text.get_text().rpartition(" ")[0]: text.get_position()[1] for text in figure.axes[0].texts}
    assert named["smaller dense"] < named["low rank only"] < named["dense"]


@pytest.mark.stays
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("names", [["dense"], ["pixelated", "small"], list(PACES)])
def test_no_text_leaves_the_picture(outside, theme, names):
    assert outside(races(run(names), theme=theme, title="Training")) == []


@pytest.mark.reproduces
def test_the_same_run_gives_the_same_bytes(tmp_path):
    one, two = (save(races(run()), tmp_path / name) for name in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


@pytest.mark.survives
def test_a_model_that_diverged_is_drawn_as_far_as_it_came():
    found = run()
    curve = found["arms"]["random"]["curve"]
    for row in (curve[5], *curve[9:]):
        row["loss"] = None
    line = part(races(found), "step-random")
    assert len(line.get_ydata()) == 9
    assert np.isnan(line.get_ydata()[5])
    for row in curve[1:]:
        row["loss"] = None
    assert part(races(found), "step-random") is None


@pytest.mark.survives
@pytest.mark.parametrize(
    "found", [{}, {"arms": {}}, {"arms": {"dense": {"curve": [{"step": 0, "seconds": 0, "loss": 5}]}}}]
)
def test_a_run_without_a_curve_is_refused(found):
    with pytest.raises(DataError, match="train_pixelated"):
        races(found)
