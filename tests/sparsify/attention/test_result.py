"""Sparse models on disk: what is loaded is what was saved, on the base it was trained from, and never by mistake."""

import dataclasses
import filecmp
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import fewedges as fe
from fewedges import store
from fewedges.data.addition import Sums, tokenizer
from fewedges.errors import FewedgesError, ModelError, RecipeError, StoreError
from fewedges.model.attention import allowed_keys, attention_by, register
from fewedges.recipes import SparseAttention
from fewedges.sparsify.attending import attend_, attending
from fewedges.sparsify.attention import result
from fewedges.sparsify.attention.card import model_card
from fewedges.sparsify.attention.interface import gate_biases, gate_queries, is_gated
from fewedges.sparsify.attention.result import Sparse, gates_only, origin, save_control, training_data
from fewedges.sparsify.fixed_attention import Local
from tiny import NoiseBatches, tiny_loaded, tiny_model

TOKENS = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(9))


def recipe(**changes):
    settings = {"steps": 2, "batch_size": 4, "context_length": 12, "log_every": 1, "lora_rank": 2, "warmup_steps": 0}
    return SparseAttention(**(settings | {"learning_rate": 1e-2, "bias_learning_rate": 0.3} | changes))


def base_folder(folder, name="llama", seed=0):
    tiny_model(name, seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of tiny dense models with a tokenizer, as users have them."""
    return {name: base_folder(tmp_path_factory.mktemp("base") / name, name) for name in ("llama", "gpt2", "olmo")}


@pytest.fixture(scope="module")
def run(bases, tmp_path_factory):
    """A saved run with its control, and the Sparse that was saved; read only."""
    folder = tmp_path_factory.mktemp("run") / "sparse"
    dense = fe.load(bases["llama"])
    return folder, fe.sparsify(dense, recipe(), data=NoiseBatches(), out=folder, control=True)


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS, use_cache=False).logits


# -- save and load ---------------------------------------------------------------------------------------------


@pytest.mark.reproduces
@pytest.mark.parametrize("bias", ["learned", "constant"])
@pytest.mark.parametrize("train", ["full", "attention", "lora"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_saved_model_comes_back_with_the_same_logits(bases, tmp_path, monkeypatch, name, train, bias):
    dense = fe.load(bases[name])
    sparse = fe.sparsify(dense, recipe(train=train, bias=bias, bias_start=0.25), data=NoiseBatches())
    sparse.save(tmp_path)
    probed = []
    check = result.check
    monkeypatch.setattr(result, "check", lambda *a, **k: probed.append(check(*a, **k)) or probed[-1])
    loaded = fe.load(tmp_path)
    assert isinstance(loaded, Sparse)
    assert torch.equal(logits(loaded.model), logits(sparse.model))
    assert torch.equal(logits(loaded.dense.model), logits(dense.model))
    assert not torch.equal(logits(loaded.model), logits(dense.model))
    assert len(probed) == 1
    assert set(probed[0]) == {"finite", "called", "causal", "padding", "decode", "dense_equal"}
    biases = gate_biases(loaded.model, dense.anatomy)
    assert torch.equal(biases, gate_biases(sparse.model, dense.anatomy))
    assert (biases == 0.25).all() == (bias == "constant")
    assert (loaded.recipe, loaded.data, loaded.finished) == (sparse.recipe, sparse.data, True)
    assert loaded.records == sparse.records
    assert loaded.tokenizer.get_vocab() == dense.tokenizer.get_vocab()


@pytest.mark.reproduces
@pytest.mark.parametrize("choices", [{}, {"precision": "bf16"}, {"saved": "bfloat16"}], ids=str)
@pytest.mark.parametrize("train", ["full", "attention", "lora"])
def test_gate_queries_come_back_as_they_were_trained(bases, tmp_path, train, choices):
    dense = fe.load(bases["llama"], probes=False)
    sparse = fe.sparsify(dense, recipe(train=train, gate_query=True, **choices), data=NoiseBatches())
    sparse.save(tmp_path)
    queries = gate_queries(sparse.model, dense.anatomy)
    assert (queries.dtype, queries.shape) == (torch.float32, (2, 4, 8))
    assert (queries != 0).all()
    body = load_file(next(tmp_path.glob("gates-*")))
    assert {name: (x.dtype, tuple(x.shape)) for name, x in body.items()} == {
        "bias": (torch.float32, (2, 4)),
        "query": (torch.float32, (2, 4, 8)),
    }
    assert not any("gate_query" in name for name in load_file(next(tmp_path.glob("weights-*"))))
    loaded = fe.load(tmp_path)
    assert torch.equal(gate_queries(loaded.model, dense.anatomy), queries)
    assert torch.equal(logits(loaded.model), logits(sparse.model))
    for module in dense.anatomy.modules(sparse.model):
        module.gate_query.data.zero_()
    assert not torch.equal(logits(loaded.model), logits(sparse.model))


OLDER = ("gate_query", "target_edges", "compiled")  # fields that recipes before gate queries do not name


@pytest.mark.reproduces
def test_a_run_saved_before_there_were_gate_queries_still_loads(moved):
    folder, _ = moved
    sparse = fe.load(folder)
    stored = store.load(folder)
    assert list(stored.tensors["gates"]) == ["bias"]
    known = {name: value for name, value in stored.facts["recipe"].items() if name not in OLDER}
    assert len(known) == len(stored.facts["recipe"]) - len(OLDER)
    store.save(folder, stored.kind, stored.tensors, stored.facts | {"recipe": known})
    loaded = fe.load(folder)
    assert gate_queries(loaded.model, loaded.dense.anatomy) is None
    assert torch.equal(logits(loaded.model), logits(sparse.model))
    assert loaded.recipe == sparse.recipe


@pytest.mark.reproduces
@pytest.mark.parametrize("train", ["full", "attention", "lora"])
def test_a_run_with_gate_queries_starts_from_a_loaded_one_without(bases, tmp_path, train):
    """The step at 1e-9 moves what there was by nothing to see; Adam's first step moves each new number by its rate."""
    dense, still = fe.load(bases["llama"], probes=False), {"learning_rate": 1e-9, "bias_learning_rate": 1e-9}
    fe.sparsify(dense, recipe(train=train), data=NoiseBatches(), control=True).save(tmp_path / "old")
    old = fe.load(tmp_path / "old", probes=False)
    settings = recipe(train=train, gate_query=True, steps=1, **still)
    new = fe.sparsify(old, settings, data=NoiseBatches(), control=True, out=tmp_path / "new")
    queries = gate_queries(new.model, dense.anatomy)
    assert 0 < queries.abs().max() < 1.1e-9
    for name in ("loaded", "control"):
        before, after = (getattr(sparse, name).model for sparse in (old, new))
        torch.testing.assert_close(logits(after), logits(before), atol=NOTHING, rtol=0)
    again = fe.load(tmp_path / "new")
    assert torch.equal(gate_queries(again.model, dense.anatomy), queries)
    third = fe.sparsify(again, recipe(train=train, gate_query=True, steps=1), data=NoiseBatches())
    assert gate_queries(third.model, dense.anatomy).abs().max() > 1e-3
    with pytest.raises(RecipeError, match=r"gate_query is trained in one of them only"):
        fe.sparsify(again, recipe(train=train, steps=1), data=NoiseBatches())


NOTHING = 5e-6  # one step at 1e-9; measured 1.3e-6


@pytest.mark.reproduces
@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_model_saved_in_bfloat16_comes_back_rounded_once(bases, tmp_path, train):
    sparse = fe.sparsify(fe.load(bases["llama"]), recipe(saved="bfloat16", train=train), data=NoiseBatches())
    sparse.save(tmp_path / "one")
    loaded = fe.load(tmp_path / "one")
    body = load_file(next((tmp_path / "one").glob("weights-*")))
    assert {x.dtype for x in body.values()} == {torch.bfloat16}
    trained = dict(sparse.model.named_parameters())
    back = dict(loaded.model.named_parameters())
    assert all(torch.equal(back[name], trained[name].bfloat16().float()) for name in body)
    assert torch.equal(gate_biases(loaded.model, loaded.dense.anatomy), gate_biases(sparse.model, sparse.dense.anatomy))
    loaded.save(tmp_path / "two")
    assert store.read_manifest(tmp_path / "two")["files"] == store.read_manifest(tmp_path / "one")["files"]


@pytest.mark.reproduces
@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_model_saved_in_int8_comes_back_as_it_was_returned(bases, tmp_path, train):
    dense = fe.load(bases["llama"])
    sparse = fe.sparsify(
        dense, recipe(saved="int8", train=train), data=NoiseBatches(), out=tmp_path / "one", control=True
    )
    loaded = fe.load(tmp_path / "one")
    assert torch.equal(logits(loaded.model), logits(sparse.model))
    assert torch.equal(logits(loaded.control.model), logits(sparse.control.model))
    for part in ("one", "one/control"):
        body = load_file(next((tmp_path / part).glob("weights-*")))
        assert torch.int8 in {x.dtype for x in body.values()}
    loaded.save(tmp_path / "two")
    assert store.read_manifest(tmp_path / "two")["files"] == store.read_manifest(tmp_path / "one")["files"]


@pytest.mark.reproduces
@pytest.mark.parametrize("train", ["full", "attention", "lora"])
def test_a_bf16_run_is_trained_beside_and_saved_on_the_float32_base(bases, tmp_path, train):
    dense = fe.load(bases["gpt2"])
    sparse = fe.sparsify(dense, recipe(precision="bf16", train=train), data=NoiseBatches(), out=tmp_path)
    assert {p.dtype for p in sparse.model.parameters()} == {torch.float32}
    assert torch.equal(logits(fe.load(tmp_path).model), logits(sparse.model))


@pytest.mark.survives
@pytest.mark.parametrize("train", ["full", "attention", "lora"])
def test_a_run_can_be_loaded_in_bfloat16(bases, tmp_path, train):
    sparse = fe.sparsify(
        fe.load(bases["llama"]),
        recipe(train=train, precision="bf16", gate_query=True),
        data=NoiseBatches(),
        out=tmp_path,
    )
    gates = ("gate_bias", "gate_query")
    for dtype in ("bfloat16", torch.bfloat16):
        half = fe.load(tmp_path, dtype=dtype)
        kinds = {name: p.dtype for name, p in half.model.named_parameters()}
        assert {kind for name, kind in kinds.items() if not name.endswith(gates)} == {torch.bfloat16}
        assert {kind for name, kind in kinds.items() if name.endswith(gates)} == {torch.float32}
        assert logits(half.model).dtype == torch.bfloat16
    assert torch.equal(gate_biases(half.model, half.dense.anatomy), gate_biases(sparse.model, sparse.dense.anatomy))
    assert torch.equal(gate_queries(half.model, half.dense.anatomy), gate_queries(sparse.model, sparse.dense.anatomy))


@pytest.mark.survives
@pytest.mark.parametrize(
    ("dtype", "choices"),
    [
        ("bfloat16", {}),
        ("bfloat16", {"precision": "bf16"}),
        ("bfloat16", {"precision": "bf16", "train": "attention"}),
        ("bfloat16", {"train": "lora"}),
        ("float16", {"precision": "bf16", "train": "lora"}),
    ],
    ids=str,
)
def test_weights_in_half_precision_are_refused_before_training(bases, tmp_path, dtype, choices):
    dense = fe.load(bases["llama"], dtype=dtype, probes=False)
    with pytest.raises(ModelError, match=rf"{dtype} in memory.*train=lora and precision=bf16"):
        fe.sparsify(dense, recipe(**choices), data=NoiseBatches(), out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.reproduces
@pytest.mark.parametrize("gate_query", [False, True], ids=["bias", "gate query"])
def test_adapters_train_on_a_base_that_is_bfloat16_in_memory(bases, tmp_path, gate_query):
    """As on a bfloat16 copy of the float32 base: the same steps, one copy of the weights, the same file."""
    settings = recipe(train="lora", precision="bf16", gate_query=gate_query, saved="bfloat16")
    half, full = (fe.load(bases["llama"], dtype=dtype, probes=False) for dtype in ("bfloat16", "float32"))
    before = {name: x.clone() for name, x in half.model.state_dict().items()}
    sparse = fe.sparsify(half, settings, data=NoiseBatches(), out=tmp_path / "half", control=True)
    beside = fe.sparsify(full, settings, data=NoiseBatches(), out=tmp_path / "full", control=True)
    clock = ("seconds", "tokens_per_second")
    mine, theirs = ([{k: v for k, v in r.items() if k not in clock} for r in s.records] for s in (sparse, beside))
    assert mine == theirs
    for part in ("", "control"):
        files = [store.read_manifest(tmp_path / run / part)["files"] for run in ("half", "full")]
        assert files[0] == files[1]
    assert all(torch.equal(x, before[name]) for name, x in half.model.state_dict().items())
    frozen = {p.data_ptr() for p in half.model.parameters()}
    assert len(frozen & {p.data_ptr() for p in sparse.model.parameters()}) == len(frozen)
    assert gate_biases(sparse.model, half.anatomy).dtype == torch.float32
    assert logits(sparse.model).dtype == logits(sparse.control.model).dtype == torch.bfloat16
    loaded = fe.load(tmp_path / "half", dtype="bfloat16")
    assert torch.equal(logits(loaded.model), logits(sparse.model))
    assert torch.equal(logits(loaded.control.model), logits(sparse.control.model))
    assert not torch.equal(logits(loaded.model), logits(half.model))


@pytest.mark.stays
def test_a_lora_save_holds_adapters_only(bases, tmp_path):
    dense = fe.load(bases["llama"])
    sparse = fe.sparsify(dense, recipe(train="lora"), data=NoiseBatches())
    sparse.save(tmp_path)
    body = load_file(next(tmp_path.glob("weights-*")))
    assert body
    assert all("lora_A" in name or "lora_B" in name for name in body)
    matrices = [m for m in dense.model.modules() if isinstance(m, torch.nn.Linear) and m is not dense.model.lm_head]
    wanted = sum(2 * (m.in_features + m.out_features) for m in matrices)  # rank 2
    assert sum(x.numel() for x in body.values()) == wanted
    full = fe.sparsify(dense, recipe(), data=NoiseBatches()).save(tmp_path / "full")
    assert next(tmp_path.glob("weights-*")).stat().st_size < 0.4 * next(full.glob("weights-*")).stat().st_size
    assert not list(tmp_path.glob("*.bin")) + list(tmp_path.glob("*.pt"))


@pytest.mark.reproduces
def test_the_control_is_saved_and_loaded_beside_the_sparse_model(run):
    folder, sparse = run
    loaded = fe.load(folder)
    assert torch.equal(logits(loaded.control.model), logits(sparse.control.model))
    assert not is_gated(loaded.control.model)
    assert is_gated(loaded.model)
    assert not torch.equal(logits(loaded.control.model), logits(loaded.dense.model))
    assert store.load(folder / "control", "dense-control").facts["recipe"]["steps"] == 2


@pytest.mark.reproduces
def test_results_and_a_pause_are_remembered(run, tmp_path):
    _, sparse = run
    changed = dataclasses.replace(sparse, results={"sparse": {"kl": 0.25}}, finished=False, control=None)
    changed.save(tmp_path)
    loaded = fe.load(tmp_path, probes=False)
    assert (loaded.results, loaded.finished, loaded.control) == ({"sparse": {"kl": 0.25}}, False, None)
    assert "(paused)" in str(loaded)


@pytest.mark.reproduces
def test_a_run_with_out_is_saved_there_and_the_same_call_returns_it(bases, run):
    folder, sparse = run
    before = store.read_manifest(folder)["files"]
    again = fe.sparsify(fe.load(bases["llama"]), recipe(), data=NoiseBatches(), out=folder, control=True)
    assert store.read_manifest(folder)["files"] == before
    assert torch.equal(logits(again.model), logits(sparse.model))
    assert again.records == sparse.records
    assert torch.equal(logits(again.control.model), logits(sparse.control.model))


@pytest.mark.stays
def test_a_paused_run_trains_no_control_yet(bases, tmp_path):
    dense, steps = fe.load(bases["llama"]), []
    for _ in range(4):
        sparse = fe.sparsify(dense, recipe(), data=NoiseBatches(), out=tmp_path, control=True, pause_minutes=0.0)
        steps.append((sparse.finished, sparse.control is not None))
    assert steps == [(False, False), (False, True), (True, True), (True, True)]


# -- what must not be loaded -----------------------------------------------------------------------------------


@pytest.fixture
def moved(run, bases, tmp_path):
    """A copy of the run whose base is a copy too, both to be broken."""
    base = shutil.copytree(bases["llama"], tmp_path / "base")
    dense = fe.load(base)
    folder = tmp_path / "run"
    fe.sparsify(dense, recipe(steps=1), data=NoiseBatches()).save(folder)
    return folder, base


@pytest.mark.survives
@pytest.mark.parametrize("seed", [1, None])
def test_a_base_with_other_weights_is_refused(moved, seed):
    folder, base = moved
    model = tiny_model("llama", 0 if seed is None else seed)
    if seed is None:  # the smallest difference there is
        weight = model.model.layers[1].mlp.down_proj.weight
        with torch.no_grad():
            weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    model.save_pretrained(base)
    with pytest.raises(StoreError, match="not the one it was trained from"):
        fe.load(folder)


@pytest.mark.survives
def test_a_base_that_is_gone_is_named(moved):
    folder, base = moved
    shutil.rmtree(base)
    with pytest.raises(FewedgesError, match=str(base)):
        fe.load(folder)


@pytest.mark.survives
@pytest.mark.parametrize("stem", ["weights", "gates"])
def test_a_damaged_body_is_refused(moved, stem):
    folder, _ = moved
    body = next(folder.glob(f"{stem}-*"))
    body.write_bytes(body.read_bytes()[:-1] + b"\x55")
    with pytest.raises(StoreError, match=body.name):
        fe.load(folder)


@pytest.mark.survives
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"train": "attention"}, "do not fit the recipe"),
        ({"train": "lora"}, "do not fit the recipe"),
    ],
)
def test_weights_of_another_recipe_are_refused(moved, change, match):
    folder, _ = moved
    stored = store.load(folder)
    store.save(folder, stored.kind, stored.tensors, stored.facts | {"recipe": stored.facts["recipe"] | change})
    with pytest.raises(StoreError, match=match):
        fe.load(folder)


