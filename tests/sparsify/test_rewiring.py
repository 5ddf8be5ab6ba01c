"""RigL: every update over ten steps against the slow oracle, and what never changes.

Below, the stages whose masks are made in training: each method against a plain loop by hand, and any of them stopped.
"""

import math
from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewedges.errors import ModelError, RecipeError
from fewedges.sparsify.distilling import losses
from fewedges.sparsify.gradual import gradually
from fewedges.sparsify.lottery import find_ticket, reinitialised_
from fewedges.sparsify.masks import held
from fewedges.sparsify.matrices import matrices_of
from fewedges.sparsify.pruning import prune_
from fewedges.sparsify.quantizing import quantize_
from fewedges.sparsify.recovery import learning_rate_factor, train_
from fewedges.sparsify.rewiring import Rewiring, moved, random_masks, rewired
from fewedges.sparsify.schedule import Cosine, Cubic
from fewedges.weight_recipes import (
    TRAINED,
    Gradual,
    Method,
    Prune,
    Quantize,
    Rewind,
    Rewire,
    Tickets,
    Train,
)
from tiny import NoiseBatches, tiny_loaded

OPTIMIZERS = {
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.02, momentum=0.9),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=3e-3),
}


def start(name="llama", density=0.3, rule="erk"):
    loaded = tiny_loaded(name)
    matrices = matrices_of(loaded)
    loaded.model.requires_grad_(True)
    return loaded.model, matrices, random_masks(matrices, density, rule, seed=1)


@pytest.mark.matches
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_ten_updates_are_the_oracles(name, kind):
    """Each update from the same weights, gradients and mask; between them the optimiser moves the weights."""
    model, matrices, masks = start(name)
    optimizer = OPTIMIZERS[kind](model.parameters())
    recipe = Rewire(steps=28, every=2, until=0.75, drop=0.5)
    updates = 0
    with rewired(model, masks, optimizer, recipe) as rigl:
        for step in range(recipe.steps):
            rigl.prepare(step)
            tokens = NoiseBatches().at(step, 4).tokens
            model(input_ids=tokens, labels=tokens).loss.backward()
            before = {p: (m.weight.clone(), m.oriented(m.parameter.grad).clone()) for p, m in matrices.items()}
            kept = {path: mask.clone() for path, mask in rigl.guard.kept.items()}
            if not rigl.rewire_(step):
                optimizer.step()
                optimizer.zero_grad()
                assert all(torch.equal(kept[path], rigl.guard.kept[path]) for path in kept)
                continue
            updates += 1
            share = 0.25 * (1 + math.cos(math.pi * step / 21))
            for path, matrix in matrices.items():
                weight, slope = (x.detach().numpy() for x in before[path])
                wanted, values = oracles.rigl(weight, slope, kept[path].numpy(), share)
                assert (rigl.guard.kept[path].numpy() == wanted).all(), (step, path)
                assert (matrix.weight.numpy() == values).all()
                assert all((matrix.oriented(x)[~rigl.guard.kept[path]] == 0).all() for x in rigl.guard.state_of(matrix))
            changed = sum(int((kept[p] ^ rigl.guard.kept[p]).sum()) for p in kept)
            assert changed > 0
            optimizer.zero_grad()
    assert updates == 10
    assert rigl.guard.masks().nnz == masks.nnz


@pytest.mark.stays
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 999), st.floats(0, 1), st.floats(0, 1))
def test_the_count_never_changes_and_what_moves_is_at_most_the_fraction(rows, columns, seed, density, drop):
    generator = torch.Generator().manual_seed(seed)
    weight, slope = (torch.randn(rows, columns, generator=generator) for _ in range(2))
    kept = torch.rand(rows, columns, generator=generator) < density
    new = moved(weight * kept, slope, kept, drop)
    assert int(new.sum()) == int(kept.sum())
    assert int((kept & ~new).sum()) <= math.floor(int(kept.sum()) * drop)


