"""Kept blocks by torch's own products, gathered and one by one, against the dense matrix with its zeros."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewedges.errors import RecipeError
from fewedges.measure.clock import peak_bytes
from fewedges.sparsify import block_batched
from fewedges.sparsify.block_kernel import block_product, index_blocks
from fewedges.sparsify.butterfly import PixelatedLinear, Plan
from fewedges.sparsify.pattern import Blocks

WAYS = {"gathered": 10**9, "one by one": -1}
"""Up to how many tokens inputs are gathered."""


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    monkeypatch.setattr(block_batched, "FEW", WAYS[request.param])
    return request.param


def ragged(b, rows, columns, density=0.5, seed=0):
    """Random blocks: as many in a row as come; one row and one column are empty where there is room for that."""
    layout = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density
    if min(rows, columns) > 2:
        layout[1] = layout[:, 2] = False
    return index_blocks(Blocks(layout, b, b), b)


def drawn(index, *batch, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (*batch, index.shape[1]), (index.blocks, index.block, index.block), (*batch, index.shape[0])
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def run(kernel, index, x, values, pull):
    """The result and both gradients."""
    given_ = [t.detach().requires_grad_() for t in (x, values)]
    y = block_product(*given_, index, kernel=kernel)
    return [y.detach(), *torch.autograd.grad(y, given_, pull)]


def errors(index, *batch, dtype):
    """Relative 2-norms of the result and both gradients, against the oracle in float64."""
    x, values, pull = drawn(index, *batch, dtype=dtype)
    found = run("batched", index, x, values, pull)
    assert {t.dtype for t in found} == {dtype}
    exact = run("reference", index, x.double(), values.double(), pull.double())
    assert [t.shape for t in found] == [t.shape for t in exact]
    return [float((a.double() - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(found, exact, strict=True)]


TOLERANCES = {torch.float64: 1.5e-15, torch.float32: 7e-7, torch.float16: 8e-4, torch.bfloat16: 6e-3}
"""Measured: 4.0e-16, 2.1e-7, 2.1e-4 and 1.7e-3; in 16 bits it is the rounding of the results."""


@pytest.mark.matches
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("b", "rows", "columns"), [(32, 5, 7), (64, 6, 4), (128, 4, 6)])
def test_the_product_and_its_gradients_match_the_dense_matrix(way, b, rows, columns, dtype):
    index = ragged(b, rows, columns)
    assert len(set(index.start.diff().tolist())) > 2  # ragged, an empty row among them
    found = errors(index, 40, dtype=dtype)
    assert max(found) <= TOLERANCES[dtype], found


@pytest.mark.matches
def test_many_blocks_in_a_row_are_rounded_once(way):
    """Added up in bfloat16, every block would round: one by one 9.4e-3."""
    found = errors(ragged(32, 3, 64, 1.0), 40, dtype=torch.bfloat16)
    assert max(found) <= TOLERANCES[torch.bfloat16], found


@pytest.mark.stays
def test_autocast_does_not_reach_inside(way):
    """Its products are in 16 bits, and here their sums are not: the layer has cast what comes in."""
    index = ragged(32, 3, 9, 1.0)
    for dtype in (torch.float32, torch.bfloat16):
        given_ = drawn(index, 5, dtype=dtype)
        plain = run("batched", index, *given_)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = run("batched", index, *given_)
        assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.stays
def test_torch_compile_breaks_its_graph_there(way):
    index = ragged(32, 3, 4)
    x, values, _ = drawn(index, 5)

    def step(x, values):
        return block_product(2 * x, values, index, kernel="batched") + 1

    assert torch.equal(torch.compile(step, backend="eager")(x, values), step(x, values))


@pytest.mark.stays
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.floats(0, 1), st.integers(0, 99), st.sampled_from([0, 1, 3, 32, 33]))
def test_any_layout_and_any_number_of_tokens(rows, columns, density, seed, tokens):
    """Nothing kept, all kept, no token, and both sides of the number of tokens up to which inputs are gathered."""
    found = errors(ragged(32, rows, columns, density, seed), tokens, dtype=torch.float64)
    assert max(found) <= TOLERANCES[torch.float64], found


@pytest.mark.matches
def test_batch_dimensions_are_kept_and_strides_do_not_matter(way):
    index = ragged(32, 5, 7)
    assert max(errors(index, 2, 3, 4, dtype=torch.float32)) <= TOLERANCES[torch.float32]
    x, values, pull = drawn(index, 6)
    turned = torch.empty(6, 2 * index.shape[1])[:, ::2].copy_(x), values.transpose(1, 2).contiguous().transpose(1, 2)
    for a, b in zip(run("batched", index, *turned, pull), run("batched", index, x, values, pull), strict=True):
        assert torch.equal(a, b)
    spread = torch.ones(()).expand(6, index.shape[0])  # as sum() sends it back
    for a, b in zip(
        run("batched", index, x, values, spread), run("batched", index, x, values, spread.clone()), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.stays
def test_only_what_needs_a_gradient_is_computed(way, monkeypatch):
    index, made = ragged(32, 5, 7), []
    x, values, pull = drawn(index, 4)
    wanted = run("batched", index, x, values, pull)
    for name in ("_multiply", "_sample"):
        plain = getattr(block_batched, name)
        monkeypatch.setattr(block_batched, name, lambda *a, f=plain, name=name: made.append(name) or f(*a))
    for n, expected in enumerate((["_multiply", "_multiply"], ["_multiply", "_sample"])):
        given_ = [x.clone(), values.clone()]
        given_[n].requires_grad_()
        made.clear()
        block_product(*given_, index, kernel="batched").backward(pull)
        assert torch.equal(given_[n].grad, wanted[n + 1])
        assert (given_[1 - n].grad, made) == (None, expected)


@pytest.mark.stays
def test_a_row_that_keeps_nothing_reads_nothing(way):
    """Not even what is not a number."""
    index = ragged(32, 4, 5, 0.9)
    y = block_product(torch.full((3, 160), torch.nan), torch.ones(index.blocks, 32, 32), index, kernel="batched")
    assert (y[:, 32:64] == 0).all()
    assert y[:, :32].isnan().all()


@pytest.mark.stays
def test_no_dense_matrix_is_written():
    index = ragged(64, 16, 16, 0.05)
    for tokens in (4, 40):
        x, values, pull = drawn(index, tokens)
        dense = 4 * index.shape[0] * index.shape[1]
        held = {k: peak_bytes(lambda k=k: run(k, index, x, values, pull), x.device) for k in ("batched", "reference")}  # noqa: B023
        assert held["batched"] < dense / 4 < dense <= held["reference"]


@pytest.mark.reproduces
def test_same_inputs_same_bits(way):
    index = ragged(32, 4, 9, 0.8)
    given_ = drawn(index, 40)
    for a, b in zip(run("batched", index, *given_), run("batched", index, *given_), strict=True):
        assert torch.equal(a, b)


@pytest.mark.stays
def test_a_gpu_never_gathers():
    """Its index_add_ adds in any order."""
    assert block_batched._gathers(torch.empty(block_batched.FEW, 4))
    assert not block_batched._gathers(torch.empty(block_batched.FEW + 1, 4))
    assert not block_batched._gathers(torch.empty(1, 4, device="meta"))


@pytest.mark.survives
def test_layers_that_are_batched_products_by_their_reference_refuse_the_name():
    with pytest.raises(RecipeError, match=r"kernel='batched'.*reference or triton"):
        PixelatedLinear(64, 64, Plan(4, 1, 0), kernel="batched")
