import pytest

from fewedges.draw import save
from fewedges.draw.one_percent import one_percent
from fewedges.errors import DataError


def record(device="CPU, 1 threads", gains=(3.0, 0.5), sizes=(1, 256)):
    way = {"speedup_p20": 0.4, "speedup_p80": 5.0}
    cases = [
        {
            "shape": "64x128",
            "M": size,
            "limit": 80.0 / size**0.25,
            "ways": {"csr": {"speedup": gain, **way}, "bsr 128": {"speedup": 2 * gain, **way}, "masked": {"why": "no"}},
        }
        for size, gain in zip(sizes, gains, strict=True)
    ]
    facts = {"device": device, "processor": "A chip", "threads": 1, "dtype": "float32", "repeats": 30}
    return {"cases": cases[::-1], "runs": [{"facts": facts | {"clock": "thread"}}]}


def part(axes, name):
    found = axes.findobj(lambda artist: artist.get_gid() == name)
    return found[0] if found else None


@pytest.mark.matches
def test_a_mark_stands_at_its_speed_up_in_the_row_of_its_case():
    (axes,) = one_percent([record()]).axes
    for place, gain in enumerate((3.0, 0.5)):  # rows by M, whatever the order of the cases
        assert part(axes, f"csr-{place}").get_xdata()[0] == gain
        assert part(axes, f"bsr 128-{place}").get_xdata()[0] == 2 * gain
        assert abs(part(axes, f"csr-{place}").get_ydata()[0] - place) < 0.5
        assert set(part(axes, f"limit-{place}").get_xdata()) == {80.0 / (1, 256)[place] ** 0.25}
    assert part(axes, "masked-0") is None  # what could not be had is no mark
    assert [label.get_text() for label in axes.get_yticklabels()] == ["M = 1   64 → 128", "M = 256   64 → 128"]


@pytest.mark.stays
def test_panels_share_an_axis_that_holds_every_mark_and_every_limit():
    figure = one_percent([record(), record("A GPU", gains=(0.02, 40.0))])
    cpu, gpu = figure.axes
    assert cpu.get_xlim() == gpu.get_xlim()
    low, high = cpu.get_xlim()
    assert low < 0.02
    assert high > 80


@pytest.mark.says
def test_a_panel_says_its_device_and_how_it_was_timed():
    figure = one_percent([record(), record("A GPU")])
    said = [text.get_text() for text in figure.texts]
    assert {"A chip, 1 core", "A GPU", "anywhere (CSR)", "what the peaks allow"} <= set(said)
    assert any("float32; the thread's CPU time, median of 30 runs" in text for text in said)


@pytest.mark.says
@pytest.mark.parametrize("found", [[], [{"cases": [], "runs": []}]])
def test_nothing_to_draw_is_an_error(found):
    with pytest.raises(DataError, match=r"jsons of scripts/one_percent\.py"):
        one_percent(found)


@pytest.mark.reproduces
def test_the_same_numbers_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        save(one_percent([record()], theme="dark"), tmp_path / name)
    for end in ("svg", "png"):
        assert (tmp_path / f"a.{end}").read_bytes() == (tmp_path / f"b.{end}").read_bytes()
