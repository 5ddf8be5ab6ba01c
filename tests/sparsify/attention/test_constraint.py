"""The multiplier's law against a slow restatement, and what it promises over every history."""

import dataclasses
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


TARGETS = st.builds(
    SparseAttention,
    kl_margin=st.none(),
    loss_margin=st.none(),
    target_edges=st.floats(0.1, 100),
    multiplier_start=st.floats(1e-6, 1),
    multiplier_rate=st.floats(1e-4, 0.5),
    multiplier_width=st.floats(1e-3, 1),
    smoothing=st.floats(0, 0.999),
    slack=st.floats(0, 1),
)


@pytest.mark.matches
@given(TARGETS, st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_the_law_of_a_target_is_that_of_its_docstring(recipe, history):
    """violation = 10 width log(target / edges), whatever KL, loss, slack and learning rate are."""
    multiplier, mean, log_price = Multiplier(recipe.multiplier_start), None, math.log(recipe.multiplier_start)
    for step, edges in enumerate(history):
        multiplier.update_(recipe, kl=9.0 - step, excess_loss=step - 7.0, fall=1 / (step + 1), edges=edges)
        now = 10 * recipe.multiplier_width * (math.log(recipe.target_edges) - math.log(edges))
        mean = now if mean is None else recipe.smoothing * mean + (1 - recipe.smoothing) * now
        log_price -= recipe.multiplier_rate * min(1.0, max(-1.0, mean / recipe.multiplier_width))
    assert math.log(multiplier.price) == pytest.approx(log_price, abs=TARGET_ROUNDING)


@pytest.mark.matches
@given(TARGETS, st.integers(1, 500), st.lists(st.integers(0, 500), min_size=1, max_size=20))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_the_price_of_heads_follows_the_same_law(recipe, target, history):
    """Open heads towards their target move a price as edges towards theirs do, where at least one is open."""
    twin = dataclasses.replace(recipe, target_edges=float(target))
    heads, edges = Multiplier(recipe.head_multiplier_start), Multiplier(recipe.head_multiplier_start)
    for found in history:
        heads.towards_(recipe, float(target), float(found))
        edges.update_(twin, 0.0, 0.0, edges=float(found))
        assert heads == edges
        assert math.isfinite(heads.price)


TARGET_ROUNDING = 6e-15  # measured 1.8e-15 over these examples


@pytest.mark.stays
@given(TARGETS, st.lists(st.floats(1.001, 50), min_size=1, max_size=20), st.booleans())
@settings(max_examples=50, deadline=None)
def test_the_price_rises_above_the_target_and_falls_below_it(recipe, factors, above):
    multiplier = Multiplier(recipe.multiplier_start)
    for factor in factors:
        before = multiplier.price
        multiplier.update_(recipe, 0.0, 0.0, edges=recipe.target_edges * (factor if above else 1 / factor))
        assert (multiplier.price > before) == above
        assert abs(math.log(multiplier.price / before)) <= recipe.multiplier_rate * (1 + 1e-9) + 1e-15


@pytest.mark.stays
@pytest.mark.parametrize("start", [1e-4, 10.0])
@pytest.mark.parametrize("target", [1.0, 20.0])
def test_edges_that_obey_their_price_settle_at_the_target(start, target):
    """Edges as the price p leaves them, 40 / (1 + 50 p): from either side they end at the target and stay."""
    recipe = SparseAttention(kl_margin=None, loss_margin=None, target_edges=target, multiplier_rate=0.05)
    multiplier, edges = Multiplier(start), []
    for _ in range(600):
        edges.append(40 / (1 + 50 * multiplier.price))
        multiplier.update_(recipe, 0.0, 0.0, edges=edges[-1])
    assert abs(math.log(edges[0] / target)) > 0.5
    assert all(abs(x / target - 1) < 0.01 for x in edges[-100:])


@pytest.mark.survives
def test_a_batch_without_an_edge_moves_the_price_by_its_rate_only():
    recipe = SparseAttention(kl_margin=None, loss_margin=None, target_edges=3.0, multiplier_rate=0.05)
    multiplier = Multiplier(1.0)
    multiplier.update_(recipe, 0.0, 0.0, edges=0.0)
    assert multiplier.price == pytest.approx(math.exp(-0.05), rel=1e-15)
    assert math.isfinite(multiplier.mean)


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