@pytest.mark.matches
def test_a_dropped_entry_with_the_largest_gradient_comes_back_with_its_weight():
    weight = torch.tensor([[0.1, 2.0, 3.0, 0.0]])
    slope = torch.tensor([[9.0, 0.0, 0.0, 1.0]])
    kept = torch.tensor([[True, True, True, False]])
    assert torch.equal(moved(weight, slope, kept, 1 / 3), kept)
    assert moved(weight, slope * torch.tensor([0.0, 1, 1, 1]), kept, 1 / 3).tolist() == [[False, True, True, True]]


def after_two_moves(grow, seed=0, factor=1.0):
    """The masks, where every gradient is `factor` times noise of its own."""
    model, matrices, masks = start()
    recipe = Rewire(steps=10, every=2, drop=0.5, grow=grow, seed=seed)
    with rewired(model, masks, OPTIMIZERS["momentum"](model.parameters()), recipe) as moving:
        for step in (2, 4):
            for number, matrix in enumerate(matrices.values()):
                noise = torch.randn(matrix.parameter.shape, generator=torch.Generator().manual_seed(number))
                matrix.parameter.grad = noise * factor + (factor > 1) * noise.roll(1, 0)
            assert moving.rewire_(step)
        return {path: kept.clone() for path, kept in moving.guard.kept.items()}, masks


@pytest.mark.stays
def test_growth_at_random_hangs_on_its_seed_alone():
    (first, masks), (same, _), (other, _) = (after_two_moves("random", *given) for given in ((0,), (0, 7.0), (2**50,)))
    assert all(torch.equal(first[path], same[path]) for path in first)
    assert not any(torch.equal(first[path], other[path]) for path in first)
    assert sum(int(kept.sum()) for kept in first.values()) == masks.nnz
    (by_slope, _), (by_another, _) = after_two_moves("gradient"), after_two_moves("gradient", factor=7.0)
    assert not any(torch.equal(by_slope[path], by_another[path]) for path in first)


@pytest.mark.stays
@pytest.mark.parametrize("rule", ["uniform", "erk"])
def test_random_masks_meet_the_density_and_repeat(rule):
    _, matrices, masks = start(density=0.25, rule=rule)
    assert masks.density == pytest.approx(0.25, abs=1e-3)  # each matrix rounds by at most one entry
    spread = np.ptp([pattern.density for pattern in masks.patterns.values()])
    assert (spread < 1e-3) == (rule == "uniform")
    again = random_masks(matrices, 0.25, rule, seed=1)
    assert all(torch.equal(a.mask(), again.patterns[n].mask()) for n, a in masks.patterns.items())


@pytest.mark.survives
def test_rewiring_without_gradients_is_an_error():
    model, _, masks = start()
    with held(model, masks) as guard, pytest.raises(ModelError, match="no gradient"):
        Rewiring(guard, Cosine(0.3, end=10, every=1)).rewire_(1)


@pytest.mark.survives
@pytest.mark.parametrize(
    ("field", "value"), [("density", 0), ("drop", 1.5), ("every", 0), ("allocation", "global"), ("grow", "weight")]
)
def test_a_value_out_of_range_names_its_field(field, value):
    with pytest.raises(RecipeError, match=field):
        Rewire(**{field: value})


# -- stages --------------------------------------------------------------------------------------------------------

NOISE = NoiseBatches()
QUICK = {"batch_size": 4, "context_length": 12, "warmup_steps": 2, "log_every": 1, "clip": 1e6, "learning_rate": 3e-3}
METHOD = {
    "static": Train(density=0.3, steps=5, **QUICK),
    "rigl": Rewire(density=0.3, steps=7, every=2, drop=0.5, **QUICK),
    "set": Rewire(method="set", density=0.3, steps=7, every=2, drop=0.5, **QUICK),
    "gradual": Gradual(density=0.3, steps=8, every=2, **QUICK),
    "tickets": Rewind(density=0.3, steps=4, rounds=2, rewind=1, **QUICK),
}


