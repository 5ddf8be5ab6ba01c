"""The multiplier's law against a slow restatement, and what it promises over every history."""

import itertools
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewedges.recipes import SparseAttention
from fewedges.sparsify.attention.constraint import Multiplier, violation

NATS = st.floats(-5, 5)
HISTORIES = st.lists(st.tuples(NATS, NATS), min_size=1, max_size=20)
RECIPES = st.builds(
    SparseAttention,
    kl_margin=st.floats(0, 1),
    loss_margin=st.floats(-0.1, 1),
    multiplier_start=st.floats(1e-6, 1),
    multiplier_rate=st.floats(1e-4, 0.5),
    multiplier_width=st.floats(1e-3, 1),
    smoothing=st.floats(0, 0.999),
)


def prices(recipe, history):
    """The price after every step, from its start on."""
    multiplier = Multiplier(recipe.multiplier_start)
    found = [multiplier.price]
    for kl, excess in history:
        multiplier.update_(recipe, kl, excess)
        found.append(multiplier.price)
    return found


@pytest.mark.matches
@given(RECIPES, HISTORIES)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_the_law_is_that_of_its_docstring(recipe, history):
    """The running mean as a weighted sum over all past violations, the price from the sum of all pulls."""
    past = [max(kl - recipe.kl_margin, excess - recipe.loss_margin) for kl, excess in history]
    keep, pulls = recipe.smoothing, []
    for n in range(1, len(past) + 1):
        weights = [keep ** (n - 1)] + [(1 - keep) * keep ** (n - 1 - i) for i in range(1, n)]
        mean = sum(w * v for w, v in zip(weights, past[:n], strict=True))
        pulls.append(min(1, max(-1, mean / recipe.multiplier_width)))
    wanted = recipe.multiplier_start * math.exp(-recipe.multiplier_rate * sum(pulls))
    assert prices(recipe, history)[-1] == pytest.approx(wanted, rel=3e-15)  # measured 7.7e-16 over these examples


@pytest.mark.matches
def test_the_first_value_starts_the_mean_and_the_most_violated_constraint_drives():
    recipe = SparseAttention(kl_margin=0.1, loss_margin=0.02, multiplier_width=0.05, smoothing=0.9)
    multiplier = Multiplier(1.0)
    multiplier.update_(recipe, 0.12, -1.0)
    assert multiplier.mean == pytest.approx(0.02, abs=1e-15)
    assert multiplier.price == pytest.approx(math.exp(-0.02 * 0.4), rel=1e-14)
    multiplier.update_(recipe, 0.0, 0.05)
    assert multiplier.mean == pytest.approx(0.9 * 0.02 + 0.1 * 0.03, abs=1e-15)


@pytest.mark.matches
@pytest.mark.parametrize(
    ("margins", "wanted"), [((0.1, 0.2), 0.4), ((0.1, None), 0.4), ((None, 0.2), -0.1), ((0.7, 0.2), -0.1)]
)
def test_a_constraint_that_is_switched_off_does_not_count(margins, wanted):
    recipe = SparseAttention(kl_margin=margins[0], loss_margin=margins[1])
    assert violation(recipe, kl=0.5, excess_loss=0.1) == pytest.approx(wanted, abs=1e-15)


@pytest.mark.stays
@given(RECIPES, st.lists(st.tuples(st.floats(1e-6, 2), st.floats(1e-6, 2)), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_the_price_rises_at_every_step_at_which_all_constraints_hold(recipe, slack):
    found = prices(recipe, [(recipe.kl_margin - a, recipe.loss_margin - b) for a, b in slack])
    assert all(after > before for before, after in itertools.pairwise(found))


@pytest.mark.stays
@given(RECIPES, st.lists(st.tuples(st.floats(1e-6, 2), NATS, st.booleans()), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_the_price_falls_at_every_step_at_which_one_is_broken(recipe, excess):
    kl, loss = recipe.kl_margin, recipe.loss_margin
    broken = [(kl + over, other) if first else (other, loss + over) for over, other, first in excess]
    found = prices(recipe, broken)
    assert all(after < before for before, after in itertools.pairwise(found))


@pytest.mark.stays
@given(RECIPES, st.lists(st.tuples(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9)), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_no_batch_moves_the_price_by_more_than_its_rate(recipe, history):
    found = prices(recipe, history)
    for before, after in itertools.pairwise(found):
        assert abs(math.log(after / before)) <= recipe.multiplier_rate * (1 + 1e-9) + 1e-15
        assert after > 0


@pytest.mark.stays
@given(RECIPES, NATS, NATS, st.floats(0, 3))
@settings(max_examples=50, deadline=None)
def test_a_worse_batch_never_gives_a_higher_price(recipe, kl, excess, worse):
    assert prices(recipe, [(kl + worse, excess)])[-1] <= prices(recipe, [(kl, excess)])[-1]
    assert prices(recipe, [(kl, excess + worse)])[-1] <= prices(recipe, [(kl, excess)])[-1]


@pytest.mark.reproduces
@given(RECIPES, HISTORIES, HISTORIES)
@settings(max_examples=50, deadline=None)
def test_a_state_goes_through_json_bit_for_bit(recipe, first, then):
    straight, multiplier = Multiplier(recipe.multiplier_start), Multiplier(recipe.multiplier_start)
    assert Multiplier(**json.loads(json.dumps(straight.state()))) == straight
    for kl, excess in first:
        straight.update_(recipe, kl, excess)
        multiplier.update_(recipe, kl, excess)
    resumed = Multiplier(**json.loads(json.dumps(multiplier.state())))
    assert resumed == straight
    for kl, excess in then:
        straight.update_(recipe, kl, excess)
        resumed.update_(recipe, kl, excess)
    assert resumed == straight
