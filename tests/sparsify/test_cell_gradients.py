"""Sums behind all gradients of a pixelated butterfly, on the CPU through Triton's interpreter."""

import sys

import pytest
import torch

from fewedges.sparsify import cell_gradients
from fewedges.sparsify.cell_gradients import added
from fewedges.sparsify.cell_products import Tile

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
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_are_added_in_float32(parts):
    """In half precision a sum of parts that cancel would lose what is left."""
    low = torch.randn(parts, 700, 12).half() * 100
    low[-1] = -low[:-1].float().sum(0).half() if parts > 1 else low[-1]
    assert torch.equal(added(low), low.float().sum(0).half())


@pytest.mark.stays
def test_tokens_are_cut_only_where_processors_would_idle():
    small = Tile(16, 16, 16, 1, 1)
    assert [tile.splits for tile in cell_gradients._cuts(small, (16, 16), torch.zeros(4, 2))] == [1]
    assert [tile.splits for tile in cell_gradients._cuts(small, (16, 16), torch.zeros(1, 1))] == [4, 8]
