"""Every way equals the dense product with its own matrix, and says truly what it stores."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from fewedges.errors import FewedgesError
from fewedges.measure.ways import WAYS, Case, examples, monarch_form, pixelated
from fewedges.sparsify.monarch import ButterflyProduct, Monarch

HERE = [name for name in WAYS if name != "2:4" and "triton" not in name]
"""What a CPU can do."""
FACTORS = ["monarch", "butterfly product"]
pytestmark = pytest.mark.filterwarnings("ignore:Sparse")  # torch calls its sparse layouts a beta on first use


def case(inputs=256, outputs=384, density=0.25, rows=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(rows, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator)
    return Case(x, weight, density, seed)


@pytest.mark.matches
@pytest.mark.parametrize("name", HERE)
@torch.inference_mode()
def test_every_call_is_the_product_with_the_matrix_it_says(name):
    given_ = case(inputs=512, outputs=256, density=0.3)
    built = WAYS[name].build(given_)
    exact = linear(given_.x.double(), built.exact())
    for call in built.calls.values():
        y = call()
        assert y.shape == (5, 256)
        assert y.is_contiguous()
        # float32 rounding, relative to the norm: measured 1.5e-7 at most
        assert (y.double() - exact).norm() <= 5e-7 * exact.norm()


@pytest.mark.matches
@pytest.mark.parametrize("name", [n for n in HERE if n not in ("dense", "pixelated", "butterfly", *FACTORS)])
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
@given(density=st.floats(0.1, 0.9), seed=st.integers(0, 5), name=st.sampled_from(HERE))
@torch.inference_mode()
def test_density_is_what_was_asked_for_or_the_next_the_structure_has(density, seed, name):
    found = WAYS[name].build(case(density=density, seed=seed))
    kept = found.parameters / (256 * 384)
    if name == "dense":
        assert kept == 1
    elif name in ("butterfly", "pixelated", *FACTORS):
        assert kept <= density * 1.02 + 1e-9
    else:
        unit = int(name.split()[1]) ** 2 if name.startswith("bsr") else 1
        assert density - 1e-9 <= kept < density + unit / (256 * 384) + 1e-9


@pytest.mark.matches
@pytest.mark.parametrize(("inputs", "outputs"), [(256, 384), (384, 256), (60, 50)])
@torch.inference_mode()
def test_a_product_of_factors_multiplies_by_the_matrix_of_its_layer(inputs, outputs):
    """Computed column by column; the layer writes its factors out as dense matrices."""
    for name, kind in zip(FACTORS, (Monarch, ButterflyProduct), strict=True):
        built = WAYS[name].build(case(inputs=inputs, outputs=outputs, density=0.4))
        (layer,) = (
            c.cell_contents for c in next(iter(built.calls.values())).__closure__ if isinstance(c.cell_contents, kind)
        )
        assert built.parameters == sum(part.numel() for part in layer.parameters())
        assert built.pattern is None
        # float64 rounding of up to 9 factors: measured 6e-16
        weight = layer.double().weight
        assert (built.exact() - weight).norm() <= 2e-15 * weight.norm()


@pytest.mark.matches
def test_factors_are_the_densest_that_are_not_over_by_hand():
    """256 inputs, 384 outputs: blocks of b of a product cost 2 b S log2(S / b)."""
    product = {d: WAYS["butterfly product"].build(case(density=d)) for d in (0.1, 0.2, 0.5)}
    assert {d: built.parameters for d, built in product.items()} == {
        0.1: 2 * 1 * 512 * 9,
        0.2: 2 * 2 * 512 * 8,
        0.5: 2 * 8 * 512 * 6,  # exactly half of the matrix
    }
    assert product[0.5].how == "6 factors of 8 x 8 blocks"


@pytest.mark.matches
def test_a_monarch_has_few_large_blocks_by_hand():
    """256 inputs, 384 outputs: k blocks of rank r cost 640 k r, and density .1 pays for 15.4 of these."""
    assert {d: monarch_form((384, 256), d) for d in (0.02, 0.05, 0.1, 0.25, 0.42)} == {
        0.02: (2, 1),  # 3.1: no 4 blocks
        0.05: (2, 3),  # 7.7: 4 blocks of rank 1 would spend 4 of 6
        0.1: (2, 7),  # 4 of rank 3 would spend 12 of 14
        0.25: (4, 9),  # 36 of 38
        0.42: (4, 16),
    }
    assert monarch_form((6, 10), 0.9) == (2, 1)  # no other number divides both
    assert monarch_form((66, 30), 0.5) == (3, 3)  # 2 of rank 5, 3 of rank 3, 6 of rank 1
    built = WAYS["monarch"].build(case(density=0.25))
    assert built.parameters == 640 * 4 * 9
    assert built.how == "4 blocks a factor, rank 9, width 144"
    assert monarch_form((2048, 2048), 0.5) == (4, 128)  # as wide as the matrix


@pytest.mark.stays
@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 60), columns=st.integers(1, 60), step=st.integers(2, 6), density=st.floats(0.01, 1))
def test_no_monarch_is_over_and_none_much_denser_is_passed_over(rows, columns, step, density):
    rows, columns = step * rows, step * columns
    counts = [k for k in range(2, min(rows, columns) + 1) if rows % k == columns % k == 0]
    most, side = density * rows * columns * (1 + 1e-9) / (rows + columns), min(rows, columns)
    spent = {k: [k * r for r in range(1, side // k + 1) if k * r <= most] for k in counts}
    best = max((kept for of_k in spent.values() for kept in of_k), default=0)
    if not best:
        with pytest.raises(FewedgesError, match="the thinnest for"):
            monarch_form((rows, columns), density)
        return
    k, r = monarch_form((rows, columns), density)
    assert k * r == spent[k][-1] >= 0.9 * best
    assert not [n for n in counts if 4 <= n < k and max(spent[n], default=0) >= 0.9 * best]


@pytest.mark.survives
@pytest.mark.parametrize(
    ("name", "shape", "density"),
    [("monarch", (64, 50), 0.05), ("monarch", (61, 64), 0.9), ("butterfly product", (64, 50), 0.2)],
)
def test_a_shape_that_factors_do_not_fit_says_what_the_thinnest_is(name, shape, density):
    with pytest.raises(FewedgesError, match="the thinnest for"):
        WAYS[name].build(case(*shape, density=density))


@pytest.mark.matches
def test_the_patterns_to_be_shown_are_what_their_names_say():
    found = examples()
    for name, kept in found.items():
        (share,) = (float(word.strip(",").rstrip("%")) for word in name.split() if "%" in word)
        assert kept.density == pytest.approx(share / 100, abs=5e-3)
        assert kept.shape == (256, 256)
    anywhere, blocks, cells = found.values()
    assert anywhere.cover(16) == pytest.approx(1 - 0.99**256, abs=0.02)  # measured .926, expected .924
    assert (blocks.cover(16), cells.cover(16)) == (blocks.density, cells.density)


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