@pytest.mark.survives
@pytest.mark.parametrize("gate_query", [False, True], ids=["bias", "gate query"])
def test_gates_of_another_shape_missing_or_too_many_are_refused(moved, gate_query):
    folder, _ = moved
    stored = store.load(folder)
    right = {"bias": torch.zeros(2, 4), "query": torch.zeros(2, 4, 8)}
    flawed = [{"bias": torch.zeros(3, 4)}, {"query": torch.zeros(2, 4, 8)}, {}]
    flawed += [
        right | {"query": torch.zeros(2, 4, 4)},
        right | {"bias": torch.zeros(2, 1)},
        right | {"more": torch.zeros(2, 4)},
    ]
    flawed += [{"bias": right["bias"]}] if gate_query else [right]
    facts = stored.facts | {"recipe": stored.facts["recipe"] | {"gate_query": gate_query}}
    for gates in flawed:
        store.save(folder, stored.kind, stored.tensors | {"gates": gates}, facts)
        with pytest.raises(StoreError, match=r"gates {.*}, base and recipe have {'bias': \(2, 4\)"):
            fe.load(folder)
    good = right if gate_query else {"bias": right["bias"]}
    store.save(folder, stored.kind, stored.tensors | {"gates": good}, facts)
    assert (gate_biases(fe.load(folder).model, tiny_loaded().anatomy) == 0).all()


