"""Products of kept blocks against the dense matrix with its zeros, on the CPU through Triton's interpreter.

The interpreter cannot multiply bfloat16 matrices: benchmarks/blocks.py checks those on a GPU.
"""

import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewedges.errors import ModelError, RecipeError
from fewedges.sparsify import block_kernel
from fewedges.sparsify.block_kernel import (
    BlockTile,
    BlockTiles,
    SampleTile,
    block_product,
    gather_blocks,
    index_blocks,
    scatter_blocks,
)
from fewedges.sparsify.butterfly import flat_butterfly
from fewedges.sparsify.pattern import Blocks, Pattern

DEVICE = "fewedges.sparsify.block_device"


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Device functions built anew for the interpreter, whoever imported what before."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    sys.modules.pop(DEVICE, None)
    yield
    sys.modules.pop(DEVICE, None)


def pattern(b, rows, columns, density, seed=0):
    """Random blocks; one row and one column are empty where there is room for that."""
    layout = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density
    if min(rows, columns) > 2:
        layout[1] = layout[:, 2] = False
    return Blocks(layout, b, b)


def errors(index, tokens, dtype=torch.float32, tiles=None):
    """Relative 2-norms of the result and both gradients, against float64."""
    torch.manual_seed(0)
    x = torch.randn(tokens, index.shape[1]).to(dtype)
    values = torch.randn(index.blocks, index.block, index.block).to(dtype)
    pull = torch.randn(tokens, index.shape[0]).to(dtype)
    found = []
    for kernel, kind in (("triton", dtype), ("reference", torch.double)):
        given = [t.detach().to(kind).requires_grad_() for t in (x, values)]
        y = block_product(*given, index, kernel=kernel, tiles=tiles if kernel == "triton" else None)
        found.append([y.detach(), *torch.autograd.grad(y, given, pull.to(kind))])
    return [float((a.double() - b).norm() / b.norm().clamp_min(1e-12)) for a, b in zip(*found, strict=True)]


@pytest.mark.matches
@pytest.mark.parametrize("tokens", [70, 64, 1])
@pytest.mark.parametrize(("b", "rows", "columns"), [(32, 4, 5), (64, 3, 4), (128, 2, 3)])
def test_float32_matches_the_dense_matrix(b, rows, columns, tokens):
    found = errors(index_blocks(pattern(b, rows, columns, 0.6), b), tokens)
    assert max(found) < 5e-7, found  # measured 1.3e-7


@pytest.mark.matches
@pytest.mark.parametrize("b", [32, 64])
def test_float16_matches_the_dense_matrix(b):
    found = errors(index_blocks(pattern(b, 4, 5, 0.6), b), 70, torch.float16)
    assert max(found) < 8e-4, found  # measured 2.1e-4: the rounding of the results


@pytest.mark.matches
@pytest.mark.parametrize("shared", [1, 2, 4])
@pytest.mark.parametrize(("swap", "depth", "band"), [(False, 64, 1), (True, 64, 2), (True, 16, 3), (False, 32, 5)])
def test_tiles_do_not_matter(swap, depth, band, shared):
    tile = BlockTile(16, depth, 1, 1, swap, band)
    tiles = BlockTiles(tile, tile._replace(rows=32), SampleTile(shared, depth, 1, 1))
    found = errors(index_blocks(pattern(64, 4, 6, 0.7), 64), 70, tiles=tiles)
    assert max(found) < 5e-7, found  # measured 1.5e-7


@pytest.mark.matches
def test_a_butterfly_and_a_full_matrix_are_patterns_too():
    for kept in (flat_butterfly(128, 256, 4, 1), Pattern(torch.ones(64, 96, dtype=torch.bool))):
        index = index_blocks(kept, 32)
        assert index.density == kept.density
        assert max(errors(index, 20)) < 5e-7  # measured 1.1e-7


@pytest.mark.stays
def test_nothing_kept_or_no_token_is_zero():
    index = index_blocks(Blocks(torch.zeros(2, 3, dtype=torch.bool), 32, 32), 32)
    x, values = torch.randn(5, 96, requires_grad=True), torch.zeros(0, 32, 32, requires_grad=True)
    y = block_product(x, values, index, kernel="triton")
    assert y.shape == (5, 64)
    grads = torch.autograd.grad(y.sum(), [x, values])
    assert not y.any()
    assert not grads[0].any()
    index = index_blocks(pattern(32, 2, 2, 1.0), 32)
    x, values = torch.zeros(0, 64, requires_grad=True), torch.randn(4, 32, 32, requires_grad=True)
    assert not torch.autograd.grad(block_product(x, values, index, kernel="triton").sum(), values)[0].any()


