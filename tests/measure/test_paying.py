"""Ranges of density in which a way pays: by hand, against a fine grid, in words; a whole model by sums."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewedges.measure.paying import Range, brief, points, ranges, said, together


def line(*gains):
    return [(0.01 * 2**place, gain) for place, gain in enumerate(gains)]


@pytest.mark.matches
@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ((0.5, 0.4, 0.3), []),
        ((0.5, 2.0, 0.5), [(0.01 * 2**0.5, 0.02 * 2**0.5)]),  # slow below, then fast, then slow
        ((2.0, 0.5, 2.0), [(None, 0.01 * 2**0.5), (0.02 * 2**0.5, None)]),
        ((0.25, 2.0, 4.0), [(0.01 * 2 ** (2 / 3), None)]),
        ((4.0, 2.0, 0.25), [(None, 0.02 * 2 ** (1 / 3))]),
        ((1.0, 0.5, 0.4), [(None, 0.01)]),
        ((0.5, 1.0, 0.4), [(0.02, 0.02)]),
        ((2.0, 3.0, 1.0), [(None, None)]),
        ((2.0,), [(None, None)]),
        ((0.5,), []),
        ((), []),
    ],
)
def test_ranges_by_hand(gains, expected):
    found = ranges(line(*gains))
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs)


@pytest.mark.matches
def test_the_audits_line_is_a_range_and_not_everything_below_it():
    found = [(0.01, 0.3), (0.1, 2.0), (0.5, 0.5)]
    low = 0.01 * 10 ** (math.log(0.3) / math.log(0.3 / 2))
    assert ranges(found) == [pytest.approx((low, 0.1 * 5**0.5))]
    assert said(found) == "between 0.043 and 0.22"


@pytest.mark.matches
@given(st.lists(st.floats(0.1, 10).filter(lambda gain: abs(gain - 1) > 1e-3), min_size=1, max_size=6), st.data())
def test_a_density_is_in_a_range_where_the_line_between_its_neighbours_is_above_1(gains, data):
    whole = line(*gains)
    at = data.draw(st.floats(0, len(gains) - 1))
    place = min(int(at), max(len(gains) - 2, 0))
    ahead = gains[min(place + 1, len(gains) - 1)]
    height = math.log(gains[place]) * (1 - (at - place)) + math.log(ahead) * (at - place)
    if abs(height) < 1e-9:
        return
    density = 0.01 * 2**at
    inside = any((r.low is None or r.low <= density) and (r.high is None or density <= r.high) for r in ranges(whole))
    assert inside == (height > 0)


@pytest.mark.says
@pytest.mark.parametrize(
    ("gains", "words", "signs"),
    [
        ((0.5, 0.4), "never", "never"),
        ((4.0, 2.0, 0.25), "below 0.025", "< 0.025"),
        ((0.25, 2.0, 4.0), "above 0.016", "> 0.016"),
        ((0.5, 2.0, 0.5), "between 0.014 and 0.028", "0.014-0.028"),
        ((2.0, 3.0), "at all of 0.010 to 0.020", "0.010-0.020"),
        ((2.0,), "at 0.010", "0.010"),
        ((2.0, 0.5, 2.0), "below 0.014 and above 0.028", "< 0.014, > 0.028"),
    ],
)
def test_ranges_in_words_and_in_signs(gains, words, signs):
    assert (said(line(*gains)), brief(line(*gains))) == (words, signs)


def timed(shape, asked, speedup, density=None):
    return {"shape": shape, "asked": asked, "density": density or asked, "dense_ms_p50": 10.0, "ms_p50": 10 / speedup}


@pytest.mark.matches
def test_a_whole_model_is_the_sum_of_its_matrices():
    rows = [timed("8x8", 0.1, 4.0, 0.125), timed("8x16", 0.1, 0.5), timed("8x8", 0.5, 2.0)]
    counts = {"8x8": 4, "8x16": 1}
    # 5 * 10 ms dense; 4 * 2.5 + 1 * 20 ms; of 4 * 64 + 128 weights 256 / 8 + 12.8 kept; at .5 one shape is missing
    assert together(rows, counts) == [{"asked": 0.1, "density": pytest.approx(44.8 / 384), "speedup": 50 / 30}]
    assert together(rows, {"9x9": 1}) == []
    assert [point["asked"] for point in together(rows, {"8x8": 2})] == [0.1, 0.5]


@pytest.mark.stays
def test_points_go_from_sparse_to_dense():
    rows = [{"density": 0.5, "speedup": 1.0}, {"density": 0.1, "speedup": 2.0}]
    assert points(rows) == [(0.1, 2.0), (0.5, 1.0)]
    assert Range(None, 0.1).high == 0.1
