"""Distillation: the objective against a slow oracle, masks held, resumed to the same bits, students of fewer layers."""

import copy
import json

import pytest
import torch
from torch.nn import functional as F

from fewedges.data.addition import Sums
from fewedges.errors import ModelError, RecipeError, StoreError, TrainingError
from fewedges.model.loading import Loaded
from fewedges.sparsify import recovery
from fewedges.sparsify.masks import Masks
from fewedges.sparsify.matrices import blocks_of, matrices_of
from fewedges.sparsify.pruned import begin, load_pruned
from fewedges.sparsify.pruning import prune_
from fewedges.sparsify.quantizing import quantize_
from fewedges.sparsify.recovery import distil_, hidden_difference, learning_rate_factor
from fewedges.sparsify.shrink import keep_layers
from fewedges.weight_recipes import Distil, Prune, Quantize
from tiny import NoiseBatches, tiny_loaded

NOISE = NoiseBatches()
SMALL = {"batch_size": 4, "context_length": 12, "learning_rate": 1e-3, "warmup_steps": 2, "log_every": 1}


def twin(loaded: Loaded) -> Loaded:
    return loaded.with_model(copy.deepcopy(loaded.model))


def pruned(name="llama", density=0.5):
    return prune_(tiny_loaded(name), Prune(method="magnitude", density=density))


