"""Anatomies against tables written by hand, family by family, and the families that are refused."""

import pytest
import torch

from fewedges.errors import ModelError, ProbeError
from fewedges.model.anatomy import anatomy, example_tokens, plain
from fewedges.model.attention import attention_by
from fewedges.model.probes import check
from tiny import SUPPORTED, TINY, configs, tiny_model

LLAMA = ("model.layers.{}.self_attn", ("q_proj", "k_proj", "v_proj"), ("o_proj",))
PATHS = {
    "phi3": ("model.layers.{}.self_attn", ("qkv_proj",), ("o_proj",)),
    "gpt2": ("transformer.h.{}.attn", ("c_attn",), ("c_proj",)),
    "gpt-neox": ("gpt_neox.layers.{}.attention", ("query_key_value",), ("dense",)),
    "opt": ("model.decoder.layers.{}.self_attn", ("q_proj", "k_proj", "v_proj"), ("out_proj",)),
}  # everything else is named as in Llama
KV_HEADS = {"llama-gqa-4-to-1": 1, "gpt2": 4, "gpt-neox": 4, "opt": 4}  # everything else 2 of 4
WINDOWS = {"mistral-window": (4, 4), "gemma2": (4, None), "gemma3": (4, 4)}  # Gemma 3: every sixth layer is global
SOFTCAPS = {"gemma2": 50.0}
SCALINGS = {"opt": 1.0}  # OPT scales its queries itself; everything else 1 / sqrt(8)
TIED = {"llama-tied", "gemma2", "gemma3", "gpt2", "opt"}
FAMILIES = {"llama-gqa-4-to-1": "llama", "llama-tied": "llama", "mistral-window": "mistral"}
FAMILIES |= {"gemma3": "gemma3_text", "gpt-neox": "gpt_neox"}


@pytest.mark.matches
@pytest.mark.parametrize("name", SUPPORTED)
def test_readers_and_writers_are_those_of_the_table(name):
    module, readers, writers = PATHS.get(name, LLAMA)
    for index, layer in enumerate(anatomy(tiny_model(name)).layers):
        at = module.format(index)
        assert (layer.index, layer.module) == (index, at)
        assert sorted(layer.readers) == sorted(f"{at}.{reader}" for reader in readers)
        assert layer.writers == tuple(f"{at}.{writer}" for writer in writers)


@pytest.mark.matches
@pytest.mark.parametrize("name", SUPPORTED)
def test_heads_widths_windows_and_softcaps_are_those_of_the_table(name):
    found = anatomy(tiny_model(name))
    assert len(found.layers) == 2
    assert {(layer.heads, layer.kv_heads, layer.width) for layer in found.layers} == {(4, KV_HEADS.get(name, 2), 8)}
    assert tuple(layer.window for layer in found.layers) == WINDOWS.get(name, (None, None))
    assert {layer.softcap for layer in found.layers} == {SOFTCAPS.get(name)}
    assert {layer.scaling for layer in found.layers} == {SCALINGS.get(name, 8**-0.5)}
    assert found.heads == 4


@pytest.mark.matches
@pytest.mark.parametrize("name", SUPPORTED)
def test_the_whole_model_is_described(name):
    model = tiny_model(name)
    found = anatomy(model)
    assert (found.family, found.width, found.vocabulary) == (FAMILIES.get(name, name), 32, 61)
    assert found.positions == 64
    assert found.tied == (name in TIED)
    assert found.parameters == sum(tensor.numel() for tensor in {id(p): p for p in model.parameters()}.values())


@pytest.mark.matches
def test_the_table_names_every_supported_architecture():
    assert list(configs()) == list(SUPPORTED)


@pytest.mark.matches
def test_a_scaling_of_its_own_is_seen():
    import transformers as tf

    model = tf.GraniteForCausalLM(tf.GraniteConfig(**TINY, attention_multiplier=0.25))
    assert {layer.scaling for layer in anatomy(model).layers} == {0.25}


