"""The flat block butterfly against the paper's definition, and the gathered product against the dense matrix."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewedges.errors import ModelError, RecipeError
from fewedges.sparsify.butterfly import (
    GatheredCells,
    PixelatedLinear,
    Plan,
    _sources,
    cells_of,
    flat_butterfly,
    neighbours,
    random_neighbours,
    tiled_butterfly,
)

seeds = st.integers(0, 2**20)
grids = st.integers(0, 5).flatmap(lambda p: st.tuples(st.just(2**p), st.integers(0, p)))


def factor_support(grid, stride):
    """A butterfly factor: 2 x 2 blocks of diagonals of side stride / 2, repeated along the diagonal."""
    pair = np.kron(np.ones((2, 2), int), np.eye(stride // 2, dtype=int))
    return np.kron(np.eye(grid // stride, dtype=int), pair)


def slow_cells(grid, factors):
    """Definition 3.2: the union of the supports of the factors of stride 2, 4, ... 2^k."""
    union = np.eye(grid, dtype=int)
    for t in range(1, factors + 1):
        union |= factor_support(grid, 2**t)
    return union.astype(bool)


@pytest.mark.matches
@pytest.mark.parametrize(("grid", "factors"), [(1, 0), (2, 1), (4, 2), (8, 2), (16, 2), (16, 4), (32, 1), (64, 6)])
def test_cells_are_the_union_of_the_factors_supports(grid, factors):
    mine = cells_of(neighbours(grid, factors))
    assert (mine.numpy() == slow_cells(grid, factors)).all()


@pytest.mark.stays
@given(grids)
def test_every_row_and_column_of_cells_has_one_and_k_and_groups_do_not_mix(grid_and_factors):
    grid, factors = grid_and_factors
    on = cells_of(neighbours(grid, factors)).int()
    assert on.sum(0).tolist() == on.sum(1).tolist() == [1 + factors] * grid
    assert torch.equal(on, on.T)
    reached = torch.linalg.matrix_power(on.double(), max(factors, 1)) > 0
    group = torch.arange(grid) >> factors
    assert torch.equal(reached, group[:, None] == group)  # a hypercube of 2^k cells, reached in k steps


@pytest.mark.matches
def test_the_flat_butterfly_is_the_product_to_first_order():
    """|prod(I + l B_s) - (I + l sum B_s)| falls with l^2."""
    rng = np.random.default_rng(0)
    factors = [factor_support(16, 2**t) * rng.normal(size=(16, 16)) for t in range(1, 5)]

    def gap(scale):
        product = np.eye(16)
        for f in factors:
            product = product @ (np.eye(16) + scale * f)
        return np.abs(product - np.eye(16) - scale * sum(factors)).max()

    assert gap(1e-4) / gap(1e-5) == pytest.approx(100, abs=0.05)  # measured 100.013
    flat = cells_of(neighbours(16, 4)).numpy()
    assert (sum(factors) != 0).sum() == flat.sum()
    assert ((sum(factors) != 0) <= flat).all()


@pytest.mark.matches
def test_cover_of_the_public_shapes():
    """768 -> 3072 on a 16 x 16 grid with 3 live cells a row: 48-wide cells straddle blocks of 32."""
    pattern = flat_butterfly(3072, 768, 16, 2)
    assert pattern.density == 3 / 16
    assert flat_butterfly(3072, 768, 16, 3).cover(16) == 0.25
    assert flat_butterfly(3072, 768, 16, 3).cover(32) == pytest.approx(0.2917, abs=5e-5)  # facts, section 5
    assert flat_butterfly(4096, 1024, 16, 2).cover(64) == pattern.density


@pytest.mark.matches
def test_the_tiled_variant_repeats_the_square():
    tiled = tiled_butterfly(8, 20, 2, 2).mask().numpy()
    cells = slow_cells(4, 2)
    for i in range(8):
        for j in range(20):
            assert tiled[i, j] == cells[i // 2, j % 8 // 2]
    assert torch.equal(tiled_butterfly(20, 8, 2, 2).mask().T, tiled_butterfly(8, 20, 2, 2).mask())


@pytest.mark.stays
@given(st.integers(1, 6).flatmap(lambda p: st.tuples(st.just(2**p), st.integers(1, 2**p))), st.integers(0, 99))
def test_the_random_control_is_regular_and_has_as_many_cells(grid_and_live, seed):
    grid, live = grid_and_live
    on = cells_of(random_neighbours(grid, live, seed)).int()
    assert on.sum(0).tolist() == on.sum(1).tolist() == [live] * grid
    assert torch.equal(on, cells_of(random_neighbours(grid, live, seed)).int())


@pytest.mark.matches
@settings(max_examples=25, deadline=None)
@given(grids, st.integers(1, 3), st.integers(1, 3), st.integers(0, 3), st.sampled_from(["butterfly", "random"]), seeds)
def test_the_gathered_product_and_its_gradients_are_those_of_the_dense_matrix(cells, height, width, rank, layout, seed):
    grid, factors = cells
    torch.manual_seed(seed)
    layer = PixelatedLinear(grid * width, grid * height, Plan(grid, factors, rank, layout)).double()
    x = torch.randn(2, 3, grid * width, dtype=torch.double, requires_grad=True)
    mask = layer.plan.pattern(grid * height, grid * width).mask()
    sparse = layer.sparse.dense()
    assert torch.equal(sparse != 0, mask)
    assert torch.equal(sparse, slow_dense(layer.sparse, layer.plan))
    wanted = torch.nn.functional.linear(x, layer.weight, layer.bias)
    mine = layer(x)
    assert (mine - wanted).norm() <= 2.2e-15 * (1 + wanted.norm())  # measured 5.5e-16 in 5,000 layers
    leaves = [x, *layer.parameters()]
    upstream = torch.randn_like(mine)
    slow = torch.autograd.grad(wanted, leaves, upstream)
    for a, b in zip(torch.autograd.grad(mine, leaves, upstream), slow, strict=True):
        scale = 1 + (b.norm() if b.dim() else upstream.norm() * wanted.norm())  # sums may cancel, gamma's most
        assert (a - b).norm() <= 3.3e-15 * scale  # measured 8.3e-16 in 5,000 layers


def slow_dense(cells, plan):
    """Cell by cell from the stored pieces."""
    (grid, height, wide), columns = cells.weight.shape, plan.columns()
    width = wide // columns.shape[1]
    dense = torch.zeros(grid * height, grid * width, dtype=cells.weight.dtype)
    for i in range(grid):
        for place, j in enumerate(columns[i].tolist()):
            piece = cells.weight[i, :, place * width : (place + 1) * width]
            dense[i * height : (i + 1) * height, j * width : (j + 1) * width] = piece.detach()
    return dense


@pytest.mark.matches
def test_gradients_by_finite_differences():
    layer = PixelatedLinear(8, 12, Plan(4, 1, 2)).double()
    x = torch.randn(3, 8, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))


@pytest.mark.matches
@pytest.mark.parametrize("plan", [Plan(16, 2, 32), Plan(16, 2, 0), Plan(0, 0, 64), Plan(16, 2, 32, "random")])
def test_a_fresh_layer_varies_as_a_dense_one_forward_and_backward(plan):
    torch.manual_seed(0)
    inputs, outputs = 256, 512
    layer = PixelatedLinear(inputs, outputs, plan, bias=False)
    x = torch.randn(2000, inputs, requires_grad=True)
    y = layer(x)
    (back,) = torch.autograd.grad(y, x, torch.randn_like(y))
    dense = torch.nn.Linear(inputs, outputs, bias=False).weight.detach().var() * inputs
    assert float((y.var() / dense).detach()) == pytest.approx(1, abs=0.05)  # measured within .016
    assert float(back.var() / (dense * outputs / inputs)) == pytest.approx(1, abs=0.05)
    layer.reset_(std=0.02)
    assert float(layer(x).detach().var() / (0.02**2 * inputs)) == pytest.approx(1, abs=0.05)


@pytest.mark.stays
def test_autocast_computes_in_bfloat16_and_gives_float32_gradients():
    layer = PixelatedLinear(32, 48, Plan(8, 2, 4))
    x = torch.randn(5, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.float().square().sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}
    wanted = layer(x)
    assert y.dtype == torch.bfloat16
    assert (y - wanted).abs().max() <= 0.02 * wanted.abs().max()  # measured .006


@pytest.mark.reproduces
def test_a_layer_is_its_plan_and_its_state_dict():
    plan = Plan(8, 2, 4, "random", seed=3)
    first, second = (PixelatedLinear(32, 48, plan) for _ in range(2))
    second.load_state_dict(first.state_dict())
    x = torch.randn(4, 32)
    assert torch.equal(first(x), second(x))
    stored = sum(p.numel() for n, p in first.named_parameters() if n not in ("bias", "gamma"))
    assert stored == plan.parameters(48, 32) == first.flops(1) // 2
    assert set(first.state_dict()) == {"sparse.weight", "low.up", "low.down", "gamma", "bias"}


@pytest.mark.stays
def test_a_single_vector_and_no_vector_are_inputs_too():
    layer = PixelatedLinear(32, 48, Plan(8, 2, 4))
    x = torch.randn(3, 32)
    torch.testing.assert_close(layer(x[0]), layer(x)[0], rtol=0, atol=5e-7)  # measured 1.2e-7
    assert layer(x[:0]).shape == (0, 48)


@pytest.mark.says
def test_the_kernel_is_chosen_and_never_silently_another(monkeypatch):
    """By the layer, at any time; it is no part of the state. A low rank alone has no use for one."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    layer, x = PixelatedLinear(32, 64, Plan(8, 2, 4), kernel="triton"), torch.randn(3, 32)
    with pytest.raises(ModelError, match="not on a GPU"):
        layer(x)
    state = layer.state_dict()
    layer.kernel = "reference"
    assert layer(x).shape == (3, 64)
    assert state.keys() == layer.state_dict().keys()
    assert PixelatedLinear(32, 48, Plan(0, 0, 4), kernel="triton")(x).shape == (3, 48)
    with pytest.raises(RecipeError, match="reference or triton"):
        PixelatedLinear(32, 48, Plan(8, 2, 4), kernel="bmm")