def parameters(result):
    return {name: p.detach().clone() for name, p in result.model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- the objective -------------------------------------------------------------------------------------------------


def oracle(dense, start, recipe, data):
    """The same training, slowly: the losses as torch has them, hidden states of every block but the last by name."""
    model = start.model.requires_grad_(True)
    masks = {f"{name}.weight": pattern.mask() for name, pattern in start.masks.patterns.items()}
    groups = [[p for p in model.parameters() if (p.dim() > 1) == wide] for wide in (True, False)]
    optimizer = torch.optim.AdamW([{"params": g} for g in groups], betas=recipe.adam_betas, weight_decay=0.0)
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * learning_rate_factor(recipe, step)
        tokens = data.at(step, recipe.batch_size).tokens
        mine = model(tokens, output_hidden_states=True)
        with torch.no_grad():
            theirs = dense.model(tokens, output_hidden_states=True)
        q, p = mine.logits[:, :-1].log_softmax(-1), theirs.logits[:, :-1].log_softmax(-1)
        kl = F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()
        loss = F.cross_entropy(mine.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        first, second = mine.hidden_states[1], theirs.hidden_states[1]
        last, wanted = (last_of(m, x.hidden_states[1]) for m, x in ((model, mine), (dense.model, theirs)))
        pairs = ((first, second), (last, wanted.detach()))
        hidden = sum(((a - b).pow(2).sum(-1) / b.pow(2).sum(-1)).mean() for a, b in pairs) / 2
        optimizer.zero_grad()
        (recipe.kl_weight * kl + recipe.loss_weight * loss + recipe.hidden_weight * hidden).backward()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in masks:
                    parameter.grad.masked_fill_(~masks[name], 0)
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in masks:
                    parameter.masked_fill_(~masks[name], 0)
    model.requires_grad_(False)


def last_of(model, hidden):
    """What leaves the second of two layers, before the final norm."""
    body = model.model
    positions = torch.arange(hidden.shape[1])[None]
    angles = body.rotary_emb(hidden, positions)
    found = body.layers[1](hidden, position_embeddings=angles, position_ids=positions, attention_mask=None)
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.matches
def test_three_steps_are_the_oracles():
    recipe = Distil(steps=3, kl_weight=1.0, loss_weight=0.5, hidden_weight=0.7, **SMALL)
    dense, mine, slow = tiny_loaded(), pruned(), pruned()
    result = distil_(mine, recipe, NOISE, teacher=dense)
    oracle(dense, slow, recipe, NOISE)
    wanted, before = parameters(slow), parameters(pruned())
    for name, value in parameters(result).items():
        assert not torch.equal(value, before[name]), name
        assert (value - wanted[name]).abs().max() <= 1e-7, name  # measured 3.0e-8


@pytest.mark.matches
def test_the_hidden_difference_is_relative_at_every_token():
    generator = torch.Generator().manual_seed(0)
    student, dense = ([torch.randn(2, 3, 5, generator=generator) for _ in range(2)] for _ in range(2))
    dense[0][0, 0] *= 1000  # a sink counts as one token
    total = 0.0
    for s, d in zip(student, dense, strict=True):
        for b in range(2):
            for t in range(3):
                total += float(((s[b, t] - d[b, t]) ** 2).sum() / (d[b, t] ** 2).sum()) / 12
    assert float(hidden_difference(student, dense)) == pytest.approx(total, rel=1e-6)
    assert float(hidden_difference(dense, dense)) == 0


@pytest.mark.stays
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_micro_batches_change_rounding_only(micro_batch):
    options = {**SMALL, "steps": 2, "hidden_weight": 0.5}
    whole = distil_(pruned("gpt2"), Distil(**options), NOISE, teacher=tiny_loaded("gpt2"))
    parts = distil_(pruned("gpt2"), Distil(**options, micro_batch=micro_batch), NOISE, teacher=tiny_loaded("gpt2"))
    gaps = []
    for name, value in parameters(parts).items():
        gap = (value - parameters(whole)[name]).abs().flatten()
        assert gap.max() < 1.7e-4, name  # measured 4.3e-5: where a gradient all but vanishes Adam divides by rounding
        gaps.append(gap)
    assert torch.cat(gaps).quantile(0.99) < 3e-8  # measured 7.5e-9


# -- masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.stays
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gemma2", "phi3", "opt"])
def test_zeros_stay_and_the_teacher_and_dropout_are_left_alone(name):
    dense, result = tiny_loaded(name), pruned(name)
    before, zeros = parameters(begin(dense)), result.masks
    done = distil_(result, Distil(steps=3, **SMALL), NOISE, teacher=dense)
    done.check()
    assert done.masks is zeros
    for path, matrix in done.masks.matrices(done.model).items():
        assert int((matrix.weight != 0).sum()) == zeros.patterns[path].nnz
    assert same(before, parameters(begin(dense)))
    assert done.stages == (result.stages[0], Distil(steps=3, **SMALL))
    assert not any(p.requires_grad or p.grad is not None for p in done.model.parameters())
    assert not done.model.training


@pytest.mark.stays
def test_only_matrices_move_if_only_they_shall():
    before = parameters(pruned())
    done = parameters(distil_(pruned(), Distil(steps=2, train="matrices", **SMALL), NOISE, teacher=tiny_loaded()))
    moved = {name for name in done if not torch.equal(done[name], before[name])}
    assert moved == {f"{name}.weight" for name in matrices_of(tiny_loaded())}


@pytest.mark.says
def test_recovery_brings_a_pruned_model_nearer_to_the_dense_one(addition):
    start = prune_(twin(addition), Prune(method="magnitude", density=0.4))
    recipe = Distil(steps=40, learning_rate=3e-4, batch_size=64, warmup_steps=5, log_every=1)
    seen = []
    distil_(start, recipe, Sums(), teacher=addition, watch=seen.append)
    assert [record["step"] for record in seen] == list(range(1, 41))
    assert seen[0]["kl"] > 0.1
    assert seen[-1]["kl"] < 6e-5  # measured 1.5e-5, from 0.30
    assert seen[-1]["progress"] == 1
    assert seen[0]["learning_rate"] == pytest.approx(3e-4 / 5)
    assert 0 < seen[-1]["learning_rate"] < 3e-5


# -- stopping and going on -----------------------------------------------------------------------------------------


@pytest.mark.reproduces
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_run_paused_after_every_step_gives_the_same_bits(tmp_path, name):
    recipe = Distil(steps=4, hidden_weight=0.3, **SMALL)
    wanted = parameters(distil_(pruned(name), recipe, NOISE, teacher=tiny_loaded(name)))
    for piece in range(4):
        paused = distil_(
            pruned(name), recipe, NOISE, teacher=tiny_loaded(name), folder=tmp_path / "run", pause_minutes=0.0
        )
        assert paused.finished == (piece == 3)
        assert len(paused.stages) == 1 + (piece == 3)
    assert same(parameters(paused), wanted)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [1, 2, 3, 4]
    assert not (tmp_path / "run" / "checkpoint").exists()


@pytest.mark.survives
@pytest.mark.parametrize("change", ["recipe", "data", "weights"])
def test_another_run_is_not_resumed(tmp_path, change):
    recipe = Distil(steps=4, **SMALL)
    options = {"teacher": tiny_loaded(), "folder": tmp_path, "pause_minutes": 0.0}
    distil_(pruned(), recipe, NOISE, **options)
    other = {"recipe": (pruned(), Distil(steps=5, **SMALL), NOISE), "data": (pruned(), recipe, NoiseBatches(seed=9))}
    other["weights"] = (pruned(density=0.6), recipe, NOISE)
    with pytest.raises(StoreError, match="it was started with"):
        distil_(*other[change], **options)


@pytest.mark.survives
def test_a_step_that_is_not_finite_is_an_error_that_changes_nothing():
    start = pruned()
    start.model.model.norm.weight.data[0] = torch.inf
    before = parameters(start)
    with pytest.raises(TrainingError, match="is not finite; nothing was updated"):
        distil_(start, Distil(steps=2, **SMALL), NOISE, teacher=tiny_loaded())
    assert same(parameters(start), before)


@pytest.mark.survives
def test_what_cannot_be_distilled_is_refused():
    recipe = Distil(steps=1, **SMALL)
    loaded = tiny_loaded()
    with pytest.raises(ModelError, match="the teacher is the model that is trained"):
        distil_(loaded, recipe, NOISE, teacher=loaded)
    with pytest.raises(RecipeError, match="quantize last"):
        distil_(quantize_(tiny_loaded(), Quantize()), recipe, NOISE, teacher=loaded)
    with pytest.raises(ModelError, match="bfloat16"):
        distil_(loaded.with_model(tiny_loaded().model.bfloat16()), recipe, NOISE, teacher=loaded)
    with pytest.raises(RecipeError, match="choose layers first"):
        distil_(pruned(), Distil(steps=1, layers=(0,), **SMALL), NOISE, teacher=loaded)
    with pytest.raises(RecipeError, match="numbers below 2"):
        distil_(loaded, Distil(steps=1, layers=(0, 2), **SMALL), NOISE)
    with pytest.raises(ModelError, match="load tiny-llama"):  # no teacher given, and none to be read
        distil_(tiny_loaded(), recipe, NOISE)


@pytest.mark.survives
def test_another_base_is_not_a_teacher(addition, monkeypatch):
    other = twin(addition)
    other.model.transformer.ln_f.weight.data.mul_(2)
    monkeypatch.setattr(recovery, "load_dense", lambda *_, **__: other)
    with pytest.raises(StoreError, match="other weights"):
        recovery.dense_of(begin(addition))


# -- fewer layers --------------------------------------------------------------------------------------------------


@pytest.mark.matches
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gemma2", "gemma3", "gpt-neox", "opt"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_student_of_one_layer_is_the_dense_model_without_the_other(name, layer):
    dense = tiny_loaded(name)
    student = keep_layers(begin(dense), (layer,))
    other = blocks_of(dense)[1 - layer].module
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(other, "forward", lambda x, *_, **__: x)
        given = NOISE.at(5, 2).tokens
        assert torch.equal(student.model(given).logits, dense.model(given).logits)
    assert len(student.loaded.anatomy.layers) == 1
    assert len(blocks_of(dense)) == 2


@pytest.mark.reproduces
def test_a_student_of_fewer_layers_is_trained_pruned_saved_and_loaded(addition, tmp_path):
    recipe = Distil(layers=(0, 2, 3), steps=2, hidden_weight=1.0, batch_size=16, warmup_steps=0)
    before = parameters(begin(addition))
    result = prune_(distil_(addition, recipe, Sums()), Prune(method="magnitude", density=0.5))
    assert same(parameters(begin(addition)), before)
    assert len(result.loaded.anatomy.layers) == 3
    assert result.masks.density == 0.5
    again = load_pruned(result.save(tmp_path))
    assert same(parameters(again), parameters(result))
    assert again.stages[0] == recipe
    assert isinstance(again.masks, Masks)
