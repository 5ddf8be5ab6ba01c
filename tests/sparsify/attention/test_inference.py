"""Hard-gated prefill and decoding against gate.py, on the CPU through Triton's interpreter.

The interpreter cannot multiply bfloat16 matrices: benchmarks/inference.py checks those on a GPU.
"""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewedges.errors import ModelError
from fewedges.model.attention import attention_by, register
from fewedges.sparsify.attention import inference
from fewedges.sparsify.attention.gate import gated_attention
from fewedges.sparsify.attention.inference import Walk, causal_range, hard_gated_attention, key_range
from tiny import tiny_model

DEVICES = [f"fewedges.sparsify.attention.{name}" for name in ("inference_device", "device")]
WALKS = {"low": Walk(16, 32, 16, 1, 1), "high": Walk(32, 16, 32, 1, 1), "square": Walk(16, 16, 16, 1, 1)}


def interpret(patch):
    """Small tiles, several spans and splits, and device functions built anew for the interpreter."""
    patch.setenv("TRITON_INTERPRET", "1")
    patch.setattr(inference, "SPAN", 32)
    patch.setattr(inference, "CHUNK", 16)
    patch.setattr(inference, "PACKED", 12)  # else all that is small enough for a test would be decoding
    use(patch, WALKS["low"])
    for name in DEVICES:
        sys.modules.pop(name, None)


def use(patch, walk):
    for walks in ("PREFILL", "DECODE"):
        patch.setattr(inference, walks, {(256, 2): walk._replace(rows=16 if walks == "DECODE" else walk.rows)})
        getattr(inference, walks)[(256, 4)] = getattr(inference, walks)[(256, 2)]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    pytest.importorskip("triton")
    interpret(monkeypatch)
    yield
    for name in DEVICES:
        sys.modules.pop(name, None)


def inputs(batch, heads, groups, queries, keys, width, dtype=torch.float32):
    """Query, key, value as transformers passes them (transposed views), and a bias that closes most gates."""
    torch.manual_seed(keys)
    sizes = ((queries, heads), (keys, groups), (keys, groups))
    qkv = [torch.randn(batch, length, h, width).to(dtype).transpose(1, 2) for length, h in sizes]
    return [*qkv, torch.linspace(-2.5, 0.5, heads) if heads > 1 else torch.tensor([-1.5])]


def by_key(tensors):
    """The same with a bias for every key of every head."""
    *qkv, bias = tensors
    return [*qkv, bias[:, None] + torch.randn(qkv[0].shape[0], len(bias), qkv[1].shape[2])]


