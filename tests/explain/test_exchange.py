"""EAP-IG's json: written as theirs, read back equal, damaged files refused."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewedges.errors import DataError, RecipeError
from fewedges.explain.exchange import Exchanged, read_eap_ig, write_eap_ig
from fewedges.explain.graph import Graph


def circuit_of(graph, seed):
    draw = np.random.default_rng(seed)
    scores = draw.normal(size=graph.real.shape) * graph.real
    return Exchanged(graph=graph, scores=scores, mask=graph.real & (draw.random(scores.shape) < 0.3), width=32)


@pytest.mark.reproduces
@settings(max_examples=20, deadline=None)
@given(layers=st.integers(1, 3), heads=st.integers(1, 4), parallel=st.booleans(), seed=st.integers(0, 99))
def test_a_circuit_survives_the_round_trip(layers, heads, parallel, seed, tmp_path_factory):
    circuit = circuit_of(Graph(layers=layers, heads=heads, key_readers=heads, parallel=parallel), seed)
    path = tmp_path_factory.mktemp("exchange") / "circuit.json"
    write_eap_ig(path, circuit)
    again = read_eap_ig(path)
    assert again.graph == circuit.graph
    assert again.width == 32
    assert np.array_equal(again.scores, circuit.scores)
    assert np.array_equal(again.mask, circuit.mask)


@pytest.mark.matches
def test_the_file_has_the_layout_of_eap_ig(tmp_path):
    graph = Graph(layers=1, heads=1, key_readers=1)
    scores = np.zeros(graph.real.shape)
    scores[graph.index("input->a0.h0<v>")] = 0.5
    mask = graph.mask(["input->a0.h0<v>", "a0.h0->logits"])
    write_eap_ig(tmp_path / "c.json", Exchanged(graph=graph, scores=scores, mask=mask, width=8))
    data = json.loads((tmp_path / "c.json").read_text())
    assert data["cfg"] == {"n_layers": 1, "n_heads": 1, "parallel_attn_mlp": False, "d_model": 8}
    assert {name: facts["in_graph"] for name, facts in data["nodes"].items()} == {
        "input": True,
        "a0.h0": True,
        "m0": False,
        "logits": True,
    }
    names = "input->a0.h0<q> input->a0.h0<k> input->a0.h0<v> input->m0 input->logits a0.h0->m0 a0.h0->logits m0->logits"
    assert set(data["edges"]) == set(names.split())
    assert data["edges"]["input->a0.h0<v>"] == {"score": 0.5, "in_graph": True}


@pytest.mark.survives
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("cfg"),
        lambda data: data["edges"].popitem(),
        lambda data: data["edges"].update({"a0.h0->a0.h0<q>": {"score": 0.0, "in_graph": False}}),
        lambda data: data["edges"]["input->m0"].update(score="high"),
        lambda data: data["edges"]["input->m0"].update(in_graph=1),
        lambda data: data["cfg"].update(n_layers=0),
        lambda data: data["cfg"].update(n_heads=10**9),
        lambda data: data.update(edges=[]),
    ],
)
def test_a_damaged_file_is_refused(damage, tmp_path):
    path = tmp_path / "c.json"
    write_eap_ig(path, circuit_of(Graph(layers=1, heads=1, key_readers=1), 0))
    data = json.loads(path.read_text())
    damage(data)
    path.write_text(json.dumps(data))
    with pytest.raises(DataError, match="read"):
        read_eap_ig(path)


@pytest.mark.survives
@pytest.mark.parametrize("text", ["", "[]", "{", '{"cfg": 1, "edges": 2}', "NaN"])
def test_a_foreign_file_is_refused(text, tmp_path):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(DataError):
        read_eap_ig(tmp_path / "c.json")
    with pytest.raises(DataError):
        read_eap_ig(tmp_path / "missing.json")


@pytest.mark.says
@pytest.mark.parametrize(
    ("kind", "hint"), [({"key_readers": 1}, "key_readers"), ({"key_readers": 2, "split": False}, "split=True")]
)
def test_another_kind_of_graph_is_told_how_to_be_wired(kind, hint, tmp_path):
    with pytest.raises(RecipeError, match=hint):
        write_eap_ig(tmp_path / "c.json", circuit_of(Graph(layers=1, heads=2, **kind), 0))
