"""Every probe passes on every supported architecture, and fails alone when its own fault is planted."""

import pytest
import torch

from fewedges.errors import ProbeError
from fewedges.model import probes
from fewedges.model.anatomy import anatomy
from fewedges.model.attention import boolean_mask, dense_attention, register
from fewedges.model.probes import allowance, check
from fewedges.sparsify.attention.interface import GATED, GatePass, attach_, gated_forward
from tiny import SUPPORTED, tiny_model

PROBES = ["finite", "called", "causal", "padding", "decode", "dense_equal"]
ROUNDING = 4e-6  # measured: at most 1.1e-6 (Gemma 3), at logits of up to 2.7


def gated(name="llama", bias=0.0):
    model = tiny_model(name)
    found = anatomy(model)
    return attach_(model, found, bias_start=bias), found


def run_by(model, name, function, mask):
    """Switch the model to an attention function and a mask of our own making."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, mask)
    model.set_attn_implementation(name)


# -- all pass --------------------------------------------------------------------------------------------------


@pytest.mark.matches
@pytest.mark.parametrize("name", SUPPORTED)
def test_all_six_pass_on_a_dense_model(name):
    model = tiny_model(name)
    before = model.config._attn_implementation
    found = check(model, anatomy(model))
    assert list(found) == PROBES
    assert found.pop("called") == 2
    assert found.pop("causal") == 0  # the same additions in the same order
    assert max(found.values()) <= ROUNDING
    assert model.config._attn_implementation == before


@pytest.mark.matches
@pytest.mark.parametrize("name", SUPPORTED)
def test_all_six_pass_on_a_gated_model_with_its_gates_open(name):
    model, body = gated(name)
    found = check(model, body, options={"gate_pass": GatePass(open_all=True)}, calls=2)
    assert list(found) == PROBES
    assert found["causal"] == 0
    assert max(found[name] for name in ("padding", "decode", "dense_equal")) <= ROUNDING
    assert model.config._attn_implementation == GATED


@pytest.mark.matches
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_all_six_pass_in_half_precision(name):
    model = tiny_model(name).to(torch.bfloat16)
    found = check(model, anatomy(model))
    assert 0 < found["dense_equal"] <= 0.05  # measured: .020 to .029, 1 eps of logits of 2 to 4


@pytest.mark.matches
def test_hard_gates_fail_dense_equal_but_none_of_the_others():
    """Proof that closed gates are seen: what passes with gates open must not pass with them shut."""
    model, body = gated(bias=-0.5)
    with pytest.raises(ProbeError, match="probe dense_equal"):
        check(model, body, calls=2)


@pytest.mark.matches
def test_the_allowance_is_a_number_of_roundings_and_far_below_a_lost_mask():
    assert allowance(0.1, torch.float32) == 256 * 2**-23
    assert allowance(10.0, torch.float32) == 2560 * 2**-23
    assert allowance(10.0, torch.bfloat16) == 80 * 2**-7
    assert allowance(10.0, torch.float32) < 0.08 / 20  # the smallest change a lost mask made on 11 models


# -- each fails on its own fault -------------------------------------------------------------------------------


@pytest.mark.survives
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window"])
def test_causal_fails_when_no_mask_arrives(name):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def maskless(module, query, key, value, attention_mask, **kwargs):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **{**kwargs, "is_causal": False})

    model = tiny_model(name)
    body = anatomy(model)
    run_by(model, "test-maskless", maskless, lambda *_, **__: None)
    with pytest.raises(ProbeError, match="probe causal: logits differ by"):
        check(model, body)


@pytest.mark.survives
def test_causal_fails_when_the_mask_allows_everything():
    model = tiny_model("llama")
    body = anatomy(model)
    run_by(model, "test-all-true", dense_attention, lambda *args, **kwargs: boolean_mask(*args, **kwargs) | True)
    with pytest.raises(ProbeError, match="probe causal"):
        check(model, body)


@pytest.mark.survives
@pytest.mark.parametrize("mask", ["none", "all true"])
def test_a_gated_model_without_its_mask_is_never_run_as_if_all_were_well(mask, monkeypatch):
    from transformers import AttentionMaskInterface

    model, body = gated()
    masks = {"none": lambda *_, **__: None, "all true": lambda *args, **kwargs: boolean_mask(*args, **kwargs) | True}
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, GATED, masks[mask])
    found = {"none": "no mask arrived", "all true": "probe causal"}
    with pytest.raises(ProbeError, match=found[mask]):
        check(model, body, options={"gate_pass": GatePass(open_all=True)}, calls=2)


@pytest.mark.survives
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"]
)
def test_finite_fails_and_names_the_tensor(name, value):
    model = tiny_model("llama")
    body = anatomy(model)
    model.get_parameter(name).data.view(-1)[7] = value
    with pytest.raises(ProbeError, match=f"probe finite: {name} holds NaN or inf"):
        check(model, body)


@pytest.mark.survives
def test_finite_fails_on_a_nan_that_attention_on_a_cpu_hides():
    model = tiny_model("llama")
    body = anatomy(model)
    attention = model.model.layers[0].self_attn
    attention.q_proj.weight.data[:] = float("nan")
    with torch.no_grad():
        logits = model(input_ids=torch.arange(1, 9)[None]).logits
    assert torch.isfinite(logits).all(), "this machine hides no NaN: the test proves nothing here"
    with pytest.raises(ProbeError, match=r"layers\.0\.self_attn\.q_proj\.weight"):
        check(model, body)


@pytest.mark.survives
def test_finite_scans_buffers_too():
    model = tiny_model("llama")
    body = anatomy(model)
    model.model.rotary_emb.inv_freq[1] = float("inf")
    with pytest.raises(ProbeError, match=r"rotary_emb\.inv_freq"):
        check(model, body)


@pytest.mark.survives
def test_a_gate_bias_may_be_infinite_but_not_nan():
    model, body = gated(bias=torch.inf)
    open_all = {"options": {"gate_pass": GatePass(open_all=True)}, "calls": 2}
    assert check(model, body, **open_all)["finite"] == 0
    model.model.layers[1].self_attn.gate_bias.data[2] = float("nan")
    with pytest.raises(ProbeError, match=r"layers\.1\.self_attn\.gate_bias holds NaN"):
        check(model, body, **open_all)


@pytest.mark.survives
def test_called_fails_on_a_layer_that_stays_dense():
    """The layer gives the right logits, so only counting can notice that it would never be gated."""
    model = tiny_model("llama")
    body = anatomy(model)
    second = model.model.layers[1].self_attn
    before, through_interface = model(input_ids=torch.arange(9)[None]).logits, second.forward

    def hard_wired(*args, **kwargs):
        chosen, model.config._attn_implementation = model.config._attn_implementation, "sdpa"
        try:
            return through_interface(*args, **kwargs)
        finally:
            model.config._attn_implementation = chosen

    second.forward = hard_wired
    assert torch.equal(model(input_ids=torch.arange(9)[None]).logits, before)
    with pytest.raises(ProbeError, match="probe called: 1 of 2 layers"):
        check(model, body)


@pytest.mark.survives
@pytest.mark.parametrize("calls", [0, 1, 3])
def test_called_fails_when_a_gated_model_reports_another_number_of_layers(calls):
    model, body = gated()
    with pytest.raises(ProbeError, match=f"probe called: {calls} of 2"):
        check(model, body, options={"gate_pass": GatePass(open_all=True)}, calls=calls)


@pytest.mark.survives
def test_decode_fails_on_a_cache_that_is_off_by_one(monkeypatch):
    from transformers.cache_utils import DynamicLayer

    honest = DynamicLayer.update

    def off_by_one(self, key_states, value_states, *args, **kwargs):
        keys, values = honest(self, key_states, value_states, *args, **kwargs)
        return (keys, values) if keys.shape == key_states.shape else (keys, values.roll(1, dims=-2))

    model = tiny_model("llama")
    body = anatomy(model)
    monkeypatch.setattr(DynamicLayer, "update", off_by_one)
    with pytest.raises(ProbeError, match="probe decode"):
        check(model, body)


@pytest.mark.survives
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_decode_fails_on_positions_that_are_one_too_far(name):
    model = tiny_model(name)
    body, honest = anatomy(model), model.forward

    def one_too_far(*args, past_key_values=None, **kwargs):
        if past_key_values is not None:
            kwargs["position_ids"] = torch.tensor([[past_key_values.get_seq_length() + 1]])
        return honest(*args, past_key_values=past_key_values, **kwargs)

    model.forward = one_too_far
    with pytest.raises(ProbeError, match="probe decode"):
        check(model, body)


@pytest.mark.survives
def test_dense_equal_fails_on_an_additive_bias_in_attention():
    """A slope over the keys, as ALiBi has: causal, blind to padding, decodes well, yet more than softmax(q k) v."""

    def sloped(module, query, key, value, attention_mask, scaling=None, **_):
        scores = (query @ key.repeat_interleave(2, 1).transpose(-1, -2)) * scaling
        scores = scores + 0.3 * torch.arange(key.shape[-2])
        weights = scores.masked_fill(~attention_mask, -torch.inf).softmax(-1).nan_to_num(0.0)
        return (weights @ value.repeat_interleave(2, 1)).transpose(1, 2).contiguous(), None

    model = tiny_model("llama")
    body = anatomy(model)
    run_by(model, "test-sloped", sloped, boolean_mask)
    with pytest.raises(ProbeError, match="probe dense_equal"):
        check(model, body)


@pytest.mark.survives
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_padding_fails_when_padding_is_attended_to(name):
    def leaky(*args, attention_mask=None, **kwargs):
        return boolean_mask(*args, attention_mask=None, **kwargs)

    model = tiny_model(name)
    body = anatomy(model)
    run_by(model, "test-leaky", dense_attention, leaky)
    with pytest.raises(ProbeError, match="probe padding"):
        check(model, body)


@pytest.mark.survives
def test_a_failed_check_leaves_the_attention_implementation_alone():
    model, body = gated(bias=-0.5)
    with pytest.raises(ProbeError):
        check(model, body, calls=2)
    assert model.config._attn_implementation == GATED


@pytest.mark.survives
def test_logits_that_are_not_finite_fail_instead_of_comparing_as_equal():
    model = tiny_model("llama")
    body = anatomy(model)

    def broken(tokens, **_):
        return torch.full((*tokens.shape, 61), torch.nan)

    with torch.no_grad(), pytest.raises(ProbeError, match="differ by inf"):
        probes.causal(model, body, broken)


# -- the median over prompts -----------------------------------------------------------------------------------


@pytest.mark.stays
@pytest.mark.parametrize("faults", range(6))
def test_a_gate_that_flips_on_few_prompts_is_no_fault_one_on_most_is(faults):
    model = tiny_model("llama")
    body, seen = anatomy(model), []

    def flips(tokens):
        seen.append(tokens)
        jump = 1.0 if len(seen) <= 2 * faults and len(seen) % 2 else 0.0  # `causal` asks twice per prompt
        return torch.full((1, tokens.shape[1], 61), jump)

    with torch.no_grad():
        if faults < 3:
            assert probes.causal(model, body, flips) == 0
        else:
            with pytest.raises(ProbeError, match=r"differ by 1\.00e"):
                probes.causal(model, body, flips)
    assert len(seen) == 2 * probes.PROMPTS


@pytest.mark.reproduces
def test_probes_measure_the_same_twice():
    model = tiny_model("qwen3")
    body = anatomy(model)
    assert check(model, body) == check(model, body)


@pytest.mark.says
def test_a_registered_function_always_has_its_mask():
    from transformers import AttentionInterface, AttentionMaskInterface

    register("test-registered", gated_forward)
    assert AttentionInterface()["test-registered"] is gated_forward
    assert AttentionMaskInterface()["test-registered"] is boolean_mask
