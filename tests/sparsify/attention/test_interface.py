"""Gates inside real architectures: open they are the dense model, hard they are causal, padded and cached alike."""

from statistics import median

import pytest
import torch

from fewedges.data import addition
from fewedges.errors import ModelError, ProbeError
from fewedges.model.anatomy import anatomy
from fewedges.model.attention import register
from fewedges.model.capture import dense_maps
from fewedges.sparsify.attention.gate import uniform_noise
from fewedges.sparsify.attention.interface import (
    GATED,
    GatePass,
    attach_,
    gate_biases,
    gate_queries,
    gated_forward,
    gated_maps,
    is_gated,
)
from tiny import SUPPORTED, tiny_loaded, tiny_model

PROMPTS = 3
LENGTH = 9
WINDOWS = {"mistral-window": (4, 4), "gemma2": (4, None), "gemma3": (4, 4)}
WITH_QUERY = pytest.mark.parametrize("gate_query", [False, True], ids=["bias", "gate query"])
ROUNDING = 4e-6  # measured: at most 2.0e-6 over the architectures, at logits of up to 3.5


def prompts(batch=1, length=LENGTH, seeds=PROMPTS):
    return [torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(s)) for s in range(seeds)]


def sparse_model(name, dtype=torch.float32, seed=0, gate_query=False):
    """A gated model with biases (and gate queries) of its own for every head, about half of its gates open."""
    model = tiny_model(name, seed).to(dtype)
    body = anatomy(model)
    attach_(model, body, gate_query=gate_query)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer, module in enumerate(body.modules(model)):
            module.gate_bias.copy_(torch.linspace(-0.4, 0.3, 4).roll(layer))
            if gate_query:
                module.gate_query.copy_(torch.randn(module.gate_query.shape, generator=generator))
    return model


def logits(model, tokens, **kwargs):
    with torch.no_grad():
        return model(input_ids=tokens, **({"use_cache": False} | kwargs)).logits


def counted(model, tokens, **options):
    run = GatePass(**options)
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False, gate_pass=run)
    return run


def gap_but_for_flips(difference):
    """The median over prompts: rounding may flip a hard gate on one of them, a fault shows on all (see probes)."""
    return median(float(difference(tokens).abs().max()) for tokens in prompts())


# -- gates all open are the dense model ------------------------------------------------------------------------


@pytest.mark.matches
@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("how", ["bias", "pass"])
def test_open_gates_give_the_dense_logits_to_1e_6(name, how):
    """Weights as transformers draws them; conftest's are 6 times that, see the next test."""
    import transformers as tf

    from tiny import configs

    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(configs()[name]).eval()
    tokens = prompts(batch=2, length=20)[0]
    dense = logits(model, tokens)
    body = anatomy(model)
    attach_(model, body, bias_start=torch.inf if how == "bias" else 0.0, gate_query=True)
    for module in body.modules(model):
        torch.nn.init.normal_(module.gate_query)
    kwargs = {"gate_pass": GatePass(open_all=True)} if how == "pass" else {}
    assert (logits(model, tokens, **kwargs) - dense).abs().max() <= 1e-6  # required; measured at most 2.1e-7
    if how == "pass":
        assert (logits(model, tokens) - dense).abs().max() > 1e-4  # the gates do something when they may


@pytest.mark.matches
@pytest.mark.parametrize("name", SUPPORTED)
def test_open_gates_give_the_dense_logits_of_large_weights(name):
    """Here float32 itself is off by 1.8e-6; in float64 gated and dense agree to the last bits."""
    model = tiny_model(name)
    tokens = prompts(batch=2, length=20)[0]
    dense, exact = logits(model, tokens), logits(model.double(), tokens)
    attach_(model, anatomy(model))
    # Measured at most 1.4e-15; Gemma 2 4.0e-7, since its softmax rounds to float32.
    limit = 8e-7 if name == "gemma2" else 4e-15
    assert (logits(model, tokens, gate_pass=GatePass(open_all=True)) - exact).abs().max() <= limit
    mine = logits(model.float(), tokens, gate_pass=GatePass(open_all=True))
    assert (mine - dense).abs().max() <= ROUNDING


