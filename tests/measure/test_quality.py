"""Every number against a slow loop that scores one token, one query or one sentence at a time."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewedges.data import addition
from fewedges.errors import DataError
from fewedges.measure.quality import (
    Protocol,
    Quality,
    dense_edges,
    minimal_pairs,
    read_pairs,
    score_tokens,
    sentence_scores,
    windows_of,
)
from fewedges.model.anatomy import anatomy
from fewedges.sparsify.attention.interface import GatePass, attach_
from tiny import tiny_model

LENGTH = 7
CLOSE = 4e-7  # float32 means of about 4 nats; measured at most 1.9e-7


def stream(tokens=40, seed=0):
    return np.random.default_rng(seed).integers(0, 61, tokens).astype(np.uint16)


def protocol(**choices):
    return Protocol(**({"context_length": LENGTH, "batch_size": 3} | choices))


def gated(name="llama", seed=1):
    model = tiny_model(name, seed)
    body = anatomy(model)
    attach_(model, body)
    for layer, module in enumerate(body.modules(model)):
        module.gate_bias.data = torch.linspace(-0.4, 0.3, 4).roll(layer)
    return model


def log_probabilities(model, window):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(window)]), use_cache=False).logits
    return torch.log_softmax(logits[0].double(), -1)


def slow_scores(model, dense, ids, protocol):
    """Cross-entropy and KL, token by token: each is scored in the first window that may score it."""
    length, stride = protocol.context_length, protocol.stride or protocol.context_length
    losses, divergences = [], []
    for start in range(0, len(ids) - length + 1, stride):
        window = ids[start : start + length].tolist()
        log_q, log_p = log_probabilities(model, window), log_probabilities(dense, window)
        for t in range(1, length):
            if start == 0 or t >= length - stride:
                losses.append(-float(log_q[t - 1, window[t]]))
                divergences.append(float((log_p[t - 1].exp() * (log_p[t - 1] - log_q[t - 1])).sum()))
    return len(losses), sum(losses) / len(losses), sum(divergences) / len(divergences)


# -- cross-entropy, KL and edges -------------------------------------------------------------------------------


@pytest.mark.matches
@pytest.mark.parametrize("stride", [None, 7, 3, 1])
def test_scores_are_those_of_a_slow_loop(stride):
    model, dense, how = gated(), tiny_model("llama"), protocol(stride=stride)
    found = score_tokens(model, dense, windows_of(stream(), how), how)
    tokens, cross_entropy, kl = slow_scores(model, dense, stream(), how)
    assert found.tokens == tokens
    assert found.cross_entropy == pytest.approx(cross_entropy, abs=CLOSE)
    assert found.kl == pytest.approx(kl, abs=CLOSE)
    assert found.perplexity == pytest.approx(math.exp(cross_entropy), rel=CLOSE)
    assert kl > 0.05


@pytest.mark.matches
@pytest.mark.parametrize("stride", [None, 2])
def test_edges_are_counted_gate_by_gate(stride):
    """Over all queries of whole windows, scored or not, so that they belong to one T."""
    model, how = gated(), protocol(stride=stride)
    found = score_tokens(model, tiny_model("llama"), windows_of(stream(), how), how)
    counts, windows = torch.zeros(2, 4, dtype=torch.float64), 0
    for start in range(0, 40 - LENGTH + 1, stride or LENGTH):
        run = GatePass(keep_maps=True)
        with torch.no_grad():
            model(input_ids=torch.tensor(stream()[start : start + LENGTH].astype(np.int64))[None], gate_pass=run)
        windows += 1
        for layer, (_, opened) in run.maps.items():
            for h in range(4):
                counts[layer, h] += sum(bool(opened[0, h, i, j]) for i in range(LENGTH) for j in range(i + 1))
    wanted = counts / (windows * LENGTH)
    torch.testing.assert_close(found.edges.double(), wanted, rtol=0, atol=4e-7)  # rounded to float32: measured 1.2e-7
    assert found.edges_per_query_per_head == pytest.approx(float(wanted.mean()), abs=4e-7)
    share = float(counts.sum()) / (windows * 2 * 4 * LENGTH * (LENGTH + 1) / 2)
    assert found.density == pytest.approx(share, abs=1e-7)  # measured 2.5e-8
    assert 0.15 < share < 0.85


@pytest.mark.matches
def test_a_dense_model_has_every_edge_of_the_triangle():
    dense, how = tiny_model("llama"), protocol()
    found = score_tokens(dense, dense, windows_of(stream(), how), how)
    assert found.edges is None
    assert found.edges_per_query_per_head == dense_edges(LENGTH) == sum(range(1, LENGTH + 1)) / LENGTH
    assert found.density == 1
    assert found.kl == 0


@pytest.mark.matches
def test_gates_held_open_have_density_one_and_the_dense_scores():
    model, dense, how = gated(seed=0), tiny_model("llama"), protocol()
    for layer in model.model.layers:
        layer.self_attn.gate_bias.data.fill_(torch.inf)
    found = score_tokens(model, dense, windows_of(stream(), how), how)
    reference = score_tokens(dense, dense, windows_of(stream(), how), how)
    assert found.density == 1
    assert found.cross_entropy == pytest.approx(reference.cross_entropy, abs=CLOSE)
    assert abs(found.kl) <= 1.3e-8  # measured 3.4e-9


@pytest.mark.stays
@given(st.integers(2, 4096), st.floats(0, 1))
def test_density_and_edges_are_one_number_in_two_units(length, share):
    edges = torch.full((3, 2), share * dense_edges(length), dtype=torch.float64)
    found = Quality(tokens=1, cross_entropy=1.0, kl=0.0, edges=edges, context_length=length)
    assert found.density * (length + 1) / 2 == pytest.approx(found.edges_per_query_per_head, rel=1e-12)
    assert found.density == pytest.approx(share, rel=1e-12, abs=1e-12)


@pytest.mark.matches
@pytest.mark.parametrize("stride", [None, 2])
def test_the_batch_size_changes_no_result(stride):
    model, dense = gated(), tiny_model("llama")
    found = []
    for size in (1, 2, 64):
        how = protocol(stride=stride, batch_size=size)
        found.append(score_tokens(model, dense, windows_of(stream(), how), how))
    for other in found[1:]:
        assert other.tokens == found[0].tokens
        assert other.cross_entropy == pytest.approx(found[0].cross_entropy, abs=CLOSE)
        assert other.kl == pytest.approx(found[0].kl, abs=CLOSE)
        assert torch.equal(other.edges, found[0].edges)


@pytest.mark.matches
def test_half_precision_is_used_when_asked_for_and_close():
    model, how = tiny_model("llama"), protocol(precision="bf16")
    half = score_tokens(model, model, windows_of(stream(), how), how)
    full = score_tokens(model, model, windows_of(stream(), protocol()), protocol())
    assert 0 < abs(half.cross_entropy - full.cross_entropy) < 2.3e-3  # measured 5.8e-4


# -- windows ---------------------------------------------------------------------------------------------------


@pytest.mark.stays
@given(st.integers(2, 8), st.integers(1, 8), st.integers(0, 40), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_a_stride_scores_every_token_once_with_enough_context(length, stride, more, size):
    stride, tokens = min(stride, length - 1), length + more
    how = Protocol(context_length=length, stride=stride, batch_size=size)
    batches = list(windows_of(np.arange(tokens), how))
    scored = torch.cat([batch.tokens[batch.counts] for batch in batches]).tolist()
    whole = length + (tokens - length) // stride * stride  # the tail that fills no window is left out
    assert sorted(scored) == list(range(1, whole))
    for batch in batches:
        rows = batch.tokens[:, 0] > 0
        context = batch.counts[rows].int().argmax(-1)
        assert (context >= length - stride).all()
    assert all(len(batch.tokens) <= size for batch in batches)


@pytest.mark.stays
@given(st.integers(2, 8), st.integers(0, 40))
@settings(max_examples=40, deadline=None)
def test_without_a_stride_all_but_the_first_token_of_each_window_is_scored(length, more):
    batches = list(windows_of(np.arange(length + more), Protocol(context_length=length)))
    scored = torch.cat([batch.tokens[batch.counts] for batch in batches]).tolist()
    assert scored == [t for t in range((length + more) // length * length) if t % length]


@pytest.mark.matches
def test_max_tokens_bounds_what_is_scored():
    rows = torch.cat([batch.tokens for batch in windows_of(np.arange(40), protocol(max_tokens=22))])
    assert rows.flatten().tolist() == list(range(21))


@pytest.mark.survives
def test_text_shorter_than_a_window_is_refused_with_both_numbers():
    assert len(list(windows_of(stream(LENGTH), protocol()))) == 1
    with pytest.raises(DataError, match=r"6 tokens, one window is 7.*smaller --context-length"):
        list(windows_of(stream(LENGTH - 1), protocol()))
    with pytest.raises(DataError, match="3 tokens"):
        list(windows_of(stream(), protocol(max_tokens=3)))


@pytest.mark.survives
@pytest.mark.parametrize(
    "choices",
    [
        {"context_length": 1},
        {"context_length": 8, "stride": 9},
        {"stride": -1},
        {"stride": 0},
        {"batch_size": 0},
        {"max_tokens": 0},
        {"precision": "fp16"},
    ],
    ids=str,
)
def test_a_protocol_out_of_range_is_refused_by_name(choices):
    with pytest.raises(DataError, match=list(choices)[-1]):
        Protocol(**choices)


# -- minimal pairs ---------------------------------------------------------------------------------------------

SENTENCES = ["12+34=046", "1", "99+99=198", "7+", "00+00=000", "55"]
PAIRS = [
    {"paradigm": "sums", "good": "43+45=088", "bad": "43+45=089"},
    {"paradigm": "sums", "good": "29+19=048", "bad": "29+19=148"},
    {"paradigm": "wrong", "good": "87+68=156", "bad": "87+68=155"},
    {"paradigm": "ties", "good": "12+", "bad": "12+"},
]


def slow_sentence(model, sentence):
    ids = addition.tokenizer()(sentence)["input_ids"]
    log_p = log_probabilities(model, ids)
    return sum(float(log_p[t - 1, ids[t]]) for t in range(1, len(ids)))


@pytest.mark.matches
@pytest.mark.parametrize("batch_size", [1, 4, 32])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gated"])
def test_sentence_scores_are_those_of_one_sentence_at_a_time(name, batch_size):
    """Padded batches of unequal sentences; absolute positions (GPT-2) and gates must not see the padding."""
    model = gated() if name == "gated" else tiny_model(name)
    found = sentence_scores(model, addition.tokenizer(), SENTENCES, batch_size)
    wanted = [slow_sentence(model, sentence) for sentence in SENTENCES]
    assert found == pytest.approx(wanted, abs=2.8e-6)  # sums of up to 9 terms; measured 7.1e-7
    assert len({round(x, 3) for x in found}) == len(SENTENCES)


@pytest.mark.matches
def test_accuracy_is_the_fraction_of_pairs_won_by_paradigm(addition):
    found = minimal_pairs(addition.model, addition.tokenizer, PAIRS)
    wins = {}
    for pair in PAIRS:
        good, bad = (slow_sentence(addition.model, pair[kind]) for kind in ("good", "bad"))
        won = 0.5 if pair["good"] == pair["bad"] else float(good > bad)
        wins.setdefault(pair["paradigm"], []).append(won)
    every = [won for paradigm in wins.values() for won in paradigm]
    assert found == {"all": sum(every) / 4} | {name: sum(w) / len(w) for name, w in wins.items()}
    assert (found["sums"], found["wrong"], found["ties"]) == (1.0, 0.0, 0.5)


@pytest.mark.matches
def test_pairs_without_a_paradigm_are_counted_under_all_only(tmp_path, addition):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps({"good": p["good"], "bad": p["bad"]}) for p in PAIRS[:3]))
    pairs = read_pairs(path)
    assert [pair["paradigm"] for pair in pairs] == ["all"] * 3
    assert minimal_pairs(addition.model, addition.tokenizer, pairs) == {"all": 2 / 3}


@pytest.mark.matches
def test_pairs_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({**pair, "more": 1}) + "\n" for pair in PAIRS))
    assert read_pairs(path) == PAIRS


@pytest.mark.survives
@pytest.mark.parametrize("bad", ["not json", '{"good": "a"}', "[1, 2]", "null", "", '{"good": 1, "bad": "b"}'])
def test_a_bad_line_is_named_by_its_number(tmp_path, bad):
    path = tmp_path / "pairs.jsonl"
    good = json.dumps(PAIRS[0])
    path.write_text("\n".join([good, good, bad, good]))
    with pytest.raises(DataError, match=r"pairs\.jsonl line 3: no json object with good and bad"):
        read_pairs(path)


@pytest.mark.survives
def test_a_file_without_pairs_is_refused_by_name(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match=r"empty\.jsonl: it is empty"):
        read_pairs(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match=r"absent\.jsonl"):
        read_pairs(tmp_path / "absent.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"binary\.jsonl.*UTF-8"):
        read_pairs(tmp_path / "binary.jsonl")


@pytest.mark.survives
def test_a_sentence_too_short_to_score_is_refused_by_its_text():
    with pytest.raises(DataError, match="sentence '': fewer than two tokens"):
        sentence_scores(tiny_model("llama"), addition.tokenizer(), ["12+34=046", ""])
