"""One model's search: every method is what its own file says, nodes, forms of the graph, export."""

import dataclasses

import numpy as np
import pytest
from pairs import random_prompts
from planted import CIRCUITS

from fewedges.errors import RecipeError
from fewedges.explain import searching
from fewedges.explain.attribution import attribute
from fewedges.explain.circuit import circuit_mask
from fewedges.explain.evaluate import evaluate
from fewedges.explain.exchange import Exchanged, per_head, read_eap_ig
from fewedges.explain.explaining import explain, exported_name
from fewedges.explain.hooks import wire
from fewedges.explain.patching import edge_effects, node_effects
from fewedges.explain.searching import Search, rank
from fewedges.model.anatomy import anatomy
from fewedges.recipes import CircuitSearch
from fewedges.sparsify.attention.result import gates_only
from tiny import tiny_loaded

SEARCH = CircuitSearch(count=8, points=6, samples=5, steps=2)


def searched(wiring, prompts=None, label="dense", **options):
    prompts = random_prompts(6) if prompts is None else prompts
    return Search(label, wiring, prompts, prompts, dataclasses.replace(SEARCH, **options))


@pytest.mark.matches
def test_exact_is_patching_of_every_edge_and_node(wired):
    wiring, prompts = wired("gpt2"), random_prompts(4)
    found = rank(wiring, prompts, CircuitSearch(method="exact"))
    assert np.array_equal(found.edges, edge_effects(wiring, prompts))
    assert np.array_equal(found.nodes, node_effects(wiring, prompts))


@pytest.mark.says
def test_exact_patching_of_a_large_graph_is_refused_with_numbers(wired, monkeypatch):
    wiring, prompts = wired("gpt2"), random_prompts(4)
    graph = wiring.graph
    monkeypatch.setattr(searching, "MOST_RUNS", 4 * graph.sources)
    runs = f"{4 * (graph.edges + graph.sources):,} runs, at most {4 * graph.sources:,}"
    with pytest.raises(RecipeError, match=f"method exact.*{runs}"):
        rank(wiring, prompts, CircuitSearch(method="exact"))
    assert rank(wiring, prompts, CircuitSearch(method="exact", nodes=True)).nodes.any()  # nodes alone are few


@pytest.mark.matches
def test_a_learned_mask_ranks_the_planted_edges_first_in_every_order():
    model, prompts, truth = CIRCUITS["copy"]()
    wiring = wire(model, anatomy(model))
    density = 1.2 * len(truth) / wiring.graph.edges
    ranked = rank(wiring, prompts, CircuitSearch(method="learned", mask_steps=120, mask_density=density))
    assert 0 <= ranked.edges.min() <= ranked.edges.max() <= 1
    for how in ("absolute", "signed", "greedy"):
        found = set(wiring.graph.names(circuit_mask(wiring, ranked.edges, len(truth), how=how)))
        assert 2 * len(found & truth) / (len(found) + len(truth)) >= 0.9, (found - truth, truth - found)


@pytest.mark.says
def test_a_learned_mask_has_no_shuffled_control_and_says_nothing_of_nodes(wired):
    one = searched(wired("gpt2"), method="learned", mask_steps=2)
    curves = one.curves()
    assert set(curves) == {"dense", "dense, random"}
    assert one.ranking(curves["dense"]) == {}


@pytest.mark.matches
def test_node_circuits_are_whole_and_end_in_the_model(wired):
    one = searched(wired("llama"), nodes=True)
    found, graph = one.curves()["dense"], one.wiring.graph
    assert found.explained[-1] == pytest.approx(1, abs=1e-9)
    names = one.ranking(found)["nodes"]
    assert list(names) == list(graph.source_names)
    assert list(names.values()) == pytest.approx(attribute(one.wiring, one.train, steps=2).nodes.tolist())
    masks = one._masks(one.ranked, "absolute")
    best = sorted(list(names)[1:], key=lambda name: -abs(names[name]))
    for n, mask in zip(sorted({round(float(x)) for x in np.geomspace(1, graph.sources - 1, 6)}), masks, strict=True):
        assert {graph.source_names[j] for j in np.flatnonzero(mask.any(1))} <= {"input", *best[:n]}
    used = masks[2].any(1)
    inner = graph.real & used[:, None] & (graph.feeds @ used | (np.arange(graph.destinations) == graph.logits))
    assert np.array_equal(masks[2], inner)