@pytest.mark.matches
@pytest.mark.parametrize("name", SUPPORTED)
def test_open_gates_are_counted_as_all_the_keys_a_query_may_see(name):
    run = counted(sparse_model(name), prompts(batch=2)[0], open_all=True)
    for layer, window in enumerate(WINDOWS.get(name, (None, None))):
        wanted = torch.arange(1, LENGTH + 1).clamp(max=window or LENGTH).float().expand(2, 4, LENGTH)
        assert torch.equal(run.open[layer], wanted)
        assert torch.equal(run.expected[layer], wanted)


# -- a sparse model is as sound as a dense one -----------------------------------------------------------------


@pytest.mark.stays
@pytest.mark.parametrize("name", SUPPORTED)
@WITH_QUERY
def test_a_sparse_model_is_causal(name, gate_query):
    model = sparse_model(name, gate_query=gate_query)

    def difference(tokens):
        changed = torch.cat([tokens[:, :-3], (tokens[:, -3:] + 7) % 61], dim=1)
        return (logits(model, changed) - logits(model, tokens))[:, :-3]

    assert gap_but_for_flips(difference) == 0


@pytest.mark.stays
@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("side", ["left", "right"])
@WITH_QUERY
def test_padding_leaves_a_sparse_model_alone(name, side, gate_query):
    model = sparse_model(name, gate_query=gate_query)

    def difference(tokens):
        pad, mask = torch.full((1, 3), 5), torch.ones(1, LENGTH, dtype=torch.long)
        parts = [(pad, torch.zeros_like(pad)), (tokens, mask)]
        ids, attended = (torch.cat(p, dim=1) for p in zip(*(parts if side == "left" else parts[::-1]), strict=True))
        positions = (attended.cumsum(-1) - 1).clamp(min=0)
        padded = logits(model, ids, attention_mask=attended, position_ids=positions)
        return (padded[:, -LENGTH:] if side == "left" else padded[:, :LENGTH]) - logits(model, tokens)

    assert gap_but_for_flips(difference) <= ROUNDING


@pytest.mark.stays
@pytest.mark.parametrize("name", SUPPORTED)
@WITH_QUERY
def test_cached_decoding_of_a_sparse_model_equals_the_full_pass(name, gate_query):
    model = sparse_model(name, gate_query=gate_query)

    def difference(tokens):
        cache, pieces = None, []
        for piece in tokens.split([4, 1, 1, 3], dim=1):  # a prompt, single tokens, and several at once
            with torch.no_grad():
                step = model(input_ids=piece, past_key_values=cache, use_cache=True)
            cache, pieces = step.past_key_values, [*pieces, step.logits]
        return torch.cat(pieces, dim=1) - logits(model, tokens)

    assert gap_but_for_flips(difference) <= ROUNDING


@pytest.mark.stays
@pytest.mark.parametrize("name", SUPPORTED)
@WITH_QUERY
def test_the_models_of_these_tests_are_neither_dense_nor_closed(name, gate_query):
    model = sparse_model(name, gate_query=gate_query)
    run, whole = counted(model, prompts(8)[0]), counted(model, prompts(8)[0], open_all=True)
    share = run.open_edges().mean() / whole.open_edges().mean()
    assert 0.15 < share < 0.85
    dense = logits(model, prompts()[0], gate_pass=GatePass(open_all=True))
    assert (logits(model, prompts()[0]) - dense).abs().max() > 0.05
    if gate_query:
        assert (logits(model, prompts()[0]) - logits(sparse_model(name), prompts()[0])).abs().max() > 0.05


