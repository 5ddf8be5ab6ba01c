"""A pruned model on disk: saved, loaded, exported to plain transformers, and every lost zero noticed."""

import copy
import json
import shutil

import pytest
import torch
import transformers

import fewedges as fe
from fewedges import store
from fewedges.data.addition import Sums
from fewedges.errors import ModelError, StoreError
from fewedges.sparsify import masks
from fewedges.sparsify.matrices import matrices_of
from fewedges.sparsify.pruned import begin, load_pruned
from fewedges.sparsify.pruning import prune_
from fewedges.sparsify.quantizing import quantize_
from fewedges.weight_recipes import Prune, Quantize
from tiny import NoiseBatches, tiny_loaded

RECIPES = {
    "wanda": [Prune(method="wanda", structure="2:4", calibration_windows=8)],
    "sparsegpt": [Prune(method="sparsegpt", density=0.6, calibration_windows=8)],
    "joint": [Prune(method="sparsegpt", structure="2:4", bits=4, group_size=32, calibration_windows=8)],
    "prune-then-round": [Prune(method="magnitude", density=0.3), Quantize(bits=8)],
    "round": [Quantize(bits=4)],
    "blocks": [Prune(method="sparsegpt", structure="8x8", density=0.25, calibration_windows=8)],
    "channel": [Prune(method="magnitude", structure="channel", density=0.5), Prune(method="magnitude", density=0.5)],
}


def made(addition, name):
    result = begin(fe.Loaded(**{**vars(addition), "model": copy.deepcopy(addition.model)}))
    for recipe in RECIPES[name]:
        result = quantize_(result, recipe) if isinstance(recipe, Quantize) else prune_(result, recipe, Sums())
    return result


def same(a, b):
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.reproduces
@pytest.mark.parametrize("name", RECIPES)
def test_what_is_loaded_is_what_was_saved(addition, tmp_path, name):
    result = made(addition, name)
    again = load_pruned(result.save(tmp_path / "run"))
    assert same(result.model, again.model)
    assert again.stages == tuple(RECIPES[name])
    assert again.data == json.loads(json.dumps(result.data))
    assert again.masks.nnz == result.masks.nnz
    assert again.masks.kinds() == result.masks.kinds()
    assert {row["name"]: row for row in again.rows()} == {row["name"]: row for row in result.rows()}
    assert str(again) == str(result)
    assert {n: r.bits for n, r in again.rounded.items()} == {n: r.bits for n, r in result.rounded.items()}
    twice = load_pruned(again.save(tmp_path / "again"))
    assert same(result.model, twice.model)


@pytest.mark.stays
def test_a_saved_folder_is_as_small_as_what_is_kept(addition, tmp_path):
    sizes = {}
    for name in ("wanda", "joint"):
        folder = made(addition, name).save(tmp_path / name)
        sizes[name] = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    matrices = sum(m.parameter.numel() for m in matrices_of(addition).values())
    assert sizes["wanda"] < matrices * (4 / 2 + 1 / 8) + 8192  # half the values, a bit an entry, headers
    assert sizes["joint"] < matrices * (0.5 + 1 / 8 + 4 / 32) + 16384  # 4-bit codes, a bit an entry, a scale per 32


@pytest.mark.matches
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gemma2", "phi3"])
def test_the_export_is_an_ordinary_checkpoint_with_identical_logits(tmp_path, name):
    loaded = tiny_loaded(name)
    result = prune_(loaded, Prune(structure="2:4", calibration_windows=4, context_length=12), NoiseBatches())
    result.export(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    plain.set_attn_implementation(loaded.model.config._attn_implementation)
    given = NoiseBatches().at(9, 2).tokens
    assert torch.equal(plain(given).logits, loaded.model(given).logits)
    result.masks.check(plain)
    tied = plain.get_input_embeddings().weight is plain.get_output_embeddings().weight
    assert tied == (name in ("llama-tied", "gpt2", "gemma2"))
    assert torch.equal(plain.get_input_embeddings().weight, tiny_loaded(name).model.get_input_embeddings().weight)


@pytest.mark.matches
def test_a_shrunk_model_exports_too(tmp_path):
    for kind in ("head", "channel"):
        result = prune_(tiny_loaded("qwen2"), Prune(method="magnitude", structure=kind))
        result.export(tmp_path / kind)
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / kind, dtype=torch.float32)
        given = NoiseBatches().at(9, 2).tokens
        assert torch.equal(plain(given).logits, result.model(given).logits)


@pytest.mark.stays
def test_what_else_was_trained_is_saved_too(addition, tmp_path):
    result = made(addition, "wanda")
    with torch.no_grad():
        result.model.transformer.ln_f.weight.mul_(1.5)
        for path, matrix in result.masks.matrices(result.model).items():
            matrix.weight.add_(0.01 * result.masks.patterns[path].mask())
    assert same(load_pruned(result.save(tmp_path)).model, result.model)