@pytest.mark.survives
def test_a_log_that_cannot_be_read_is_a_store_error(moved):
    folder, _ = moved
    (folder / "log.jsonl").write_bytes(b'{"step": 1}\n{"step": \xff\n')
    with pytest.raises(StoreError, match=r"log\.jsonl"):
        fe.load(folder)


@pytest.mark.survives
def test_a_sparse_run_with_a_gate_bias_is_refused_not_ignored(moved):
    with pytest.raises(RecipeError, match="gate biases of its own"):
        fe.load(moved[0], gate_bias=0.0)


@pytest.mark.survives
def test_transformers_refuses_a_saved_folder(run):
    from transformers import AutoModelForCausalLM

    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(run[0])
    with pytest.raises(ModelError):
        fe.model.loading.load(run[0])


@pytest.mark.survives
def test_a_control_folder_is_not_taken_for_a_sparse_model(run):
    with pytest.raises(StoreError, match="holds 'dense-control', not 'sparse-attention'"):
        fe.load(run[0] / "control")


@pytest.mark.survives
def test_missing_data_and_missing_budget_are_refused_before_any_work():
    dense = tiny_loaded()
    with pytest.raises(RecipeError, match="no data"):
        fe.sparsify(dense, recipe())
    with pytest.raises(RecipeError, match="no budget"):
        fe.sparsify(dense, SparseAttention(), data=NoiseBatches())


