"""Rankings of attention edges: planted readings come first, roles are means over prompts, the unknown comes last."""

from dataclasses import replace

import numpy as np
import planted
import pytest
from pairs import random_prompts

from fewedges.errors import RecipeError
from fewedges.explain.attention_circuit import attention_curve
from fewedges.explain.attention_masking import edge_scores, pair
from fewedges.explain.attention_ranking import edge_budgets, own_ranks, role_scores
from fewedges.model.anatomy import anatomy
from fewedges.sparsify.attention.interface import attach_
from tiny import tiny_model


def gpt2(*, gated):
    made = tiny_model("gpt2").double()
    return attach_(made, anatomy(made), bias_start=-0.05, learned=False) if gated else made


def with_roles():
    """Prompts with roles, two of which lack the role "here"."""
    found = random_prompts()
    rows = [["", "", "A", "here" if n % 2 else "", "B", "", ""][: end + 1] for n, end in enumerate(found.last.tolist())]
    return replace(found, roles=tuple(map(tuple, rows)))


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "gated"])
def model(request):
    return gpt2(gated=request.param)


@pytest.fixture(scope="module")
def prompts():
    return with_roles()


@pytest.mark.matches
@pytest.mark.parametrize(
    ("name", "readings"),
    [
        ("copy", {"3 reads 1 in a0.h1"}),
        ("induction", {"2 reads 1 in a0.h0", "4 reads 2 in a1.h2"}),
        ("greater_than", {"3 reads 1 in a0.h2"}),
        ("either", {"3 reads 1 in a0.h0", "3 reads 2 in a0.h2"}),
    ],
)
def test_planted_readings_come_first(name, readings):
    made, prompts, _ = planted.CIRCUITS[name]()
    scores = role_scores(made, prompts, steps=16)
    assert set(scores.names(scores.order("signed")[: len(readings)])) == readings
    found = attention_curve(made, prompts, scores.ranks(prompts), [len(readings), scores.met.size])
    assert found.explained[0] > 0.9


@pytest.mark.matches
def test_scores_by_role_are_means_over_prompts_with_nothing_where_there_is_no_such_edge(model, prompts):
    whole, parts = role_scores(model, prompts, steps=2), [prompts.subset([n]) for n in range(5)]
    alone = [role_scores(model, one, steps=2, places=whole.places) for one in parts]
    assert np.abs(whole.total - np.mean([one.total for one in alone], 0)).max() < 1e-15
    assert np.array_equal(whole.met, np.any([one.met for one in alone], 0))
    here = whole.places.index("here")
    assert [bool(one.met[:, :, here].any()) for one in alone] == [n % 2 == 1 for n in range(5)]


@pytest.mark.stays
def test_edges_never_met_in_the_search_come_last(model, prompts):
    scores = role_scores(model, prompts.subset([0, 2, 4]), places={n for row in prompts.places for n in row})
    met = int(scores.met.sum())
    for how in ("signed", "absolute", "random"):
        order = scores.order(how)
        assert sorted(order) == list(range(scores.met.size))
        assert scores.met.ravel()[order[:met]].all()
    found = attention_curve(model, prompts, scores.ranks(prompts), [met, scores.met.size])
    assert found.kept[0, 1] < found.kept[1, 1]
    assert np.array_equal(found.kept[0, ::2], found.kept[1, ::2])


@pytest.mark.stays
@pytest.mark.parametrize("how", ["signed", "absolute"])
def test_own_edges_are_as_many_in_every_prompt(model, prompts, how):
    found = attention_curve(model, prompts, own_ranks(2, how), [0, 7, 20, 10**6], how="own", size=2)
    assert (found.kept[:3].T == [0, 7, 20]).all()
    assert found.explained[-1] == pytest.approx(1, abs=1e-12)
    again = attention_curve(model, prompts, own_ranks(2, how), [7], size=5)
    assert np.abs(again.metric[0] - found.metric[1]).max() < 4e-14  # measured 1e-14


@pytest.mark.matches
def test_the_first_own_edge_is_the_one_with_the_largest_score(model, prompts):
    both = pair(model, prompts)
    ranks, scores = own_ranks(2)(both, list(range(5))), edge_scores(both, 2)
    for row in range(5):
        assert scores[:, row][ranks[:, row] == 0].item() == scores[:, row].max()


@pytest.mark.reproduces
def test_random_edges_are_those_of_the_seed(model, prompts):
    scores = role_scores(model, prompts, steps=1)
    assert np.array_equal(scores.order("random", 3), scores.order("random", 3))
    assert not np.array_equal(scores.order("random", 3), scores.order("random", 4))


@pytest.mark.stays
def test_budgets_are_even_on_a_log_axis_and_end_with_all():
    assert edge_budgets(1000, 5, 1, slots=5000) == [1, 10, 100, 1000, 5000]
    assert edge_budgets(3, 20, 4, slots=3) == [3]


@pytest.mark.survives
def test_an_unknown_ranking_is_refused(model, prompts):
    scores = role_scores(model, prompts, steps=1)
    with pytest.raises(RecipeError, match="how='best'"):
        scores.order("best")
    with pytest.raises(RecipeError, match="how='random'"):
        own_ranks(2, "random")
