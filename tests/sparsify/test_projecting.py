"""Projection: exact where the matrix is of the form, never worse from round to round, each step a least squares."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewedges.errors import ModelError, RecipeError
from fewedges.sparsify.butterfly import PixelatedLinear, Plan
from fewedges.sparsify.projecting import fill_, project

PLAN = Plan(8, 2, 3)


def inputs(columns, count, seed=0):
    """Correlated inputs (C, count)."""
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=rng, dtype=torch.double)
    return mixing @ torch.randn(columns, count, generator=rng, dtype=torch.double)


def rebuilt(weight, plan, gram=None, **options):
    """The matrix of a layer filled with the projection, and the projection."""
    rows, columns = weight.shape
    fit = project(weight, plan, gram, **options)
    layer = PixelatedLinear(columns, rows, plan, bias=False).to(weight.dtype)
    fill_(layer, fit)
    return layer.weight.detach(), fit


@pytest.mark.matches
@pytest.mark.parametrize("layout", ["butterfly", "random"])
def test_without_low_rank_it_keeps_the_live_entries(layout):
    weight, plan = torch.randn(24, 32), Plan(8, 2, 0, layout)
    found, fit = rebuilt(weight, plan)
    kept = plan.pattern(24, 32).mask()
    assert torch.equal(found, torch.where(kept, weight, 0))
    assert fit.error == pytest.approx(float((weight * ~kept).norm() / weight.norm()), abs=1e-6)  # measured 1e-8


@pytest.mark.matches
def test_without_a_butterfly_it_is_the_truncated_svd():
    weight = torch.randn(24, 32, dtype=torch.double) @ torch.diag(torch.linspace(1, 8, 32).double())
    found, fit = rebuilt(weight, Plan(0, 0, 5))
    s = torch.linalg.svdvals(weight)
    best = float(s[5:].norm() / s.norm())
    assert fit.error == pytest.approx(best, rel=1.6e-5)  # a sketch refined twice; measured 4e-6 above
    assert fit.error >= best - 1e-12
    assert float((weight - found).norm() / weight.norm()) == pytest.approx(fit.error, abs=1e-12)


@pytest.mark.matches
def test_a_matrix_of_the_form_is_recovered():
    torch.manual_seed(0)
    made = PixelatedLinear(64, 48, Plan(16, 2, 2), bias=False).double().weight.detach()
    found, fit = rebuilt(made, Plan(16, 2, 2), rounds=200)
    assert fit.error < 2e-15  # measured 5.4e-16
    assert (found - made).abs().max() < 2e-15


@pytest.mark.stays
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.booleans(), st.integers(1, 6), st.integers(1, 4))
def test_the_error_never_rises_and_is_that_of_the_layer(seed, with_inputs, rank, height):
    torch.manual_seed(seed)
    weight = torch.randn(8 * height, 16, dtype=torch.double)
    x = inputs(16, 40, seed)
    gram = x @ x.T if with_inputs else None
    found, fit = rebuilt(weight, Plan(8, 1, min(rank, 8 * height)), gram, rounds=6, damping=0)
    assert all(b <= a + 1e-12 for a, b in zip(fit.errors, fit.errors[1:], strict=False))
    metric = x if with_inputs else torch.eye(16, dtype=torch.double)
    slow = float(((weight - found) @ metric).norm() / (weight @ metric).norm())
    assert slow == pytest.approx(fit.error, abs=1e-9)


@pytest.mark.matches
def test_the_sparse_step_is_a_least_squares_of_every_row():
    """With no low rank: numpy's lstsq on the live inputs of each output."""
    weight, x = torch.randn(16, 32, dtype=torch.double), inputs(32, 100)
    plan = Plan(8, 2, 0)
    found, _ = rebuilt(weight, plan, x @ x.T, damping=0)
    kept, data = plan.pattern(16, 32).mask().numpy(), x.numpy()
    for row in range(16):
        live = np.flatnonzero(kept[row])
        wanted, *_ = np.linalg.lstsq(data[live].T, data.T @ weight[row].numpy(), rcond=None)
        np.testing.assert_allclose(found[row, live], wanted, rtol=1e-8, atol=1e-9)  # measured 3e-10


@pytest.mark.stays
def test_inputs_and_both_terms_help():
    torch.manual_seed(1)
    weight, x = torch.randn(64, 64, dtype=torch.double), inputs(64, 300)

    def error(plan, gram):
        found, _ = rebuilt(weight, plan, gram)
        return float(((weight - found) @ x).norm() / (weight @ x).norm())

    both, aware = Plan(8, 1, 4), x @ x.T
    assert error(both, aware) < 0.9 * error(both, None)  # measured .75 of it
    assert error(both, aware) < min(error(Plan(8, 1, 0), aware), error(Plan(0, 0, 4), aware))
    assert error(both, None) < min(error(Plan(8, 1, 0), None), error(Plan(0, 0, 4), None))


@pytest.mark.survives
def test_a_singular_gram_is_an_error_and_not_another_method():
    x = torch.randn(32, 3, dtype=torch.double)
    gram = x @ x.T - 0.1 * torch.eye(32)
    with pytest.raises(ModelError, match="not positive definite"):
        project(torch.randn(16, 32, dtype=torch.double), PLAN, gram, damping=0)
    assert project(torch.randn(16, 32, dtype=torch.double), PLAN, x @ x.T).error < 1  # damped it is


@pytest.mark.survives
def test_a_zero_matrix_and_a_rank_above_the_sides_are_met():
    found, fit = rebuilt(torch.zeros(16, 32), Plan(8, 1, 2))
    assert not found.any()
    assert fit.error == 0
    with pytest.raises(RecipeError, match="rank"):
        project(torch.randn(4, 32), Plan(4, 1, 5))