@pytest.mark.stays
def test_the_share_of_edges_that_stay_is_one_only_where_prompts_agree(wired):
    same, other = random_prompts(6).subset([0] * 6), random_prompts(6)
    stays = [one.ranking(one.curves()["dense"])["stays"] for one in (searched(wired("gpt2"), x) for x in (same, other))]
    assert stays[0] == 1
    assert 0.3 < stays[1] < 1


@pytest.mark.stays
def test_memory_changes_no_number_and_the_grid_of_mib_is_its_percentages(wired):
    wiring = wired("gpt2")
    whole, small = (searched(wiring, memory=x, controls=False, points=3).curves()["dense"] for x in (None, 1))
    assert np.abs(whole.metric - small.metric).max() < 1e-12
    mib = searched(wiring, grid="mib", controls=False).curves()["dense"].budgets
    assert mib.tolist() == [int(wiring.graph.edges * p / 100) for p in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)]


@pytest.mark.matches
@pytest.mark.parametrize("form", [{"split": False}, {"key_readers": "head"}, {}])
def test_the_graph_has_the_form_that_is_asked_for(form):
    loaded = tiny_loaded("llama")
    with wired_as(loaded, form) as wiring:
        assert (wiring.graph.split, wiring.graph.key_readers) == (form.get("split", True), 4 if form else 2)


def wired_as(loaded, form):
    return searching.wired(loaded, CircuitSearch(**form))


@pytest.mark.matches
@pytest.mark.parametrize("name", ["llama", "llama-gqa-4-to-1", "qwen2"])
def test_a_grouped_circuit_computes_the_same_per_query_head(name, wired):
    grouped, headed, prompts = wired(name), wired(name, key_readers="head"), random_prompts()
    scores = attribute(grouped, prompts, "eap").edges
    mask = circuit_mask(grouped, scores, grouped.graph.edges // 2)
    found = per_head(Exchanged(graph=grouped.graph, scores=scores, mask=mask, width=32))
    assert found.graph == headed.graph
    before, after = (evaluate(w, prompts, m[None]).metric for w, m in ((grouped, mask), (headed, found.mask)))
    assert np.abs(before - after).max() < 1e-9  # measured 2e-14
    assert np.abs(found.scores.sum(1) - scores.sum(1)).max() < 1e-9
    true = attribute(headed, prompts, "eap").edges
    queries = [headed.graph.reader(1, "q", head) for head in range(4)]
    assert np.abs(found.scores - true)[:, queries].max() < 1e-6 * np.abs(true).max()


@pytest.mark.reproduces
def test_what_the_verb_exports_is_read_back(addition, tmp_path):
    found = explain(gates_only(addition, -0.5), "addition", SEARCH, export=tmp_path / "circuits")
    assert [path.name for path in sorted((tmp_path / "circuits").iterdir())] == sorted(
        exported_name(found.task, label) for label in found.labels
    )
    assert sorted(found.facts["exported"]) == sorted(str(path) for path in (tmp_path / "circuits").iterdir())
    for label in ("dense", "sparse"):
        back = read_eap_ig(tmp_path / "circuits" / exported_name(found.task, label))
        assert list(back.graph.names(back.mask)) == found.circuits[label]
        nodes = dict(zip(back.graph.source_names, back.scores.sum(1), strict=True))
        assert nodes == pytest.approx(found.rankings[label]["nodes"])


@pytest.mark.says
def test_one_input_per_head_cannot_be_exported(addition, tmp_path):
    search = dataclasses.replace(SEARCH, split=False, controls=False)
    with pytest.raises(RecipeError, match="split=True"):
        explain(addition, "addition", search, export=tmp_path)


@pytest.mark.says
@pytest.mark.parametrize(
    "bad",
    [
        {"method": "exact", "gim": True},
        {"method": "learned", "nodes": True},
        {"nodes": True, "how": "greedy"},
        {"nodes": True, "grid": "mib"},
        {"split": False, "key_readers": "head"},
        {"memory": 0},
        {"mask_density": 1.0},
        {"mask_steps": 0},
    ],
)
def test_settings_that_contradict_are_refused(bad):
    with pytest.raises(RecipeError, match=next(iter(bad)).split("_")[0]):
        CircuitSearch(**bad)
