"""One verb for every method: stages in a row, saved and resumed between them."""

import copy
from dataclasses import replace

import pytest
import torch

import fewedges as fe
from fewedges.data.addition import Sums
from fewedges.errors import ModelError, RecipeError, StoreError
from fewedges.recipes import read_recipe, write_recipe
from fewedges.sparsify import stages as verb
from fewedges.sparsify.attending import attend_, detach_patterns_, rules_of
from fewedges.sparsify.fixed_attention import Local
from fewedges.sparsify.pruning import prune_
from fewedges.sparsify.quantizing import quantize_
from fewedges.sparsify.recovery import distil_
from fewedges.sparsify.stages import sparsify, sparsify_weights

PRUNE = fe.Prune(method="wanda", density=0.5, calibration_windows=8)
DISTIL = fe.Distil(steps=3, batch_size=8, warmup_steps=0, log_every=1)
STAGES = (PRUNE, DISTIL, fe.Quantize(bits=8))


def twin(loaded):
    return loaded.with_model(copy.deepcopy(loaded.model))


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.matches
def test_stages_in_a_row_are_the_verbs_in_a_row_and_leave_the_model_alone(addition, tmp_path):
    before = parameters(addition.model)
    result = fe.sparsify(addition, STAGES, out=tmp_path / "run")
    assert same(parameters(addition.model), before)
    by_hand = prune_(twin(addition), PRUNE, Sums())
    by_hand = quantize_(distil_(by_hand, DISTIL, Sums(), teacher=addition), STAGES[2])
    assert same(parameters(result.model), parameters(by_hand.model))
    assert result.stages == by_hand.stages == STAGES
    assert {code.bits for code in result.rounded.values()} == {8}
    assert read_recipe(tmp_path / "run" / "recipe.yaml") == STAGES
    loaded = fe.load(tmp_path / "run")
    assert isinstance(loaded, fe.Pruned)
    assert same(parameters(loaded.model), parameters(result.model))
    assert len((tmp_path / "run" / "distil-1" / "log.jsonl").read_text().splitlines()) == 3


@pytest.mark.reproduces
def test_a_run_stopped_in_any_stage_goes_on_to_the_same_bits(addition, tmp_path, monkeypatch):
    wanted = parameters(sparsify_weights(addition, STAGES).model)
    for _ in range(2):
        paused = sparsify_weights(addition, STAGES, out=tmp_path, pause_minutes=0.0)
        assert not paused.finished
        assert fe.load(tmp_path).stages == (PRUNE,)
    monkeypatch.setattr(verb, "prune_", None)  # what is saved is not done again
    done = sparsify_weights(addition, STAGES, out=tmp_path)
    assert same(parameters(done.model), wanted)
    monkeypatch.setattr(verb, "train_", None)
    monkeypatch.setattr(verb, "quantize_", None)
    again = sparsify_weights(addition, STAGES, out=tmp_path)
    assert same(parameters(again.model), wanted)
    assert again.finished


@pytest.mark.matches
def test_a_saved_run_goes_on_with_more_stages_and_finds_its_own_teacher(addition, tmp_path):
    first = sparsify_weights(addition, PRUNE, out=tmp_path / "a")
    second = sparsify_weights(fe.load(tmp_path / "a"), [DISTIL, STAGES[2]], out=tmp_path / "b")
    assert second.stages == STAGES
    assert same(parameters(second.model), parameters(sparsify_weights(addition, STAGES).model))
    assert same(parameters(first.model), parameters(fe.load(tmp_path / "a").model))


SHORT = {"steps": 6, "batch_size": 8, "warmup_steps": 0, "log_every": 3}
METHOD = {
    "static": fe.Train(**SHORT),
    "rigl": fe.Rewire(every=2, from_scratch=True, **SHORT),
    "set": fe.Rewire(method="set", every=2, **SHORT),
    "gradual": fe.Gradual(every=2, **SHORT),
    "tickets": fe.Rewind(rounds=1, rewind=2, from_scratch=True, **SHORT),
}


@pytest.mark.reproduces
@pytest.mark.parametrize("method", METHOD)
def test_a_method_that_trains_is_a_stage_that_stops_goes_on_saves_loads_and_is_measured(addition, tmp_path, method):
    recipe = METHOD[method]
    stages = [recipe, fe.Distil(steps=2, batch_size=8, warmup_steps=0)]
    wanted = sparsify_weights(addition, stages)
    write_recipe(tuple(stages), tmp_path / "stages.yaml")
    while not (
        now := sparsify(addition, read_recipe(tmp_path / "stages.yaml"), out=tmp_path, pause_minutes=0.0)
    ).finished:
        assert len(list(tmp_path.glob("*-*/log.jsonl"))) == len(now.stages) + 1
    assert now.stages == wanted.stages == tuple(stages)
    loaded = fe.load(tmp_path)
    for result in (now, loaded):
        assert same(parameters(result.model), parameters(wanted.model))
        assert all(torch.equal(p.mask(), wanted.masks.patterns[n].mask()) for n, p in result.masks.patterns.items())
    assert loaded.masks.density == pytest.approx(0.2, abs=1e-3)  # each matrix rounds to whole entries
    assert not same(
        parameters(sparsify(addition, replace(recipe, seed=1)).model), parameters(sparsify(addition, recipe).model)
    )


