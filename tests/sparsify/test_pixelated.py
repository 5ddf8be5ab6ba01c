"""A pixelated model as a result: distilled through the verb, saved, loaded, and refused what it cannot bear."""

import copy

import pytest
import torch

import fewedges as fe
from fewedges.errors import ModelError, RecipeError, StoreError
from fewedges.model.loading import fingerprint
from fewedges.sparsify import pixelated, recovery, stages
from fewedges.sparsify.attending import attend_, detach_patterns_
from fewedges.sparsify.butterfly import PixelatedLinear
from fewedges.sparsify.distilling import losses
from fewedges.sparsify.fixed_attention import Local
from fewedges.sparsify.matrices import blocks_of
from fewedges.sparsify.pixelate import load_pixelated_, pixelate_
from fewedges.sparsify.pixelated import PixelatedModel, begin_pixelated, block_modules, layers_in, rows_of
from fewedges.sparsify.recovery import distil_
from fewedges.sparsify.stages import sparsify_weights
from tiny import NoiseBatches, tiny_loaded

NOISE = NoiseBatches(length=16)
SMALL = {"batch_size": 8, "context_length": 16, "learning_rate": 3e-3, "warmup_steps": 2, "log_every": 1}
SHORT = fe.Distil(steps=3, **SMALL)


@pytest.fixture
def hub(monkeypatch):
    """A place that tiny models are loaded from by name."""

    def read(name, **_):
        return tiny_loaded(str(name).removeprefix("tiny-"))

    for module in (pixelated, recovery):
        monkeypatch.setattr(module, "load_dense", read)


def made(name="llama", **options):
    loaded = tiny_loaded(name)
    pixelate_(loaded, 0.4, block=2, **options)
    return loaded


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def distance(model, name):
    """KL to the dense model on noise that is not trained on."""
    tokens = NOISE.at(1000, 64).tokens
    dense = logits(tiny_loaded(name).model, tokens)
    return float(losses(logits(model, tokens), dense, tokens, torch.ones_like(tokens, dtype=torch.bool)).kl)


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.matches
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "gpt-neox", "gemma2"])
def test_distilling_comes_nearer_and_what_is_loaded_is_what_was_saved(hub, name, tmp_path):
    loaded = made(name)
    before = parameters(loaded.model)
    result = fe.sparsify(loaded, fe.Distil(steps=40, **SMALL), data=NOISE, out=tmp_path)
    assert same(parameters(loaded.model), before)
    assert isinstance(result, PixelatedModel)
    # measured .23 of it (gpt-neox), .25 (gpt2), .41 (llama-tied), .46 (llama), .49 (gemma2)
    assert distance(result.model, name) < 0.7 * distance(loaded.model, name)
    again = fe.load(tmp_path)
    assert isinstance(again, PixelatedModel)
    given = NOISE.at(0, 3).tokens
    assert torch.equal(logits(again.model, given), logits(result.model, given))
    assert (again.stages, again.base, again.pixelated) == (result.stages, result.base, result.pixelated)
    assert {n: layer.plan for n, layer in layers_in(again.model).items()} == result.pixelated.plans
    assert again.base["sha256"] == fingerprint(tiny_loaded(name).model)
    other = tiny_loaded(name, seed=1)
    load_pixelated_(tmp_path, other)
    assert torch.equal(logits(other.model, given), logits(result.model, given))


@pytest.mark.reproduces
def test_a_run_stopped_goes_on_to_the_same_bits_and_a_finished_one_is_read(hub, tmp_path, monkeypatch):
    loaded = made()
    wanted = parameters(fe.sparsify(loaded, [SHORT, SHORT], data=NOISE).model)
    for _ in range(4):
        assert not fe.sparsify(loaded, [SHORT, SHORT], data=NOISE, out=tmp_path, pause_minutes=0.0).finished
    assert fe.load(tmp_path).stages == (SHORT,)
    done = fe.sparsify(loaded, [SHORT, SHORT], data=NOISE, out=tmp_path)
    assert same(parameters(done.model), wanted)
    monkeypatch.setattr(stages, "train_", None)
    again = fe.sparsify(loaded, [SHORT, SHORT], data=NOISE, out=tmp_path)
    assert same(parameters(again.model), wanted)


@pytest.mark.matches
def test_a_loaded_run_is_distilled_further(hub, tmp_path):
    loaded = made("gpt2")
    twice = fe.sparsify(loaded, [SHORT, SHORT], data=NOISE)
    fe.sparsify(loaded, SHORT, data=NOISE, out=tmp_path)
    further = fe.sparsify(fe.load(tmp_path), SHORT, data=NOISE)
    assert further.stages == twice.stages == (SHORT, SHORT)
    assert same(parameters(further.model), parameters(twice.model))


@pytest.mark.matches
def test_a_teacher_at_hand_is_used_and_noted(hub, monkeypatch):
    wanted = sparsify_weights(made(), SHORT, data=NOISE)
    for module in (pixelated, recovery):
        monkeypatch.setattr(module, "load_dense", None)
    mine = distil_(made(), SHORT, NOISE, teacher=tiny_loaded())
    assert mine.base == wanted.base == {"name": "tiny-llama", "sha256": fingerprint(tiny_loaded().model)}
    assert same(parameters(mine.model), parameters(wanted.model))


