"""A gated model through the hard-gate kernel against the same model through gate.py (Triton's interpreter)."""

import pytest
import torch
from test_inference import interpret

from fewedges.errors import ModelError
from fewedges.model.anatomy import anatomy
from fewedges.sparsify.attention.interface import GATED, GatePass, attach_
from fewedges.sparsify.attention.serving import hard_kernel
from tiny import tiny_loaded, tiny_model


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    pytest.importorskip("triton")
    interpret(monkeypatch)


def gated(name):
    """A tiny model with gate biases of either sign and gate queries that are not 0."""
    model = tiny_model(name)
    attach_(model, tiny_loaded(name).anatomy, bias_start=-0.1, gate_query=True)
    torch.manual_seed(0)
    for name_, parameter in model.named_parameters():
        if name_.endswith(("gate_bias", "gate_query")):
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def padded():
    ids = torch.arange(22).view(2, 11) % 30
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return ids, mask


@pytest.mark.matches
@pytest.mark.parametrize("name", ["llama", "gpt2", "olmo"])
def test_forward_and_generation_are_those_of_the_reference(name):
    model = gated(name)
    ids, mask = padded()
    found = {}
    for kernel in (False, True):
        run = GatePass()
        options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        with torch.no_grad(), hard_kernel(model) if kernel else torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, gate_pass=run).logits
            kept = {"return_dict_in_generate": True, "output_logits": True}
            steps = torch.stack(model.generate(input_ids=ids, attention_mask=mask, **options, **kept).logits)
        found[kernel] = logits[mask.bool()], steps, run.open_edges()[:, mask.bool()[:, None].expand(-1, 4, -1)]
    # Measured: 1.2e-6, of logits of about 1.
    torch.testing.assert_close(found[True][0], found[False][0], atol=4e-6, rtol=0)
    torch.testing.assert_close(found[True][1], found[False][1], atol=4e-6, rtol=0)
    assert torch.equal(found[True][2], found[False][2])
    assert 0 < found[True][2].mean() < 6
    assert model.config._attn_implementation == GATED


@pytest.mark.says
def test_what_it_cannot_do_is_an_error_and_the_model_is_as_before():
    ids = torch.arange(24).view(1, 24) % 30
    with pytest.raises(ModelError, match="has no gates"), hard_kernel(tiny_model("llama")):
        pass
    model = gated("llama")
    for run in (GatePass(sample=True), GatePass(keep_maps=True), GatePass(straight_through=True)):
        with pytest.raises(ModelError, match="sampled gates"), torch.no_grad(), hard_kernel(model):
            model(input_ids=ids, gate_pass=run)
    windowed = tiny_model("mistral-window")
    attach_(windowed, anatomy(windowed))
    with pytest.raises(ModelError, match="sliding window"), torch.no_grad(), hard_kernel(windowed):
        windowed(input_ids=ids)
    for one in (model, windowed):
        assert one.config._attn_implementation == GATED