@pytest.mark.says
def test_measure_sets_controls_of_the_same_density_beside_a_method_that_trains(addition):
    report = fe.measure(sparsify(addition, METHOD["rigl"])).to_dict()
    densities = {name: row["density"] for name, row in report["models"].items()}
    assert densities["random"] == densities["magnitude"] == densities["sparse"] == report["total"]["density"] < 0.21
    assert report["models"]["random"]["kl"] > 0.1


@pytest.mark.matches
def test_tickets_by_rate_are_the_stage_of_their_density(addition):
    plan = fe.Tickets(rounds=2, rate=0.3, rewind=1, steps=2, scope="global")
    recipe = fe.Rewind(density=plan.density, rounds=2, rewind=1, steps=2, allocation="global")
    result = sparsify(addition, plan)
    assert result.stages == (recipe,)
    assert result.masks.density == pytest.approx(0.49, abs=1e-3)


@pytest.mark.survives
def test_a_folder_of_another_run_is_refused(addition, tmp_path):
    sparsify_weights(addition, [fe.Prune(method="magnitude")], out=tmp_path)
    for other in ([PRUNE], [fe.Quantize()]):
        with pytest.raises(StoreError, match="it holds other stages"):
            sparsify_weights(addition, other, out=tmp_path)
    changed = twin(addition)  # in memory; on disk under that name lie the old weights
    changed.model.transformer.ln_f.weight.data.mul_(2)
    with pytest.raises(StoreError, match="made from another model"):
        sparsify_weights(changed, [fe.Prune(method="magnitude")], out=tmp_path)
    text = tmp_path / "sums.txt"
    text.write_text("29+19=048" * 100)
    recipe = fe.Prune(method="wanda", calibration_windows=4, context_length=9)
    sparsify_weights(addition, recipe, data=str(text), out=tmp_path / "b")
    with pytest.raises(StoreError, match=r"it read .*sums.txt"):
        sparsify_weights(addition, recipe, out=tmp_path / "b")


@pytest.mark.survives
def test_what_the_verb_cannot_do_is_refused(addition, tmp_path):
    for wrong in ([], [fe.SparseAttention()], "wanda"):
        with pytest.raises(RecipeError, match="stage"):
            sparsify_weights(addition, wrong)
    for field, wrong in (("every", fe.Rewire(steps=50, every=60)), ("steps", fe.Gradual(steps=1))):
        with pytest.raises(RecipeError, match=f"field {field}"):
            sparsify(addition, [PRUNE, wrong], out=tmp_path / "x")
    with pytest.raises(RecipeError, match="density below 1"):
        sparsify(addition, fe.Rewind(density=1.0), out=tmp_path / "x")
    with pytest.raises(RecipeError, match="the model has 10 positions"):
        sparsify(addition, fe.Rewire(), data=str(tmp_path))
    with pytest.raises(ModelError, match="attention training would not hold their zeros"):
        sparsify(sparsify(addition, fe.Prune(method="random")), fe.SparseAttention(steps=1))
    with pytest.raises(RecipeError, match="to be run, not saved"):
        sparsify(addition, fe.Quantize(backend="torchao"), out=tmp_path / "x")
    sparse = sparsify(addition, fe.SparseAttention(steps=1, batch_size=8, context_length=10))
    assert isinstance(sparse, fe.Sparse)
    with pytest.raises(ModelError, match="gated attention"):
        sparsify(sparse, PRUNE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.survives
def test_a_run_that_would_lose_its_patterns_is_refused_before_it_begins(addition, tmp_path):
    loaded, recipe = twin(addition), fe.Prune(method="magnitude")
    attend_(loaded.model, loaded.anatomy, Local(2))
    with pytest.raises(ModelError, match=r"sparsify into .*run: fixed attention patterns .*detach_patterns_"):
        fe.sparsify(loaded, recipe, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ModelError, match="train in"):
        distil_(loaded, DISTIL, Sums(), teacher=addition, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    result = fe.sparsify(loaded, [recipe, DISTIL])  # in memory it is made under the pattern
    assert [rule.window for rule in rules_of(result.model, loaded.anatomy)] == [2] * 4
    for write in (result.save, result.export):
        with pytest.raises(ModelError, match="fixed attention patterns"):
            write(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    detach_patterns_(result.model, loaded.anatomy)
    assert same(parameters(fe.load(result.save(tmp_path / "run")).model), parameters(result.model))
    with pytest.raises(ModelError, match="make a model smaller"):
        fe.sparsify(loaded, fe.Prune(method="magnitude", structure="channel"))
