"""Budgets over matrices: the published ERK numbers, and the whole budget met by every rule."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewedges.errors import RecipeError
from fewedges.sparsify.allocation import by_cost, erk, prices, shares, uniform

GPT2 = {"qkv": (2304, 768), "out": (768, 768), "up": (3072, 768), "down": (768, 3072)}
shapes = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6).map(
    lambda xs: {str(i): x for i, x in enumerate(xs)}
)
densities = st.floats(0.01, 1)


def total(shapes_, found):
    size = sum(r * c for r, c in shapes_.values())
    return sum(found[name] * r * c for name, (r, c) in shapes_.items()) / size


def slow_erk(shapes_, density):
    """The published loop: epsilon over what is not dense yet; the largest is made dense whenever it passes 1."""
    full = set()
    while True:
        rest = {n: s for n, s in shapes_.items() if n not in full}
        target = density * sum(r * c for r, c in shapes_.values()) - sum(r * c for n in full for r, c in [shapes_[n]])
        epsilon = target / sum(r + c for r, c in rest.values())
        probability = {n: epsilon * (r + c) / (r * c) for n, (r, c) in rest.items()}
        worst = max(probability.values(), default=0)
        if worst <= 1:
            return {n: probability.get(n, 1.0) for n in shapes_}
        full |= {n for n, p in probability.items() if p == worst}


@pytest.mark.matches
@pytest.mark.parametrize(
    ("density", "sparsities"), [(0.2, (0.80, 0.70, 0.8125, 0.8125)), (0.1, (0.9, 0.85, 0.906, 0.906))]
)
def test_erk_of_gpt2s_shapes_is_the_reference(density, sparsities):
    found = erk(GPT2, density)
    for name, wanted in zip(GPT2, sparsities, strict=True):
        assert 1 - found[name] == pytest.approx(wanted, abs=5e-4), name  # three decimals were kept


@pytest.mark.matches
@settings(max_examples=80, deadline=None)
@given(shapes, densities)
def test_erk_is_the_published_loop(shapes_, density):
    found, wanted = erk(shapes_, density), slow_erk(shapes_, density)
    for name in shapes_:
        assert found[name] == pytest.approx(wanted[name], abs=1e-9)


@pytest.mark.stays
@settings(max_examples=60, deadline=None)
@given(shapes, densities)
def test_every_rule_meets_the_budget_and_passes_no_one(shapes_, density):
    for found in (uniform(shapes_, density), erk(shapes_, density)):
        assert all(0 < x <= 1 + 1e-9 for x in found.values())
        assert total(shapes_, found) == pytest.approx(density, rel=1e-9)


@pytest.mark.stays
@settings(max_examples=60, deadline=None)
@given(shapes, densities, st.integers(0, 99))
def test_cost_is_met_where_entries_have_prices(shapes_, density, seed):
    cost = {name: 1.0 + (seed * 7 + i * 13) % 5 for i, name in enumerate(shapes_)}
    found = by_cost(shapes_, density, cost)
    spent = sum(found[n] * r * c * cost[n] for n, (r, c) in shapes_.items())
    assert spent == pytest.approx(density * sum(r * c * cost[n] for n, (r, c) in shapes_.items()), rel=1e-9)
    assert by_cost(shapes_, density, dict.fromkeys(shapes_, 3.0)) == pytest.approx(uniform(shapes_, density))


@pytest.mark.matches
def test_cost_minimises_what_it_says():
    """No other pair of densities of the same cost has less entries / density: searched."""
    shapes_, cost = {"a": (10, 10), "b": (20, 10)}, {"a": 4.0, "b": 1.0}
    found = by_cost(shapes_, 0.25, cost)
    budget = 0.25 * (400 + 200)

    def error(a):
        return 100 / a + 200 / ((budget - 400 * a) / 200)

    best = min((a / 10_000 for a in range(1, 3749)), key=error)
    assert found["a"] == pytest.approx(best, abs=1e-4)  # the grid's step


@pytest.mark.survives
@pytest.mark.parametrize(("shapes_", "density"), [({}, 0.5), ({"a": (2, 2)}, 0.0), ({"a": (2, 2)}, 1.1)])
def test_nothing_to_share_is_refused(shapes_, density):
    with pytest.raises(RecipeError):
        erk(shapes_, density)


@pytest.mark.matches
def test_a_rule_by_its_name():
    assert shares("uniform", GPT2, 0.3) == uniform(GPT2, 0.3)
    assert shares("erk", GPT2, 0.3) == erk(GPT2, 0.3)
    cost = {"qkv": 1.0, "out": 1.0, "up": 0.5, "down": 4.0}
    assert prices(GPT2, ("up=0.5", "down=2", "wn=4")) == cost
    assert shares("cost", GPT2, 0.3, ("up=.5", "down=4")) == by_cost(GPT2, 0.3, cost)


@pytest.mark.survives
@pytest.mark.parametrize("price", ["side=2", "=2", "up", "up=0", "up=-1", "up=dear", "up=nan"])
def test_a_price_of_nothing_or_no_price_is_refused(price):
    with pytest.raises(RecipeError, match="price"):
        shares("cost", GPT2, 0.3, (price,))


@pytest.mark.survives
def test_prices_come_with_the_rule_that_reads_them():
    for rule, price in (("cost", ()), ("erk", ("up=2",))):
        with pytest.raises(RecipeError, match="price"):
            shares(rule, GPT2, 0.3, price)
