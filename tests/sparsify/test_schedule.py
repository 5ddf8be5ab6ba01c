"""Schedules: the published formulas at every step, and what never changes about them."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewedges.errors import RecipeError
from fewedges.sparsify.schedule import Cosine, Cubic, OneShot, Rewinding, Static


@pytest.mark.matches
def test_cubic_is_the_published_polynomial():
    schedule = Cubic(density=0.1, start=10, end=110, every=20)
    changes = {step: schedule.at(step).density for step in range(200) if schedule.at(step).change}
    n = 5
    wanted = {10 + 20 * k: 1 - 0.9 * (1 - (1 - 20 * k / (n * 20)) ** 3) for k in range(n + 1)}
    assert changes == pytest.approx(wanted)
    assert schedule.at(0).density == 1
    assert schedule.at(500).density == pytest.approx(0.1)


@pytest.mark.stays
@settings(max_examples=50, deadline=None)
@given(st.floats(0.01, 1), st.integers(0, 20), st.integers(1, 50), st.integers(1, 17))
def test_cubic_never_rises_and_ends_at_its_density(density, start, length, every):
    schedule = Cubic(density=density, start=start, end=start + length, every=every)
    line = [schedule.at(step).density for step in range(start + length + 3)]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(line))
    assert line[-1] == pytest.approx(density)
    assert schedule.at(start + length).change


@pytest.mark.matches
def test_cosine_is_rigls():
    schedule = Cosine(density=0.2, end=75, every=10, drop=0.3)
    changes = {step: schedule.at(step).drop for step in range(100) if schedule.at(step).change}
    assert changes == {t: 0.15 * (1 + math.cos(math.pi * t / 75)) for t in range(10, 75, 10)}
    assert all(schedule.at(step).density == 0.2 for step in range(100))


@pytest.mark.matches
def test_rewinding_prunes_after_each_training_and_trains_once_more():
    schedule = Rewinding(rounds=3, rate=0.2, steps=5)
    moments = [schedule.at(step) for step in range(25)]
    assert [step for step, moment in enumerate(moments) if moment.rewind] == [5, 10, 15]
    assert moments[0].density == 1
    assert [moments[step].density for step in (5, 10, 15, 24)] == pytest.approx([0.8, 0.64, 0.512, 0.512])


@pytest.mark.matches
def test_one_shot_and_static():
    assert [OneShot(0.3, step=2).at(step) for step in range(4)] == [
        (False, 1.0, 0.0, False),
        (False, 1.0, 0.0, False),
        (True, 0.3, 0.0, False),
        (False, 0.3, 0.0, False),
    ]
    assert not any(Static(0.3).at(step).change for step in range(9))


@pytest.mark.survives
def test_a_schedule_that_never_ends_or_never_starts_is_refused():
    for make in (lambda: Cubic(0.5, 10, 10), lambda: Cubic(0.5, 0, 10, 0), lambda: Cosine(0.5, 0)):
        with pytest.raises(RecipeError):
            make()
