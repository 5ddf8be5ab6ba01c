"""What is done with scored token edges: heads of a circuit, roles, readings that meet, saving, refusing."""

import numpy as np
import pytest
import torch
from pairs import random_prompts
from test_positions import tiny

from fewedges.errors import DataError, RecipeError, StoreError
from fewedges.explain.positions import heads_in, read_token_edges, token_edges


@pytest.fixture(scope="module")
def some():
    return token_edges(tiny("llama", True), random_prompts())


@pytest.mark.stays
def test_only_the_heads_of_a_circuit_are_looked_at(some):
    circuit = ["input->a0.h1<q>", "a0.h1->a1.g1<v>", "a1.h2->logits", "m0->a1.h2<q>"]
    few = token_edges(tiny("llama", True), random_prompts(), heads=circuit)
    heads = {tuple(edge) for edge in few.edges[:, 1:3].tolist()}
    assert heads == {(0, 1), (1, 2)}
    mine = some.of_heads(circuit)
    np.testing.assert_array_equal(few.edges, mine.edges)
    np.testing.assert_array_equal(few.scores, mine.scores)


@pytest.mark.matches
def test_a_group_is_its_named_heads_or_all_of_them():
    shape = (2, 4, 2)
    assert np.argwhere(heads_in(["input->a1.g1<k>"], shape)).tolist() == [[1, 2], [1, 3]]
    assert np.argwhere(heads_in(["input->a1.g1<k>", "a1.h3->logits"], shape)).tolist() == [[1, 3]]
    assert np.argwhere(heads_in("a0.h2", shape)).tolist() == [[0, 2]]


@pytest.mark.stays
def test_edges_asked_for_come_in_their_order_and_score_the_same(some):
    best = some.strongest(7)
    assert (np.diff(np.abs(best.scores)) <= 0).all()
    found, prompts = tiny("llama", True), random_prompts()
    again = token_edges(found, prompts, edges=best.edges)
    np.testing.assert_array_equal(again.edges, best.edges)
    np.testing.assert_array_equal(again.scores, best.scores)
    every = token_edges(found, prompts, "exact")
    few = token_edges(found, prompts, "exact", edges=best.edges, at_once=3)
    place = [every.edges.tolist().index(edge) for edge in best.edges.tolist()]
    assert np.abs(few.scores - every.scores[place]).max() < 1.6e-15  # in other batches: measured 4.4e-16


@pytest.mark.stays
def test_prompts_together_score_as_they_do_alone(some):
    found, prompts = tiny("llama", True), random_prompts()
    for number in (0, 1, -1):
        alone = token_edges(found, prompts.subset([number]))
        mine = some.of_prompt(number)
        np.testing.assert_array_equal(alone.edges, mine.edges)
        assert (
            np.abs(alone.scores - mine.scores).max() < 1e-7
        )  # without its padding: measured 2.7e-8, the rotary embedding's float32
        assert (alone.tokens, alone.places) == (mine.tokens, mine.places)


@pytest.mark.matches
def test_roles_are_means_over_all_prompts(some):
    for one in some.by_role()[::40]:
        layer, head = map(int, one.head[1:].split(".h"))
        rows = [
            n
            for n, (b, l, h, q, k) in enumerate(some.edges.tolist())
            if (l, h) == (layer, head) and (some.places[b][q], some.places[b][k]) == (one.query, one.key)
        ]
        assert one.score == pytest.approx(some.scores[rows].sum() / 5, rel=1e-12)
        assert one.weight == pytest.approx(some.weights[rows].mean(), rel=1e-12)
        assert one.prompts == len(rows)
    worth = [abs(one.score) for one in some.by_role()]
    assert worth == sorted(worth, reverse=True)


@pytest.mark.stays
def test_what_carries_in_a_prompt_is_open_there_and_strongest_over_all(some):
    names = list(some.heads())[:3]
    for number in range(5):
        found = some.carrying(number, names, count=2, least=0.0)
        mine = {tuple(edge[1:]) for edge in some.edges[some.edges[:, 0] == number].tolist()}
        assert set(found) <= mine
        assert len(found) == 6
        assert {one.head for one in found.values()} == set(names)
        assert all(one.query == some.places[number][q] for (_, _, q, _), one in found.items())
        high = max(abs(one.score) for one in some.of_heads(names).by_role())
        few = some.carrying(number, names, count=2, least=0.5)
        assert few == {place: one for place, one in found.items() if abs(one.score) >= 0.5 * high}
        assert len(few) < 6


