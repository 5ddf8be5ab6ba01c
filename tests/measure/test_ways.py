"""Every way equals the dense product with its own matrix, and says truly what it stores."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from fewedges.errors import FewedgesError
from fewedges.measure.ways import WAYS, Case, pixelated

HERE = [name for name in WAYS if name != "2:4" and "triton" not in name]
"""What a CPU can do."""
pytestmark = pytest.mark.filterwarnings("ignore:Sparse")  # torch calls its sparse layouts a beta on first use


def case(inputs=256, outputs=384, density=0.25, rows=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(rows, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator)
    return Case(x, weight, density, seed)


@pytest.mark.matches
@pytest.mark.parametrize("name", HERE)
@torch.inference_mode()
def test_every_call_is_the_product_with_the_matrix_it_says(name):
    given_ = case(inputs=512, outputs=256)
    built = WAYS[name].build(given_)
    exact = linear(given_.x.double(), built.exact())
    for call in built.calls.values():
        y = call()
        assert y.shape == (5, 256)
        assert y.is_contiguous()
        # float32 rounding, relative to the norm: measured 1.5e-7 at most
        assert (y.double() - exact).norm() <= 5e-7 * exact.norm()


@pytest.mark.matches
@pytest.mark.parametrize("name", [name for name in HERE if name not in ("dense", "pixelated", "butterfly")])
@torch.inference_mode()
def test_kept_weights_are_the_layers_own_and_all_others_are_zero(name):
    given_ = case()
    built = WAYS[name].build(given_)
    mask = built.pattern.mask()
    assert torch.equal(built.exact(), torch.where(mask, given_.weight, 0).double())
    assert built.parameters == int(mask.sum())


@pytest.mark.matches
@torch.inference_mode()
def test_stored_bytes_by_hand():
    given_ = case(inputs=256, outputs=384, density=0.25)
    size, kept = 256 * 384, 256 * 384 // 4
    index = 8  # torch's compressed layouts count in int64
    assert WAYS["dense"].build(given_).stored == 4 * size
    assert WAYS["masked"].build(given_).stored == 8 * size  # weights and a mask of their type
    assert WAYS["csr"].build(given_).stored == (4 + index) * kept + index * (384 + 1)
    assert WAYS["bsr 32"].build(given_).stored == 4 * kept + index * (kept // 32**2 + 384 // 32 + 1)
    plain = pixelated(given_, 0.0)
    assert plain.parameters * 4 < plain.stored < plain.parameters * 4 + 1000  # and which cells are live


@pytest.mark.stays
@settings(max_examples=15, deadline=None)
@given(density=st.floats(0.05, 0.9), seed=st.integers(0, 5), name=st.sampled_from(HERE))
@torch.inference_mode()
def test_density_is_what_was_asked_for_or_the_next_the_structure_has(density, seed, name):
    found = WAYS[name].build(case(density=density, seed=seed))
    kept = found.parameters / (256 * 384)
    if name == "dense":
        assert kept == 1
    elif name in ("butterfly", "pixelated"):
        assert kept <= density * 1.02 + 1e-9
    else:
        unit = int(name.split()[1]) ** 2 if name.startswith("bsr") else 1
        assert density - 1e-9 <= kept < density + unit / (256 * 384) + 1e-9


@pytest.mark.stays
@torch.inference_mode()
def test_building_a_way_leaves_the_users_random_numbers_alone():
    for name in HERE:
        torch.manual_seed(3)
        WAYS[name].build(case())
        assert torch.initial_seed() == 3
        torch.manual_seed(3)
        expected = torch.rand(1)
        torch.manual_seed(3)
        WAYS[name].build(case())
        assert torch.equal(torch.rand(1), expected)


@pytest.mark.reproduces
@torch.inference_mode()
def test_the_same_seed_keeps_the_same_weights():
    for name in HERE:
        one, same, other = (WAYS[name].build(case(seed=seed)) for seed in (1, 1, 2))
        assert torch.equal(one.exact(), same.exact())
        assert name == "dense" or not torch.equal(one.exact(), other.exact())


@pytest.mark.survives
@pytest.mark.parametrize("name", [name for name in WAYS if name not in HERE])
@torch.inference_mode()
def test_what_needs_a_gpu_says_so(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def run():
        return [call() for call in WAYS[name].build(case()).calls.values()]

    with pytest.raises((FewedgesError, RuntimeError), match=r"GPU|CUDA"):
        run()