@pytest.mark.matches
def test_modules_are_found_through_a_peft_wrapper():
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    found = anatomy(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    assert plain(wrapped) is model
    assert found.modules(wrapped) == [layer.self_attn for layer in model.model.layers]


# -- models that are refused -----------------------------------------------------------------------------------


def refused_configs():
    """One tiny config of every family that cannot be gated, with the class that is asked for."""
    import transformers as tf

    tiny = {"vocab_size": 61, "hidden_size": 32}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    bert = {**tiny, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    moe = {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "rope_parameters": {"rope_type": "default"}}
    neo = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    t5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    gptj = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4}
    return {
        "bloom": (tf.BloomForCausalLM, tf.BloomConfig(**tiny, **ends, n_layer=2, n_head=4)),
        "gpt-neo": (tf.GPTNeoForCausalLM, tf.GPTNeoConfig(**tiny, **ends, **neo, max_position_embeddings=64)),
        "gpt-j": (tf.GPTJForCausalLM, tf.GPTJConfig(vocab_size=61, **ends, **gptj)),
        "falcon": (tf.FalconForCausalLM, tf.FalconConfig(**tiny, **ends, num_hidden_layers=2, num_attention_heads=4)),
        "t5": (tf.T5ForConditionalGeneration, tf.T5Config(vocab_size=61, **t5)),
        "bert": (tf.BertForMaskedLM, tf.BertConfig(**bert)),
        "bert-without-head": (tf.BertModel, tf.BertConfig(**bert)),
        "mamba": (tf.MambaForCausalLM, tf.MambaConfig(**tiny, **ends, num_hidden_layers=2, state_size=4)),
        "gpt-oss": (tf.GptOssForCausalLM, tf.GptOssConfig(**TINY, **moe)),
    }


REFUSED = {
    "bloom": "the attention of Bloom.*hard-wired.*would stay dense.*Llama, Mistral",
    "gpt-neo": "hard-wired.*would stay dense.*Llama, Mistral",
    "gpt-j": "hard-wired.*would stay dense.*Llama, Mistral",
    "falcon": "hard-wired.*would stay dense.*Llama, Mistral",
    "t5": "encoder-decoder.*decoder-only",
    "bert": "not a causal decoder",
    "bert-without-head": "no language-model head.*ForCausalLM",
    "mamba": "no attention heads.*softmax attention",
    "gpt-oss": "takes s_aux.*without attention sinks",
}


def state_of(model):
    """Everything that a refusal must leave as it was."""
    tokens = {"input_ids": example_tokens(61)}
    if model.config.is_encoder_decoder:
        tokens["decoder_input_ids"] = tokens["input_ids"]
    with torch.no_grad():
        output = model(**tokens)[0].clone()
    parameters = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.named_parameters()}
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    return model.config._attn_implementation, output, parameters, hooks


@pytest.mark.survives
@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_gated_is_refused_untouched(name):
    kind, config = refused_configs()[name]
    torch.manual_seed(0)
    model = kind(config).eval().requires_grad_(False)
    before = state_of(model)
    with pytest.raises(ModelError, match=REFUSED[name]) as caught:
        check(model, anatomy(model))
    assert caught.value.hint
    after = state_of(model)
    assert after[0] == before[0]
    assert torch.equal(after[1], before[1])
    assert after[2].keys() == before[2].keys()
    for name, (address, values) in before[2].items():
        assert address == after[2][name][0]
        assert torch.equal(values, after[2][name][1])
    assert after[3] == before[3]


@pytest.mark.survives
def test_a_masked_model_is_refused_by_a_probe_not_by_its_name():
    kind, config = refused_configs()["bert"]
    torch.manual_seed(0)
    model = kind(config).eval()
    with pytest.raises(ProbeError, match="probe causal"):
        check(model, anatomy(model))


@pytest.mark.survives
def test_a_layer_that_bypasses_the_interface_is_refused():
    model = tiny_model("llama")
    second = model.model.layers[1].self_attn
    second.forward = lambda hidden_states, **_: (second.o_proj(hidden_states), None)
    with pytest.raises(ModelError, match="1 calls of the attention interface for 2 layers"):
        anatomy(model)


@pytest.mark.survives
def test_the_attention_implementation_comes_back_after_an_error():
    model = tiny_model("llama")
    before = model.config._attn_implementation
    inside = []

    def fails():
        with attention_by(model, "eager"):
            inside.append(model.config._attn_implementation)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert inside == ["eager"]
    assert model.config._attn_implementation == before


@pytest.mark.reproduces
@pytest.mark.parametrize("name", SUPPORTED)
def test_looking_changes_nothing_and_sees_the_same_twice(name):
    model = tiny_model(name)
    before = state_of(model)
    assert anatomy(model) == anatomy(model)
    after = state_of(model)
    assert after[0] == before[0]
    assert torch.equal(after[1], before[1])
    assert after[3] == before[3]


@pytest.mark.says
def test_an_anatomy_prints_what_a_reader_asks_first():
    text = str(anatomy(tiny_model("gemma2")))
    rows = {line[:24].strip(): line[24:] for line in text.splitlines()}
    assert rows["L layers"] == "2"
    assert rows["H heads"] == "4 (2 key/value)"
    assert rows["V vocabulary"] == "61, tied"
    assert rows["sliding windows"] == "4"
    assert rows["softcap"] == "50.0"
    assert rows["readers"] == "q_proj, k_proj, v_proj"
    assert rows["parameters"] == "17,600"