@pytest.mark.survives
@pytest.mark.parametrize(
    "make",
    [
        lambda: neighbours(12, 1),
        lambda: neighbours(8, 4),
        lambda: random_neighbours(4, 5),
        lambda: flat_butterfly(30, 32, 4, 1),
        lambda: GatheredCells(32, 30, Plan(4, 1, 0)),
        lambda: PixelatedLinear(8, 8, Plan(0, 0, 0)),
        lambda: _sources(torch.tensor([[0, 1], [0, 0]])),
    ],
)
def test_what_is_no_butterfly_is_refused(make):
    with pytest.raises(RecipeError, match="Try: "):
        make()


@pytest.mark.says
def test_a_layer_says_its_plan_and_density():
    text = str(PixelatedLinear(1024, 4096, Plan(16, 2, 32)))
    assert "grid=16, factors=2, rank=32" in text
    assert "density=0.2266" in text  # facts: medium total .227


@pytest.mark.matches
@pytest.mark.parametrize(("plan", "joins"), [
    (Plan(8, 1, 0), True), (Plan(2, 1, 0), True), (Plan(8, 2, 0), False), (Plan(8, 0, 0), False),
    (Plan(8, 1, 0, "random"), False),
])  # fmt: skip
def test_cells_of_one_factor_are_multiplied_as_cells_of_twice_the_sides(plan, joins):
    """A quarter as many cells, nothing gathered, and the same matrix, with gradients."""
    layer = GatheredCells(24, 40, plan).double() if plan.grid == 8 else GatheredCells(6, 10, plan).double()
    with torch.no_grad():
        layer.weight.normal_(generator=torch.Generator().manual_seed(0))
    weight, columns, sources = layer.joined(layer.weight)
    assert (len(columns) == plan.grid // 2) is joins
    assert weight.data_ptr() == layer.weight.data_ptr()
    assert torch.equal(columns.flatten().sort().values, sources.flatten().sort().values) or not joins
    x = torch.randn(7, layer.dense().shape[1], dtype=torch.float64, requires_grad=True)
    pull = torch.randn(7, layer.dense().shape[0], dtype=torch.float64)
    found, wanted = layer(x), x @ layer.dense().T
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-14)  # measured 3.6e-15
    mine, theirs = (torch.autograd.grad(y, [x, layer.weight], pull) for y in (found, wanted))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-14)  # measured 3.6e-15