def trained(name, recipe, **options):
    return train_(tiny_loaded(name), recipe, NOISE, teacher=tiny_loaded(name), **options)


def pruned(density):
    return prune_(tiny_loaded(), Prune(method="magnitude", density=density))


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def masks_of(result):
    return {name: pattern.mask() for name, pattern in result.masks.patterns.items()}


def same_run(result, model, masks):
    """Whether a stage has the masks and, to the bit, the weights of a loop done by hand."""
    return same(parameters(result.model), parameters(model)) and same(
        masks_of(result), {name: pattern.mask() for name, pattern in masks.patterns.items()}
    )


def adamw(model, recipe):
    groups = [[p for p in model.parameters() if (p.dim() > 1) == wide] for wide in (True, False)]
    return torch.optim.AdamW([{"params": g} for g in groups if g], betas=recipe.adam_betas, weight_decay=0.0)


def slopes_(model, optimizer, recipe, step):
    """The plain part of a plain loop. Another way to this loss rounds otherwise, and masks follow that near ties."""
    for group in optimizer.param_groups:
        group["lr"] = recipe.learning_rate * learning_rate_factor(recipe, step)
    batch = NOISE.at(step, recipe.batch_size)
    optimizer.zero_grad()
    logits = model(batch.tokens).logits
    losses(logits, logits.detach(), batch.tokens, batch.counts, kl_weight=0.0, loss_weight=1.0).objective.backward()


@pytest.mark.matches
@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
@pytest.mark.parametrize("method", ["rigl", "set"])
def test_a_stage_that_rewires_is_rewired_around_a_plain_loop(name, method):
    recipe, loaded = METHOD[method], tiny_loaded(name)
    model, optimizer = loaded.model.requires_grad_(True), adamw(loaded.model, recipe)
    first = random_masks(matrices_of(loaded), recipe.density, "erk", recipe.seed)
    with rewired(model, first, optimizer, recipe) as rigl:
        for step in range(recipe.steps):
            rigl.prepare(step)
            slopes_(model, optimizer, recipe, step)
            if not rigl.rewire_(step):
                optimizer.step()
    result = trained(name, recipe)
    assert not same(masks_of(result), {n: p.mask() for n, p in first.patterns.items()})
    assert same_run(result, model, rigl.guard.masks())


@pytest.mark.matches
def test_a_gradual_stage_is_gradually_around_a_plain_loop():
    recipe, loaded = METHOD["gradual"], tiny_loaded()
    model, optimizer = loaded.model.requires_grad_(True), adamw(loaded.model, recipe)
    with gradually(model, matrices_of(loaded), optimizer, Cubic(0.3, start=0, end=6, every=2)) as pruner:
        for step in range(recipe.steps):
            slopes_(model, optimizer, recipe, step)
            optimizer.step()
            pruner.prune_(step)
    result = trained("llama", recipe)
    assert result.masks.density == pytest.approx(0.3, abs=1e-3)  # each matrix rounds by at most one entry
    assert same_run(result, model, pruner.guard.masks())


@pytest.mark.matches
@pytest.mark.parametrize("rewind", [0, 2])
@pytest.mark.parametrize("rule", ["uniform", "global"])
def test_a_stage_of_tickets_finds_the_ticket(rewind, rule):
    recipe = Rewind(density=0.3, steps=5, rounds=2, rewind=rewind, allocation=rule, **QUICK)
    loaded = tiny_loaded()
    model = loaded.model.requires_grad_(True)

    def train(masks, first, last):
        optimizer = adamw(model, recipe)
        with held(model, masks, optimizer):
            for step in range(first, last):
                slopes_(model, optimizer, recipe, step)
                optimizer.step()

    scope = {"uniform": "matrix", "global": "global"}[rule]
    plan = Tickets(rounds=2, rate=1 - 0.3**0.5, rewind=rewind, steps=5, scope=scope)
    ticket = find_ticket(loaded, plan, train)
    seen = []
    result = trained("llama", recipe, watch=seen.append)
    assert len(seen) == rewind + 3 * (5 - rewind)
    assert [round(record["density"], 2) for record in (seen[0], seen[5], seen[-1])] == [1.0, 0.55, 0.3]
    assert same_run(result, model, ticket.masks)


