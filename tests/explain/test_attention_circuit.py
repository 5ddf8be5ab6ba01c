"""Curves of attention edges: nested, exact, counted prompt by prompt."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_attention_ranking import gpt2, with_roles

from fewedges.errors import DataError
from fewedges.explain.attention_circuit import AttentionCurve, attention_curve
from fewedges.explain.attention_masking import pair
from fewedges.explain.attention_ranking import role_scores

BUDGETS = [0, 3, 10, 30, 100, 10**6]


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "gated"])
def model(request):
    return gpt2(gated=request.param)


@pytest.fixture(scope="module")
def prompts():
    return with_roles()


@pytest.fixture(scope="module")
def curve(model, prompts):
    ranks = role_scores(model, prompts, steps=3).ranks(prompts, "absolute")
    return attention_curve(model, prompts, ranks, BUDGETS, how="absolute", complements=True, size=2)


@pytest.mark.matches
def test_the_ends_are_no_edge_and_the_model(curve):
    assert curve.explained[[0, -1]] == pytest.approx([0, 1], abs=1e-12)
    assert curve.likeness[[0, -1]] == pytest.approx([0, 1], abs=1e-6)  # KL is in float32: measured 2e-7
    assert curve.necessity[[0, -1]] == pytest.approx([0, 1], abs=1e-12)
    assert np.abs(np.diff(curve.explained)).max() > 0.05
    assert curve.edges[0] == curve.heads[0] == 0
    assert round(curve.edges[-1]) == curve.all_edges
    assert curve.heads[-1] == 8


@pytest.mark.matches
def test_a_nested_curve_is_that_of_circuits_one_by_one(model, prompts, curve):
    scores = role_scores(model, prompts, steps=3, size=5)
    for number, budget in enumerate(BUDGETS):
        kept = set(scores.names(scores.order("absolute")[:budget]))
        for row in range(len(prompts)):
            both, names = pair(model, prompts.subset([row]), skip=False), prompts.places[row]
            edges = torch.nonzero(both.live).tolist()
            mine = [e for e in edges if f"{names[e[3]]} reads {names[e[4]]} in a{e[0]}.h{e[2]}" in kept]
            masks = torch.zeros(both.live.shape, dtype=torch.float64)
            for edge in mine:
                masks[tuple(edge)] = 1
            assert curve.kept[number, row] == len(mine)
            assert curve.touched[number, row] == len({(e[0], e[2]) for e in mine})
            metric = float(both.metric(both.run(masks)))
            assert abs(metric - curve.metric[number, row]) < 4e-14  # measured 1e-14


@pytest.mark.stays
def test_sizes_grow_and_every_prompt_may_be_drawn_twice(curve):
    assert (np.diff(curve.kept, axis=0) >= 0).all()
    some = curve.of([0, 0, 3])
    assert np.array_equal(some.edges, curve.kept[:, [0, 0, 3]].mean(1))
    assert np.array_equal(some.heads, curve.touched[:, [0, 0, 3]].mean(1))
    low, high = curve.interval(lambda x: x.edges_at(0.5), samples=50)
    assert low <= high
    assert curve.of(range(5)).to_dict() == curve.to_dict()


@pytest.mark.matches
def test_the_kl_share_is_read_off_as_the_effect_is(curve):
    share = curve.likeness
    level = (share[1] + share[2]) / 2
    assert curve.edges[1] < curve.like_at(level) < curve.edges[2]
    assert curve.like_at(share[2]) == pytest.approx(curve.edges[2])
    assert curve.like_at(1.1) == np.inf


@pytest.mark.matches
def test_edges_and_heads_at_a_level_are_those_of_the_first_circuit_that_has_it(curve):
    first = int(curve.explained[:-1].argmax())
    level = curve.explained[first]
    assert curve.index_at(level) == first
    assert (curve.edges_at(level), curve.heads_at(level)) == pytest.approx((curve.edges[first], curve.heads[first]))


@pytest.mark.matches
def test_a_level_is_kept_from_behind_the_last_circuit_below_it(curve):
    metric = np.tile(np.array([0.0, 0.95, 0.5, 0.8, 1.0, 1.0])[:, None], 5)
    made = replace(curve, metric=metric, full=np.ones(5), empty=np.zeros(5))
    assert made.edges_at(0.9) < made.edges[1]
    assert made.stays_at(0.9) == pytest.approx(np.sqrt(made.edges[3] * made.edges[4]))
    assert made.stays_at(-1.0) == 0
    assert replace(made, metric=metric[::-1]).stays_at(0.9) == np.inf


@pytest.mark.reproduces
def test_what_is_saved_is_read_back(curve):
    back = AttentionCurve.from_dict(curve.to_dict())
    assert back.to_dict() == curve.to_dict()
    assert str(back) == str(curve)


@pytest.mark.survives
def test_prompts_whose_attention_carries_nothing_are_refused(model, prompts):
    same = replace(prompts, corrupt=prompts.clean)
    with pytest.raises(DataError, match="metric without any edge"):
        attention_curve(model, same, role_scores(model, same, steps=1).ranks(same), [3])