@pytest.mark.stays
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.floats(0, 1), st.integers(0, 99))
def test_the_index_is_the_layout_by_rows_and_by_columns(rows, columns, density, seed):
    kept = pattern(32, rows, columns, density, seed)
    index = index_blocks(kept, 32)
    at = list(zip(index.rows.tolist(), index.columns.tolist(), strict=True))
    assert [list(x) for x in at] == kept.kept.nonzero().tolist()
    counts = index.turned_start.diff()
    assert torch.equal(counts, kept.kept.sum(0).int())
    turned = torch.arange(columns).repeat_interleave(counts).tolist()
    assert [(r, c) for r, c in zip(index.turned_rows.tolist(), turned, strict=True)] == [at[n] for n in index.places]
    for shared, (job_rows, firsts) in index.jobs.items():
        covered = [
            (row, n)
            for row, first in zip(job_rows.tolist(), firsts.tolist(), strict=True)
            for n in range(first, min(first + shared, int(index.start[row + 1])))
        ]
        assert covered == [(row, n) for n, (row, _) in enumerate(at)]


@pytest.mark.stays
@pytest.mark.parametrize("shared", [1, 2, 4])
def test_no_program_writes_what_is_anothers(shared):
    """The interpreter runs one after the other; in the other order a value written twice would show."""
    index = index_blocks(pattern(32, 5, 6, 0.6), 32)
    g, x = torch.randn(20, 160), torch.randn(20, 192)
    turned = replace(index, jobs={n: (rows.flip(0), firsts.flip(0)) for n, (rows, firsts) in index.jobs.items()})
    tile = SampleTile(shared, 32, 1, 1)
    assert torch.equal(block_kernel._sample(g, x, index, tile), block_kernel._sample(g, x, turned, tile))


@pytest.mark.stays
def test_values_come_from_a_dense_matrix_and_go_back():
    index = index_blocks(pattern(32, 4, 5, 0.6), 32)
    weight = torch.randn(128, 160)
    values = gather_blocks(weight, index)
    assert torch.equal(scatter_blocks(values, index), weight * pattern(32, 4, 5, 0.6).mask())
    moved = index.to("cpu")
    assert (moved.shape, moved.block, moved.blocks) == (index.shape, 32, index.blocks)
    assert torch.equal(moved.jobs[2][0], index.jobs[2][0])


@pytest.mark.stays
def test_a_row_that_keeps_nothing_reads_nothing():
    """Not even what is not a number."""
    index = index_blocks(pattern(32, 4, 5, 0.9), 32)
    y = block_product(torch.full((3, 160), torch.nan), torch.ones(index.blocks, 32, 32), index, kernel="triton")
    assert (y[:, 32:64] == 0).all()
    assert y[:, :32].isnan().all()


@pytest.mark.reproduces
def test_same_inputs_same_bits():
    index = index_blocks(pattern(32, 4, 5, 0.6), 32)
    x, values = torch.randn(40, 160), torch.randn(index.blocks, 32, 32)
    first, second = (block_product(x, values, index, kernel="triton") for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.stays
def test_every_candidate_is_one_the_kernel_knows():
    for (b, _), tiles in block_kernel.PRODUCTS.items():
        assert all(b % tile.depth == 0 and (b >= 64 or not tile.swap) for tile in tiles)
    assert {tile.blocks for tiles in block_kernel.GRADIENTS.values() for tile in tiles} <= set(block_kernel.SHARING)
    assert block_kernel.PRODUCTS.keys() == block_kernel.GRADIENTS.keys()
    assert {tile.rows for tile in block_kernel._fitting(block_kernel.PRODUCTS[64, 2], 20)} == {32}


@pytest.mark.says
def test_says_what_it_cannot_do(monkeypatch):
    index = index_blocks(pattern(32, 4, 5, 0.6), 32)
    x, values = torch.randn(4, 160), torch.randn(index.blocks, 32, 32)
    with pytest.raises(RecipeError, match="reference, batched or triton"):
        block_product(x, values, index, kernel="bsr")
    with pytest.raises(ModelError, match=r"inputs of 160, and .* blocks of 32"):
        block_product(x[:, :32], values, index)
    with pytest.raises(ModelError, match="one dtype and one device"):
        block_product(x.half(), values, index)
    with pytest.raises(ModelError, match=r"float64.*batched"):
        block_product(x.double(), values.double(), index, kernel="triton")
    for kept, b in ((Pattern(torch.ones(48, 64, dtype=torch.bool)), 32), (pattern(32, 4, 4, 0.5), 16)):
        with pytest.raises(RecipeError, match="whole blocks, b one of"):
            index_blocks(kept, b)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ModelError, match=r"not on a GPU.*kernel='batched'"):
        block_product(x, values, index, kernel="triton")
