import itertools

import numpy as np
import pytest

from fewedges.draw import save
from fewedges.draw.hardware import facts_of, limit_line, looks_of, pays, speedups
from fewedges.errors import DataError
from fewedges.measure.hardware import Hardware
from fewedges.measure.ways import WAYS

FACTS = {"M": 256, "itemsize": 4, "flops": 1e11, "bandwidth": 2e10, "device": "CPU, 1 threads", "dtype": "float32"}
SPEED = {
    "masked": [0.9, 0.9, 0.9],
    "csr": [8.0, 2.0, 0.5],
    "bsr 32": [7.0, 2.0, 0.5],
    "bsr 64": [7.5, 2.2, 0.6],
    "monarch": [0.4, 2.0, 0.6],
    "pixelated (triton)": [9.0, 6.0, 2.0],
}
DENSITIES = (0.01, 0.1, 0.4)


def rows(shape="1024x4096", speed=SPEED):
    found = [{"what": "dense", "shape": shape, "density": 1.0, "speedup": 1.0}]
    for what, gains in speed.items():
        for density, gain in zip(DENSITIES, gains, strict=True):
            known = {"what": what, "shape": shape, "asked": density, "density": density, "dense_ms_p50": 24.0}
            found.append({**known, "speedup": gain, "speedup_p20": gain * 0.9, "speedup_p80": gain * 1.1})
    return [*found, {"what": "2:4", "shape": shape, "why": "no GPU"}]


def run(shapes=("1024x4096", "768x3072")):
    return Hardware(rows=[row for shape in shapes for row in rows(shape)], facts=FACTS).to_dict()


def part(figure, name):
    found = figure.findobj(lambda artist: artist.get_gid() == name)
    return found[0] if found else None


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts] + [x.get_text() for x in figure.texts]


@pytest.mark.matches
def test_lines_hold_the_rows_on_log_axes():
    figure = speedups(run())
    for shape in ("1024x4096", "768x3072"):
        for what, gains in SPEED.items():
            line = part(figure, f"{what}-{shape}")
            assert (list(line.get_xdata()), list(line.get_ydata())) == (list(DENSITIES), gains)
            assert (line.axes.get_xscale(), line.axes.get_yscale()) == ("log", "log")


@pytest.mark.matches
def test_the_limit_is_dense_time_over_arithmetic_or_bytes_by_hand():
    density, best = limit_line({"shape": "1024x4096", "dense_ms_p50": 24.0}, FACTS, 0.001, 1.0)
    size = 1024 * 4096
    at_1 = 24.0 / (1e3 * 2 * 256 * size / 1e11)  # arithmetic decides
    at_0 = 24.0 / (1e3 * 4 * (256 * 5120 + 0.001 * size) / 2e10)  # bytes decide
    assert (density[0], density[-1]) == (pytest.approx(0.001), pytest.approx(1.0))
    assert best[-1] == pytest.approx(at_1, rel=1e-12)
    assert best[0] == pytest.approx(at_0, rel=1e-12)
    steep = (density > 0.1) & (density < 0.9)
    # while arithmetic decides the limit is 1/density: speed-up times density is constant (measured 4e-16)
    assert np.ptp(best[steep] * density[steep]) <= 2e-15 * at_1
    drawn = part(speedups(run()), "limit-1024x4096")
    assert drawn.get_ydata()[-1] == pytest.approx(at_1)


@pytest.mark.matches
def test_the_limit_drawn_is_the_limit_measured():
    """One formula in two places (draw imports no torch): measure's floor and this line."""
    from fewedges.measure.speed import floor_ms

    density, best = limit_line({"shape": "1024x4096", "dense_ms_p50": 24.0}, FACTS, 0.001, 1.0)
    peaks = {name: FACTS[name] for name in ("flops", "bandwidth")}
    for place in (0, 60, 130, -1):
        floor = floor_ms((1024, 4096), float(density[place]), 256, 4, peaks)
        assert best[place] == pytest.approx(24.0 / floor, rel=1e-12)


@pytest.mark.matches
def test_rings_stand_wherever_a_line_goes_through_1_and_the_table_says_between_what():
    found = run(["1024x4096"])
    figure = speedups(found)
    even = found["break_even"]["1024x4096"]
    for what in ("csr", "bsr 32", "bsr 64"):
        ((_, high),) = even[what]
        assert list(part(figure, f"even-{what}").get_xdata()) == [high]
        assert f"below {high:#.2g}" in texts(figure)
    ((low, high),) = even["monarch"]
    assert list(part(figure, "even-monarch").get_xdata()) == [low, high]
    assert f"between {low:#.2g} and {high:#.2g}" in texts(figure)
    assert part(figure, "even-masked") is None
    assert part(figure, "even-pixelated (triton)") is None  # faster wherever it was timed
    assert {"never", "at all of 0.010 to 0.40"} <= set(texts(figure))


