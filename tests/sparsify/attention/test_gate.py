"""The mathematics of the gate against slow loops, finite differences, counting and plain integers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewedges.sparsify.attention.gate import (
    Gated,
    Gating,
    gated_attention,
    gates,
    key_bias,
    logistic_noise,
    uniform_noise,
)

SAMPLED = Gating(sample=True, seed=11)
HARD = Gating()
SOFTLY = Gating(straight_through=True)
EXACT = 3.5e-15  # float64 sums of a few products; measured at most 8.9e-16


def inputs(batch=2, heads=4, groups=2, queries=5, width=3, seed=0, keys=None):
    """Query, key, value, bias in float64, with gradients."""
    torch.manual_seed(seed)
    keys = queries if keys is None else keys
    shapes = [(batch, heads, queries, width), (batch, groups, keys, width), (batch, groups, keys, width), (heads,)]
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def causal(queries, keys=None):
    return torch.ones(1, 1, queries, queries if keys is None else keys, dtype=torch.bool).tril()


def attend(query, key, value, bias, allowed=None, gating=HARD, scaling=0.7, softcap=None):
    allowed = causal(query.shape[2]) if allowed is None else allowed
    return gated_attention(query, key, value, bias, allowed, scaling=scaling, softcap=softcap, gating=gating)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# -- the forward pass ------------------------------------------------------------------------------------------


def slow(query, key, value, bias, allowed, gating=HARD, scaling=0.7, softcap=None):
    """Gated attention entry by entry, in Python floats; the bias by head, or by head and key."""
    batch, heads, queries, _ = query.shape
    repeat, keys = heads // key.shape[1], key.shape[2]
    bias = bias if bias.dim() == 3 else bias.view(1, -1, 1).expand(batch, heads, keys)
    noise = logistic_noise(uniform_noise(gating.seed, (batch, heads, queries, keys), query.device))
    result = Gated(torch.zeros_like(query), *torch.zeros(2, batch, heads, queries, dtype=query.dtype))
    for b, h, i in [(b, h, i) for b in range(batch) for h in range(heads) for i in range(queries)]:
        seen = [j for j in range(keys) if allowed[b % len(allowed), 0, i, j]]
        pairs = {j: zip(query[b, h, i].tolist(), key[b, h // repeat, j].tolist(), strict=True) for j in seen}
        dots = {j: scaling * sum(x * y for x, y in pairs[j]) for j in seen}
        scores = dots if softcap is None else {j: softcap * math.tanh(s / softcap) for j, s in dots.items()}
        total = sum(math.exp(s) for s in scores.values())
        for j, score in scores.items():
            logit = score + float(bias[b, h, j])
            drawn = logit + float(noise[b, h, i, j]) if gating.sample else logit
            if drawn > 0:
                result.output[b, h, i] += math.exp(score) / total * value[b, h // repeat, j]
            result.expected[b, h, i] += sigmoid(logit)
            result.open[b, h, i] += float(logit > 0)
    return result


@pytest.mark.matches
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("gating", [HARD, SAMPLED, SOFTLY], ids=["hard", "sampled", "straight-through"])
def test_gated_attention_is_what_the_formula_says(gating, softcap):
    tensors = [x.detach() for x in inputs()]
    allowed = causal(5).repeat(2, 1, 1, 1)
    allowed[1, :, :, :2] = False  # two padded keys: the first two rows of the second prompt see nothing
    found = attend(*tensors, allowed, gating, softcap=softcap)
    wanted = slow(*tensors, allowed, gating, softcap=softcap)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=EXACT)
    assert 0 < found.open.sum() < allowed.sum() * 4
    assert found.output[1, :, :2].abs().max() == 0


@pytest.mark.matches
@pytest.mark.parametrize("gating", [HARD, SAMPLED, SOFTLY], ids=["hard", "sampled", "straight-through"])
def test_gates_all_open_are_plain_attention(gating):
    query, key, value, bias = inputs()
    found = attend(query, key, value, torch.full_like(bias, torch.inf), gating=gating)
    wide = [x.repeat_interleave(2, 1) for x in (key, value)]
    wanted = torch.nn.functional.scaled_dot_product_attention(query, *wide, is_causal=True, scale=0.7)
    torch.testing.assert_close(found.output, wanted, rtol=0, atol=EXACT)
    rows = torch.arange(1, 6, dtype=torch.float64).expand(2, 4, 5)
    assert torch.equal(found.expected, rows)
    assert torch.equal(found.open, rows)


@pytest.mark.matches
@pytest.mark.parametrize("groups", [1, 2])
def test_shared_keys_equal_repeated_keys(groups):
    query, key, value, bias = inputs(groups=groups)
    shared = attend(query, key, value, bias, gating=SAMPLED)
    wide = [x.repeat_interleave(4 // groups, 1) for x in (key, value)]
    repeated = attend(query, *wide, bias, gating=SAMPLED)
    for mine, theirs in zip(shared, repeated, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.matches
def test_a_cached_query_sees_what_it_saw_in_the_full_pass():
    """Fewer queries than keys: the rows of hard attention do not depend on each other."""
    query, key, value, bias = inputs(queries=6)
    full = attend(query, key, value, bias)
    last = attend(query[:, :, -2:], key, value, bias, causal(6)[:, :, -2:])
    for mine, theirs in zip(last, full, strict=True):
        torch.testing.assert_close(mine, theirs[:, :, -2:], rtol=0, atol=EXACT)


@pytest.mark.stays
@given(st.integers(0, 2**31), st.integers(2, 7), st.booleans())
@settings(max_examples=25, deadline=None)
def test_the_future_changes_nothing(seed, queries, sample):
    query, key, value, bias = inputs(queries=queries, seed=seed % 1000)
    gating = Gating(sample=sample, seed=seed)
    before = attend(query, key, value, bias, gating=gating)
    later = torch.zeros(1, 1, queries, 1, dtype=torch.float64)
    later[:, :, -1] = 1.0
    after = attend(query + later, key - 2 * later, value + 3 * later, bias, gating=gating)
    for mine, theirs in zip(after, before, strict=True):
        assert torch.equal(mine[:, :, :-1], theirs[:, :, :-1])
    assert not torch.equal(after.expected[:, :, -1], before.expected[:, :, -1])


@pytest.mark.stays
@given(st.integers(0, 1000), st.floats(-5, 5), st.floats(0, 5))
@settings(max_examples=25, deadline=None)
def test_a_larger_bias_opens_more_and_closes_nothing(seed, low, more):
    query, key, value, bias = [x.detach() for x in inputs(seed=seed)]
    less, rest = (attend(query, key, value, torch.full_like(bias, b)) for b in (low, low + more))
    assert (rest.open >= less.open).all()
    assert (rest.expected >= less.expected).all()
    assert (less.open <= torch.arange(1, 6)).all()


@pytest.mark.matches
def test_half_precision_inputs_give_float32_counts():
    query, key, value, bias = (x.detach() for x in inputs())
    found = attend(query.bfloat16(), key.bfloat16(), value.bfloat16(), bias.float())
    assert (found.output.dtype, found.expected.dtype, found.open.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )


# -- the backward pass -----------------------------------------------------------------------------------------


def nearest_to_zero(query, key, bias, softcap, scaling=0.7):
    """The smallest |logit|: a gate flips within a finite difference if it is about the step, 1e-6."""
    scores = query @ key.repeat_interleave(2, 1).transpose(-1, -2) * scaling
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    return (scores + bias[:, None, None]).detach().abs().min()


@pytest.mark.matches
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_the_gradient_of_hard_attention_is_the_finite_difference(softcap):
    *tensors, bias = inputs(seed=3)
    bias = bias.detach()
    assert nearest_to_zero(*tensors[:2], bias, softcap) > 1e-4
    assert 0 < attend(*tensors, bias).open.sum() < 2 * 4 * 15
    assert torch.autograd.gradcheck(lambda *x: attend(*x, bias, softcap=softcap).output, tensors)


@pytest.mark.matches
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_the_gradient_of_expected_edges_is_the_finite_difference(softcap):
    query, key, value, bias = inputs(seed=3)
    assert torch.autograd.gradcheck(
        lambda q, k, b: attend(q, k, value, b, softcap=softcap).expected, (query, key, bias)
    )


@pytest.mark.matches
def test_counts_of_open_gates_carry_no_gradient():
    found = attend(*inputs())
    assert found.output.requires_grad
    assert found.expected.requires_grad
    assert not found.open.requires_grad


def slow_gradients(tensors, gating, pull, price, scaling):
    """dS = p [(gate + sigmoid'(z)) u - D] + d_expected sigmoid'(G), entry by entry, and what follows from it."""
    query, key, value, bias = (x.detach() for x in tensors)
    batch, heads, queries, _ = query.shape
    repeat, by_key = heads // key.shape[1], bias.dim() == 3
    bias = bias if by_key else bias.view(1, -1, 1).expand(batch, heads, queries)
    noise = logistic_noise(uniform_noise(gating.seed, (batch, heads, queries, queries), query.device)).double()
    dq, dk, dv = (torch.zeros_like(x) for x in (query, key, value))
    dbias = torch.zeros(batch, heads, queries, dtype=bias.dtype)
    for b, h, i in [(b, h, i) for b in range(batch) for h in range(heads) for i in range(queries)]:
        g, seen = h // repeat, range(i + 1)
        s = [scaling * float(query[b, h, i] @ key[b, g, j]) for j in seen]
        total = sum(math.exp(x) for x in s)
        p = [math.exp(x) / total for x in s]
        z = [x + float(bias[b, h, j]) + (float(noise[b, h, i, j]) if gating.sample else 0.0) for j, x in enumerate(s)]
        u = [float(pull[b, h, i] @ value[b, g, j]) for j in seen]
        d = sum(p[j] * (z[j] > 0) * u[j] for j in seen)
        for j in seen:
            through_gate = p[j] * sigmoid(z[j]) * (1 - sigmoid(z[j])) * u[j]
            opened = sigmoid(s[j] + float(bias[b, h, j]))
            through_price = float(price[b, h, i]) * opened * (1 - opened)
            ds = p[j] * ((z[j] > 0) * u[j] - d) + through_gate + through_price
            dq[b, h, i] += scaling * ds * key[b, g, j]
            dk[b, g, j] += scaling * ds * query[b, h, i]
            dv[b, g, j] += p[j] * (z[j] > 0) * pull[b, h, i]
            dbias[b, h, j] += through_gate + through_price
    return dq, dk, dv, dbias if by_key else dbias.sum((0, 2))


@pytest.mark.matches
@pytest.mark.parametrize("by_key", [False, True], ids=["by head", "by key"])
@pytest.mark.parametrize("gating", [SAMPLED, SOFTLY], ids=["sampled", "straight-through"])
def test_the_straight_through_gradient_is_the_closed_form(gating, by_key):
    tensors = inputs()
    if by_key:
        tensors[3] = torch.randn(2, 4, 5, dtype=torch.float64).requires_grad_()
    found = attend(*tensors, gating=gating)
    pull, price = torch.randn_like(found.output), torch.randn_like(found.expected)
    mine = torch.autograd.grad((found.output, found.expected), tensors, (pull, price))
    wanted = slow_gradients(tensors, gating, pull, price, scaling=0.7)
    for name, a, b in zip(("query", "key", "value", "bias"), mine, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=EXACT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.matches
def test_hard_gates_without_straight_through_give_the_bias_no_gradient():
    tensors = inputs()
    (found,) = torch.autograd.grad(attend(*tensors).output.sum(), tensors[3:], allow_unused=True)
    assert found is None or found.abs().max() == 0
    (found,) = torch.autograd.grad(attend(*tensors, gating=SOFTLY).output.sum(), tensors[3:])
    assert found.abs().max() > 0.01


@pytest.mark.survives
@pytest.mark.parametrize("bias", [-1e4, -torch.inf])
@pytest.mark.parametrize("gating", [HARD, SAMPLED, SOFTLY], ids=["hard", "sampled", "straight-through"])
def test_closed_rows_give_zero_and_finite_gradients(gating, bias):
    tensors = inputs()
    tensors[3] = torch.full((4,), bias, dtype=torch.float64, requires_grad=True)
    found = attend(*tensors, gating=gating)
    assert found.output.abs().max() == 0
    assert found.open.sum() == 0
    slopes = torch.autograd.grad(found.output.sum() + found.expected.sum(), tensors, allow_unused=True)
    assert all(x is None or torch.isfinite(x).all() for x in slopes)


@pytest.mark.survives
@pytest.mark.parametrize("gating", [HARD, SAMPLED, SOFTLY], ids=["hard", "sampled", "straight-through"])
def test_a_query_that_may_see_nothing_gives_zero_and_finite_gradients(gating):
    tensors = inputs()
    allowed = causal(5).clone()
    allowed[:, :, 2] = False
    found = attend(*tensors, allowed, gating)
    assert found.output[:, :, 2].abs().max() == 0
    assert found.expected[:, :, 2].abs().max() == 0
    assert found.output[:, :, 3].abs().max() > 0
    slopes = torch.autograd.grad(found.output.sum() + found.expected.sum(), tensors, allow_unused=True)
    assert all(x is None or torch.isfinite(x).all() for x in slopes)


@pytest.mark.survives
def test_gates_held_open_pass_finite_gradients():
    tensors = inputs()
    tensors[3] = torch.full((4,), torch.inf, dtype=torch.float64, requires_grad=True)
    found = attend(*tensors, gating=SAMPLED)
    slopes = torch.autograd.grad(found.output.sum() + found.expected.sum(), tensors)
    assert all(torch.isfinite(x).all() for x in slopes)
    assert slopes[3].abs().max() == 0


# -- gate queries: a bias by key -------------------------------------------------------------------------------


def with_gate_query(groups=2, seed=3):
    """Query, key, value, bias, and a gate query of every head."""
    *tensors, bias = inputs(groups=groups, seed=seed)
    return [*tensors, bias, torch.randn(4, 3, dtype=torch.float64).requires_grad_()]


def slow_key_bias(bias, extra, key, scaling=0.7):
    """bias[h] + scaling * w[h] k[j], entry by entry, for the keys that head h shares."""
    batch, groups, keys, _ = key.shape
    heads = len(bias)
    found = torch.zeros(batch, heads, keys, dtype=torch.float64)
    for b, h, j in [(b, h, j) for b in range(batch) for h in range(heads) for j in range(keys)]:
        pairs = zip(extra[h].tolist(), key[b, h // (heads // groups), j].tolist(), strict=True)
        found[b, h, j] = float(bias[h]) + scaling * sum(x * y for x, y in pairs)
    return found


@pytest.mark.matches
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("gating", [HARD, SAMPLED, SOFTLY], ids=["hard", "sampled", "straight-through"])
def test_a_gate_query_is_what_the_formula_says(gating, groups):
    """Through GQA and beside a softcap, which caps S and not what the gate query adds."""
    query, key, value, bias, extra = (x.detach() for x in with_gate_query(groups))
    by_key = key_bias(bias, extra, key, 0.7)
    torch.testing.assert_close(by_key, slow_key_bias(bias, extra, key), rtol=0, atol=EXACT)
    for softcap in (None, 1.5):
        found = attend(query, key, value, by_key, None, gating, softcap=softcap)
        wanted = slow(query, key, value, by_key, causal(5), gating, softcap=softcap)
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=EXACT)
        assert 0 < found.open.sum() < 2 * 4 * 15


@pytest.mark.matches
def test_a_gate_query_acts_as_if_every_query_had_it_added_in_the_gate_alone():
    query, key, value, bias, extra = (x.detach() for x in with_gate_query())
    found = attend(query, key, value, key_bias(bias, extra, key, 0.7))
    as_query = attend(query + extra[:, None], key, value, bias)
    torch.testing.assert_close(found.expected, as_query.expected, rtol=0, atol=EXACT)
    assert torch.equal(found.open, as_query.open)
    assert not torch.allclose(found.output, as_query.output, atol=0.01)  # the softmax is the one without it
    assert not torch.equal(found.open, attend(query, key, value, bias).open)


@pytest.mark.matches
def test_no_gate_query_is_the_bias_itself_and_a_zero_one_changes_nothing():
    *tensors, bias, extra = with_gate_query()
    assert key_bias(bias, None, tensors[1], 0.7) is bias
    zero = attend(*tensors, key_bias(bias, 0 * extra, tensors[1], 0.7), gating=SAMPLED)
    for mine, theirs in zip(zero, attend(*tensors, bias, gating=SAMPLED), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.matches
def test_a_gate_query_closes_the_sink_and_leaves_its_softmax():
    """What it is for: every score of key 0 is large; with a bias by head its gate opens whenever any other does."""
    query, key, value, bias, extra = (x.detach() for x in with_gate_query())
    key[:, :, 0], query[..., 0], extra[:] = torch.tensor([9.0, 0, 0]), 1.0, torch.tensor([-5.0, 0, 0])
    key[:, :, 1:, 0], bias[:] = 0.0, 0.5
    plain, closed = (attend(query, key, value, b) for b in (bias, key_bias(bias, extra, key, 0.7)))
    assert (plain.open[:, :, 0] == 1).all()
    assert torch.equal(closed.open, plain.open - 1)
    others = value.repeat_interleave(2, 1)[:, :, 1:].abs().sum(2)[:, :, None]
    assert (closed.output.abs() <= 0.02 * others).all()  # weights of keys but the sink: at most e^-4


@pytest.mark.matches
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradients_through_a_gate_query_are_the_finite_differences(softcap):
    query, key, value, bias, extra = with_gate_query()

    def expected(query, key, bias, extra):
        return attend(query, key, value, key_bias(bias, extra, key, 0.7), softcap=softcap).expected

    def output(query, key, value):
        by_key = key_bias(bias.detach(), extra.detach(), key, 0.7)
        return attend(query, key, value, by_key, softcap=softcap).output

    by_key = key_bias(bias, extra, key, 0.7)
    scores = query @ key.repeat_interleave(2, 1).mT * 0.7
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    assert (scores + by_key[:, :, None]).abs().min() > 1e-4  # no gate flips within a step of 1e-6
    assert torch.autograd.gradcheck(expected, (query, key, bias, extra))
    assert torch.autograd.gradcheck(output, (query, key, value))


@pytest.mark.matches
@pytest.mark.parametrize("gating", [SAMPLED, SOFTLY], ids=["sampled", "straight-through"])
def test_gate_queries_and_keys_get_the_gradient_of_the_bias_by_key(gating):
    *tensors, bias, extra = with_gate_query()
    found = attend(*tensors, key_bias(bias, extra, tensors[1], 0.7), gating=gating)
    pull, price = torch.randn_like(found.output), torch.randn_like(found.expected)
    given = (*tensors, bias, extra)
    mine = torch.autograd.grad((found.output, found.expected), given, (pull, price))
    by_key = key_bias(bias, extra, tensors[1], 0.7)
    dq, dk, dv, dbias = slow_gradients([*tensors, by_key], gating, pull, price, scaling=0.7)
    dextra = 0.7 * torch.einsum("bhj,bhje->he", dbias, tensors[1].repeat_interleave(2, 1))
    dk = dk + 0.7 * torch.einsum("bghj,ghe->bgje", dbias.unflatten(1, (2, 2)), extra.unflatten(0, (2, 2)))
    for a, b in zip(mine, (dq, dk, dv, dbias.sum((0, 2)), dextra), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=EXACT)


@pytest.mark.matches
def test_a_gate_query_stays_exact_beside_half_precision_and_under_autocast():
    _, key, _, bias, extra = (x.detach().float() for x in with_gate_query())
    for keys in (key, key.bfloat16()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = key_bias(bias, extra, keys, 0.7)
        assert inside.dtype == torch.float32
        assert torch.equal(inside, key_bias(bias, extra, keys.float(), 0.7))


# -- sampling --------------------------------------------------------------------------------------------------


@pytest.mark.matches
def test_expected_edges_are_the_mean_of_sampled_gates():
    """Values that are unit vectors make the output show which gates were drawn open."""
    query, key, _, bias = (x.detach() for x in inputs(queries=6))
    value = torch.eye(6, dtype=torch.float64).expand(2, 2, 6, 6)
    wide = torch.nn.functional.pad(query, (0, 3)), torch.nn.functional.pad(key, (0, 3))
    draws = 400
    seen = sum(
        (attend(*wide, value, bias, gating=Gating(sample=True, seed=s)).output > 0).double() for s in range(draws)
    )
    logits = 0.7 * query @ key.repeat_interleave(2, 1).transpose(-1, -2) + bias[:, None, None]
    chance = torch.sigmoid(logits) * causal(6)
    sigma = (draws * (chance * (1 - chance)).sum(-1)).sqrt()  # of the number of open gates in a row
    expected = attend(*wide, value, bias).expected
    torch.testing.assert_close(expected, chance.sum(-1), rtol=0, atol=EXACT)
    z = (seen.sum(-1) - draws * expected) / sigma
    assert z.abs().max() < 4.5  # 48 rows: a larger one has a chance of 3e-4; measured 3.1
    assert abs(z.mean()) < 4.5 / 48**0.5
    assert 0.5 < z.square().mean() < 1.9  # the spread is that of independent gates: 48 squares, +-4.5 sigma


@pytest.mark.matches
@pytest.mark.parametrize("logit", [-6.0, -1.0, 0.0, 2.0])
def test_a_gate_opens_with_probability_sigmoid_of_its_logit(logit):
    n = 2**18
    drawn = gates(torch.full((1, 4, 256, 256), logit), Gating(sample=True, seed=5)).mean()
    p = sigmoid(logit)
    assert abs(float(drawn) - p) < 4.5 * math.sqrt(p * (1 - p) / n)


@pytest.mark.matches
def test_gates_are_zero_or_one_and_their_slope_is_the_sigmoids():
    logits = torch.linspace(-9, 9, 36, dtype=torch.float64).view(1, 1, 6, 6).requires_grad_()
    for gating in (SAMPLED, SOFTLY):
        drawn = gates(logits, gating)
        assert ((drawn == 0) | ((drawn - 1).abs() < 1e-15)).all()  # hard + (soft - soft): 1 to the last bit
        noise = logistic_noise(uniform_noise(11, (1, 1, 6, 6), logits.device)) if gating.sample else 0.0
        soft = torch.sigmoid(logits.detach() + noise)
        (slope,) = torch.autograd.grad(drawn.sum(), logits)
        torch.testing.assert_close(slope, soft * (1 - soft), rtol=0, atol=EXACT)


@pytest.mark.reproduces
def test_the_same_seed_draws_the_same_gates_and_another_does_not():
    tensors = inputs()
    first, again, other = (attend(*tensors, gating=Gating(sample=True, seed=s)).output for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first, attend(*tensors, gating=Gating(sample=True, seed=torch.tensor(3))).output)


# -- the noise -------------------------------------------------------------------------------------------------

MASK = 2**32 - 1


def mix(x):
    """lowbias32 in Python integers."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def slow_uniform(seed, shape, b, h, i, j):
    _, heads, queries, _ = shape
    row = mix(mix(seed & MASK) ^ ((b * heads + h) * queries + i))
    return ((mix((row + j * 0x9E3779B9) & MASK) >> 9) + 0.5) / 2**23


@pytest.mark.matches
@pytest.mark.parametrize("seed", [0, 1, 7919 * 31, 2**31 - 1, 2**31, 2**32 - 1, 2**32 + 5, -1, -(2**31)])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 1, 9), (3, 2, 1, 7)])
def test_noise_is_the_documented_integer_hash(seed, shape):
    drawn = uniform_noise(seed, shape, torch.device("cpu"))
    for place in torch.cartesian_prod(*(torch.arange(n) for n in shape)).tolist():
        assert float(drawn[tuple(place)]) == slow_uniform(seed, shape, *place)


