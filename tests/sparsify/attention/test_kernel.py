"""The fused kernel against gate.py, on the CPU through Triton's interpreter.

The interpreter cannot multiply bfloat16 matrices: benchmarks/attention.py checks those on a GPU.
"""

import sys

import pytest
import torch

from fewedges.errors import ModelError
from fewedges.sparsify.attention import kernel
from fewedges.sparsify.attention.gate import Gating, gated_attention, key_bias, uniform_noise

DEVICE = "fewedges.sparsify.attention.device"
NAMES = ("output", "expected", "open", "query", "key", "value", "bias")
SMALL = [  # rows above, below and equal to keys: every path through the diagonal
    kernel.Tiles(kernel.Tile(32, 16, 1, 1), kernel.Tile(16, 32, 1, 1), kernel.Tile(16, 32, 1, 1)),
    kernel.Tiles(kernel.Tile(16, 32, 1, 1), kernel.Tile(32, 16, 1, 1), kernel.Tile(32, 16, 1, 1)),
    kernel.Tiles(kernel.Tile(16, 16, 1, 1), kernel.Tile(16, 16, 1, 1), kernel.Tile(16, 16, 1, 1)),
]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Small tiles, and device functions built anew for the interpreter, whoever imported what before."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    use(monkeypatch, SMALL[0])
    sys.modules.pop(DEVICE, None)
    yield
    sys.modules.pop(DEVICE, None)


def use(monkeypatch, tiles):
    monkeypatch.setattr(kernel, "TILES", {(256, 2): tiles, (256, 4): tiles})


def inputs(batch, heads, groups, length, width, dtype=torch.float32):
    """Query, key, value as transformers passes them (transposed views), and a bias that closes most gates."""
    torch.manual_seed(length)
    query, key, value = (torch.randn(batch, length, h, width).to(dtype) for h in (heads, groups, groups))
    bias = torch.linspace(-2, 1, heads) if heads > 1 else torch.tensor([-0.5])
    return [x.requires_grad_() for x in (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), bias)]


def with_gradients(attend, tensors):
    """The three results and four gradients, the gradient through `expected` included."""
    result = attend(*tensors)
    seeds = torch.Generator().manual_seed(1)
    pulls = [torch.randn(x.shape, generator=seeds).to(x.dtype) for x in result[:2]]
    return [x.detach() for x in (*result, *torch.autograd.grad(result[:2], tensors, pulls))]


def fused(*tensors, seed=7, **gating):
    scaling = tensors[0].shape[-1] ** -0.5
    return kernel.fused_gated_attention(*tensors, seed, scaling=scaling, **{"sample": True, **gating})


def exact(*tensors, seed=7, **gating):
    causal = torch.ones(1, 1, tensors[0].shape[2], tensors[0].shape[2], dtype=torch.bool).tril()
    options = Gating(seed=seed, **{"sample": True, **gating})
    return gated_attention(*tensors, causal, scaling=tensors[0].shape[-1] ** -0.5, gating=options)


def errors(tensors, **gating):
    """Relative error in the 2-norm of every result and gradient, against gate.py in float64."""
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    ours = with_gradients(lambda *x: fused(*x, **gating), tensors)
    reference = with_gradients(lambda *x: exact(*x, **gating), doubles)
    size = [b.norm().clamp_min(1e-12) for b in reference]
    return {n: ((a - b).norm() / s).item() for n, a, b, s in zip(NAMES, ours, reference, size, strict=True)}


SHAPES = [(1, 2, 2, 37, 32), (2, 4, 2, 50, 64), (1, 3, 1, 65, 24), (1, 1, 1, 1, 64), (1, 2, 1, 40, 96)]
GATINGS = [{"sample": True}, {"sample": False}, {"sample": False, "straight_through": True}]