@pytest.mark.says
def test_what_could_not_be_had_is_named():
    figure = speedups(run())
    assert any("not here: 2:4" in text for text in texts(figure))
    assert any("CPU, 1 threads; float32; 256 input vectors" in text for text in texts(figure))
    assert {"1024 → 4096", "768 → 3072", "beyond the limit (all inputs read)", "dense", "pays at density"} <= set(
        texts(figure)
    )


@pytest.mark.says
def test_the_processor_is_named_and_kernels_that_need_a_gpu_are_one_word():
    facts = {**FACTS, "processor": "AMD EPYC", "threads": 1, "clock": "thread", "repeats": 30}
    known = facts_of(facts, ["csr"], ["2:4", "bsr 32 (triton)", "pixelated (triton)"])
    assert known.startswith("AMD EPYC, 1 thread; float32")
    assert "median of 30 runs, CPU time of the thread" in known
    assert known.endswith("not here: 2:4, the triton kernels")
    assert facts_of(facts, ["bsr 64 (triton)"], ["bsr 32 (triton)"]).endswith("not here: bsr 32 (triton)")
    assert facts_of({**facts, "device": "a GPU"}, [], []).startswith("a GPU; float32")


@pytest.mark.stays
def test_every_way_looks_different_and_larger_blocks_are_wider_and_lie_lower():
    looks = looks_of([name for name in WAYS if name != "dense"])
    assert len({(own.light, str(own.dash), own.width, own.marker) for own in looks.values()}) == len(looks)
    assert len({(own.dark, str(own.dash), own.width, own.marker) for own in looks.values()}) == len(looks)
    assert looks["pixelated"].light == looks["pixelated (triton)"].light
    figure = speedups(run())
    lines = [part(figure, f"bsr {b}-1024x4096") for b in (32, 64)]
    assert lines[0].get_linewidth() < lines[1].get_linewidth()
    assert lines[0].get_zorder() > lines[1].get_zorder()


@pytest.mark.says
def test_a_cell_says_in_signs_what_is_too_wide_in_words():
    twice = rows(speed={"way": [2.0, 0.5, 2.0]})
    assert pays(twice, "1024x4096", "way", 2.0) == "below 0.032 and above 0.20"
    assert pays(twice, "1024x4096", "way", 0.9) == "< 0.032, > 0.20"
    assert pays(twice, "1024x4096", "other", 2.0) == "-"


@pytest.mark.stays
@pytest.mark.parametrize("count", [1, 5, 14])
@pytest.mark.parametrize("across", [1, 3, 6])
def test_the_table_names_every_line_once_and_no_cell_touches_another(count, across):
    gains = [0.5, 2.0, 0.5]
    shapes = [f"{1024 * (1 + place)}x11008" for place in range(across)]
    speed = {f"way {place}": gains for place in range(count)}
    found = {"rows": [row for shape in shapes for row in rows(shape, speed)], "facts": FACTS}
    figure = speedups(found)
    figure.draw_without_rendering()
    names = [text.get_text() for text in figure.texts]
    assert [name for name in names if name.startswith("way")] == list(speed)
    lines = {}
    for text in figure.texts:
        if text.get_va() == "center_baseline":
            lines.setdefault(text.get_position()[1], []).append(text.get_window_extent())
    assert len(lines) == count + 1
    for boxes in lines.values():
        assert len(boxes) == across + 1
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


@pytest.mark.stays
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_no_text_leaves_the_picture(outside, theme, count):
    shapes = [f"{1024 * (1 + place)}x4096" for place in range(count)]
    assert outside(speedups(run(shapes), theme=theme, title="CPU")) == []


@pytest.mark.stays
def test_shapes_can_be_chosen():
    figure = speedups(run(), shapes=["768x3072"])
    assert len(figure.axes) == 1
    assert part(figure, "csr-1024x4096") is None


@pytest.mark.reproduces
def test_the_same_run_gives_the_same_bytes(tmp_path):
    one, two = (save(speedups(run()), tmp_path / name) for name in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


@pytest.mark.survives
@pytest.mark.parametrize("found", [{}, {"rows": [], "facts": FACTS}, {"rows": rows(speed={}), "facts": FACTS}])
def test_a_run_without_a_speed_up_is_refused(found):
    with pytest.raises(DataError, match="to_dict"):
        speedups(found)


@pytest.mark.survives
def test_shapes_that_were_not_timed_are_refused():
    with pytest.raises(DataError):
        speedups(run(), shapes=["5x5"])
