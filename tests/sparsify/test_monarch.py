"""Butterfly products and Monarch matrices against explicit dense factors, and what they are known to contain."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewedges.errors import RecipeError
from fewedges.sparsify.monarch import ButterflyProduct, Monarch

sides = st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 3))


def slow_factor(layer, t):
    """Pair by pair: block p of the lower half of a stride mixes with block p + 2^t."""
    b, dense = layer.block, torch.zeros(layer.grid * layer.block, layer.grid * layer.block, dtype=layer.twiddle.dtype)
    firsts = [p for p in range(layer.grid) if not p >> t & 1]
    for number, p in enumerate(firsts):
        pair = torch.cat([torch.arange(p * b, (p + 1) * b), torch.arange((p + 2**t) * b, (p + 2**t + 1) * b)])
        dense[pair[:, None], pair] = layer.twiddle[t, number].detach()
    return dense


@pytest.mark.matches
@settings(max_examples=30, deadline=None)
@given(sides)
def test_a_butterfly_product_is_the_product_of_its_factors(shape):
    inputs, outputs, block = shape
    layer = ButterflyProduct(inputs, outputs, block).double()
    product = torch.eye(layer.grid * block, dtype=torch.double)
    for t in range(layer.factors):
        assert torch.equal(layer.factor(t), slow_factor(layer, t))
        product = slow_factor(layer, t) @ product
    wanted = product[:outputs, :inputs]
    torch.testing.assert_close(layer.weight, wanted, rtol=0, atol=2.6e-15)  # measured 7e-16
    x = torch.randn(2, 3, inputs, dtype=torch.double)
    torch.testing.assert_close(layer(x), x @ wanted.T, rtol=0, atol=2.6e-15)  # measured 7e-16


@pytest.mark.matches
def test_a_butterfly_product_holds_the_hadamard_transform_exactly():
    layer = ButterflyProduct(16, 16)
    with torch.no_grad():
        layer.twiddle.copy_(torch.tensor([[1.0, 1], [1, -1]]).expand_as(layer.twiddle))
    signs = [[(-1) ** bin(i & j).count("1") for j in range(16)] for i in range(16)]
    assert layer.weight.tolist() == signs
    assert layer.twiddle.numel() == 2 * 16 * 4  # 2 S log2 S


@pytest.mark.matches
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_monarch_is_two_block_diagonals_and_transposes(blocks, outs, ins):
    layer = Monarch(blocks * ins, blocks * outs, blocks).double()
    right = torch.block_diag(*layer.right.detach())  # (k q, C)
    left = torch.block_diag(*layer.left.detach())  # (R, q k)
    turn = torch.arange(blocks * blocks).view(blocks, blocks).T.flatten()  # (j, s) -> (s, j)
    back = torch.arange(blocks * outs).view(blocks, outs).T.flatten()  # (s, o) -> (o, s)
    wanted = (left @ right[turn])[back]
    torch.testing.assert_close(layer.weight, wanted, rtol=0, atol=4.8e-15)  # measured 1.3e-15
    x = torch.randn(2, 3, blocks * ins, dtype=torch.double)
    torch.testing.assert_close(layer(x), x @ wanted.T, rtol=0, atol=4.8e-15)  # measured 1.3e-15
    assert layer.flops(1) == 2 * (blocks * blocks * ins + blocks * blocks * outs)


@pytest.mark.matches
def test_the_projection_recovers_a_monarch_and_no_training_betters_it():
    torch.manual_seed(0)
    made, layer = Monarch(24, 36, 6).double(), Monarch(24, 36, 6).double()
    assert layer.project_(made.weight) < 1e-12
    torch.testing.assert_close(layer.weight, made.weight, rtol=0, atol=9e-16)  # measured 2e-16
    weight = torch.randn(36, 24, dtype=torch.double)
    error = layer.project_(weight)
    assert float((weight - layer.weight.detach()).norm() / weight.norm()) == pytest.approx(error, abs=1e-12)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = (weight - layer.weight).square().sum() / weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    assert float(loss().detach().sqrt()) == pytest.approx(error, abs=1e-9)  # already there


@pytest.mark.matches
@pytest.mark.parametrize("make", [lambda: ButterflyProduct(256, 256), lambda: Monarch(256, 256, 16)])
def test_a_fresh_relative_varies_as_a_dense_matrix(make):
    torch.manual_seed(0)
    dense = torch.nn.Linear(256, 256).weight.var()
    shares = torch.stack([(make()(torch.randn(50, 256)).var() / (256 * dense)).detach() for _ in range(100)])
    assert shares.mean() == pytest.approx(1, abs=0.02)  # measured .997 and .995


@pytest.mark.survives
def test_blocks_that_do_not_divide_are_refused():
    with pytest.raises(RecipeError, match="divides both"):
        Monarch(10, 12, 4)