@pytest.mark.stays
@pytest.mark.parametrize("name", ["llama-gqa-4-to-1", "gemma3", "phi3", "olmo2", "gpt2", "gpt-neox", "opt"])
@pytest.mark.parametrize("method", METHOD)
def test_every_method_ends_at_its_density_with_its_zeros(name, method):
    result = trained(name, replace(METHOD[method], steps=3, every=1) if method in ("rigl", "set") else METHOD[method])
    result.check()
    assert result.masks.density == pytest.approx(0.3, abs=2e-3)  # each matrix rounds to whole entries
    for path, matrix in result.masks.matrices(result.model).items():
        assert int((matrix.weight != 0).sum()) >= 0.95 * result.masks.patterns[path].nnz  # what came last may be 0 yet
    assert result.masks.patterns.keys() == matrices_of(tiny_loaded(name)).keys()


@pytest.mark.stays
@pytest.mark.parametrize("structure", ["unstructured", "8x16"])
def test_static_keeps_its_random_mask_and_the_tokenizer_and_begins_where_it_is_told(structure):
    given = tiny_loaded()
    recipe = Train(density=0.3, steps=1, structure=structure, from_scratch=True, **{**QUICK, "learning_rate": 1e-30})
    result = train_(given, recipe, NOISE, teacher=tiny_loaded())
    first = random_masks(matrices_of(given), 0.3, "erk", 0, structure=structure)
    assert same(masks_of(result), {n: p.mask() for n, p in first.patterns.items()})
    assert {pattern.kind for pattern in result.masks.patterns.values()} == {structure}
    fresh = tiny_loaded()
    reinitialised_(fresh.model, 0)
    first.apply_(fresh.model)
    assert same(parameters(result.model), parameters(fresh.model))  # steps of 1e-30 move nothing
    assert result.tokenizer is given.tokenizer


@pytest.mark.stays
@pytest.mark.parametrize("method", ["rigl", "gradual", "tickets"])
def test_blocks_go_and_come_whole(method):
    result = trained("gpt2", replace(METHOD[method], structure="8x8"))
    assert {pattern.kind for pattern in result.masks.patterns.values()} == {"8x8"}
    assert result.masks.density == pytest.approx(0.3, abs=0.02)  # of 16 to 24 blocks a matrix


@pytest.mark.matches
def test_a_pruned_model_goes_on_from_its_own_masks():
    start = pruned(0.3)
    zeros = masks_of(start)
    held_ = train_(start, METHOD["static"], NOISE, teacher=tiny_loaded())
    assert same(masks_of(held_), zeros)
    moved = train_(pruned(0.3), METHOD["rigl"], NOISE, teacher=tiny_loaded())
    assert moved.masks.nnz == start.masks.nnz
    assert not same(masks_of(moved), zeros)
    closed = masks_of(train_(pruned(0.5), METHOD["gradual"], NOISE, teacher=tiny_loaded()))
    assert not any((mask & ~masks_of(pruned(0.5))[name]).any() for name, mask in closed.items())


@pytest.mark.matches
def test_prices_and_dense_matrices_are_heard():
    price = ("down_proj=4", "up_proj=4", "gate_proj=4")
    result = trained("llama", replace(METHOD["static"], allocation="cost", price=price, keep_dense=("q_proj",)))
    density = {name.rpartition(".")[2]: p.density for name, p in result.masks.patterns.items()}
    assert "q_proj" not in density
    assert density["o_proj"] / density["up_proj"] == pytest.approx(2, rel=0.01)  # price^(-1/2); entries are whole


