"""Learned masks: the gradient by the mask is EAP, and learning recovers planted circuits."""

import numpy as np
import pytest
import torch
from pairs import random_prompts
from planted import CIRCUITS

from fewedges.errors import RecipeError
from fewedges.explain.attribution import attribute
from fewedges.explain.circuit import circuit_mask
from fewedges.explain.hooks import wire
from fewedges.explain.mask import Differentiable, expected_open, hard_concrete, learn_mask
from fewedges.explain.running import Ablated, circuit_logits, run
from fewedges.model.anatomy import anatomy


@pytest.mark.matches
@pytest.mark.parametrize(("name", "form"), [("gpt2", {}), ("llama", {}), ("llama", {"split": False}), ("gpt-neox", {})])
def test_the_gradient_by_an_all_ones_mask_is_eap(name, form, wired):
    wiring, prompts = wired(name, **form), random_prompts()
    shape = (prompts.clean.shape[0], prompts.clean.shape[1])
    with torch.no_grad():
        values = run(wiring, prompts.corrupt, prompts.last, {})
    mask = torch.from_numpy(wiring.graph.real).double().requires_grad_()
    stream = Differentiable(Ablated(values=values, wiring=wiring, shape=shape), mask)
    logits = circuit_logits(wiring, prompts.clean, prompts.last, stream, {})[0]
    slope = torch.autograd.grad(prompts.measure_metric(logits).mean(), mask)[0].numpy()
    scores = attribute(wiring, prompts, "eap").edges
    assert np.abs(slope - scores).max() < 1e-6 * np.abs(scores).max()  # float32 scores; measured 3e-8


@pytest.mark.matches
@pytest.mark.parametrize("name", ["copy", "induction", "greater_than"])
def test_learning_finds_planted_circuits(name):
    model, prompts, truth = CIRCUITS[name]()
    wiring = wire(model, anatomy(model))
    scores = learn_mask(wiring, prompts, density=1.2 * len(truth) / wiring.graph.edges, steps=120)
    found = set(wiring.graph.names(circuit_mask(wiring, scores, len(truth), how="signed")))
    assert 2 * len(found & truth) / (len(found) + len(truth)) >= 0.9, (found - truth, truth - found)


@pytest.mark.matches
def test_the_expected_share_of_open_gates_is_the_share_that_opens():
    scores = torch.linspace(-4, 4, 9)[:, None].expand(9, 20_000)
    opened = (hard_concrete(scores, torch.Generator().manual_seed(0)) > 0).float().mean(1)
    assert torch.allclose(opened, expected_open(scores[:, 0]), atol=0.012)  # measured: 0.004


@pytest.mark.reproduces
def test_learning_is_a_function_of_its_seed(wired):
    wiring, prompts = wired("gpt2"), random_prompts()
    a, b, c = (learn_mask(wiring, prompts, steps=3, seed=seed) for seed in (0, 0, 1))
    assert (a == b).all()
    assert (a != c).any()


@pytest.mark.says
@pytest.mark.parametrize("bad", [{"density": 0.0}, {"density": 1.0}, {"steps": 0}, {"rate": 0.0}])
def test_values_out_of_range_are_refused(bad, wired):
    with pytest.raises(RecipeError, match="learn_mask"):
        learn_mask(wired("gpt2"), random_prompts(), **bad)
