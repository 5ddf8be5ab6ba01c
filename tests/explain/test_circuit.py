"""Curves: nested equals one by one, numbers read off against hand-made curves, intervals, round trips."""

import json
from dataclasses import replace

import numpy as np
import pytest
from pairs import random_prompts

from fewedges.errors import RecipeError
from fewedges.explain.attribution import attribute
from fewedges.explain.circuit import Curve, circuit_mask, curve
from fewedges.explain.evaluate import evaluate


def made(metric, edges, heads=None, full=1.0, empty=0.0):
    """A curve with one prompt and these values."""
    metric = np.array(metric, dtype=float)[:, None]
    ones = np.ones_like(metric)
    return Curve(
        all_edges=edges[-1],
        ablation="counterfactual",
        how="absolute",
        budgets=np.array(edges),
        edges=np.array(edges),
        heads=np.array(heads or edges),
        mlps=np.array(edges),
        metric=metric,
        kl=ones,
        correct=ones > 0,
        full=np.array([full]),
        empty=np.array([empty]),
    )


@pytest.mark.matches
@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt-neox"])
@pytest.mark.parametrize("ablation", ["counterfactual", "mean"])
def test_a_nested_curve_is_its_circuits_one_by_one(name, ablation, wired):
    wiring, prompts = wired(name), random_prompts()
    scores = attribute(wiring, prompts).edges
    budgets = [3, 10, 30, wiring.graph.edges]
    found = curve(wiring, prompts, scores, budgets=budgets, ablation=ablation, complements=True)
    for n, budget in enumerate(budgets):
        mask = circuit_mask(wiring, scores, budget)
        both = evaluate(wiring, prompts, np.stack([mask, wiring.graph.real & ~mask]), ablation=ablation)
        assert np.abs(found.metric[n] - both.metric[0]).max() < 1e-12
        assert np.abs(found.without[n] - both.metric[1]).max() < 1e-12
        assert found.edges[n] == mask.sum()
        names = wiring.graph.names(mask)
        heads = {part for name in names for part in [name.split("->")[0]] if part.startswith("a")}
        assert found.heads[n] == len(heads)
    assert abs(found.explained[-1] - 1) < 1e-12
    assert abs(found.necessity[-1] - 1) < 1e-12


@pytest.mark.matches
def test_edges_at_a_level_are_interpolated_on_the_log_axis():
    found = made([0.0, 0.4, 0.8, 1.0], [1, 10, 100, 1000])
    assert found.edges_at(0.8) == pytest.approx(100)
    assert found.edges_at(0.6) == pytest.approx(10**1.5)
    assert found.edges_at(0.0) == 1
    assert found.edges_at(1.01) == float("inf")
    assert (found.index_at(0.9), found.index_at(2.0)) == (3, None)
    assert made([0.2, 1.0, 0.5], [1, 10, 100]).edges_at(0.9) < 10  # the first crossing counts


@pytest.mark.matches
def test_necessity_is_read_at_the_first_circuit_that_reaches_the_level():
    found = made([0.0, 0.6, 0.95], [1, 10, 100])
    assert found.necessity_at(0.5) is None  # no complements were run
    found = replace(found, without=np.array([[0.9], [0.7], [0.2]]))
    assert [found.necessity_at(level) for level in (0.5, 0.9, 0.99)] == [pytest.approx(0.3), pytest.approx(0.8), None]


@pytest.mark.matches
def test_areas_are_those_of_triangles():
    found = made([0.0, 1.0], [0, 100], full=3.0, empty=1.0)
    assert found.explained.tolist() == [-0.5, 0.0]
    half = made([0.0, 1.0], [0, 100])
    assert half.cpr == pytest.approx(0.5)
    assert half.cmd == pytest.approx(0.5)
    assert made([2.0, 2.0], [0, 100]).cpr == pytest.approx(2)
    assert made([2.0, 2.0], [0, 100]).cmd == pytest.approx(1)


@pytest.mark.reproduces
def test_bootstrap_intervals_hold_the_value_and_are_a_function_of_the_seed(wired):
    wiring, prompts = wired("gpt2"), random_prompts(12)
    found = curve(wiring, prompts, attribute(wiring, prompts).edges, budgets=[5, 20, 60, wiring.graph.edges])
    low, high = found.interval(lambda c: c.metric[1].mean(), samples=200)
    assert low < found.metric[1].mean() < high
    assert (low, high) == found.interval(lambda c: c.metric[1].mean(), samples=200)
    assert found.of(range(12)).explained == pytest.approx(found.explained)


@pytest.mark.reproduces
def test_a_curve_survives_json(wired):
    wiring, prompts = wired("gpt2"), random_prompts()
    found = curve(wiring, prompts, attribute(wiring, prompts, "eap").edges, budgets=[5, 50])
    again = Curve.from_dict(json.loads(json.dumps(found.to_dict())))
    for name, value in vars(found).items():
        assert np.array_equal(getattr(again, name), value) if value is not None else getattr(again, name) is None
    assert "explained" in str(again)


@pytest.mark.survives
def test_prompts_that_do_not_differ_have_no_explained_effect(wired):
    wiring, prompts = wired("gpt2"), random_prompts()
    same = replace(prompts, corrupt=prompts.clean)
    with pytest.raises(RecipeError, match="explained effect"):
        curve(wiring, same, np.zeros(wiring.graph.real.shape), budgets=[5])
