"""The one top-k: exact budgets, ties, groups, structures, against plain sorting."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewedges.errors import ModelError, RecipeError
from fewedges.sparsify.select import keep_largest, kept_units, select, select_global
from fewedges.weight_recipes import Structure

sizes = st.tuples(st.integers(1, 6), st.integers(1, 12))
densities = st.integers(0, 1000).map(lambda k: k / 1000)


def scores(shape, seed, levels=None):
    generator = torch.Generator().manual_seed(seed)
    if levels is None:
        return torch.rand(shape, generator=generator)
    return torch.randint(0, levels, shape, generator=generator).float()


def slow(score, kept):
    """Zero from the front of a stable ascending sort."""
    mask = np.ones(score.size, bool)
    mask[np.argsort(score.ravel(), kind="stable")[: score.size - kept]] = False
    return mask.reshape(score.shape)


@pytest.mark.matches
@settings(max_examples=80, deadline=None)
@given(sizes, densities, st.integers(0, 999), st.sampled_from([None, 1, 2, 5]))
def test_equal_to_a_stable_sort_ties_and_all(size, density, seed, levels):
    score = scores(size, seed, levels)
    pattern = select(score, "unstructured", density)
    wanted = score.numel() - math.floor(score.numel() * (1 - Fraction(str(density))))
    assert pattern.nnz == wanted
    assert (pattern.mask().numpy() == slow(score.numpy(), wanted)).all()


@pytest.mark.matches
@settings(max_examples=50, deadline=None)
@given(sizes, densities, st.integers(0, 999), st.sampled_from([None, 2]))
def test_rows_are_each_a_group(size, density, seed, levels):
    score = scores(size, seed, levels)
    found = select(score, "unstructured", density, "row").mask().numpy()
    kept = kept_units(size[1], density)
    assert (found == np.stack([slow(row, kept) for row in score.numpy()])).all()


@pytest.mark.stays
@settings(max_examples=50, deadline=None)
@given(sizes, densities, st.integers(0, 999), st.sampled_from(["matrix", "row"]))
def test_permuting_the_scores_permutes_the_pattern(size, density, seed, group):
    torch.manual_seed(seed)
    score = scores(size, seed)
    rows, columns = torch.randperm(size[0]), torch.randperm(size[1])
    moved = select(score[rows][:, columns], "unstructured", density, group)
    assert torch.equal(moved.mask(), select(score, "unstructured", density, group).permute(rows, columns).mask())


@pytest.mark.stays
@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 8), st.integers(0, 999), st.sampled_from([None, 2]))
def test_n_of_every_m_are_kept_and_they_are_the_highest(rows, groups, m, seed, levels):
    n = 1 + seed % m
    score = scores((rows, groups * m), seed, levels)
    mask = select(score, f"{n}:{m}").mask().view(rows, groups, m)
    assert (mask.sum(-1) == n).all()
    lowest_kept = score.view_as(mask).masked_fill(~mask, torch.inf).amin(-1)
    highest_gone = score.view_as(mask).masked_fill(mask, -torch.inf).amax(-1)
    assert (lowest_kept >= highest_gone).all()


@pytest.mark.matches
@pytest.mark.parametrize("group", ["matrix", "row"])
def test_a_block_is_worth_the_sum_of_its_entries(group):
    score = scores((6, 8), seed=1)
    pattern = select(score, "2x4", 0.5, group)
    sums = np.array([[score[2 * i : 2 * i + 2, 4 * j : 4 * j + 4].sum() for j in range(2)] for i in range(3)])
    wanted = slow(sums, 3) if group == "matrix" else np.stack([slow(row, 1) for row in sums])
    assert (pattern.kept.numpy() == wanted).all()
    assert pattern.nnz == 24
    assert pattern.shape == (6, 8)


@pytest.mark.matches
def test_globally_means_over_the_joined_scores():
    given_scores = {"a": scores((4, 6), 0), "b": 3 * scores((5, 2), 1), "c": scores((1, 7), 2)}
    found = select_global(given_scores, "unstructured", 0.3)
    line = np.concatenate([x.numpy().ravel() for x in given_scores.values()])
    wanted = np.split(slow(line, kept_units(len(line), 0.3)), [24, 34])
    for (_, pattern), mask in zip(found.items(), wanted, strict=True):
        assert (pattern.mask().numpy().ravel() == mask).all()
    assert found["b"].density > found["a"].density


@pytest.mark.stays
@pytest.mark.parametrize("density", [0.9, 0.7, 0.6, 0.1])
def test_a_decimal_means_what_it_says(density):
    """1 - .9 is .09999999999999998 in binary; ten entries at .9 are nine."""
    assert kept_units(10, density) == round(10 * density)
    assert kept_units(1000, density) == round(1000 * density)


@pytest.mark.stays
def test_a_count_is_a_budget_and_what_is_forbidden_goes_first():
    score = torch.tensor([[3.0, -torch.inf, 1.0, 2.0]])
    assert select(score, "unstructured", 2).mask().tolist() == [[True, False, False, True]]
    assert select(score, "unstructured", 0).nnz == 0
    assert select(score, "unstructured", 4).nnz == 4


@pytest.mark.survives
def test_half_precision_scores_are_compared():
    mask = keep_largest(torch.tensor([1.0, 3.0, 2.0], dtype=torch.bfloat16), 1)
    assert mask.tolist() == [False, True, False]


@pytest.mark.survives
def test_nan_is_an_error():
    with pytest.raises(ModelError, match="1 scores are NaN"):
        select(torch.tensor([[1.0, torch.nan]]), "unstructured", 0.5)


@pytest.mark.survives
@pytest.mark.parametrize(
    ("structure", "budget"),
    [("3:4", None), ("5x5", 0.5), ("head", 0.5), ("unstructured", None), ("unstructured", 1.5), ("unstructured", 99)],
)
def test_what_cannot_be_selected_is_refused(structure, budget):
    with pytest.raises(RecipeError, match="Try: "):
        select(torch.rand(4, 6), structure, budget)


@pytest.mark.survives
@pytest.mark.parametrize("text", ["4:2", "0:4", "2;4", "x", "16x", "0x4", "layer", ""])
def test_a_structure_that_cannot_be_read_is_refused(text):
    with pytest.raises(RecipeError, match="2:4"):
        Structure.parse(text)


@pytest.mark.says
@pytest.mark.parametrize("text", ["unstructured", "2:4", "16x32", "head", "channel"])
def test_a_structure_prints_as_it_was_written(text):
    assert str(Structure.parse(text)) == text
