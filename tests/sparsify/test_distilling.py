"""The losses, and the gradients they form by hand, against plain autograd in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fewedges.sparsify import distilling
from fewedges.sparsify.distilling import losses

WEIGHTS = [(1.0, 0.0), (0.0, 1.0), (1.0, 0.1), (0.3, 2.0)]
EXACT = 7e-15  # float64; measured at most 1.8e-15


def inputs(batch=3, length=6, vocabulary=11, seed=0, dtype=torch.float64):
    """Logits of student and dense model, tokens, and a mask with holes in it."""
    torch.manual_seed(seed)
    student, dense = (3 * torch.randn(batch, length, vocabulary, dtype=dtype) for _ in range(2))
    tokens = torch.randint(0, vocabulary, (batch, length))
    counts = torch.rand(batch, length) < 0.6
    counts[:, 0] = False
    counts[0, 1] = True
    return student.requires_grad_(), dense, tokens, counts


def plain(student, dense, tokens, counts, kl_weight, loss_weight):
    """The same by torch's own functions and autograd: prediction t is of token t + 1."""
    keep = counts[:, 1:]
    q, p = (F.log_softmax(x[:, :-1], -1)[keep] for x in (student, dense))
    kl = F.kl_div(q, p, log_target=True, reduction="batchmean")
    cross_entropy, dense_cross_entropy = (F.nll_loss(x, tokens[:, 1:][keep]) for x in (q, p))
    return kl_weight * kl + loss_weight * cross_entropy, kl, cross_entropy, dense_cross_entropy


@pytest.mark.matches
@pytest.mark.parametrize(("kl_weight", "loss_weight"), WEIGHTS)
def test_values_and_gradients_are_those_of_plain_autograd(kl_weight, loss_weight):
    student, dense, tokens, counts = inputs()
    mine = losses(student, dense, tokens, counts, kl_weight=kl_weight, loss_weight=loss_weight)
    wanted = plain(student, dense, tokens, counts, kl_weight, loss_weight)
    for name, a, b in zip(mine._fields, mine, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=EXACT, msg=lambda text, name=name: f"{name}: {text}")
    slopes = [torch.autograd.grad(3 * x, student)[0] for x in (mine.objective, wanted[0])]
    torch.testing.assert_close(*slopes, rtol=0, atol=EXACT)
    assert slopes[0].abs().max() > 0.01


@pytest.mark.matches
def test_the_gradient_is_the_finite_difference():
    student, dense, tokens, counts = inputs(batch=2, length=4, vocabulary=5)

    def objective(x):
        return losses(x, dense, tokens, counts, kl_weight=0.7, loss_weight=0.4).objective

    assert torch.autograd.gradcheck(objective, (student,))


@pytest.mark.matches
def test_only_the_objective_carries_a_gradient():
    found = losses(*inputs(), kl_weight=1.0, loss_weight=0.5)
    assert found.objective.requires_grad
    assert not any(x.requires_grad for x in found[1:])


@pytest.mark.stays
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(2, 6))
@settings(max_examples=25, deadline=None)
def test_what_is_masked_changes_nothing(seed, batch, length):
    student, dense, tokens, counts = inputs(batch, length, seed=seed)
    before = losses(student, dense, tokens, counts, loss_weight=0.5)
    (slope,) = torch.autograd.grad(before.objective, student)
    masked = torch.cat([~counts[:, 1:], torch.ones(batch, 1, dtype=torch.bool)], dim=1)  # by the position that predicts
    noise = torch.randn_like(student) * masked[..., None]
    other = torch.where(counts, tokens, (tokens + 1) % 11)
    after = losses(student.detach() + noise, dense - noise, other, counts, loss_weight=0.5)
    for a, b in zip(after, before, strict=True):
        assert torch.equal(a, b.detach())
    assert slope[masked].abs().max() == 0
    assert (slope[~masked].abs().amax(-1) > 0).all()