@pytest.mark.survives
@pytest.mark.parametrize("how", ["save", "export"])
def test_a_lost_zero_cannot_be_saved(addition, tmp_path, how):
    result = made(addition, "wanda")
    next(iter(result.masks.matrices(result.model).values())).weight.add_(1e-3)
    with pytest.raises(ModelError, match="zeros of 1 matrices are lost"):
        getattr(result, how)(str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.survives
def test_another_base_or_a_damaged_folder_is_refused(addition, tmp_path, monkeypatch):
    folder = made(addition, "wanda").save(tmp_path / "run")
    other = copy.deepcopy(addition)
    other.model.transformer.ln_f.weight.data.mul_(2)
    with monkeypatch.context() as patch:
        patch.setattr("fewedges.sparsify.pruned.load_dense", lambda *_, **__: other)
        with pytest.raises(StoreError, match="other weights"):
            load_pruned(folder)
    saved = store.load(folder)
    tensors = dict(saved.tensors)
    tensors["values"] = {name: value[:-1] for name, value in tensors["values"].items()}
    store.save(folder, saved.kind, tensors, saved.facts)
    with pytest.raises(StoreError, match="do not fit"):
        load_pruned(folder)
    store.save(folder, "something-else", {}, {})
    with pytest.raises(StoreError, match="not 'sparse-weights'"):
        load_pruned(folder)


@pytest.mark.stays
def test_a_run_saved_before_kinds_were_kept_is_read_and_a_mask_of_another_kind_is_not(addition, tmp_path):
    result = made(addition, "wanda")
    folder = result.save(tmp_path)
    saved = store.load(folder)
    kinds = saved.facts.pop("kinds")
    assert set(kinds.values()) == {"2:4"}
    store.save(folder, saved.kind, saved.tensors, saved.facts)
    old = load_pruned(folder)
    assert same(old.model, result.model)
    assert set(old.masks.kinds().values()) == {"unstructured"}
    for wrong in ("1:4", "8x8", "dense"):
        store.save(folder, saved.kind, saved.tensors, {**saved.facts, "kinds": {**kinds, next(iter(kinds)): wrong}})
        with pytest.raises(StoreError, match="load the mask of transformer"):
            load_pruned(folder)


@pytest.mark.survives
@pytest.mark.parametrize("how", ["save", "export", "push_to_hub"])
def test_with_adapters_on_nothing_is_saved_or_measured(addition, tmp_path, how):
    from peft import LoraConfig, get_peft_model

    result = made(addition, "wanda")
    adapted = get_peft_model(result.model, LoraConfig(r=2, fan_in_fan_out=True, target_modules=["c_attn"]))
    with pytest.raises(ModelError, match=r"carries adapters.*sparsify.masks.merge_masked\(adapted, pruned.masks\)"):
        getattr(result, how)(str(tmp_path / "run"))
    with pytest.raises(ModelError, match="carries adapters"):
        fe.measure(result)
    assert not (tmp_path / "run").exists()
    masks.merge_masked(adapted, result.masks)
    assert same(load_pruned(result.save(tmp_path / "run")).model, result.model)
    whole = made(addition, "round")  # no mask to lose
    get_peft_model(whole.model, LoraConfig(r=2, fan_in_fan_out=True, target_modules=["c_attn"]))
    with pytest.raises(ModelError, match="carries adapters"):
        getattr(whole, how)(str(tmp_path / "whole"))


@pytest.mark.survives
@pytest.mark.parametrize("how", ["save", "export", "push_to_hub", "measure"])
def test_zeros_lost_in_a_dense_merge_are_noticed_wherever_the_result_leaves(addition, tmp_path, how):
    from peft import LoraConfig, get_peft_model

    result = made(addition, "wanda")
    options = {"fan_in_fan_out": True, "target_modules": ["c_attn"], "init_lora_weights": False}
    get_peft_model(result.model, LoraConfig(r=2, **options)).merge_and_unload()
    with pytest.raises(ModelError, match="zeros of 4 matrices are lost"):
        fe.measure(result) if how == "measure" else getattr(result, how)(str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.stays
@pytest.mark.parametrize("name", ["wanda", "blocks", "channel"])
def test_what_is_pushed_loads_in_plain_transformers_and_as_the_result_that_it_is(addition, tmp_path, monkeypatch, name):
    import huggingface_hub

    calls, hub = [], tmp_path / "hub"

    class Hub:
        def create_repo(self, repository, **options):
            calls.append((repository, options))

        def upload_folder(self, *, repo_id, folder_path):
            calls.append(repo_id)
            shutil.copytree(folder_path, hub)
            return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    result, given = made(addition, name), Sums().at(9, 4).tokens
    assert result.push_to_hub("me/pruned") == "https://huggingface.co/me/pruned"
    assert calls == [("me/pruned", {"private": True, "exist_ok": True}), "me/pruned"]
    plain = transformers.AutoModelForCausalLM.from_pretrained(hub, dtype=torch.float32)
    assert torch.equal(plain(given).logits, result.model(given).logits)
    result.masks.check(plain)
    again = fe.load(hub)
    assert isinstance(again, fe.Pruned)
    assert same(again.model, result.model)
    assert again.masks.kinds() == result.masks.kinds()
    assert all(torch.equal(again.masks.patterns[n].mask(), p.mask()) for n, p in result.masks.patterns.items())
    assert str(again) == str(result)


@pytest.mark.stays
def test_a_row_for_every_matrix_adds_up(addition):
    result = made(addition, "wanda")
    rows = result.rows()
    assert sum(row["nnz"] for row in rows) == result.masks.nnz
    assert {row["density"] for row in rows} == {0.5}
    assert all(row["cover(16)"] == 1 for row in rows)
    bytes_ = sum(row["bytes"] for row in rows)
    assert bytes_ == sum(row["parameters"] * 4 * 17 // 32 for row in rows)  # half the values, 2 bits for each kept


@pytest.mark.says
def test_a_result_says_what_it_is(addition):
    assert str(made(addition, "prune-then-round")) == (
        "addition: prune, then quantize; density 0.3000 of 196,608 weights, 8 bits"
    )
    assert str(begin(addition)) == "addition: untouched"
    shrunk = prune_(addition, Prune(method="magnitude", structure="channel"))  # makes a smaller one, this is left alone
    assert str(shrunk) == "addition: prune; n_inner 128"
    assert made(addition, "wanda")._repr_html_().startswith("<pre>addition: prune")
