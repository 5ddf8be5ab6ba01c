"""Thin products in parts, and the candidates of all products, on the CPU through Triton's interpreter."""

import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fewedges.sparsify import cell_products
from fewedges.sparsify.cell_products import BY_TORCH, Tile

DEVICE = "fewedges.sparsify.cell_device"


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Device functions built anew for the interpreter, whoever imported what before."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    sys.modules.pop(DEVICE, None)
    yield
    sys.modules.pop(DEVICE, None)


@pytest.mark.matches
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 9), st.booleans(), st.integers(1, 7), st.booleans())
def test_parts_of_a_thin_product_add_up_to_it(tokens, inner, rank, turned, splits, torchs):
    """Sides that no tile divides, more parts than steps."""
    generator = torch.Generator().manual_seed(tokens * inner)
    x = torch.randn(tokens, 4 * inner, generator=generator)
    basis = torch.randn(4 * inner, 4 * rank, generator=generator)
    tile, steps = BY_TORCH if torchs else Tile(16, 16, 16, 1, 1, splits=splits), -(-4 * inner // 16)
    low = cell_products._launch_thin(x, basis if turned else basis.T.contiguous(), turned, tile)
    assert low.shape == (1 if torchs else -(-steps // -(-steps // splits)), tokens, 4 * rank)
    exact = x.double() @ basis.double()
    assert (low.double().sum(0) - exact).norm() / exact.norm() < 6e-7  # measured 1.5e-7 over 300 examples


@pytest.mark.stays
def test_candidates_fit_the_problem():
    tiles = cell_products.fitting(cell_products.PRODUCTS[2], 8192, 688, 256)
    assert tiles == list(cell_products.PRODUCTS[2])
    assert {tile.columns for tile in cell_products.fitting(cell_products.PRODUCTS[2], 8192, 64, 256)} == {64}
    assert [tile[:3] for tile in cell_products.fitting(cell_products.PRODUCTS[2], 5, 40, 12)] == [(16, 64, 16)]


@pytest.mark.stays
def test_thin_candidates_are_as_wide_as_the_rank_and_have_two_steps_a_part():
    tiles = cell_products._thin_tiles(torch.zeros(1024, 1024, dtype=torch.bfloat16), 1024, 64)
    assert tiles[0] == BY_TORCH
    assert {tile.columns for tile in tiles[1:]} == {64}
    assert len(set(tiles)) == len(tiles)
    assert all(tile.splits == 1 or tile.splits * 2 * tile.depth <= 1024 for tile in tiles[1:])
    assert {tile.splits for tile in tiles[1:]} == {1, 2, 4}
    few = torch.zeros(20, 256, dtype=torch.bfloat16)
    assert {tile.rows for tile in cell_products._thin_tiles(few, 256, 64)} == {0, 16, 32}


@pytest.mark.stays
def test_beside_a_low_rank_no_program_has_many_tiles():
    x = torch.zeros(512, 256, dtype=torch.bfloat16)
    assert any(tile.persistent for tile in cell_products._product_tiles(x, 256, 256, 0))
    assert not any(tile.persistent for tile in cell_products._product_tiles(x, 256, 256, 64))


@pytest.mark.stays
def test_nothing_overlaps_where_there_is_no_hopper():
    cpu = torch.device("cpu")
    assert not cell_products.overlaps(cpu)
    assert cell_products.launched(cpu, True) == {}