@pytest.mark.matches
def test_towards_the_dense_model_it_is_distillation():
    recipe = replace(METHOD["rigl"], kl_weight=1.0, loss_weight=0.0, steps=3, every=1)
    seen = []
    trained("llama", recipe, watch=seen.append)
    assert all(record["loss"] == record["kl"] > 0 for record in seen)
    quiet = replace(METHOD["rigl"], log_every=5)  # between records nobody reads the dense model
    assert same(parameters(trained("llama", quiet).model), parameters(trained("llama", METHOD["rigl"]).model))


@pytest.mark.reproduces
@pytest.mark.parametrize("method", METHOD)
def test_a_stage_stopped_after_every_step_gives_the_same_bits(tmp_path, method):
    recipe = replace(
        METHOD[method], from_scratch=method != "gradual", structure="8x8" if method == "set" else "unstructured"
    )
    seen, wanted = [], trained("llama", recipe)
    for _ in range(20):
        now = trained("llama", recipe, folder=tmp_path, pause_minutes=0.0, watch=seen.append)
        if now.finished:
            break
    assert [record["step"] for record in seen] == list(range(1, len(seen) + 1))
    assert seen[-1]["progress"] == 1
    assert same(parameters(now.model), parameters(wanted.model))
    assert same(masks_of(now), masks_of(wanted))


@pytest.mark.survives
def test_a_model_that_does_not_fit_is_refused_and_left_alone():
    for method in ("rigl", "static", "tickets"):
        start = pruned(0.5)
        before = parameters(start.model)
        with pytest.raises(RecipeError, match=r"already pruned, to density 0\.5000"):
            train_(start, replace(METHOD[method], from_scratch=True), NOISE, teacher=tiny_loaded())
        assert same(parameters(start.model), before)
    for change in ({"structure": "8x8"}, {"keep_dense": ("q_proj",)}):
        with pytest.raises(RecipeError, match="already pruned"):
            train_(pruned(0.3), replace(METHOD["rigl"], **change), NOISE, teacher=tiny_loaded())
    with pytest.raises(RecipeError, match=r"price 'nobody=2'"):
        trained("llama", replace(METHOD["static"], allocation="cost", price=("nobody=2",)))
    with pytest.raises(RecipeError, match="price"):
        trained("llama", replace(METHOD["static"], price=("up_proj=2",)))
    with pytest.raises(RecipeError, match="does not divide"):
        trained("llama", replace(METHOD["rigl"], structure="7x7"))
    with pytest.raises(RecipeError, match="quantize last"):
        train_(quantize_(tiny_loaded(), Quantize()), METHOD["rigl"], NOISE, teacher=tiny_loaded())


@pytest.mark.says
def test_a_method_is_a_row_and_nothing_else(monkeypatch):
    monkeypatch.setitem(TRAINED, "fading", Method("random", group="row", schedule="cubic", update="train"))
    monkeypatch.setitem(TRAINED, "restless", Method("random", schedule="cosine", update="train", grow="magnitude"))
    monkeypatch.setitem(TRAINED, "clairvoyant", Method("gradient", update="train"))
    faded = trained("llama", Gradual(method="fading", density=0.25, steps=8, **QUICK))
    for pattern in faded.masks.patterns.values():
        rows = pattern.mask().sum(1)
        assert (rows == rows[0]).all()
        assert pattern.density == pytest.approx(0.25, abs=0.04)  # a row rounds to whole entries
    moved = trained("llama", Rewire(method="restless", steps=12, **QUICK))
    assert not same(masks_of(moved), masks_of(trained("llama", Train(steps=1, **QUICK))))
    with pytest.raises(RecipeError, match="nothing has measured"):
        trained("llama", Train(method="clairvoyant", **QUICK))
    with pytest.raises(RecipeError, match=r"method.*fading"):
        Rewire(method="fading")
