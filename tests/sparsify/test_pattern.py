"""Patterns: counts, cover and bytes against loops over the mask, and what stays when a pattern is moved."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewedges.errors import RecipeError
from fewedges.sparsify.pattern import NM, Blocks, Pattern, dense, of_kind, of_kind_if_so

shapes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))


def random_mask(shape, density, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def slow_layout(mask, b):
    """By visiting every block."""
    rows, columns = mask.shape
    return np.array([[mask[i : i + b, j : j + b].any() for j in range(0, columns, b)] for i in range(0, rows, b)])


@pytest.mark.matches
@pytest.mark.parametrize("b", [1, 2, 3, 4, 20])
def test_cover_is_the_fraction_of_blocks_that_a_visit_finds_touched(b):
    mask = random_mask((13, 10), 0.15, seed=3)
    pattern, wanted = Pattern(mask), slow_layout(mask.numpy(), b)
    assert (pattern.layout(b).numpy() == wanted).all()
    assert pattern.cover(b) == pytest.approx(wanted.mean(), abs=1e-7)  # measured 3e-8, float32
    assert pattern.flops(7, b) == 2 * 7 * wanted.sum() * b * b
    assert pattern.flops(7) == 2 * 7 * mask.sum()


@pytest.mark.matches
@pytest.mark.parametrize(("b", "published"), [(4, 0.15), (8, 0.47), (16, 0.92)])
def test_one_percent_at_random_touches_most_blocks(b, published):
    pattern = Pattern(random_mask((512, 512), 0.01, seed=0))
    assert pattern.cover(b) == pytest.approx(1 - 0.99 ** (b * b), abs=0.02)  # measured .009 at most
    assert pattern.cover(b) == pytest.approx(published, abs=0.02)


@pytest.mark.stays
@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(1, 4), st.floats(0, 1), st.integers(0, 999))
def test_cover_lies_between_density_and_what_scattering_could_touch(shape, b, density, seed):
    lead, r, c = shape
    pattern = Pattern(random_mask((lead, r * b, c * b), density, seed))
    assert pattern.density - 1e-6 <= pattern.cover(b) <= min(1, b * b * pattern.density) + 1e-6
    assert pattern.cover(1) == pytest.approx(pattern.density, abs=1e-6)
    assert pattern.nnz == int(pattern.mask().sum())


@pytest.mark.stays
@settings(max_examples=40, deadline=None)
@given(shapes, st.floats(0, 1), st.integers(0, 999))
def test_moving_rows_and_columns_moves_the_mask_and_keeps_the_count(shape, density, seed):
    torch.manual_seed(seed)
    pattern = Pattern(random_mask(shape, density, seed))
    rows, columns = torch.randperm(shape[1]), torch.randperm(shape[2])
    moved = pattern.permute(rows, columns)
    assert moved.nnz == pattern.nnz
    assert torch.equal(moved.mask(), pattern.mask()[:, rows][:, :, columns])
    back = moved.permute(torch.argsort(rows), torch.argsort(columns))
    assert torch.equal(back.mask(), pattern.mask())


@pytest.mark.stays
@settings(max_examples=30, deadline=None)
@given(shapes, st.integers(0, 999))
def test_union_and_intersection_are_those_of_sets(shape, seed):
    a, b = Pattern(random_mask(shape, 0.4, seed)), Pattern(random_mask(shape, 0.4, seed + 1))
    assert (a | b).nnz + (a & b).nnz == a.nnz + b.nnz
    assert torch.equal((a | b).mask(), a.mask() | b.mask())


@pytest.mark.matches
def test_causal_and_tile():
    square = dense((5, 5)).causal()
    assert square.nnz == 15
    assert not square.mask()[0, 1]
    tiled = Pattern(torch.eye(2, dtype=torch.bool)).tile(3, 5)
    assert tiled.mask().int().tolist() == [[1, 0, 1, 0, 1], [0, 1, 0, 1, 0], [1, 0, 1, 0, 1]]


@pytest.mark.matches
def test_blocks_are_their_stretched_layout():
    layout = torch.tensor([[True, False, True], [False, False, True]])
    blocks = Blocks(layout, 2, 4)
    assert blocks.shape == (4, 12)
    assert torch.equal(blocks.mask(), torch.kron(layout.int(), torch.ones(2, 4, dtype=torch.int)).bool())
    assert (blocks.nnz, blocks.density) == (24, 0.5)
    assert blocks.bytes(torch.float16) == 3 * (8 * 2 + 4) + 3 * 4  # three blocks and their columns, three pointers


@pytest.mark.matches
def test_bytes_of_each_kind_by_hand():
    mask = torch.zeros(8, 64, dtype=torch.bool)
    mask[:, ::2] = True
    half = Pattern(mask)
    assert half.bytes(torch.float32) == 256 * 4 + 512 // 8  # a bitmap beats 256 indices
    few = torch.zeros(64, 640, dtype=torch.bool)
    few[0, :5] = True
    assert Pattern(few).bytes(torch.float16) == 5 * 2 + 5 * 4 + 65 * 4  # compressed rows beat 5,120 bytes of bitmap
    assert half.bytes(torch.float32, b=8) == 8 * (64 * 4 + 4) + 2 * 4
    nm = NM(mask, 2, 4)
    assert nm.bytes(torch.bfloat16) == 256 * 2 + 256 * 2 // 8  # 9/16 of dense
    assert nm.bytes(4) == 128 + 64
    assert dense((8, 64)).bytes(torch.float32) == 8 * 64 * 4


PATTERNS = {
    "unstructured": lambda: Pattern(random_mask((8, 12), 0.4, seed=1)),
    "2:4": lambda: NM(torch.tensor([True, False, False, True]).repeat(8, 3), 2, 4),
    "4x3": lambda: Blocks(random_mask((2, 4), 0.5, seed=2), 4, 3),
    "dense": lambda: dense((8, 12)),
}


@pytest.mark.stays
@pytest.mark.parametrize("kind", PATTERNS)
def test_a_mask_and_its_kind_are_the_pattern(kind):
    pattern = PATTERNS[kind]()
    again = of_kind(pattern.mask(), pattern.kind)
    assert (pattern.kind, type(again)) == (kind, type(pattern))
    assert torch.equal(again.mask(), pattern.mask())
    assert again.bytes() == pattern.bytes()


@pytest.mark.survives
@pytest.mark.parametrize("kind", ["2:4", "4x3", "5x5", "dense", "3:5", "channel"])
def test_a_mask_that_is_not_of_its_kind_is_refused(kind):
    mask = random_mask((8, 12), 0.6, seed=1)
    with pytest.raises(RecipeError):
        of_kind(mask, kind)
    assert type(of_kind_if_so(mask, kind)) is Pattern


@pytest.mark.survives
@pytest.mark.parametrize(
    "make",
    [
        lambda: Pattern(torch.ones(3, 3)),
        lambda: Pattern(torch.ones(3, dtype=torch.bool)),
        lambda: NM(torch.ones(2, 4, dtype=torch.bool), 2, 4),
        lambda: NM(torch.zeros(2, 6, dtype=torch.bool), 2, 4),
        lambda: dense((2, 2)) | dense((2, 3)),
        lambda: dense((2, 2)).cover(0),
    ],
)
def test_what_is_no_pattern_is_refused(make):
    with pytest.raises(RecipeError, match="Try: "):
        make()


@pytest.mark.says
def test_a_pattern_says_its_density_and_cover():
    text = str(Pattern(random_mask((64, 64), 0.01, seed=0)))
    assert "64x64" in text
    assert "cover(16)" in text
    assert math.isclose(float(text.split("density ")[1][:6]), 0.01, abs_tol=0.005)