@pytest.mark.matches
@pytest.mark.parametrize("gating", GATINGS, ids=["sampled", "hard", "straight-through"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_matches_the_reference(shape, gating):
    # Measured: 2.6e-7 (query and bias gradients); a single gate decided otherwise would show as 1e-2.
    found = errors(inputs(*shape), **gating)
    assert max(found.values()) < 8e-7, found


@pytest.mark.matches
@pytest.mark.parametrize("gating", GATINGS, ids=["sampled", "hard", "straight-through"])
def test_a_bias_by_key_matches_the_reference(gating):
    *tensors, bias = inputs(2, 4, 2, 50, 32)
    by_key = (bias.detach()[:, None] + torch.randn(2, 4, 50)).requires_grad_()
    # Measured: 2.3e-7 (key gradient).
    found = errors([*tensors, by_key], **gating)
    assert max(found.values()) < 8e-7, found


PADDING = {
    "left": [(7, 40), (20, 40)],
    "right": [(0, 33), (0, 1)],
    "both, and none": [(5, 31), (0, 40)],
    "only padding": [(0, 0), (3, 40)],
}


@pytest.mark.matches
@pytest.mark.parametrize("gating", GATINGS, ids=["sampled", "hard", "straight-through"])
@pytest.mark.parametrize("ranges", PADDING.values(), ids=PADDING)
def test_padding_matches_the_reference(ranges, gating):
    """Keys that are padding are seen by no query and have no gradient; a query that sees nothing gives 0."""
    length = 40
    tokens = torch.stack([(torch.arange(length) >= a) & (torch.arange(length) < b) for a, b in ranges])
    tokens[1, 25] = False  # a hole
    tensors = inputs(2, 4, 2, length, 32)
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    allowed = torch.ones(length, length, dtype=torch.bool).tril() & tokens[:, None, None]
    options = Gating(seed=7, **gating)

    def reference(*x):
        return gated_attention(*x, allowed, scaling=32**-0.5, gating=options)

    ours = with_gradients(lambda *x: fused(*x, tokens=tokens, **gating), tensors)
    exactly = with_gradients(reference, doubles)
    found = {
        name: ((a - b).norm() / b.norm().clamp_min(1e-12)).item()
        for name, a, b in zip(NAMES, ours, exactly, strict=True)
    }
    # Measured: 2.4e-7 (query gradient).
    assert max(found.values()) < 8e-7, found
    assert (ours[4].transpose(1, 2)[~tokens] == 0).all()


@pytest.mark.matches
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gate_queries_match_the_reference_through_shared_keys(groups):
    """Results, and the gradients of keys and gate queries: what a bias by key is made of."""
    query, key, value, bias = inputs(2, 4, groups, 50, 32)
    extra = torch.randn(4, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
    found = {}
    for attend, dtype in ((fused, torch.float32), (exact, torch.float64)):
        given = [x.detach().to(dtype).requires_grad_() for x in (query, key, value, bias, extra)]

        def attended(q, k, v, b, w, attend=attend):
            return attend(q, k, v, key_bias(b, w, k, 32**-0.5))

        found[attend] = with_gradients(attended, given)
    for mine, theirs in zip(found[fused], found[exact], strict=True):
        assert (mine - theirs).norm() / theirs.norm() < 8e-7  # measured 2.2e-7
    assert 0.1 < found[exact][2].mean() / 25.5 < 0.9  # open gates: neither dense nor closed


@pytest.mark.matches
@pytest.mark.parametrize("sample", [True, False])
def test_infinite_biases_by_key_close_and_open_that_key_alone(sample):
    *tensors, bias = inputs(1, 2, 1, 35, 32)
    by_key = bias.detach()[:, None].repeat(1, 35)[None].clone()
    by_key[:, :, 0], by_key[:, :, 7] = -torch.inf, torch.inf
    ours, reference = fused(*tensors, by_key, sample=sample), exact(*tensors, by_key, sample=sample)
    torch.testing.assert_close(ours.output, reference.output, atol=1.2e-6, rtol=0)  # measured 3.7e-7
    assert torch.equal(ours.open, reference.open)
    assert (ours.open[:, :, 0] == 0).all()
    assert (ours.open[:, :, 7:] >= 1).all()


@pytest.mark.matches
def test_float16_matches_the_reference():
    # Measured: 3.8e-4 (query gradient), the rounding of p, dS and of the results themselves.
    found = errors(inputs(1, 2, 1, 70, 64, torch.float16))
    assert max(found.values()) < 1.2e-3, found


@pytest.mark.matches
@pytest.mark.parametrize("tiles", SMALL[1:], ids=["wide", "square"])
def test_tile_shapes_do_not_matter(monkeypatch, tiles):
    use(monkeypatch, tiles)
    found = errors(inputs(1, 2, 1, 70, 32))
    assert max(found.values()) < 6e-7, found  # measured: 1.9e-7


@pytest.mark.matches
@pytest.mark.parametrize("seed", [0, -5, 2**31 - 1, 2**32 - 1, torch.tensor(12345, dtype=torch.int32)], ids=str)
def test_every_gate_is_the_references(seed):
    """With q = 0 and one-hot values the output is gate / (i + 1): a picture of the noise cut at -bias."""
    length, bias = 32, torch.tensor([-3.0, -1.0, 0.0, 2.0])
    zero, values = torch.zeros(2, 4, length, length), torch.eye(length).expand(2, 4, length, length)
    result = kernel.fused_gated_attention(zero, zero, values, bias, seed, scaling=1.0, sample=True)
    gates = result.output * torch.arange(1, length + 1)[:, None] > 0.5
    noise = torch.logit(uniform_noise(seed, (2, 4, length, length), torch.device("cpu")).double())
    assert torch.equal(gates, (noise + bias[:, None, None] > 0).tril())


@pytest.mark.stays
@pytest.mark.parametrize("sample", [True, False])
def test_infinite_bias_is_the_dense_model_or_silence(sample):
    query, key, value, _ = inputs(1, 2, 2, 35, 32)
    dense = fused(query, key, value, torch.tensor([torch.inf, -torch.inf]), sample=sample)
    reference = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    # Measured: 3.6e-7 at most.
    torch.testing.assert_close(dense.output[:, 0], reference[:, 0], atol=1.2e-6, rtol=0)
    assert (dense.output[:, 1] == 0).all()
    assert (dense.expected == dense.open).all()
    assert (dense.open[:, 0] == torch.arange(1, 36)).all()


@pytest.mark.survives
def test_large_scores_stay_finite():
    query, key, value, bias = inputs(1, 2, 2, 35, 32)
    found = errors([(query.detach() * 300).requires_grad_(), key, value, bias])
    # Measured: 2.2e-5 (bias gradient): of scores near 1000, float32 keeps about 1e-4.
    assert max(found.values()) < 8e-5, found


@pytest.mark.reproduces
def test_same_seed_same_bits():
    tensors = inputs(1, 2, 1, 50, 32)
    runs = [with_gradients(lambda *x, s=s: fused(*x, seed=s), tensors) for s in (3, torch.tensor(3), 4)]
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not torch.equal(runs[0][0], runs[2][0])


@pytest.mark.stays
def test_operator_is_sound_for_compile():
    *tensors, bias = inputs(1, 2, 1, 20, 32)
    bias = bias.detach()[:, None].expand(1, 2, 20)
    tensors = [*tensors, bias, torch.tensor(3, dtype=torch.int32), 0.2, True, False, False]
    torch.library.opcheck(kernel._attend, tensors)


@pytest.mark.says
def test_says_what_it_cannot_do(monkeypatch):
    query, key, value, bias = inputs(1, 2, 1, 20, 32)
    with pytest.raises(ModelError, match="float64"):
        fused(query.double(), key.double(), value.double(), bias)
    with pytest.raises(ModelError, match="equal lengths"):
        fused(query[:, :, :1], key, value, bias)
    for shape in ((2, 20), (1, 2, 19), (1, 1, 20), (2, 2, 20), (1,)):
        with pytest.raises(ModelError, match="not self-attention of equal lengths"):
            fused(query, key, value, torch.zeros(shape))
    with pytest.raises(ModelError, match="one dtype"):
        fused(query, key, value.half(), bias)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ModelError, match="not on a GPU"):
        fused(query, key, value, bias)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ModelError, match=r"fewedges\[kernel\]"):
        fused(query, key, value, bias)
