"""Wiring: every supported architecture is measured additive or refused by name, and is left as it was."""

import pytest
import torch
from torch import nn

from fewedges.errors import ModelError
from fewedges.explain.hooks import affine, head_writes, project, swapped, wire
from fewedges.model.anatomy import anatomy
from tiny import SUPPORTED, tiny_model

REFUSED = {"gemma2": "sandwich norm", "gemma3": "sandwich norm", "olmo2": "post-norm"}
WIRED = [name for name in SUPPORTED if name not in REFUSED]


def state_of(model):
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    swaps = sum("forward" in m.__dict__ for m in model.modules())
    return hooks, swaps, model.config._attn_implementation


@pytest.mark.matches
@pytest.mark.parametrize("name", WIRED)
def test_sources_sum_to_the_residual_stream(name, wired):
    wiring = wired(name)
    assert wiring.residual_error < 1e-15  # measured: 2.1e-16 to 2.7e-16 in float64
    assert wiring.graph.parallel == (name == "gpt-neox")
    grouped = name in ("llama", "llama-gqa-4-to-1", "llama-tied", "mistral-window", "qwen2", "qwen3", "phi3", "olmo")
    assert (wiring.graph.key_readers < wiring.graph.heads) == grouped


@pytest.mark.survives
@pytest.mark.parametrize("name", REFUSED)
def test_a_model_whose_parts_do_not_add_up_is_refused_by_name(name):
    model = tiny_model(name)
    before = state_of(model)
    with pytest.raises(ModelError, match=REFUSED[name]):
        wire(model, anatomy(model))
    assert state_of(model) == before


@pytest.mark.survives
def test_a_scaled_residual_is_refused_by_what_was_measured():
    import transformers as tf

    from tiny import TINY

    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(tf.GraniteConfig(**TINY, residual_multiplier=0.5)).eval()
    with pytest.raises(ModelError, match="parts are not additive"):
        wire(model, anatomy(model))


@pytest.mark.survives
def test_a_query_norm_across_heads_is_refused():
    import transformers as tf

    from tiny import TINY

    torch.manual_seed(0)
    small = {**TINY, "num_key_value_heads": 4}
    model = tf.AutoModelForCausalLM.from_config(tf.OlmoeConfig(**small, num_experts=2, num_experts_per_tok=1)).eval()
    with pytest.raises(ModelError, match="full-width QK norm"):
        wire(model, anatomy(model))


@pytest.mark.survives
def test_fused_grouped_projections_cannot_be_read_once_per_head():
    model = tiny_model("phi3")
    with pytest.raises(ModelError, match=r"fewer key/value heads.*key_readers='group'"):
        wire(model, anatomy(model), key_readers="head")


@pytest.mark.stays
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox"])
def test_wiring_leaves_the_model_alone(name):
    model = tiny_model(name)
    before = state_of(model)
    with torch.no_grad():
        wire(model, anatomy(model))  # also where gradients are off
    assert state_of(model) == before


@pytest.mark.stays
@pytest.mark.parametrize("name", WIRED)
def test_weights_are_views_of_the_model_not_copies(name, wired):
    wiring = wired(name)
    owned = {p.untyped_storage().data_ptr() for p in wiring.model.parameters()}
    for block in wiring.blocks:
        for weight in (block.weight, *(reader.weight for reader in block.readers)):
            assert weight.untyped_storage().data_ptr() in owned


@pytest.mark.matches
def test_a_module_of_unknown_make_is_measured():
    torch.manual_seed(0)
    odd = nn.Sequential(nn.Linear(6, 4, bias=True), nn.Linear(4, 5, bias=False)).double().requires_grad_(False)
    weight, bias = affine(odd, 6)
    x = torch.randn(3, 6, dtype=torch.float64)
    assert torch.allclose(x @ weight + bias, odd(x), atol=1e-14)


@pytest.mark.matches
@pytest.mark.parametrize("options", [{}, {"key_readers": "head"}, {"split": False}])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "qwen2"])
def test_cut_projections_are_the_whole_ones(name, options, wired):
    """A reading matrix applied unit by unit gives its own output, repeated where keys are read per head."""
    wiring = wired(name, **options)
    torch.manual_seed(0)
    for block in wiring.blocks:
        x = torch.randn(3, block.weight.shape[-1], dtype=torch.float64)
        for reader in block.readers:
            units = project(reader, x[None].expand(len(reader.destinations), -1, -1))
            whole = reader.module(x).view(3, -1, units.shape[-1])
            whole = whole if reader.repeat is None else whole[:, list(reader.repeat)]
            assert torch.allclose(units.transpose(0, 1), whole, atol=1e-13)  # measured 8.9e-15
        heads = torch.randn(3, block.weight.shape[0] * block.weight.shape[1], dtype=torch.float64)
        bias = 0 if block.bias is None else block.bias
        assert torch.allclose(head_writes(block, heads).sum(0) + bias, block.writer(heads), atol=1e-13)


@pytest.mark.matches
@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "phi3", "llama", "opt"])
def test_destinations_are_those_whose_input_moves_the_right_query_key_or_value(name, wired):
    """Against weights cut by hand: the first head's query, the last key/value head's value."""
    wiring = wired(name)
    graph, block, config = wiring.graph, wiring.blocks[1], wiring.model.config
    width = block.weight.shape[1]
    hidden, last = graph.heads * width, graph.key_readers - 1
    if name == "gpt2":
        whole = block.attention.c_attn.weight
        query, value = whole[:, :width], whole[:, 2 * hidden + last * width :]
    elif name == "gpt-neox":
        whole = block.attention.query_key_value.weight.T.reshape(hidden, graph.heads, 3, width)
        query, value = whole[:, 0, 0], whole[:, last, 2]
    elif name == "phi3":
        whole = block.attention.qkv_proj.weight.T
        query, value = whole[:, :width], whole[:, -width:]
    else:
        query, value = block.attention.q_proj.weight.T[:, :width], block.attention.v_proj.weight.T[:, -width:]
    found = {d: w for reader in block.readers for d, w in zip(reader.destinations, reader.weight, strict=True)}
    assert config.num_hidden_layers == 2
    assert torch.equal(found[graph.reader(1, "q", 0)], query)
    assert torch.equal(found[graph.reader(1, "v", last)], value)


@pytest.mark.survives
def test_a_swap_is_undone_after_an_error():
    module = nn.Linear(2, 2)
    with swapped(module, lambda x: x + 1):
        assert module(3) == 4
    with pytest.raises(ZeroDivisionError), swapped(module, lambda x: x / 0):
        module(3)
    assert "forward" not in module.__dict__


@pytest.mark.matches
def test_adapters_are_measured_and_circuits_of_the_wrapped_model_are_exact():
    peft = pytest.importorskip("peft")
    import numpy as np
    from pairs import random_prompts

    from fewedges.explain.evaluate import evaluate

    model = tiny_model("llama").double()
    body = anatomy(model)
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).eval().requires_grad_(False)
    wiring, prompts = wire(wrapped, body), random_prompts()
    real = wiring.graph.real
    found = evaluate(wiring, prompts, np.stack([real, real & False]))
    assert np.abs(found.metric - np.stack([found.full, found.empty])).max() < 1e-12
