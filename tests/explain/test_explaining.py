"""The verb `explain`, on the built-in addition model behind gates."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import fewedges as fe
from fewedges.errors import DataError, RecipeError, StoreError
from fewedges.explain.explaining import UNTRAINED, explain, read_explained
from fewedges.pictures import draw_explained
from fewedges.sparsify.attention.result import gates_only

SEARCH = fe.CircuitSearch(count=24, points=8, samples=40, steps=3)


@pytest.fixture(scope="module")
def addition():
    """The addition model, and the same weights behind gates that are a little more closed than score > 0."""
    return gates_only(fe.load("addition", probes=False), -0.5)


@pytest.fixture(scope="module")
def found(addition):
    return explain(addition, "addition", SEARCH)


@pytest.mark.says
def test_the_json_has_the_keys_scripts_of_others_rely_on(found):
    data = json.loads(json.dumps(found.to_dict()))
    assert {"task", "model", "ratio_edges", "ratio_heads", "ratio_edges_interval", "curves", "accuracies"} <= set(data)
    assert set(data["curves"]) == set(found.curves)
    assert {"method", "ablation", "seed", "versions", "device", "prompts"} <= set(data["facts"])
    assert "not reached" not in str(found).splitlines()[2]


@pytest.mark.says
def test_necessity_and_the_best_nodes_are_reported(found):
    at, sparse = found.to_dict()["at"], found.curves["sparse"]
    assert at["sparse"]["necessity"] == {str(x): sparse.necessity_at(x) for x in (0.5, 0.8, 0.9, 0.95)}
    assert at["sparse, random"]["necessity"] is None  # complements are run for models, not for controls
    text = str(found)
    assert text.count("effect lost without them") == 3
    assert f"{sparse.necessity_at(0.9):.2f}" in text
    best = max(found.rankings["sparse"]["nodes"].items(), key=lambda one: abs(one[1]))
    assert f"sparse: {best[0]} {best[1]:+.2f}" in text
    assert f"{found.rankings['sparse']['stays']:.0%} of its edges at 0.9 stay" in text


@pytest.mark.matches
def test_every_model_and_control_has_a_curve_from_empty_to_full(found):
    assert set(found.curves) == {
        *("dense", "dense, random", "dense, shuffled"),
        *("sparse", "sparse, random", "sparse, shuffled", UNTRAINED),
    }
    for curve in found.curves.values():
        # Measured: 2e-7; the whole model as a circuit is the model.
        assert curve.explained[-1] == pytest.approx(1, abs=1e-6)
        assert curve.edges[-1] == curve.all_edges
    assert found.curves["dense, random"].edges_at() > 3 * found.curves["dense"].edges_at()


@pytest.mark.matches
def test_the_ratio_is_that_of_the_curves_and_its_interval_holds_it(found):
    dense, sparse = found.curves["dense"], found.curves["sparse"]
    assert found.ratio() == pytest.approx(dense.edges_at(0.9) / sparse.edges_at(0.9))
    low, high = found.ratio_interval()
    assert low <= found.ratio() <= high
    assert low < high
    same = dataclasses.replace(found, curves={**found.curves, "sparse": dense})
    assert same.ratio_interval() == (1.0, 1.0)  # prompts are drawn for both models together


@pytest.mark.matches
def test_circuits_are_those_of_the_first_budget_that_reaches_the_level(found):
    for label in ("dense", "sparse"):
        curve = found.curves[label]
        assert len(found.circuits[label]) == curve.edges[curve.index_at(0.9)]


@pytest.mark.reproduces
def test_the_same_seed_gives_the_same_curves_and_leaves_the_model_as_it_was(addition, found):
    before = {name: p.clone() for name, p in addition.model.named_parameters()}
    learning = {name: p.requires_grad for name, p in addition.model.named_parameters()}
    again = explain(addition, "addition", SEARCH)
    for label, curve in found.curves.items():
        assert np.array_equal(again.curves[label].metric, curve.metric)
    assert all(torch.equal(p, before[name]) for name, p in addition.model.named_parameters())
    assert {name: p.requires_grad for name, p in addition.model.named_parameters()} == learning


@pytest.mark.reproduces
def test_what_is_saved_is_read_back(found, tmp_path):
    back = read_explained(found.save(tmp_path / "circuits.json"))
    assert back.to_dict() == found.to_dict()
    assert str(back) == str(found)


@pytest.mark.survives
@pytest.mark.parametrize("text", ["", "[]", '{"task": "x"}', "null"])
def test_a_file_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(StoreError, match="not a saved explanation"):
        read_explained(tmp_path / "x.json")


@pytest.mark.survives
def test_a_model_that_does_not_do_the_task_is_refused(addition):
    torch.manual_seed(0)
    closed = gates_only(addition.dense, -1e6)
    with pytest.raises(DataError, match=r"sparse: accuracy .* is near chance"):
        explain(closed, "addition", SEARCH)


@pytest.mark.says
@pytest.mark.parametrize("bad", [{"steps": 0}, {"points": 1}, {"count": 3}, {"method": "guess"}, {"gim": "yes"}])
def test_a_search_out_of_range_is_refused_by_the_name_of_its_field(bad):
    with pytest.raises(RecipeError, match=next(iter(bad))):
        fe.CircuitSearch(**bad)


@pytest.mark.says
def test_intervals_of_too_few_prompts_are_warned_of(addition, caplog):
    quick = dataclasses.replace(SEARCH, points=2, samples=2, steps=1, controls=False, complements=False)
    explain(addition, "addition", dataclasses.replace(quick, count=16))
    assert caplog.text == ""
    explain(addition, "addition", dataclasses.replace(quick, count=4))
    assert "measured on 2 prompts, too few for its intervals: --count 16" in caplog.text


@pytest.mark.matches
def test_pictures_are_written_for_both_themes(found, tmp_path):
    for theme in ("light", "dark"):
        files = draw_explained([found], tmp_path, name="addition", theme=theme)
        assert [path.suffix for path in files] == [".svg", ".png", ".svg", ".png"]
        assert all(path.stat().st_size > 5000 for path in files)
