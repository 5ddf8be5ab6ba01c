import numpy as np
import pytest

from fewedges.draw import save
from fewedges.draw.hardware import FAMILIES, key_lines, limit_line, looks_of, speedups
from fewedges.errors import DataError
from fewedges.measure.hardware import Hardware

FACTS = {"M": 256, "itemsize": 4, "flops": 1e11, "bandwidth": 2e10, "device": "CPU, 1 threads", "dtype": "float32"}
SPEED = {
    "masked": [0.9, 0.9, 0.9],
    "csr": [8.0, 2.0, 0.5],
    "bsr 32": [7.0, 2.0, 0.5],
    "bsr 64": [7.5, 2.2, 0.6],
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
def test_a_mark_stands_at_every_break_even_density_and_the_list_says_it():
    found = run(["1024x4096"])
    figure = speedups(found)
    even = found["break_even"]["1024x4096"]
    for what in ("csr", "bsr 32", "bsr 64"):
        assert part(figure, f"even-{what}").get_xdata()[0] == even[what]
        assert f"{what} {even[what]:.2f}" in texts(figure)
    assert part(figure, "even-masked") is None
    assert part(figure, "even-pixelated (triton)") is None  # faster wherever it was timed
    assert {"masked never", "pixelated (triton) ≥ 0.40"} <= set(texts(figure))


@pytest.mark.says
def test_what_could_not_be_had_is_named():
    figure = speedups(run())
    assert any("not here: 2:4" in text for text in texts(figure))
    assert any("CPU, 1 threads; float32; 256 input vectors" in text for text in texts(figure))
    assert {"1024 → 4096", "768 → 3072", "physical limit", "dense"} <= set(texts(figure))


@pytest.mark.stays
def test_ways_of_one_family_share_a_colour_and_differ_in_dash_or_width():
    looks = looks_of([*SPEED, "bsr 128", "pixelated", "monarch"])
    assert {looks[f"bsr {b}"].light for b in (32, 64, 128)} == {FAMILIES["bsr"].light}
    assert len({(look.light, str(look.dash), look.width) for look in looks.values()}) == len(looks)
    assert looks["pixelated"].light == looks["pixelated (triton)"].light


@pytest.mark.stays
@pytest.mark.parametrize("count", [1, 5, 14])
@pytest.mark.parametrize("across", [1, 2, 3])
def test_the_key_names_every_line_once(count, across):
    names = [f"way {place}" for place in range(count)]
    assert [name for line in key_lines(names, across) for name in line] == [*names, "physical limit", "dense"]


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