@pytest.mark.matches
def test_noise_is_the_hash_far_out_where_32_bits_wrap():
    shape = (3, 50, 600, 300)
    drawn = uniform_noise(123_456_789, shape, torch.device("cpu"))
    for place in [(0, 0, 0, 299), (2, 49, 599, 299), (1, 17, 333, 250), (2, 0, 1, 7)]:
        assert float(drawn[place]) == slow_uniform(123_456_789, shape, *place)


@pytest.mark.matches
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_seed_may_be_a_tensor(dtype):
    for seed in (0, 5, 2**31 - 1, -7):
        tensor = torch.tensor(seed, dtype=dtype)
        assert torch.equal(*(uniform_noise(s, (1, 2, 3, 4), torch.device("cpu")) for s in (seed, tensor)))


@pytest.mark.stays
@given(st.integers(-(2**40), 2**40), st.tuples(*[st.integers(1, 4)] * 4), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_more_keys_or_prompts_leave_earlier_noise_alone(seed, shape, more):
    """What the formula promises: only H and Q enter a row's number, B and K do not."""
    batch, heads, queries, keys = shape
    small = uniform_noise(seed, shape, torch.device("cpu"))
    large = uniform_noise(seed, (batch + more, heads, queries, keys + more), torch.device("cpu"))
    assert torch.equal(large[:batch, :, :, :keys], small)
    assert ((small > 0) & (small < 1)).all()


@pytest.mark.matches
@pytest.mark.parametrize("seed", [0, 1, 7919, 20_000])
def test_noise_is_uniform(seed):
    drawn = uniform_noise(seed, (2, 4, 128, 128), torch.device("cpu")).flatten().double().sort().values
    n = len(drawn)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = max(float((steps[1:] - drawn).max()), float((drawn - steps[:-1]).max()))
    assert distance * n**0.5 < 1.95  # Kolmogorov-Smirnov at 0.1 %; measured at most 1.34


@pytest.mark.matches
def test_noise_is_not_correlated_with_its_neighbours():
    def noise(seed):
        return uniform_noise(seed, (4, 8, 64, 64), torch.device("cpu")).double() - 0.5

    drawn = noise(3)
    axes = enumerate(drawn.shape)
    pairs = {f"axis {axis}": (drawn.narrow(axis, 1, n - 1), drawn.narrow(axis, 0, n - 1)) for axis, n in axes}
    pairs |= {f"seed + {step}": (drawn, noise(3 + step)) for step in (1, 2, 7919, 2 * 7919)}
    pairs["transposed"] = (drawn.triu(1), drawn.transpose(2, 3).triu(1))
    for name, (a, b) in pairs.items():
        count = a.numel() if name != "transposed" else 4 * 8 * 64 * 63 // 2
        found = 12 * float((a * b).sum()) / count  # both have variance 1 / 12
        assert abs(found) * count**0.5 < 4.5, name  # standard deviations; measured at most 3.0


@pytest.mark.matches
def test_the_logistic_noise_is_the_logit():
    uniform = torch.tensor([2.0**-24, 0.25, 0.5, 0.75, 1 - 2.0**-24])
    wanted = [math.log(u / (1 - u)) for u in uniform.tolist()]
    assert logistic_noise(uniform).tolist() == pytest.approx(wanted, rel=1e-6, abs=1e-7)  # float32, measured 1.2e-7
    assert torch.isfinite(logistic_noise(uniform)).all()
