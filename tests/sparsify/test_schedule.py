"""Schedules: the published formulas at every step, and what never changes about them."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewedges.errors import RecipeError
from fewedges.sparsify.schedule import SCHEDULES, Cosine, Cubic, OneShot, Rewinding, Static, drawn_at, schedule_of
from fewedges.weight_recipes import TRAINED, Gradual, Rewind, Rewire, Train


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
@pytest.mark.parametrize(("rewind", "length"), [(0, 5), (2, 3)])
def test_going_back_is_going_back_in_data_and_rate(rewind, length):
    schedule = Rewinding(rounds=2, rate=0.5, steps=5, rewind=rewind)
    assert schedule.total == rewind + 3 * length
    line = [schedule.clock(step) for step in range(schedule.total)]
    assert line == [*range(rewind), *(list(range(rewind, 5)) * 3)]
    assert [step for step in range(99) if schedule.at(step).rewind] == [5, 5 + length]
    assert schedule.at(98).density == 0.25


@pytest.mark.matches
def test_a_recipes_schedule_fits_its_steps():
    assert schedule_of(Train(density=0.3)) == OneShot(0.3)
    assert schedule_of(Rewire(steps=3000)) == Cosine(0.2, end=2250, every=100, drop=0.3)
    assert schedule_of(Rewire(steps=50, until=0.5)) == Cosine(0.2, end=25, every=5, drop=0.3)
    assert schedule_of(Gradual(steps=50, until=1)) == Cubic(0.2, start=0, end=49, every=5)  # reached before the end
    assert schedule_of(Rewind(density=0.25, rounds=2, steps=7, rewind=3)) == Rewinding(2, 0.5, 7, 3)
    assert {row.schedule for row in TRAINED.values()} == set(SCHEDULES)


@pytest.mark.reproduces
def test_a_step_draws_the_same_again_and_no_other_does():
    first, again, other, step = (drawn_at(*given).initial_seed() for given in ((3, 7), (3, 7), (4, 7), (3, 8)))
    assert first == again
    assert len({first, other, step}) == 3


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
    for make in (lambda: Rewinding(0, 0.5, 5), lambda: Rewinding(1, 0.0, 5), lambda: Rewinding(1, 0.5, 5, rewind=5)):
        with pytest.raises(RecipeError, match="rewinding"):
            make()
    for recipe in (Rewire(steps=1), Rewire(steps=50, every=38), Gradual(steps=1), Rewind(density=1.0)):
        with pytest.raises(RecipeError):
            schedule_of(recipe)
