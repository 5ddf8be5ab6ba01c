"""Reformer attention against loops from the paper, and transformers' where it does what the published code does."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fewedges.errors import ModelError, RecipeError
from fewedges.sparsify.attending import attend_, attending, masked_attention, patterns
from fewedges.sparsify.fixed_attention import Full
from fewedges.sparsify.hashing import (
    HashedAttention,
    hash_buckets,
    lsh_attention,
    lsh_pattern,
    published_lsh_attention,
    rotations,
    suggested_buckets,
)
from tiny import NoiseBatches, tiny_loaded


def drawn(seed, n=12, rounds=2, buckets=4, heads=2):
    """Double-precision tokens, values and their buckets."""
    torch.manual_seed(seed)
    x, value = torch.randn(2, 2, heads, n, 4, dtype=torch.double)
    return x, value, hash_buckets(x, rotations(heads, 4, rounds, buckets, seed), buckets)


def rounds_of(buckets, chunk):
    """For each round the list of chunks, tokens sorted by bucket then position."""
    for line in buckets.tolist():
        order = sorted(range(len(line)), key=lambda i: (line[i], i))
        yield line, [order[at : at + chunk] for at in range(0, len(order), chunk)]


def found_in_rounds(buckets, chunk, i, causal, real):
    """The sets P_i of the paper: for every round the keys in the same bucket, in i's chunk or the one before."""
    sets = []
    for line, chunks in rounds_of(buckets, chunk):
        at = next(c for c, tokens in enumerate(chunks) if i in tokens)
        near = chunks[at] + (chunks[at - 1] if at else [])
        keys = {j for j in near if line[j] == line[i] and (j <= i or not causal) and real[j] and j != i}
        sets.append(keys)
    return sets if any(sets) else [{i} for _ in sets]


def slow_paper(x, value, buckets, chunk, causal, real):
    """Equation 6: rounds weighted by exp(z_r - z), a key found N times divided by N."""
    out = torch.zeros_like(value)
    for i in range(len(x)):
        sets = found_in_rounds(buckets, chunk, i, causal, real)
        terms = []
        for keys in sets:
            for j in keys:
                times = sum(j in other for other in sets)
                terms.append((j, math.exp(float(x[i] @ x[j] / x[j].norm())) / times))
        total = sum(weight for _, weight in terms)
        for j, weight in terms:
            out[i] += weight / total * value[j]
    return out


def slow_published(x, value, buckets, chunk, causal):
    """Two chunks whatever the bucket, the first of a round after the last of the round before, no division."""
    n, out = len(x), torch.zeros_like(value)
    chunks = [tokens for _, round_ in rounds_of(buckets, chunk) for tokens in round_]
    for i in range(n):
        terms = []
        for at, tokens in enumerate(chunks):
            if i in tokens:
                keys = [j for j in chunks[at - 1] + tokens if (j <= i or not causal) and j != i]
                terms += [(j, math.exp(float(x[i] @ x[j] / x[j].norm()))) for j in keys]
        terms = terms or [(i, 1.0)]
        total = sum(weight for _, weight in terms)
        for j, weight in terms:
            out[i] += weight / total * value[j]
    return out


SETTINGS = st.tuples(
    st.integers(0, 9999), st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(1, 3), st.sampled_from([2, 4, 6])
)


@pytest.mark.matches
@settings(max_examples=25, deadline=None)
@given(SETTINGS, st.booleans(), st.booleans())
def test_it_is_the_papers_sum_over_rounds_and_the_softmax_over_the_pattern(setting, causal, padded):
    seed, chunk, rounds, buckets = setting
    x, value, where = drawn(seed, rounds=rounds, buckets=buckets)
    real = torch.ones(2, 12, dtype=torch.bool)
    if padded:
        real[0, 8:] = False
    mine = lsh_attention(x, value, where, chunk, causal=causal, real=real)
    pattern = lsh_pattern(where, chunk, causal=causal, real=real)
    key = torch.nn.functional.normalize(x, dim=-1)
    torch.testing.assert_close(
        mine, masked_attention(x, key, value, pattern.mask(), 1.0), rtol=0, atol=3.5e-15
    )  # measured 9e-16
    for b in range(2):
        for h in range(2):
            wanted = slow_paper(x[b, h], value[b, h], where[b, h], chunk, causal, real[b])
            torch.testing.assert_close(mine[b, h], wanted, rtol=0, atol=3.5e-15)  # measured 9e-16
            for i in range(12):
                union = set().union(*found_in_rounds(where[b, h], chunk, i, causal, real[b]))
                assert set(pattern.mask()[b, h, i].nonzero()[:, 0].tolist()) == union