def ranges(batch, keys):
    """Left padding in the first row, right padding in the second."""
    return torch.tensor([keys // 3, 0])[:batch], torch.tensor([keys, keys - keys // 4])[:batch]


def compared(tensors, start=None, stop=None, way="gather"):
    """Our result, and gate.py's in float64 with the mask written out; padding rows do not count there."""
    scaling = tensors[0].shape[-1] ** -0.5
    ours = hard_gated_attention(*tensors, scaling=scaling, start=start, stop=stop, way=way)
    allowed = causal_range(tensors[0].shape[2], tensors[1].shape[2], start, stop)
    exact = gated_attention(*(x.double() for x in tensors), allowed, scaling=scaling)
    return ours, exact, allowed.any(-1)


def error(tensors, *limits, way="gather"):
    """Relative error of the output in the 2-norm; every count of open gates must be the same."""
    ours, exact, _ = compared(tensors, *limits, way=way)
    assert torch.equal(ours.open.double(), exact.open)
    return ((ours.output - exact.output).norm() / exact.output.norm().clamp_min(1e-12)).item()


PREFILLS = [  # B, H, G, Q, K, E
    (1, 2, 2, 37, 37, 32),  # odd
    (2, 4, 2, 34, 34, 64),  # GQA
    (1, 3, 1, 49, 49, 24),  # a width that is no power of two
    (2, 2, 1, 33, 70, 32),  # a second chunk of a prompt, three spans
    (1, 1, 1, 1, 1, 64),
    (1, 1, 1, 20, 40, 256),
]
DECODES = [(2, 6, 2, 1, 77, 32), (2, 4, 2, 5, 77, 96), (1, 2, 1, 1, 33, 24)]
CASES = [(shape, way) for shape in PREFILLS for way in ("gather", "skip")] + [(shape, "gather") for shape in DECODES]


@pytest.mark.matches
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(("shape", "way"), CASES, ids=str)
def test_float32_matches_the_reference(shape, way, padded):
    limits = ranges(shape[0], shape[4]) if padded else ()
    # Measured: 1.5e-7; a single gate decided otherwise would fail the counts.
    assert error(inputs(*shape), *limits, way=way) < 6e-7


@pytest.mark.matches
@pytest.mark.parametrize(("shape", "way"), [(PREFILLS[1], "gather"), (PREFILLS[1], "skip"), (DECODES[0], "gather")])
def test_a_bias_by_key_matches_the_reference(shape, way):
    assert (
        error(by_key(inputs(*shape)), *ranges(shape[0], shape[4]), way=way) < 4e-7
    )  # measured: 9.3e-8, decoding 1.4e-7


@pytest.mark.matches
@pytest.mark.parametrize("shape", [(1, 2, 1, 40, 40, 64), (1, 4, 2, 2, 70, 64)], ids=str)
def test_float16_matches_the_reference(shape):
    # Measured: 2.6e-4, the rounding of p and of the output.
    assert error(inputs(*shape, dtype=torch.float16)) < 1.0e-3


@pytest.mark.matches
def test_many_packed_queries_match_the_reference(monkeypatch):
    monkeypatch.setattr(inference, "PACKED", 64)
    assert error(inputs(1, 4, 2, 20, 70, 32), *ranges(1, 70)) < 6e-7  # measured: 2.0e-7


@pytest.mark.matches
@pytest.mark.parametrize("walk", ["high", "square"])
def test_tile_shapes_do_not_matter(monkeypatch, walk):
    use(monkeypatch, WALKS[walk])
    found = [error(inputs(2, 2, 1, 40, 40, 32), *ranges(2, 40), way=way) for way in ("gather", "skip")]
    assert max(found) < 3.6e-7  # measured: 9.2e-8


@pytest.mark.stays
@settings(max_examples=12, deadline=None)
@given(
    queries=st.integers(1, 24), before=st.integers(0, 40), first=st.integers(0, 70), length=st.integers(0, 70),
    way=st.sampled_from(["gather", "skip"]), bias=st.sampled_from([-torch.inf, -3.0, 0.0, torch.inf]),
)  # fmt: skip
def test_any_length_offset_and_padding(queries, before, first, length, way, bias):
    """Chunks, decoding and padding anywhere, also rows that are nothing but padding."""
    with pytest.MonkeyPatch.context() as patch:
        interpret(patch)
        keys = queries + before
        query, key, value, _ = inputs(1, 2, 1, queries, keys, 16)
        biases = torch.tensor([bias, -1.0])
        start, stop = torch.tensor([first]), torch.tensor([min(first + length, keys)])
        ours, exact, seen = compared([query, key, value, biases], start, stop, way)
        assert torch.equal(ours.open.double(), exact.open)
        assert (ours.output.transpose(1, 2)[~seen[:, 0]] == 0).all()
        # Measured: 3.2e-7 over 100 cases.
        torch.testing.assert_close(ours.output.double(), exact.output, atol=1.2e-6, rtol=0)


@pytest.mark.stays
@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("way", ["gather", "skip"])
def test_infinite_bias_is_the_dense_model_or_silence(queries, way):
    query, key, value, _ = inputs(1, 2, 2, queries, 70, 32)
    result = hard_gated_attention(query, key, value, torch.tensor([torch.inf, -torch.inf]), scaling=32**-0.5, way=way)
    causal = causal_range(queries, 70)
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=causal)
    # Measured: 3.6e-7 at most.
    torch.testing.assert_close(result.output[:, 0], dense[:, 0], atol=1.4e-6, rtol=0)
    assert (result.output[:, 1] == 0).all()
    assert (result.open[:, 1] == 0).all()
    assert torch.equal(result.open[0, 0], torch.arange(70 - queries + 1, 71).float())


@pytest.mark.stays
@pytest.mark.parametrize(("queries", "way", "alone"), [(1, "gather", 1), (20, "gather", 1), (20, "skip", 32)])
def test_values_behind_closed_gates_are_not_read(queries, way, alone):
    """NaN in every value no gate opens (skip: in whole tiles): in a product even 0 * NaN would show.

    The bias is positive, so that rows beyond the last query, whose scores are 0, would open every gate.
    """
    query, key, value, _ = inputs(1, 2, 2, queries, 96, 32)
    closed = (torch.arange(96) // alone) % 3 != 0
    key = torch.where(closed[:, None], -5.0, key.abs())
    spoilt = value.masked_fill(closed[:, None], torch.nan)
    options = {"bias": torch.full((2,), 0.5), "scaling": 32**-0.5, "way": way}
    ours, clean = (hard_gated_attention(query.abs(), key, x, **options) for x in (spoilt, value))
    assert (ours.open > 20).all()
    assert torch.equal(ours.output, clean.output)


@pytest.mark.survives
def test_large_scores_stay_finite():
    query, key, value, bias = inputs(1, 2, 2, 35, 70, 32)
    assert error([query * 300, key, value, bias]) < 1.0e-5  # measured: 2.8e-6


@pytest.mark.reproduces
@pytest.mark.parametrize("queries", [1, 20])
def test_same_inputs_same_bits(queries):
    tensors = inputs(2, 2, 1, queries, 50, 32)
    first, again = (hard_gated_attention(*tensors, scaling=0.2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.stays
@pytest.mark.parametrize("queries", [1, 20])
def test_operator_is_sound_for_compile(queries):
    start, stop = (x.int() for x in ranges(1, 40))
    torch.library.opcheck(inference._attend_hard, [*inputs(1, 2, 1, queries, 40, 32), start, stop, 0.2, "gather"])


@pytest.mark.matches
def test_a_padded_batch_through_a_model():
    """Left-padded prompts, prefill and three decoded tokens, in a real decoder with a cache."""

    def attend(module, query, key, value, mask, scaling=None, **_):
        limits = key_range(mask[:, 0, -1])  # the last query sees every key that is no padding
        result = hard_gated_attention(query, key, value, bias, scaling=scaling, start=limits[0], stop=limits[1])
        return result.output.transpose(1, 2).contiguous(), None

    def plain(module, query, key, value, mask, scaling=None, **_):
        return gated_attention(query, key, value, bias, mask, scaling=scaling).output.transpose(1, 2), None

    model = tiny_model("llama")
    bias = torch.zeros(model.config.num_attention_heads)
    ids = torch.arange(22).view(2, 11) % model.config.vocab_size
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    register("hard-by-triton", attend)
    register("hard-by-torch", plain)
    scores = {}
    for name in ("hard-by-triton", "hard-by-torch"):
        with attention_by(model, name), torch.no_grad():
            found = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False,
                return_dict_in_generate=True, output_logits=True, pad_token_id=0,
            )  # fmt: skip
        scores[name] = torch.stack(found.logits)
    assert scores["hard-by-torch"].std() > 0.01
    # Measured: 1.3e-6, of logits up to 2.5.
    torch.testing.assert_close(scores["hard-by-triton"], scores["hard-by-torch"], atol=5e-6, rtol=0)


@pytest.mark.stays
def test_key_range_of_a_mask():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    start, stop = key_range(mask)
    assert start.tolist() == [2, 0, 0, 4]
    assert stop.tolist() == [4, 3, 4, 0]


@pytest.mark.says
def test_says_what_it_cannot_do(monkeypatch):
    query, key, value, bias = inputs(1, 2, 1, 20, 30, 32)

    def refused(match, *changed, **options):
        with pytest.raises(ModelError, match=match):
            hard_gated_attention(*(changed or (query, key, value, bias)), **{"scaling": 0.2, **options})

    refused("float64", query.double(), key.double(), value.double(), bias)
    refused("as many keys", query, key[:, :, :10], value[:, :, :10], bias)
    refused("one dtype", query, key, value.half(), bias)
    refused("softcap 30", softcap=30.0)
    refused("both or neither", start=torch.tensor([0]))
    refused("gather or skip", way="guess")
    refused("no_grad", query, key, value, bias.clone().requires_grad_())
    monkeypatch.delenv("TRITON_INTERPRET")
    refused("not on a GPU")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton", None)
    refused(r"fewedges\[kernel\]")
