"""The graph against formulas and against counts of the field."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewedges.errors import RecipeError
from fewedges.explain.graph import Graph

GPT2_SMALL = {"layers": 12, "heads": 12, "key_readers": 12}


@st.composite
def graphs(draw):
    groups = draw(st.integers(1, 3))
    split = draw(st.booleans())
    heads = groups * draw(st.integers(1, 3))
    readers = groups if split else heads
    parallel = draw(st.booleans())
    return Graph(layers=draw(st.integers(1, 4)), heads=heads, key_readers=readers, split=split, parallel=parallel)


@pytest.mark.matches
def test_gpt2_small_has_the_counts_of_the_field():
    graph = Graph(**GPT2_SMALL)
    assert (graph.sources, graph.destinations, graph.edges) == (157, 445, 32_491)
    assert graph.real.shape == (157, 445)
    assert Graph(**GPT2_SMALL, split=False).edges == 11_611
    assert str(graph) == "32,491 edges (157 sources x 445 destinations; query, key and value apart)"


@pytest.mark.matches
@given(graphs())
def test_the_count_is_the_formula_and_the_matrix(graph):
    layers, heads, inputs = graph.layers, graph.heads, graph.readers
    sources_before = [1 + layer * (heads + 1) for layer in range(layers)]
    mlp = [n + (0 if graph.parallel else heads) for n in sources_before]
    expected = sum(inputs * n for n in sources_before) + sum(mlp) + 1 + layers * (heads + 1)
    assert graph.edges == expected == graph.real.sum()


@pytest.mark.stays
@given(graphs())
def test_every_edge_goes_forward_and_every_name_finds_its_edge_again(graph):
    order = {name: n for n, name in enumerate(graph.source_names)}
    names = graph.names(graph.real)
    assert len(set(names)) == graph.edges
    for (source, destination), name in zip(np.argwhere(graph.real), names, strict=True):
        assert graph.index(name) == (source, destination)
        fed = np.flatnonzero(graph.feeds[destination])
        assert all(source < n for n in fed)
        assert name.split("->")[0] in order
    assert (graph.mask(names) == graph.real).all()


@pytest.mark.stays
@given(graphs())
def test_every_source_but_the_input_is_fed_and_the_logits_feed_none(graph):
    assert graph.feeds[graph.logits].sum() == 0
    assert (graph.feeds.sum(0)[1:] > 0).all()
    per_head = 3 if graph.split else 1
    heads = graph.is_head()
    assert (graph.feeds[:, heads].sum(0) == per_head).all()
    assert (graph.feeds[:, ~heads].sum(0)[1:] == 1).all()


@pytest.mark.says
def test_names_are_those_of_eap_ig_and_groups_have_their_own():
    graph = Graph(layers=1, heads=2, key_readers=2)
    assert graph.source_names == ("input", "a0.h0", "a0.h1", "m0")
    assert graph.destination_names == tuple("a0.h0<q> a0.h1<q> a0.h0<k> a0.h1<k> a0.h0<v> a0.h1<v> m0 logits".split())
    grouped = Graph(layers=1, heads=2, key_readers=1)
    assert grouped.destination_names == tuple("a0.h0<q> a0.h1<q> a0.g0<k> a0.g0<v> m0 logits".split())
    whole = Graph(layers=1, heads=2, key_readers=2, split=False)
    assert whole.destination_names == ("a0.h0", "a0.h1", "m0", "logits")


@pytest.mark.says
@pytest.mark.parametrize("name", ["a0.h0->a0.h1<q>", "m0->a0.h0<q>", "input->a9.h0<q>", "input", "", "logits->m0"])
def test_an_edge_that_is_none_is_refused(name):
    with pytest.raises(RecipeError, match="no such edge"):
        Graph(layers=2, heads=2, key_readers=2).index(name)


@pytest.mark.says
@pytest.mark.parametrize("sizes", [(0, 1, 1, True), (1, 3, 2, True), (1, 4, 2, False)])
def test_sizes_that_make_no_graph_are_refused(sizes):
    layers, heads, key_readers, split = sizes
    with pytest.raises(RecipeError):
        Graph(layers=layers, heads=heads, key_readers=key_readers, split=split)