@pytest.mark.matches
@pytest.mark.parametrize(("edge", "column"), [("a0.h1->a1.h2<q>", 3), ("a0.h1->a1.g1<v>", 4), ("a0.h1->a1.h3<k>", 4)])
def test_a_circuit_edge_opens_up_into_readings_that_meet(some, edge, column):
    pairs = some.through(edge)
    writers, readers = (some.of_heads([end]).edges.tolist() for end in edge.split("->"))
    slow = [(w, r) for w in writers for r in readers if (w[0], w[3]) == (r[0], r[column])]
    found = [tuple(some.edges[n].tolist() for n in pair) for pair in pairs]
    assert sorted(found) == sorted(slow)
    weaker = [min(abs(some.scores[list(pair)])) for pair in pairs]
    assert weaker == sorted(weaker, reverse=True)


@pytest.mark.matches
def test_ends_that_are_no_heads_leave_a_place_empty(some):
    assert some.through("input->m0") == []
    assert {pair[0] for pair in some.through("input->a1.h2<q>")} == {None}
    assert len(some.through("input->a1.h2<q>")) == len(some.of_heads(["a1.h2"]))
    ends = [some.edges[n] for n, _ in some.through("a1.h2->logits")]
    assert ends
    assert all(edge[3] == len(some.tokens[edge[0]]) - 1 for edge in ends)
    assert len(some.through("a1.h2->m1")) == len(some.of_heads(["a1.h2"])) > len(ends)


@pytest.mark.reproduces
def test_what_is_saved_is_read_again(some, tmp_path):
    again = read_token_edges(some.save(tmp_path / "edges.json"))
    for name in ("edges", "weights", "scores", "metric"):
        np.testing.assert_array_equal(getattr(again, name), getattr(some, name))
    for name in ("task", "model", "method", "gated", "shape", "tokens", "places", "facts"):
        assert getattr(again, name) == getattr(some, name)
    assert str(again) == str(some)
    none = some.only([])
    assert read_token_edges(none.save(tmp_path / "none.json")).edges.shape == (0, 5)


@pytest.mark.survives
@pytest.mark.parametrize("text", ["", "[]", '{"task": "ioi"}', '{"tokens": 3, "places": []}'])
def test_another_file_is_refused(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(StoreError, match="no saved token edges"):
        read_token_edges(tmp_path / "x.json")
    with pytest.raises(StoreError):
        read_token_edges(tmp_path / "not there")


@pytest.mark.survives
@pytest.mark.usefixtures("as_users_call")
def test_what_there_is_not_is_refused(some):
    found, prompts = tiny("llama", True), random_prompts()
    with pytest.raises(RecipeError, match="one of gradient, exact"):
        token_edges(found, prompts, "slow")
    with pytest.raises(DataError, match=r"no a2\.h0 in this model"):
        token_edges(found, prompts, heads=["a2.h0"])
    with pytest.raises(DataError, match=r"no a1\.g2 in this model"):
        some.of_heads(["input->a1.g2<k>"])
    with pytest.raises(DataError, match="no head in"):
        some.of_heads(["input->m0"])
    shut = next(e for e in ([0, 0, 0, q, 0] for q in range(7)) if e not in some.edges.tolist())
    with pytest.raises(DataError, match=r"\(0, 0, 0, \d, 0\) is closed"):
        token_edges(found, prompts, edges=np.array([some.edges[0], shut]))


@pytest.mark.survives
def test_the_model_is_left_as_it_was():
    for gated in (True, False):
        found, prompts = tiny("llama", gated), random_prompts()
        before = (found.model.config._attn_implementation, found.model(input_ids=prompts.clean).logits)
        token_edges(found, prompts, "exact", edges=token_edges(found, prompts).strongest(2).edges)
        assert found.model.config._attn_implementation == before[0]
        assert torch.equal(found.model(input_ids=prompts.clean).logits, before[1])
        assert all(parameter.grad is None for parameter in found.model.parameters())


@pytest.mark.says
def test_it_prints_tokens_for_one_prompt_and_roles_for_many(addition):
    from fewedges.explain.tasks import prompts_for

    prompts = prompts_for("addition", addition.tokenizer, 6)
    many = token_edges(addition, prompts)
    lines = str(many).splitlines()
    assert lines[0].startswith(
        f"addition (tens) in addition: {6 * 16 * 36:,} causal edges of 6 prompts, gradient scores"
    )
    assert " END reads a10 in a" in str(many)
    assert "open in 6 of 6 prompts, weight 0." in lines[1]
    one = many.of_prompt(2)
    assert f"of 1 prompt, gradient scores, metric {many.metric[2]:.3g}" in str(one)
    assert "(7, END) reads '" in str(one)
    assert one._repr_html_().count("&#x27;") == str(one).count("'")
    assert str(token_edges(tiny("llama", True), random_prompts())).count("open gates of 5 prompts") == 1
