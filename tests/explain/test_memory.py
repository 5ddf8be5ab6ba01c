"""The memory limit of circuit runs, against what torch allocates."""

import json

import numpy as np
import pytest
from pairs import random_prompts
from torch.profiler import ProfilerActivity, profile

from fewedges.explain.attribution import attribute
from fewedges.explain.evaluate import evaluate
from fewedges.explain.hooks import wire
from fewedges.explain.mask import learn_mask
from fewedges.explain.running import prompts_at_once
from fewedges.model.anatomy import anatomy
from fewedges.sparsify.attention.interface import attach_
from tiny import configs

LIMIT = 2**20
TOKENS = 16


def peak(work, folder):
    """The most bytes alive at once of what torch allocates during the work; read from the profiler's trace."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    seen.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    changes = sorted((e["ts"], n, e["args"]["Bytes"]) for n, e in enumerate(events) if e.get("name") == "[memory]")
    return int(np.cumsum([change for *_, change in changes]).max())


def model_of(name, layers=2):
    import transformers as tf

    config = configs()[name.split()[-1]]
    config.num_hidden_layers = layers
    model = tf.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False).double()
    body = anatomy(model)
    if name.startswith("gated"):
        attach_(model, body, bias_start=0.0, learned=False)
    return wire(model, body)


@pytest.mark.stays
@pytest.mark.parametrize("ablation", ["counterfactual", "mean"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt-neox", "gated llama"])
def test_circuits_stay_within_the_limit_and_use_most_of_it(name, ablation, tmp_path):
    wiring = model_of(name, layers=6)  # what one layer keeps for the next shows only in some layers
    prompts = random_prompts(2 * prompts_at_once(wiring, TOKENS, LIMIT), TOKENS)
    masks = wiring.graph.real & (np.random.default_rng(0).random((3, *wiring.graph.real.shape)) < 0.7)
    used = peak(lambda: evaluate(wiring, prompts, masks, ablation=ablation, memory=LIMIT), tmp_path)
    assert LIMIT / 2 < used <= LIMIT


@pytest.mark.stays
@pytest.mark.parametrize("name", ["gpt2", "llama", "gated llama"])
@pytest.mark.parametrize("method", ["eap", "eap-ig", "eap-ig-activations", "learned"])
def test_rankings_stay_within_the_limit(name, method, tmp_path):
    wiring = model_of(name)
    prompts = random_prompts(2 * prompts_at_once(wiring, TOKENS, LIMIT, gradients=True), TOKENS)

    def rank():
        if method == "learned":
            learn_mask(wiring, prompts, steps=2, memory=LIMIT)
        else:
            attribute(wiring, prompts, method, steps=2, memory=LIMIT)

    used = peak(rank, tmp_path)
    assert LIMIT / 10 < used <= LIMIT


@pytest.mark.stays
def test_more_memory_changes_nothing_but_rounding():
    wiring, prompts = model_of("gated llama"), random_prompts(30, TOKENS)
    masks = wiring.graph.real & (np.random.default_rng(0).random((3, *wiring.graph.real.shape)) < 0.7)
    few, many = (evaluate(wiring, prompts, masks, memory=limit).metric for limit in (2**18, 2**26))
    assert prompts_at_once(wiring, TOKENS, 2**18) < 30 < prompts_at_once(wiring, TOKENS, 2**26)
    assert np.abs(few - many).max() < 1e-12