@pytest.mark.matches
@pytest.mark.parametrize("name", SUPPORTED)
@WITH_QUERY
def test_generate_writes_what_repeated_full_passes_write(name, gate_query):
    model = sparse_model(name, gate_query=gate_query)
    model.generation_config.eos_token_id = None
    written = prompt = prompts(batch=2, length=5)[0]
    for _ in range(6):
        written = torch.cat([written, logits(model, written)[:, -1:].argmax(-1)], dim=1)
    options = {"attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
    generated = model.generate(prompt, do_sample=False, max_new_tokens=6, use_cache=True, **options)
    assert generated.tolist() == written.tolist()
    assert is_gated(model)


# -- what a pass counts ----------------------------------------------------------------------------------------


@pytest.mark.matches
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@WITH_QUERY
def test_counts_are_those_of_the_maps(name, gate_query):
    model = sparse_model(name, gate_query=gate_query)
    run = counted(model, prompts(batch=2)[0], keep_maps=True)
    for layer, (weights, opened) in run.maps.items():
        for b, h, i in [(b, h, i) for b in range(2) for h in range(4) for i in range(LENGTH)]:
            keys = [j for j in range(LENGTH) if opened[b, h, i, j]]
            assert all(j <= i for j in keys)
            assert len(keys) == run.open[layer][b, h, i]
            assert all((weights[b, h, i, j] > 0) == (j in keys) for j in range(LENGTH))
            assert float(weights[b, h, i].sum()) <= 1 + 2e-7  # never renormalised; measured 1 + 1.2e-7


@pytest.mark.matches
def test_maps_of_a_prompt_are_gates_times_the_dense_weights(addition):
    """With open gates nothing but the dense weights; with hard gates those of the open edges alone."""
    import copy

    model = copy.deepcopy(addition.model)
    attach_(model, addition.anatomy, bias_start=-2.0)
    mine = gated_maps(model, addition.tokenizer, "43+45=088")
    dense = dense_maps(addition.model, addition.tokenizer, "43+45=088")
    assert mine.tokens == dense.tokens == ["<bos>", *"43+45=088"]
    assert mine.weights.shape == mine.open.shape == (4, 4, 10, 10)
    assert 0.01 < mine.open.mean() < 0.45
    assert (dense.open == torch.ones(10, 10).tril().bool().numpy()).all()
    first = dense.weights[0] * mine.open[0]  # later layers read what closed gates left
    assert (mine.weights[0] == first).all()
    for module in addition.anatomy.modules(model):
        module.gate_bias.data.fill_(torch.inf)
    opened = gated_maps(model, addition.tokenizer, "43+45=088")
    assert (opened.weights == dense.weights).all()
    assert (opened.open == dense.open).all()


@pytest.mark.matches
def test_expected_edges_are_stacked_by_layer_and_carry_gradients_to_every_bias():
    model, run = sparse_model("llama"), GatePass(sample=True, seed=1)
    model(input_ids=prompts(batch=2)[0], use_cache=False, gate_pass=run)
    expected = run.expected_edges()
    assert expected.shape == run.open_edges().shape == (2, 2, 4, LENGTH)
    assert torch.equal(expected[1], run.expected[1])
    expected[1, :, 2].sum().backward()
    slopes = [module.gate_bias.grad for module in anatomy_modules(model)]
    assert slopes[1].nonzero().flatten().tolist() == [2]
    assert slopes[0].abs().min() > 0.01  # drawn gates of layer 0 change what layer 1 reads: straight-through


@pytest.mark.matches
def test_gradients_reach_the_gate_query_of_the_head_that_pays():
    model, run = sparse_model("llama", gate_query=True), GatePass(sample=True, seed=1)
    model(input_ids=prompts(batch=2)[0], use_cache=False, gate_pass=run)
    run.expected_edges()[1, :, 2].sum().backward()
    slopes = [module.gate_query.grad for module in anatomy_modules(model)]
    assert slopes[1].abs().sum(-1).nonzero().flatten().tolist() == [2]
    assert slopes[0].abs().min() > 1e-4


@pytest.mark.matches
@pytest.mark.parametrize("name", ["llama-gqa-4-to-1", "gpt2"])
def test_a_gate_query_is_added_to_every_query_in_the_gate(name):
    """The counts of a layer, from what its attention function was handed, by plain matrix products."""
    model, seen = sparse_model(name, gate_query=True), {}

    def watched(module, query, key, value, mask, scaling=None, **rest):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        extended = query + module.gate_query[:, None]
        scores = extended @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * scale
        opened = (scores + module.gate_bias[:, None, None] > 0).tril()
        seen[module.layer_idx] = opened.sum(-1).float()
        return gated_forward(module, query, key, value, mask, scaling=scaling, **rest)

    attach_(tiny_model(name), anatomy(model))  # registers the true function
    register(GATED, watched)
    try:
        run = counted(model, prompts(batch=2)[0])
    finally:
        register(GATED, gated_forward)
    assert all(torch.equal(seen[layer], run.open[layer]) for layer in (0, 1))


@pytest.mark.matches
def test_hard_gates_pass_gradients_only_when_told_to():
    for straight_through in (False, True):
        model, run = sparse_model("llama"), GatePass(straight_through=straight_through)
        model(input_ids=prompts(batch=2)[0], use_cache=False, gate_pass=run)
        run.expected_edges()[1].sum().backward()
        slope = anatomy_modules(model)[0].gate_bias.grad
        assert (slope is not None and bool(slope.abs().max() > 0.01)) == straight_through


def anatomy_modules(model):
    return [layer.self_attn for layer in model.model.layers]


@pytest.mark.matches
def test_an_offset_is_added_to_every_bias_for_this_pass_only():
    model, tokens = sparse_model("llama"), prompts()[0]
    before = logits(model, tokens)
    shifted = counted(model, tokens, offset=0.3)
    assert torch.equal(logits(model, tokens), before)
    with torch.no_grad():
        for module in anatomy_modules(model):
            module.gate_bias += 0.3
    again = counted(model, tokens)
    assert torch.equal(shifted.open_edges(), again.open_edges())
    assert torch.equal(shifted.expected_edges(), again.expected_edges())


@pytest.mark.reproduces
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt"])
def test_a_sampled_pass_is_made_by_its_seed(name):
    model, tokens = sparse_model(name), prompts(batch=2)[0]
    first, again, other = (logits(model, tokens, gate_pass=GatePass(sample=True, seed=s)) for s in (7, 7, 8))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.01
    assert (first - logits(model, tokens)).abs().max() > 0.01


@pytest.mark.matches
def test_every_layer_draws_noise_of_its_own():
    run = GatePass(sample=True, seed=3)
    seeds = [run.gating(layer).seed for layer in range(64)]
    assert len(set(seeds)) == 64
    drawn = [uniform_noise(seed, (1, 2, 8, 8), torch.device("cpu")) for seed in seeds[:4]]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    assert all(run.gating(layer).sample for layer in range(4))


@pytest.mark.reproduces
def test_a_pass_may_be_used_again_and_forgets_the_last_prompt():
    model, run = sparse_model("llama"), GatePass()
    logits(model, prompts(length=5)[0], gate_pass=run)
    logits(model, prompts(length=7)[1], gate_pass=run)
    assert torch.equal(run.open_edges(), counted(model, prompts(length=7)[1]).open_edges())


# -- attaching -------------------------------------------------------------------------------------------------


@pytest.mark.matches
@pytest.mark.parametrize("learned", [True, False])
def test_attaching_adds_one_bias_per_head_and_nothing_else(learned):
    model = tiny_model("qwen3")
    before = dict(model.named_parameters())
    attach_(model, anatomy(model), bias_start=-1.5, learned=learned)
    after = dict(model.named_parameters())
    new = sorted(after.keys() - before.keys())
    assert new == [f"model.layers.{i}.self_attn.gate_bias" for i in (0, 1)]
    assert all(after[name] is tensor for name, tensor in before.items())
    assert all((after[name].requires_grad, after[name].dtype) == (learned, torch.float32) for name in new)
    assert torch.equal(gate_biases(model, tiny_loaded("qwen3").anatomy), torch.full((2, 4), -1.5))
    assert is_gated(model)
    assert not is_gated(tiny_model("qwen3"))


@pytest.mark.matches
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2"])  # width H E / D, and not
def test_gate_queries_start_at_zero_change_nothing_and_learn_even_beside_constant_biases(name):
    model, body = tiny_model(name), tiny_loaded(name).anatomy
    before = set(dict(model.named_parameters()))
    attach_(model, body, learned=False)
    assert gate_queries(model, body) is None
    plain = logits(model, prompts()[0])
    attach_(model, body, learned=False, gate_query=True)
    new = {n: p for n, p in model.named_parameters() if n not in before and not n.endswith("gate_bias")}
    assert [n.rpartition(".")[2] for n in new] == ["gate_query"] * 2
    assert all(p.requires_grad and p.dtype == torch.float32 for p in new.values())
    assert torch.equal(gate_queries(model, body), torch.zeros(2, 4, 8))
    assert torch.equal(logits(model, prompts()[0]), plain)


@pytest.mark.matches
def test_gate_parameters_stay_float32_beside_half_precision_weights():
    model = tiny_model("llama").bfloat16()
    attach_(model, anatomy(model), bias_start=0.1, gate_query=True)
    assert gate_biases(model, tiny_loaded("llama").anatomy).dtype == torch.float32
    assert gate_queries(model, tiny_loaded("llama").anatomy).dtype == torch.float32
    assert torch.isfinite(logits(model, prompts()[0])).all()


@pytest.mark.survives
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_fused_kernel_on_a_cpu_is_refused_not_replaced(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ModelError, match="not on a GPU"):
        logits(sparse_model(name), prompts()[0], gate_pass=GatePass(kernel="triton"))


@pytest.mark.survives
@pytest.mark.parametrize("name", ["gemma2", "mistral-window", "gemma3"])
def test_the_fused_kernel_refuses_layers_it_does_not_know(name):
    with pytest.raises(ModelError, match=r"softcap, a cache or a sliding window.*kernel=reference"):
        logits(sparse_model(name), prompts()[0], gate_pass=GatePass(kernel="triton"))


@pytest.mark.survives
def test_the_fused_kernel_refuses_a_cache():
    model = sparse_model("llama")
    with torch.no_grad():
        cache = model(input_ids=prompts()[0], use_cache=True).past_key_values
    with pytest.raises(ModelError, match="a cache"):
        logits(model, prompts()[1][:, :1], past_key_values=cache, use_cache=True, gate_pass=GatePass(kernel="triton"))


@pytest.mark.survives
def test_a_missing_mask_is_an_error_never_all_allowed(monkeypatch):
    from transformers import AttentionMaskInterface

    model = sparse_model("llama")
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, GATED, lambda *_, **__: None)
    with pytest.raises(ProbeError, match="no mask arrived, the model would not be causal"):
        logits(model, prompts()[0])
    query = torch.randn(1, 4, 3, 8)
    with pytest.raises(ProbeError, match="no mask arrived"):
        gated_forward(anatomy_modules(model)[0], query, query[:, :2], query[:, :2], None)