@pytest.mark.matches
@settings(max_examples=15, deadline=None)
@given(SETTINGS, st.booleans())
def test_the_published_variant_is_its_loop(setting, causal):
    seed, chunk, rounds, buckets = setting
    x, value, where = drawn(seed, rounds=rounds, buckets=buckets)
    mine = published_lsh_attention(x, value, where, chunk, causal=causal)
    for b in range(2):
        for h in range(2):
            wanted = slow_published(x[b, h], value[b, h], where[b, h], chunk, causal)
            torch.testing.assert_close(mine[b, h], wanted, rtol=0, atol=4.4e-15)  # measured 1.1e-15


@pytest.mark.matches
@pytest.mark.parametrize(("factors", "rounds"), [(8, 1), (8, 3), ([4, 6], 2)])
def test_buckets_are_the_nearest_of_the_rotated_axes(factors, rounds):
    torch.manual_seed(0)
    x, rotation = torch.randn(2, 3, 10, 5), rotations(3, 5, rounds, factors, seed=1)
    mine = hash_buckets(x, rotation, factors)
    for b, h, r, i in torch.cartesian_prod(*map(torch.arange, (2, 3, rounds, 10))).tolist():
        wanted, size, start = 0, 1, 0
        for factor in [factors] if isinstance(factors, int) else factors:
            sides = [float(x[b, h, i] @ rotation[h, :, r, start + c]) for c in range(factor // 2)]
            sides += [-side for side in sides]
            wanted, size, start = wanted + size * sides.index(max(sides)), size * factor, start + factor // 2
        assert int(mine[b, h, r, i]) == wanted


@pytest.mark.matches
@pytest.mark.parametrize("factors", [4, [2, 4]])
@pytest.mark.parametrize("decoder", [True, False])
def test_transformers_reformer_hashes_and_attends_like_the_published_variant(factors, decoder):
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    n, chunk, heads, width, rounds = 32, 8, 2, 8, 2
    config = ReformerConfig(
        hidden_size=16, num_attention_heads=heads, attention_head_size=width, num_hashes=rounds, hash_seed=5,
        lsh_attn_chunk_length=chunk, num_buckets=factors, is_decoder=decoder, lsh_attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = LSHSelfAttention(config).eval().double()  # in float32 a token alone at -1e5 gets weights that miss 1
    hidden = 3 * torch.randn(2, n, 16, dtype=torch.double)
    with torch.no_grad():
        out = theirs(hidden, num_hashes=rounds)
        x, value = (p(hidden).unflatten(-1, (heads, width)).transpose(1, 2) for p in (theirs.query_key, theirs.value))
    total = factors if isinstance(factors, int) else math.prod(factors)
    torch.manual_seed(5)
    half = (factors if isinstance(factors, int) else sum(factors)) // 2
    mine = hash_buckets(x, torch.randn(heads, width, rounds, half, dtype=torch.double), factors)
    numbered = mine + total * torch.arange(rounds)[:, None]
    assert torch.equal(numbered.flatten(2), out.buckets.flatten(2))
    output = published_lsh_attention(x, value, mine, chunk, causal=decoder)
    gap = (output - out.hidden_states.unflatten(-1, (heads, width)).transpose(1, 2)).abs().max()
    assert gap <= 1.4e-5  # their key norm adds 1e-6 to the mean square; measured 3.7e-6
    different = lsh_attention(x, value, mine, chunk, causal=decoder) - output
    assert different.abs().max() > 0.1  # what the paper adds matters


@pytest.mark.stays
@settings(max_examples=20, deadline=None)
@given(SETTINGS)
def test_the_future_does_not_matter_in_content(setting):
    """With buckets held, what comes later changes nothing earlier; gradients are those of the masked softmax."""
    seed, chunk, rounds, buckets = setting
    x, value, where = drawn(seed, rounds=rounds, buckets=buckets)
    before = lsh_attention(x, value, where, chunk)
    later_x, later_v = x.clone(), value.clone()
    later_x[:, :, 7:] += 1
    later_v[:, :, 7:] -= 1
    after = lsh_attention(later_x, later_v, where, chunk)
    torch.testing.assert_close(after[:, :, :7], before[:, :, :7], rtol=0, atol=0)
    x.requires_grad_()
    key = torch.nn.functional.normalize(x, dim=-1)
    slow = masked_attention(x, key, value, lsh_pattern(where, chunk).mask(), 1.0).square().sum()
    fast = lsh_attention(x, value, where, chunk).square().sum()
    (a,), (b,) = torch.autograd.grad(fast, x), torch.autograd.grad(slow, x)
    torch.testing.assert_close(a, b, rtol=0, atol=2.8e-14)  # measured 7e-15


@pytest.mark.stays
def test_near_tokens_share_buckets_and_rounds_raise_the_chance():
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(1, 1, 2000, 16), dim=-1)
    near = torch.nn.functional.normalize(x + 0.1 * torch.randn_like(x), dim=-1)

    def met(other, rounds):
        rotation = rotations(1, 16, rounds, 16)
        return float((hash_buckets(x, rotation, 16) == hash_buckets(other, rotation, 16)).any(-2).float().mean())

    far = x[:, :, torch.randperm(2000)]
    assert met(near, 1) > 0.6 > 0.2 > met(far, 1)  # measured .67 and .08
    assert met(near, 4) > met(near, 1)


@pytest.mark.stays
@given(st.integers(1, 10_000), st.integers(1, 300))
@example(10, 16)  # was half a bucket
@example(5000, 64)
def test_the_suggested_buckets_are_a_power_of_two_that_can_be_hashed_to(n, chunk):
    buckets = suggested_buckets(n, chunk)
    assert isinstance(buckets, int)
    assert buckets == 2 or buckets <= 2 * n / chunk
    assert buckets.bit_count() == 1
    assert 2 * buckets > 2 * n / chunk  # the next power would be too many
    assert rotations(1, 4, 1, buckets).shape[-1] == buckets // 2 > 0


@pytest.mark.matches
def test_a_pretrained_model_attends_within_buckets():
    loaded, given = tiny_loaded("llama"), NoiseBatches().at(0, 2).tokens
    with torch.no_grad():
        dense = loaded.model(input_ids=given, use_cache=False).logits
        with attending(loaded.model, loaded.anatomy, [HashedAttention(2, rounds=30), Full()]):
            many = loaded.model(input_ids=given, use_cache=False).logits
        attend_(loaded.model, loaded.anatomy, [HashedAttention(8, rounds=1), Full()])
        few = loaded.model(input_ids=given, use_cache=False).logits
        steps = loaded.model(input_ids=given[:, :5], use_cache=True)
        rest = loaded.model(input_ids=given[:, 5:], past_key_values=steps.past_key_values).logits
    with pytest.raises(ModelError, match="depends on the data"):
        patterns(loaded.model, loaded.anatomy, 10)
    assert (many - dense).abs().max() <= 1e-6 * dense.abs().max()  # all meet in some round; measured 0
    assert (few - dense).abs().max() > 0.05 * dense.abs().max()
    assert (torch.cat([steps.logits, rest], 1) - few).abs().max() <= 1.2e-6 * few.abs().max()  # measured 2.9e-7


@pytest.mark.matches
def test_the_router_keeps_keys_of_an_equal_bucket_and_the_query_itself():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 2, 9, 6)
    router = HashedAttention(4, rounds=2, seed=3)
    mask = router.route(q, k, torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()).mask()
    rotation = rotations(2, 6, 2, 4, seed=3)
    asks, offers = hash_buckets(q, rotation, 4), hash_buckets(k, rotation, 4)
    for h, i, j in torch.cartesian_prod(*map(torch.arange, (2, 9, 9))).tolist():
        assert bool(mask[0, h, i, j]) == (i == j or any(asks[0, h, r, i] == offers[0, h, r, j] for r in range(2)))


@pytest.mark.survives
@pytest.mark.parametrize(
    "make",
    [
        lambda: rotations(1, 4, 1, 3),
        lambda: HashedAttention(5),
        lambda: HashedAttention(4, rounds=0),
        lambda: suggested_buckets(0, 16),
        lambda: suggested_buckets(16, 0),
        lambda: hash_buckets(torch.randn(1, 1, 4, 4), rotations(1, 4, 1, 4), 8),
        lambda: lsh_attention(*torch.randn(2, 1, 1, 10, 4), torch.zeros(1, 1, 1, 10, dtype=torch.long), 4),
    ],
)
def test_what_cannot_be_hashed_is_refused(make):
    with pytest.raises(RecipeError, match="Try: "):
        make()
