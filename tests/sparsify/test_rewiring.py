"""RigL: every update over ten steps against the slow oracle, and what never changes."""

import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewedges.errors import ModelError, RecipeError
from fewedges.sparsify.masks import held
from fewedges.sparsify.matrices import matrices_of
from fewedges.sparsify.rewiring import Rewiring, moved, random_masks, rewired
from fewedges.sparsify.schedule import Cosine
from fewedges.weight_recipes import Rewire
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