@pytest.mark.says
def test_addition_brings_its_own_data(addition):
    data = training_data(addition, recipe(seed=3), None)
    assert isinstance(data, Sums)
    assert data.seed == 3
    other = NoiseBatches()
    assert training_data(addition, recipe(), other) is other


# -- what a folder says ----------------------------------------------------------------------------------------


@pytest.mark.says
def test_the_model_card_says_what_it_is_how_to_load_it_and_how_not_to(run):
    folder, sparse = run
    text = (folder / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "fewedges"
    assert front["base_model"] == sparse.dense.name
    assert 'fe.load("this folder")' in text
    assert "Without fewedges this folder is not a model" in text
    assert "score + bias[layer, head] > 0" in text
    assert "gate query" not in text
    for name in ("edges_per_query_per_head", "kl", "cross_entropy", "dense_cross_entropy"):
        assert f"| {name} | {sparse.records[-1][name]:.4g} |" in text


@pytest.mark.says
def test_the_model_card_of_a_run_with_gate_queries_says_what_they_add(run):
    facts = store.load(run[0]).facts
    text = model_card(facts | {"recipe": facts["recipe"] | {"gate_query": True}})
    assert "score + bias[layer, head] + scaling * gate query . key > 0" in text
    assert "score + bias[layer, head] > 0" not in text


@pytest.mark.says
def test_a_folder_holds_recipe_log_versions_seed_and_data(run):
    folder, sparse = run
    assert fe.read_recipe(folder / "recipe.yaml") == sparse.recipe
    assert [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] == sparse.records
    facts = store.load(folder).facts
    assert torch.__version__.startswith(facts["versions"]["torch"])  # PyPI's CUDA build says no more than 2.11.0
    assert (facts["seed"], facts["data"]) == (0, {"name": "noise", "seed": 0})
    assert facts["last_record"] == sparse.records[-1]


@pytest.mark.says
def test_a_sparse_prints_itself_in_one_line(run, bases):
    _, sparse = run
    last = sparse.records[-1]
    assert f"{last['edges_per_query_per_head']:.3g} attention edges per query per head" in str(sparse)
    assert str(sparse) in sparse._repr_html_()
    assert "untrained" in str(gates_only(fe.load(bases["llama"], probes=False), 0.0))


@pytest.mark.stays
def test_pushing_uploads_what_saving_writes(run, tmp_path, monkeypatch):
    import huggingface_hub

    calls = []

    class Hub:
        def create_repo(self, repository, **options):
            calls.append((repository, options))

        def upload_folder(self, *, repo_id, folder_path):
            calls.append(repo_id)
            shutil.copytree(folder_path, tmp_path / "hub")
            return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    _, sparse = run
    assert sparse.push_to_hub("me/sparse") == "https://huggingface.co/me/sparse"
    assert calls == [("me/sparse", {"private": True, "exist_ok": True}), "me/sparse"]
    saved = sparse.save(tmp_path / "saved")
    files = sorted(str(p.relative_to(saved)) for p in saved.rglob("*") if p.is_file())
    assert files == sorted(str(p.relative_to(tmp_path / "hub")) for p in (tmp_path / "hub").rglob("*") if p.is_file())
    timed = {"manifest.json", str(Path("control") / "manifest.json")}  # they state when they were written
    _, differ, lost = filecmp.cmpfiles(saved, tmp_path / "hub", [f for f in files if f not in timed], shallow=False)
    assert (differ, lost) == ([], [])
    assert torch.equal(logits(fe.load(tmp_path / "hub").model), logits(sparse.model))


# -- gates without training ------------------------------------------------------------------------------------


def by_hand(bias):
    """Constant gates written out: softmax over all allowed keys, times score + bias > 0."""

    def attend(module, query, key, value, attention_mask, scaling=None, **_):
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        scores = torch.einsum("bhqe,bhke->bhqk", query, key) * scaling
        allowed = allowed_keys(attention_mask, key.shape[-2])
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        weights = torch.where(scores + bias > 0, weights, 0.0)
        return torch.einsum("bhqk,bhke->bqhe", weights, value), None

    return attend


@pytest.mark.matches
@pytest.mark.parametrize("bias", [0.0, 0.7, -0.4])
@pytest.mark.parametrize("name", ["llama", "gpt2", "olmo"])  # olmo: the layout of the published flodraye/sparse-olmo7b
def test_gates_only_equals_constant_gates_made_by_hand(bases, name, bias):
    dense = fe.load(bases[name], probes=False)
    sparse = fe.load(bases[name], gate_bias=bias)
    assert isinstance(sparse, Sparse)
    register("by-hand", by_hand(bias))
    with attention_by(dense.model, "by-hand"):
        wanted = logits(dense.model)
    scale = float(wanted.abs().max())
    assert (
        float((logits(sparse.model) - wanted).abs().max()) / scale < 1e-6
    )  # measured 0; einsum may round once elsewhere
    assert float((logits(sparse.model) - logits(dense.model)).abs().max()) / scale > 1e-2
    assert set(gate_biases(sparse.model, dense.anatomy).flatten().tolist()) == {torch.tensor(bias).item()}
    assert [n for n, p in sparse.model.named_parameters() if n.endswith("gate_bias") and p.requires_grad] == []


# -- the runs that come with the package -----------------------------------------------------------------------


@pytest.mark.says
@pytest.mark.parametrize("name", result.SHIPPED)
def test_a_shipped_run_is_whole_small_and_says_what_it_is(name):
    folder = result.ASSETS / name
    saved = store.load(folder, result.KIND)  # checks every sha256
    control = store.load(folder / "control", result.CONTROL)
    assert saved.facts["base"] == control.facts["base"]
    assert saved.facts["base"]["name"] == "smollm2"
    assert saved.facts["recipe"]["saved"] == "int8"
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 25e6
    assert {"dense", "control", "sparse"} <= set(saved.facts["results"])
    card = (folder / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert f"{saved.facts['results']['sparse']['edges_per_query_per_head']:.4g}" in card


@pytest.mark.survives
@pytest.mark.parametrize("name", result.SHIPPED)
def test_a_shipped_run_without_its_base_says_how_to_get_it(name):
    with pytest.raises(ModelError, match="Try: `fewedges get smollm2`"):  # the cache of a test is empty
        fe.load(name)


@pytest.mark.reproduces
def test_gates_without_training_can_be_saved_and_loaded(bases, tmp_path):
    sparse = gates_only(fe.load(bases["gpt2"], probes=False), 0.3)
    sparse.save(tmp_path)
    assert torch.equal(logits(fe.load(tmp_path).model), logits(sparse.model))


@pytest.mark.reproduces
def test_a_run_can_start_from_a_sparse_one_and_resumes_only_as_that(tmp_path):
    dense, batches = tiny_loaded(), NoiseBatches()
    first = fe.sparsify(dense, recipe(steps=3), data=batches, control=True)
    still = recipe(steps=1, learning_rate=1e-9, bias_learning_rate=1e-9)
    second = fe.sparsify(first, still, data=batches, control=True, out=tmp_path)
    for name in ("loaded", "control"):  # one step at 1e-9: measured 1.3e-6
        old, new = (getattr(run, name).model for run in (first, second))
        torch.testing.assert_close(logits(new), logits(old), atol=5e-6, rtol=0)
    assert not torch.equal(logits(second.model), logits(dense.model))
    with pytest.raises(StoreError, match="start"):
        fe.sparsify(dense, still, data=batches, out=tmp_path)


@pytest.mark.matches
def test_the_origin_of_a_run_is_the_dense_model_and_what_sparse_and_control_begin_with(run):
    _, sparse = run
    assert origin(sparse.dense, True) == (sparse.dense, {"sparse": None, "control": None})
    dense, starts = origin(sparse, True)
    assert dense is sparse.dense
    assert starts == {"sparse": sparse.model, "control": sparse.control.model}
    alone = dataclasses.replace(sparse, control=None)
    assert origin(alone, False)[1] == {"sparse": sparse.model, "control": None}
    with pytest.raises(RecipeError, match="no control"):
        origin(alone, True)


@pytest.mark.reproduces
def test_a_control_saved_by_itself_is_the_one_a_run_saves(run, tmp_path):
    folder, sparse = run
    save_control(tmp_path, sparse.dense, sparse.recipe, sparse.data, sparse.control.model)
    mine, theirs = (store.load(path, "dense-control") for path in (tmp_path, folder / "control"))
    assert mine.facts == theirs.facts
    assert store.read_manifest(tmp_path)["files"] == store.read_manifest(folder / "control")["files"]


@pytest.mark.survives
def test_starting_from_another_kind_of_recipe_or_without_the_control_is_refused():
    dense, batches = tiny_loaded(), NoiseBatches()
    first = fe.sparsify(dense, recipe(steps=1), data=batches)
    with pytest.raises(RecipeError, match="trained in one of them only"):
        fe.sparsify(first, recipe(steps=1, train="lora", lora_rank=2), data=batches)
    with pytest.raises(RecipeError, match="control"):
        fe.sparsify(first, recipe(steps=1), data=batches, control=True)


@pytest.mark.survives
def test_gates_do_not_take_the_place_of_fixed_patterns(tmp_path):
    dense = tiny_loaded("llama")
    sparse = dataclasses.replace(gates_only(dense, -0.1), control=tiny_loaded("llama", seed=1))
    with attending(dense.model, dense.anatomy, Local(2)):
        before = logits(dense.model)
        for what in (dense, sparse):  # a base that is not dense
            with pytest.raises(ModelError, match=r"sparsify attention: fixed .*detach_patterns_"):
                fe.sparsify(what, recipe(), out=tmp_path / "run")  # before there is data
        with pytest.raises(ModelError, match="sparsify attention: fixed"):
            fe.post_train(dense, recipe(), NoiseBatches(), control=True)
        with pytest.raises(ModelError, match="sparsify attention: fixed"):
            gates_only(dense, 0.0)
        assert torch.equal(logits(dense.model), before)
    attend_(sparse.control.model, dense.anatomy, Local(2))
    with pytest.raises(ModelError, match="sparsify attention: fixed"):
        fe.sparsify(sparse, recipe(), data=NoiseBatches(), control=True)  # would begin with its weights
    with pytest.raises(ModelError, match=r"save .*run: fixed"):
        sparse.save(tmp_path / "run")
    with pytest.raises(ModelError, match=r"save .*run: fixed"):
        save_control(tmp_path / "run", dense, sparse.recipe, {}, sparse.control.model)
    assert not (tmp_path / "run").exists()