@pytest.mark.stays
@given(st.integers(0, 10_000), st.floats(0, 2), st.floats(0, 2))
@settings(max_examples=25, deadline=None)
def test_kl_is_never_negative_and_0_between_equals(seed, kl_weight, loss_weight):
    student, dense, tokens, counts = inputs(seed=seed)
    found = losses(student, dense, tokens, counts, kl_weight=kl_weight, loss_weight=loss_weight)
    assert found.kl > 0
    same = losses(student, student.detach(), tokens, counts, kl_weight=1.0)
    assert same.kl == 0
    assert same.cross_entropy == same.dense_cross_entropy
    assert torch.autograd.grad(same.objective, student)[0].abs().max() == 0


@pytest.mark.matches
def test_micro_batches_add_up_to_the_batch():
    student, dense, tokens, counts = inputs(batch=5)
    whole = losses(student, dense, tokens, counts, loss_weight=0.5)
    (slope,) = torch.autograd.grad(whole.objective, student)
    total = int(counts[:, 1:].sum())
    parts = []
    for rows in (slice(0, 2), slice(2, 3), slice(3, 5)):
        part = losses(student[rows], dense[rows], tokens[rows], counts[rows], loss_weight=0.5, total=total)
        part.objective.backward()
        parts.append(part)
    for name, values, wanted in zip(whole._fields, zip(*parts, strict=True), whole, strict=True):
        assert float(sum(values).detach()) == pytest.approx(float(wanted.detach()), abs=EXACT), name
    torch.testing.assert_close(student.grad, slope, rtol=0, atol=EXACT)


@pytest.mark.matches
@pytest.mark.parametrize("chunk", [1, 6 * 11, 2 * 6 * 11 + 5, 10**9])
def test_chunking_changes_no_result(monkeypatch, chunk):
    student, dense, tokens, counts = inputs(batch=5)
    wanted = plain(student, dense, tokens, counts, 1.0, 0.5)
    monkeypatch.setattr(distilling, "CHUNK", chunk)
    pieces = []
    monkeypatch.setattr(distilling, "_compare", _noting(pieces, distilling._compare))
    found = losses(student, dense, tokens, counts, loss_weight=0.5)
    assert pieces == {1: [1] * 5, 66: [1] * 5, 137: [2, 2, 1], 10**9: [5]}[chunk]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=EXACT)
    slopes = [torch.autograd.grad(x, student)[0] for x in (found.objective, wanted[0])]
    torch.testing.assert_close(*slopes, rtol=0, atol=EXACT)


def _noting(pieces, compare):
    def noted(student, *rest):
        pieces.append(len(student))
        return compare(student, *rest)

    return noted


@pytest.mark.survives
def test_nothing_counted_is_0_not_a_division_by_0():
    student, dense, tokens, counts = inputs()
    found = losses(student, dense, tokens, torch.zeros_like(counts), loss_weight=1.0)
    assert all(x == 0 for x in found)
    assert torch.autograd.grad(found.objective, student)[0].abs().max() == 0


@pytest.mark.survives
def test_probabilities_that_underflow_stay_finite():
    student, dense, tokens, counts = inputs(dtype=torch.float32)
    found = losses((1e4 * student).detach().requires_grad_(), 1e4 * dense, tokens, counts, loss_weight=1.0)
    assert all(torch.isfinite(x) for x in found)


@pytest.mark.matches
def test_half_precision_logits_are_compared_in_float32():
    student, dense, tokens, counts = inputs(dtype=torch.float32)
    half = student.detach().bfloat16().requires_grad_()
    found = losses(half, dense.bfloat16(), tokens, counts, loss_weight=0.5)
    wide = half.detach().float().requires_grad_()
    wanted = losses(wide, dense.bfloat16().float(), tokens, counts, loss_weight=0.5)
    assert [x.dtype for x in found] == [torch.float32] * 4
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    slope, wide_slope = torch.autograd.grad(found.objective, half)[0], torch.autograd.grad(wanted.objective, wide)[0]
    assert slope.dtype == torch.bfloat16
    assert torch.equal(slope, wide_slope.bfloat16())


@pytest.mark.matches
def test_without_gradients_the_values_are_the_same():
    student, dense, tokens, counts = inputs()
    with torch.no_grad():
        quiet = losses(student, dense, tokens, counts)
    assert all(torch.equal(a, b) for a, b in zip(quiet, losses(student, dense, tokens, counts), strict=True))
    assert not quiet.objective.requires_grad
