"""Planted circuits, whose edges are known, are recovered."""

import numpy as np
import pytest
from planted import CIRCUITS

from fewedges.explain.attribution import attribute
from fewedges.explain.circuit import circuit_mask
from fewedges.explain.evaluate import evaluate
from fewedges.explain.hooks import wire
from fewedges.explain.patching import edge_effects
from fewedges.model.anatomy import anatomy

HIDDEN = {"either": {"input->a0.h0<v>", "a0.h0->m0", "input->a0.h2<v>", "a0.h2->m0"}}
"""What no single ablation can show: either path alone is enough."""


@pytest.fixture(params=CIRCUITS)
def planted(request):
    model, prompts, truth = CIRCUITS[request.param]()
    return request.param, wire(model, anatomy(model)), prompts, truth


@pytest.mark.matches
def test_the_planted_model_does_its_task_and_its_circuit_is_sufficient_and_necessary(planted):
    _, wiring, prompts, truth = planted
    mask = wiring.graph.mask(truth)
    found = evaluate(wiring, prompts, np.stack([mask, wiring.graph.real & ~mask]))
    assert found.full_correct.all()
    assert found.full.mean() > found.empty.mean() + 0.3
    assert abs(found.explained[0] - 1) < 0.1  # measured: at most 0.039, the noise
    assert abs(found.explained[1]) < 0.1


@pytest.mark.matches
def test_exact_patching_finds_planted_edges_and_no_other(planted):
    name, wiring, prompts, truth = planted
    effects = np.abs(edge_effects(wiring, prompts))
    found = set(wiring.graph.names(effects > 0.05 * effects.max()))
    assert found == truth - HIDDEN.get(name, set())


@pytest.mark.matches
def test_eap_ig_finds_the_planted_circuit(planted):
    _, wiring, prompts, truth = planted
    scores = attribute(wiring, prompts, "eap-ig", steps=20).edges
    found = set(wiring.graph.names(circuit_mask(wiring, scores, len(truth))))
    f1 = 2 * len(found & truth) / (len(found) + len(truth))
    assert f1 >= 0.9, (sorted(found - truth), sorted(truth - found))
