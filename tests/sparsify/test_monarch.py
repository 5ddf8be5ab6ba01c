"""Butterfly products and Monarch matrices against explicit dense factors, and what they are known to contain."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewedges.errors import ModelError, RecipeError
from fewedges.sparsify.monarch import ButterflyProduct, Monarch

sides = st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 3))
forms = st.tuples(*[st.integers(1, 4)] * 4).flatmap(lambda f: st.tuples(st.just(f), st.integers(1, min(f[1], f[3]))))
"""Blocks of inputs and inputs in each, blocks of outputs and outputs in each; rank of a piece."""


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


def monarch(form):
    (blocks, ins, out_blocks, outs), rank = form
    return Monarch(blocks * ins, out_blocks * outs, blocks, out_blocks=out_blocks, rank=rank).double()


def slow_weight(layer):
    """Entry by entry: output (o, s), input (j, i), and the r numbers in between that block j gives to block s."""
    k, l, r = layer.blocks, layer.out_blocks, layer.rank
    outs, ins = layer.out_features // l, layer.in_features // k
    rows = []
    for o, s in itertools.product(range(outs), range(l)):
        for j, i in itertools.product(range(k), range(ins)):
            rows.append(sum(layer.left[s, o, j * r + t] * layer.right[j, s * r + t, i] for t in range(r)))
    return torch.stack(rows).view(layer.out_features, layer.in_features)


@pytest.mark.matches
@settings(max_examples=30, deadline=None)
@given(forms)
def test_monarch_is_two_block_diagonals_and_a_permutation_after_each(form):
    (k, ins, l, outs), r = form
    layer = monarch(form)
    right = torch.block_diag(*layer.right.detach())  # (k q, C)
    left = torch.block_diag(*layer.left.detach())  # (R, l k r)
    turn = torch.arange(k * l * r).view(k, l, r).transpose(0, 1).flatten()  # (j, s, t) -> (s, j, t)
    back = torch.arange(l * outs).view(l, outs).T.flatten()  # (s, o) -> (o, s)
    wanted = (left @ right[turn])[back]
    torch.testing.assert_close(layer.weight, wanted, rtol=0, atol=4.8e-15)  # measured 1.3e-15
    x = torch.randn(2, 3, k * ins, dtype=torch.double)
    torch.testing.assert_close(layer(x), x @ wanted.T, rtol=0, atol=4.8e-15)  # measured 1.3e-15
    assert layer.width == len(turn)
    assert layer.flops(1) == 2 * r * (l * k * ins + k * l * outs)


@pytest.mark.matches
@settings(max_examples=20, deadline=None)
@given(forms)
def test_monarch_and_its_gradients_match_the_definition_entry_by_entry(form):
    layer = monarch(form)
    x = torch.randn(2, 3, layer.in_features, dtype=torch.double, requires_grad=True)
    pull, given_ = torch.randn(2, 3, layer.out_features, dtype=torch.double), [x, *layer.parameters()]
    found = [layer(x), *torch.autograd.grad(layer(x), given_, pull)]
    slow = x @ slow_weight(layer).T
    for a, b in zip(found, [slow, *torch.autograd.grad(slow, given_, pull)], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1.4e-14)  # measured 3.6e-15


@pytest.mark.matches
@pytest.mark.parametrize(("blocks", "out_blocks", "rank"), [(6, 6, 1), (2, 3, 2), (4, 2, 5), (1, 1, 3), (3, 4, 8)])
def test_the_projection_recovers_a_monarch_and_no_training_betters_it(blocks, out_blocks, rank):
    torch.manual_seed(0)
    made, layer = (Monarch(24, 36, blocks, out_blocks=out_blocks, rank=rank).double() for _ in range(2))
    assert layer.project_(made.weight) < 1e-12
    torch.testing.assert_close(layer.weight, made.weight, rtol=0, atol=5e-15)  # measured 1.4e-15
    weight = torch.randn(36, 24, dtype=torch.double)
    error = layer.project_(weight)
    assert float((weight - layer.weight.detach()).norm() / weight.norm()) == pytest.approx(error, abs=1e-12)

    def trained(layer):
        optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=400, line_search_fn="strong_wolfe")

        def loss():
            optimizer.zero_grad()
            value = (weight - layer.weight).square().sum() / weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        return float(loss().detach().sqrt())

    assert trained(layer) == pytest.approx(error, abs=1e-9)  # already there
    made.reset_()
    assert trained(made) > error - 1e-9  # from elsewhere


@pytest.mark.matches
def test_the_projection_keeps_the_largest_singular_values_of_every_piece():
    weight = torch.randn(12, 20, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    layer, lost = Monarch(20, 12, 5, out_blocks=3, rank=2).double(), 0.0
    error = layer.project_(weight)
    for s, j in itertools.product(range(3), range(5)):
        piece = weight[s::3, 4 * j : 4 * j + 4].numpy()  # outputs (o, s), inputs (j, i)
        u, d, v = np.linalg.svd(piece)
        lost += (d[2:] ** 2).sum()
        found = layer.weight.detach()[s::3, 4 * j : 4 * j + 4].numpy()
        assert np.allclose(found, u[:, :2] * d[:2] @ v[:2], rtol=0, atol=9e-15)  # measured 2.4e-15
    assert error == pytest.approx(lost**0.5 / float(weight.norm()), rel=1e-12)


@pytest.mark.survives
def test_a_projection_takes_any_dtype_and_nothing_and_refuses_another_shape():
    layer = Monarch(12, 12 * 2, 2, rank=3)
    assert layer.project_(torch.zeros(24, 12)) == 0
    assert not layer.weight.any()
    weight = torch.randn(24, 12).bfloat16()
    assert layer.project_(weight) == layer.project_(weight.float())
    for wrong in (torch.randn(12, 24), torch.randn(288), torch.randn(1, 24, 12)):
        with pytest.raises(ModelError, match=r"12 inputs and 24 outputs: a weight .*\(24, 12\), outputs first"):
            layer.project_(wrong)


MADE = {
    "butterfly product": lambda: ButterflyProduct(256, 256),
    "square Monarch": lambda: Monarch(256, 256, 16),
    "Monarch": lambda: Monarch(256, 256, 4, out_blocks=2, rank=32),
}


@pytest.mark.matches
@pytest.mark.parametrize("name", MADE)
def test_a_fresh_relative_varies_as_a_dense_matrix(name):
    torch.manual_seed(0)
    dense = torch.nn.Linear(256, 256).weight.var()
    shares = torch.stack([(MADE[name]()(torch.randn(50, 256)).var() / (256 * dense)).detach() for _ in range(100)])
    assert shares.mean() == pytest.approx(1, abs=0.02)  # measured 1.003 to 1.006


@pytest.mark.stays
@pytest.mark.parametrize("rank", [1, 9])
def test_entries_have_the_spread_asked_for(rank):
    torch.manual_seed(0)
    layer = Monarch(256, 512, 8, out_blocks=4, rank=rank)
    layer.reset_(0.3)
    assert layer.weight.detach().std().item() == pytest.approx(0.3, rel=0.15)  # over 20 draws at most 4.5 % off


@pytest.mark.survives
def test_forms_that_cannot_be_are_refused():
    for given_ in ({"blocks": 4}, {"blocks": 0}, {"blocks": 5, "out_blocks": 5}, {"blocks": 2, "out_blocks": -1}):
        with pytest.raises(RecipeError, match="divides its side"):
            Monarch(10, 12, **given_)
    for rank, sides, piece in ((0, (10, 12), "6 x 5"), (6, (10, 12), "6 x 5"), (6, (12, 10), "5 x 6")):
        with pytest.raises(RecipeError, match=rf"{piece}.*rank 1 to 5"):
            Monarch(*sides, 2, rank=rank)
    for given_ in ((10, 12, 0), (0, 12, 1), (10, 12, -1)):
        with pytest.raises(RecipeError, match=r"butterfly product: .*at least 1"):
            ButterflyProduct(*given_)


@pytest.mark.says
def test_a_printed_monarch_says_its_form():
    assert repr(Monarch(12, 16, 2, out_blocks=4, rank=3)) == "Monarch(12, 16, 2 x 4 blocks, rank 3, width 24)"
