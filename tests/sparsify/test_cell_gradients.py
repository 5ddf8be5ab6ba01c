"""How gradients of a pixelated butterfly are cut; test_cell_kernel.py has their values."""

import pytest
import torch

from fewedges.sparsify import cell_gradients
from fewedges.sparsify.cell_products import Tile


@pytest.mark.stays
def test_tokens_are_cut_only_where_processors_would_idle():
    small = Tile(16, 16, 16, 1, 1)
    assert [tile.splits for tile in cell_gradients._cuts(small, (16, 16), torch.zeros(4, 2))] == [1, 2]
    assert [tile.splits for tile in cell_gradients._cuts(small, (16, 16), torch.zeros(1, 1))] == [2, 4, 8]
