"""The verb over attention edges, on the built-in addition model behind gates."""

import dataclasses
import json

import numpy as np
import pytest

import fewedges as fe
from fewedges.errors import DataError, RecipeError, StoreError
from fewedges.explain.attention_explaining import SEARCH, explain_attention, read_attention_explained
from fewedges.sparsify.attention.result import gates_only

SMALL = dataclasses.replace(SEARCH, count=24, points=7, samples=30, steps=3)


@pytest.fixture(scope="module")
def addition():
    """The addition model, and the same weights behind gates that are a little more closed than score > 0."""
    return gates_only(fe.load("addition", probes=False), -0.5)


@pytest.fixture(scope="module")
def found(addition):
    return explain_attention(addition, "addition", SMALL, own=True)


@pytest.mark.says
def test_the_json_has_the_keys_of_its_sibling_and_the_kl_share(found):
    data = json.loads(json.dumps(found.to_dict()))
    known = {"task", "model", "ratio_edges", "ratio_heads", "ratio_edges_interval", "curves", "accuracies"}
    assert known | {"ratio_edges_kl", "ratio_edges_kl_interval", "at_kl", "ratio_edges_stays", "at_stays"} <= set(data)
    assert data["facts"]["edges"] == "attention"
    assert "attention edges (heads) of a prompt" in str(found)


@pytest.mark.matches
def test_every_model_and_control_has_a_curve_up_to_the_model(found):
    ends = ("", ", signed", ", random", ", own")
    assert set(found.curves) == {f"{label}{end}" for label in ("dense", "sparse") for end in ends}
    for curve in found.curves.values():
        assert curve.explained[-1] == pytest.approx(1, abs=4e-6)  # measured 1e-6, in float32
        assert (np.diff(curve.edges) >= 0).all()
    assert found.curves["dense, random"].edges_at() > 2 * found.curves["dense"].edges_at()
    assert found.curves["sparse"].all_edges < found.curves["dense"].all_edges


@pytest.mark.matches
def test_ratios_are_those_of_the_curves_and_intervals_hold_them(found):
    dense, sparse = found.curves["dense"], found.curves["sparse"]
    assert found.ratio() == pytest.approx(dense.edges_at(0.9) / sparse.edges_at(0.9))
    assert found.ratio_by("like_at") == pytest.approx(dense.like_at(0.9) / sparse.like_at(0.9))
    for ratio, (low, high) in (
        (found.ratio(), found.ratio_interval()),
        (found.ratio_by("like_at"), found.ratio_by_interval("like_at")),
        (found.ratio_by("stays_at"), found.ratio_by_interval("stays_at")),
    ):
        assert low <= ratio <= high
    signed = found.ordered("signed")
    assert signed.ratio() == pytest.approx(
        found.curves["dense, signed"].edges_at() / found.curves["sparse, signed"].edges_at()
    )
    same = dataclasses.replace(found, curves={**found.curves, "sparse": dense})
    assert same.ratio_by_interval("like_at") == (1.0, 1.0)  # prompts are drawn for both models together


@pytest.mark.matches
def test_circuits_name_the_first_edges_that_reach_the_level(found):
    for label in ("dense", "sparse"):
        curve = found.curves[label]
        assert len(found.circuits[label]) == min(curve.budgets[curve.index_at(0.9)], 200)
        assert " reads " in found.circuits[label][0]


@pytest.mark.reproduces
def test_the_same_seed_gives_the_same_and_what_is_saved_is_read_back(addition, found, tmp_path):
    again = explain_attention(addition, "addition", dataclasses.replace(SMALL, controls=False))
    for label, curve in again.curves.items():
        assert np.array_equal(curve.metric, found.curves[label].metric)
    back = read_attention_explained(found.save(tmp_path / "attention.json"))
    assert back.to_dict() == found.to_dict()
    assert str(back) == str(found)


@pytest.mark.survives
@pytest.mark.parametrize("text", ["", "[]", '{"task": "x"}', "null"])
def test_a_file_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(StoreError, match="no explained attention edges"):
        read_attention_explained(tmp_path / "x.json")


@pytest.mark.survives
def test_a_model_that_does_not_do_the_task_is_refused(addition):
    with pytest.raises(DataError, match=r"sparse: accuracy .* is near chance"):
        explain_attention(gates_only(addition.dense, -1e6), "addition", SMALL)


@pytest.mark.says
@pytest.mark.parametrize("bad", [{"gim": True}, {"method": "eap"}, {"how": "greedy"}, {"ablation": "mean"}])
def test_a_search_that_attention_edges_do_not_have_is_refused_by_name(addition, bad):
    with pytest.raises(RecipeError, match=next(iter(bad))):
        explain_attention(addition, "addition", dataclasses.replace(SMALL, **bad))
