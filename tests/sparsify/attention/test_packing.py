"""Weights packed for the disk: what comes back, and what packing it again gives."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewedges.sparsify.attention.packing import SCALE, pack, unpack


def matrix(rows, columns, seed=0, spread=1.0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * spread


@pytest.mark.matches
def test_int8_is_absmax_rounding_of_each_row():
    weights = {"a": torch.tensor([[127.0, -63.4, 0.6], [0.0, 0.0, 0.0], [-2.54, 1.0, 0.03]]), "b": torch.ones(3)}
    packed = pack(weights, "int8")
    assert packed["a"].tolist() == [[127, -63, 1], [0, 0, 0], [-127, 50, 1]]  # scales 1, 0 and bfloat16(.02)
    assert (packed["a"].dtype, packed["a" + SCALE].dtype, packed["b"].dtype) == (
        torch.int8,
        torch.bfloat16,
        torch.float32,
    )
    assert torch.equal(unpack(packed)["a"][0], torch.tensor([127.0, -63.0, 1.0]))
    assert torch.equal(unpack(packed)["b"], torch.ones(3))


@pytest.mark.stays
@given(st.integers(0, 1000), st.sampled_from([1e-30, 1e-3, 1.0, 1e4]))
def test_no_entry_moves_by_more_than_half_a_step(seed, spread):
    x = matrix(4, 9, seed, spread)
    back = unpack(pack({"x": x}, "int8"))["x"]
    step = x.abs().amax(1, keepdim=True) / 127
    # half a step, and 2^-9 of the entry itself where the bfloat16 scale is too small for the largest one
    assert ((back - x).abs() <= step * (0.5 + 127 * 2**-9)).all()


@pytest.mark.reproduces
@given(st.integers(0, 1000), st.sampled_from(["int8", "bfloat16", "float32"]))
def test_packing_again_gives_the_same_bytes(seed, saved):
    weights = {"x": matrix(5, 7, seed), "bias": matrix(1, 6, seed)[0]}
    once = pack(weights, saved)
    again = pack(unpack(once), saved)
    assert set(again) == set(once)
    assert all(torch.equal(again[name], once[name]) and again[name].dtype == once[name].dtype for name in once)
