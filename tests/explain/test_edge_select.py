"""Rankings, nesting and pruning on random graphs and scores."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_graph import GPT2_SMALL, graphs

from fewedges.errors import RecipeError
from fewedges.explain.graph import Graph
from fewedges.explain.select import budget_grid, mib_budgets, nested, node_circuits, prune, ranking

HOWS = ["absolute", "signed", "greedy", "greedy-signed", "random"]


def scores_of(graph, seed):
    return np.random.default_rng(seed).normal(size=graph.real.shape)


@pytest.mark.stays
@given(graphs(), st.integers(0, 99), st.sampled_from(HOWS))
def test_a_ranking_holds_every_edge_once_and_its_circuits_are_nested(graph, seed, how):
    order = ranking(graph, scores_of(graph, seed), how, seed)
    assert sorted(order) == np.flatnonzero(graph.real).tolist()
    budgets = sorted({0, 1, graph.edges // 3, graph.edges})
    masks = nested(graph, order, budgets)
    assert masks.sum((1, 2)).tolist() == budgets
    assert (masks[1:] >= masks[:-1]).all()


@pytest.mark.matches
def test_top_edges_are_the_largest_by_absolute_or_signed_score():
    graph = Graph(layers=1, heads=1, key_readers=1)
    scores = np.zeros(graph.real.shape)
    scores[graph.index("input->m0")], scores[graph.index("a0.h0->logits")] = -3, 2
    names = {how: graph.names(nested(graph, ranking(graph, scores, how), [1])[0]) for how in ("absolute", "signed")}
    assert names == {"absolute": ("input->m0",), "signed": ("a0.h0->logits",)}


@pytest.mark.stays
@given(graphs(), st.integers(0, 99), st.integers(0, 40))
def test_greedy_circuits_have_no_input_that_feeds_nobody(graph, seed, budget):
    mask = nested(graph, ranking(graph, scores_of(graph, seed), "greedy"), [min(budget, graph.edges)])[0]
    feeds_somebody = graph.feeds @ mask.any(1)
    feeds_somebody[graph.logits] = True
    assert (feeds_somebody >= mask.any(0)).all()


@pytest.mark.matches
@given(graphs(), st.integers(0, 99), st.floats(0, 1))
def test_pruning_keeps_exactly_the_edges_on_a_path_from_input_to_logits(graph, seed, share):
    mask = graph.real & (np.random.default_rng(seed).random(graph.real.shape) < share)
    forward, backward = {0}, {graph.logits}
    for _ in range(2 * graph.layers + 2):
        into = {i for j, i in np.argwhere(mask) if j in forward}
        forward |= {j for i in into for j in np.flatnonzero(graph.feeds[i])}
        out_of = {j for j, i in np.argwhere(mask) if i in backward}
        backward |= {i for j in out_of for i in np.flatnonzero(graph.feeds[:, j])}
    expected = [(j, i) for j, i in np.argwhere(mask) if j in forward and i in backward]
    assert [tuple(edge) for edge in np.argwhere(prune(graph, mask))] == expected


@pytest.mark.stays
@given(graphs(), st.integers(0, 99), st.sampled_from(["absolute", "signed", "random"]))
def test_node_circuits_are_nested_hold_the_best_nodes_and_end_in_the_graph(graph, seed, how):
    scores = np.random.default_rng(seed).normal(size=graph.sources)
    masks = node_circuits(graph, scores, how, 5, seed)
    assert (masks[1:] >= masks[:-1]).all()
    assert np.array_equal(masks[-1], graph.real)
    worth = np.abs(scores) if how == "absolute" else scores
    used = masks[0].any(1)[1:].nonzero()[0] + 1  # the smallest circuit: the input and one node
    assert len(used) <= 1
    assert how == "random" or all(worth[j] == worth[1:].max() for j in used)


@pytest.mark.says
def test_budgets_are_log_spaced_and_those_of_mib_are_its_percentages():
    graph = Graph(**GPT2_SMALL)
    grid = budget_grid(graph)
    assert (len(grid), grid[0], grid[-1]) == (20, 10, 32_491)
    assert mib_budgets(graph)[:3] == (32, 64, 162)
    assert mib_budgets(graph)[-1] == graph.edges


@pytest.mark.says
@pytest.mark.usefixtures("as_users_call")
def test_bad_rankings_and_budgets_are_refused():
    graph = Graph(layers=1, heads=1, key_readers=1)
    good = np.zeros(graph.real.shape)
    for scores, how in [(good, "best"), (good[1:], "signed"), (good + np.nan, "signed")]:
        with pytest.raises(RecipeError, match="ranking"):
            ranking(graph, scores, how)
    for how, nodes in (("greedy", np.zeros(graph.sources)), ("signed", np.zeros(1))):
        with pytest.raises(RecipeError, match="node circuits"):
            node_circuits(graph, nodes, how)
    with pytest.raises(RecipeError, match="budgets"):
        nested(graph, ranking(graph, good), [graph.edges + 1])
    with pytest.raises(RecipeError, match="budget grid"):
        budget_grid(graph, 1)