@pytest.mark.matches
def test_an_additive_mask_is_read_as_allowed_where_it_is_zero():
    model, attention = sparse_model("llama"), None
    attention = anatomy_modules(model)[1]
    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    allowed = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    additive = torch.zeros(1, 1, 5, 5).masked_fill(~allowed, torch.finfo(torch.float32).min)
    by_bool, by_float = (gated_forward(attention, query, key, key, mask)[0] for mask in (allowed, additive))
    assert torch.equal(by_bool, by_float)


@pytest.mark.says
def test_plain_save_pretrained_loses_the_gates(tmp_path, monkeypatch):
    """Why there is a store of our own: transformers saves the biases, and drops them when it loads them again."""
    import fewedges as fe
    from fewedges.sparsify.attention.result import gates_only

    model = sparse_model("llama")
    model.save_pretrained(tmp_path / "plain")
    addition.tokenizer().save_pretrained(tmp_path / "plain")
    back = fe.load(str(tmp_path / "plain")).model
    assert not is_gated(back)
    assert (logits(back, prompts()[0]) - logits(tiny_model("llama"), prompts()[0])).abs().max() == 0
    sparse = gates_only(fe.load(str(tmp_path / "plain")), -0.1)
    sparse.save(tmp_path / "ours")
    again = fe.load(tmp_path / "ours").model
    assert is_gated(again)
    assert torch.equal(logits(again, prompts()[0]), logits(sparse.model, prompts()[0]))
    assert (logits(again, prompts()[0]) - logits(back, prompts()[0])).abs().max() > 0.05


@pytest.mark.survives
def test_an_empty_prompt_has_no_maps(addition):
    from fewedges.errors import DataError

    with pytest.raises(DataError, match=r"1 tokens.*at least two"):
        gated_maps(addition.model, addition.tokenizer, "")