@pytest.mark.stays
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_only_matrices_move_where_only_they_are_to(hub, name):
    loaded = made(name, keep_dense=("o_proj",) if name == "llama" else ("c_proj",))
    result = fe.sparsify(loaded, fe.Distil(train="matrices", hidden_weight=0.1, steps=2, **SMALL), data=NOISE)
    before, after = parameters(loaded.model), parameters(result.model)
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    blocks = [n for n in before if ".layers." in n or ".h." in n]
    parts = ("sparse.weight", "low.up", "low.down", "gamma", "_proj.weight")
    assert moved == {n for n in blocks if n.endswith(parts)}
    assert any(n.endswith("gamma") for n in moved)


@pytest.mark.matches
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "opt"])
def test_blocks_and_matrices_are_those_of_the_dense_model(name):
    loaded, dense = made(name, keep_dense=("q_proj",) if name == "llama" else ()), tiny_loaded(name)
    blocks = blocks_of(dense)
    assert block_modules(loaded) == [loaded.model.get_submodule(block.name) for block in blocks]
    known = [(matrix.name, matrix.shape) for block in blocks for matrix in block.matrices]
    assert sorted((row["name"], row["shape"]) for row in rows_of(loaded)) == sorted(known)
    assert block_modules(dense) == [block.module for block in blocks]


@pytest.mark.stays
def test_every_gamma_is_part_of_the_fingerprint():
    loaded = made()
    before = fingerprint(loaded.model)
    with torch.no_grad():
        next(m for m in loaded.model.modules() if isinstance(m, PixelatedLinear)).gamma.add_(0.25)
    assert fingerprint(loaded.model) != before


@pytest.mark.survives
@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (None, "SparseAttention"),
        (fe.SparseAttention(steps=1), "SparseAttention"),
        (fe.Prune(method="magnitude", density=0.5), "Prune"),
        (fe.Quantize(bits=8), "Quantize"),
        ([SHORT, fe.Quantize(bits=8)], "Quantize"),
        (fe.Distil(layers=(0,), steps=1), "Distil"),
    ],
)
def test_what_a_pixelated_model_cannot_bear_is_refused(hub, recipe, message):
    for model in (made(), begin_pixelated(made())):
        with pytest.raises(RecipeError, match=f"pixelated model by .*{message}"):
            fe.sparsify(model, recipe, data=NOISE)
        if recipe is not None and not isinstance(recipe, fe.SparseAttention):
            with pytest.raises(RecipeError, match="pixelated model by"):
                sparsify_weights(model, recipe, data=NOISE)


@pytest.mark.survives
def test_another_dense_model_is_noticed(hub, tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="nothing in it is pixelated"):
        begin_pixelated(tiny_loaded())
    with pytest.raises(ModelError, match="is another there"):
        begin_pixelated(made("llama"), tiny_loaded("gpt2"))
    result = fe.sparsify(made(), SHORT, data=NOISE, out=tmp_path / "run")
    with pytest.raises(StoreError, match="another model"):
        fe.sparsify(made("llama-tied"), SHORT, data=NOISE, out=tmp_path / "run")
    monkeypatch.setattr(pixelated, "load_dense", lambda *_, **__: tiny_loaded(seed=1))
    with pytest.raises(StoreError, match="other weights"):
        fe.load(tmp_path / "run")
    result.pixelated.save(tmp_path / "bare", result.model)
    with pytest.raises(StoreError, match="does not say which dense model"):
        fe.load(tmp_path / "bare")


@pytest.mark.says
def test_the_result_says_what_it_is_and_what_it_cannot(hub, tmp_path):
    result = distil_(copy.deepcopy(made()), SHORT, NOISE)
    assert str(result).startswith("tiny-llama: pixelated, then distil; 14 matrices at density 0.3")
    with pytest.raises(ModelError, match="no pixelated layers"):
        result.export(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.survives
def test_patterns_do_not_get_lost_on_the_way_to_the_disk(hub, tmp_path):
    """A model distilled under a pattern came back dense from disk, without a word."""
    loaded = tiny_loaded("llama")
    attend_(loaded.model, loaded.anatomy, Local(2))
    made_by = pixelate_(loaded, 0.4, block=2)
    with pytest.raises(ModelError, match=r"sparsify into .*fixed attention patterns"):
        fe.sparsify(loaded, SHORT, data=NOISE, out=tmp_path / "run")
    with pytest.raises(ModelError, match=r"save .*fixed attention patterns"):
        made_by.save(tmp_path / "run", loaded)
    result = fe.sparsify(loaded, SHORT, data=NOISE)
    with pytest.raises(ModelError, match=r"save .*fixed attention patterns"):
        result.save(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    wanted = logits(result.model, NOISE.at(0, 2).tokens)
    detach_patterns_(result.model, loaded.anatomy)
    again = fe.load(result.save(tmp_path / "run"), probes=False)
    attend_(again.model, again.loaded.anatomy, Local(2))  # as the error says: attached again
    assert torch.equal(logits(again.model, NOISE.at(0, 2).tokens), wanted)
