"""What trains is what the recipe says; what does not is the dense model's own memory."""

import sys

import pytest
import torch

from fewedges.errors import RecipeError
from fewedges.model.anatomy import plain
from fewedges.recipes import SparseAttention
from fewedges.sparsify.attention.interface import GatePass, is_gated
from fewedges.sparsify.attention.student import (
    at_precision,
    make_student,
    put_back_,
    start_from_,
    trained,
    trained_weights,
)
from fewedges.sparsify.distilling import losses
from tiny import SUPPORTED, NoiseBatches, tiny_loaded

ATTENTION = {"gpt2": ("c_attn", "attn.c_proj"), "phi3": ("qkv_proj", "o_proj")}
ATTENTION |= {"gpt-neox": ("query_key_value", "dense"), "opt": ("q_proj", "k_proj", "v_proj", "out_proj")}
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj")


def recipe(**choices):
    return SparseAttention(**({"steps": 1, "lora_rank": 2} | choices))


def weights(model):
    return {name: p for name, p in plain(model).named_parameters() if ".gate_" not in name or "gate_proj" in name}


def take_a_step(student, dense):
    """One plain gradient step on everything that moves, large enough to see."""
    batch = NoiseBatches().at(0, 2)
    with torch.no_grad():
        reference = dense.model(input_ids=batch.tokens, use_cache=False).logits
    run = GatePass(sample=True, seed=1)
    options = {"gate_pass": run} if is_gated(student) else {}
    logits = student(input_ids=batch.tokens, use_cache=False, **options).logits
    objective = losses(logits, reference, batch.tokens, batch.counts, loss_weight=1.0).objective
    if is_gated(student):
        objective = objective + 0.1 * run.expected_edges().mean()
    objective.backward()
    with torch.no_grad():
        for parameter in trained(student).values():
            parameter -= 0.5 * parameter.grad


# -- what moves ------------------------------------------------------------------------------------------------


@pytest.mark.matches
@pytest.mark.parametrize("name", SUPPORTED)
def test_full_trains_every_weight_and_shares_none(name):
    dense = tiny_loaded(name)
    student = make_student(dense, recipe(train="full"))
    assert set(trained(student)) == {n for n, _ in student.named_parameters()}
    assert set(trained_weights(student)) == {n for n, _ in dense.model.named_parameters()}
    ours, theirs = weights(student), weights(dense.model)
    assert not {p.data_ptr() for p in ours.values()} & {p.data_ptr() for p in theirs.values()}
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


@pytest.mark.matches
@pytest.mark.parametrize("name", SUPPORTED)
def test_attention_trains_the_attention_matrices_and_shares_the_rest(name):
    dense = tiny_loaded(name)
    student = make_student(dense, recipe(train="attention"))
    wanted = {
        parameter
        for parameter, _ in dense.model.named_parameters()
        if parameter.rpartition(".")[0].endswith(ATTENTION.get(name, LLAMA)) and ".mlp." not in parameter
    }
    assert wanted
    assert set(trained_weights(student)) == wanted
    assert sum(n.endswith("gate_bias") for n in trained(student)) == 2
    ours, theirs = weights(student), weights(dense.model)
    for parameter, tensor in theirs.items():
        assert (ours[parameter].data_ptr() == tensor.data_ptr()) == (parameter not in wanted), parameter


@pytest.mark.matches
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "opt"])
def test_lora_trains_adapters_and_shares_every_weight(name):
    pytest.importorskip("peft")
    dense = tiny_loaded(name)
    student = make_student(dense, recipe(train="lora"))
    moving = trained(student)
    assert sum(n.endswith("gate_bias") for n in moving) == 2
    adapters = trained_weights(student)
    assert all(".lora_A." in n or ".lora_B." in n for n in adapters)
    assert all(min(tensor.shape) == 2 for tensor in adapters.values())
    linear = (
        sum(type(module).__name__ in ("Linear", "Conv1D") for module in dense.model.modules()) - 1
    )  # not the output
    assert len(adapters) == 2 * linear
    theirs = {p.data_ptr() for p in dense.model.parameters()}
    frozen = [p for n, p in student.named_parameters() if n not in moving]
    assert len(frozen) == len(theirs)
    assert {p.data_ptr() for p in frozen} == theirs


@pytest.mark.matches
@pytest.mark.parametrize("train", ["full", "attention", "lora"])
def test_constant_biases_do_not_train(train):
    pytest.importorskip("peft")
    student = make_student(tiny_loaded(), recipe(train=train, bias="constant", bias_start=0.25))
    biases = {n: p for n, p in student.named_parameters() if n.endswith("gate_bias")}
    assert len(biases) == 2
    assert all(torch.equal(p, torch.full((4,), 0.25)) for p in biases.values())
    assert not any(n in trained(student) for n in biases)


@pytest.mark.matches
@pytest.mark.parametrize("bias", ["learned", "constant"])
@pytest.mark.parametrize("train", ["full", "attention", "lora"])
def test_gate_queries_train_in_every_kind_of_run_and_are_no_weights(train, bias):
    pytest.importorskip("peft")
    dense = tiny_loaded()
    student = make_student(dense, recipe(train=train, bias=bias, gate_query=True))
    queries = {n: p for n, p in trained(student).items() if n.endswith("gate_query")}
    assert [p.shape for p in queries.values()] == [(4, 8), (4, 8)]
    assert sum(n.endswith("gate_bias") for n in trained(student)) == (2 if bias == "learned" else 0)
    without = make_student(dense, recipe(train=train, bias=bias))
    assert not any("gate_query" in n for n, _ in without.named_parameters())
    assert trained_weights(student).keys() == trained_weights(without).keys()
    take_a_step(student, dense)
    assert all((p != 0).all() for p in queries.values())


@pytest.mark.matches
@pytest.mark.parametrize("train", ["full", "attention", "lora"])
def test_the_control_has_the_same_weights_to_train_and_no_gates(train):
    pytest.importorskip("peft")
    dense = tiny_loaded()
    control, student = (make_student(dense, recipe(train=train), gates=gates) for gates in (False, True))
    assert not is_gated(control)
    assert is_gated(student)
    assert trained_weights(control).keys() == trained_weights(student).keys() == trained(control).keys()


@pytest.mark.matches
@pytest.mark.parametrize("train", ["full", "attention"])
def test_tied_embeddings_stay_tied(train):
    student = make_student(tiny_loaded("llama-tied"), recipe(train=train))
    assert student.lm_head.weight is student.model.embed_tokens.weight


# -- the dense model is left alone -----------------------------------------------------------------------------


@pytest.mark.stays
@pytest.mark.parametrize("name", ["llama", "gpt2", "llama-tied"])
@pytest.mark.parametrize("train", ["full", "attention", "lora"])
def test_a_training_step_moves_the_student_and_not_the_dense_model(name, train):
    pytest.importorskip("peft")
    dense = tiny_loaded(name)
    before = {n: p.clone() for n, p in dense.model.named_parameters()}
    tokens = NoiseBatches().at(1, 2).tokens
    logits = dense.model(input_ids=tokens).logits
    student = make_student(dense, recipe(train=train))
    start = {n: p.detach().clone() for n, p in trained(student).items()}
    take_a_step(student, dense)
    after = dict(dense.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert not any(p.requires_grad for p in after.values())
    assert torch.equal(dense.model(input_ids=tokens).logits, logits)
    assert not is_gated(dense.model)
    moved = {n for n, p in trained(student).items() if not torch.equal(p, start[n])}
    still = {n for n in start if ".lora_A." in n}  # B starts at 0, so A has no slope in the first step
    assert moved == start.keys() - still - {n for n in start if "k_proj.bias" in n}


@pytest.mark.matches
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox"])
@pytest.mark.parametrize("train", ["full", "attention", "lora"])
def test_a_fresh_student_with_open_gates_is_the_dense_model(name, train):
    pytest.importorskip("peft")
    dense = tiny_loaded(name)
    student = make_student(dense, recipe(train=train))
    tokens = NoiseBatches().at(1, 2).tokens
    with torch.no_grad():
        mine = student(input_ids=tokens, gate_pass=GatePass(open_all=True)).logits
        difference = mine - dense.model(input_ids=tokens).logits
    assert difference.abs().max() <= 4e-6  # measured at most 1.1e-6, at logits of 2.9


@pytest.mark.matches
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_adapter_adds_b_times_a(name):
    """Conv1D keeps its matrix the other way round than Linear: the adapter must follow."""
    pytest.importorskip("peft")
    student = make_student(tiny_loaded(name), recipe(train="lora"))
    path = {"llama": "model.layers.1.mlp.down_proj", "gpt2": "transformer.h.1.mlp.c_fc"}[name]
    layer = plain(student).get_submodule(path)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        b.normal_()
        x = torch.randn(3, a.shape[1])
        assert torch.equal(layer(x), layer.base_layer(x) + x @ a.T @ b.T)
    assert (layer(x) - layer.base_layer(x)).abs().max() > 0.1


@pytest.mark.reproduces
def test_adapters_are_drawn_by_the_recipes_seed_and_leave_the_global_one_alone():
    pytest.importorskip("peft")
    dense = tiny_loaded()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (trained_weights(make_student(dense, recipe(train="lora", seed=s))) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


# -- putting saved weights back --------------------------------------------------------------------------------


@pytest.mark.reproduces
@pytest.mark.parametrize("train", ["full", "attention", "lora"])
def test_saved_weights_go_back_where_they_came_from(train):
    pytest.importorskip("peft")
    dense = tiny_loaded()
    student, fresh = (make_student(dense, recipe(train=train)) for _ in range(2))
    take_a_step(student, dense)
    saved = {n: tensor.clone() for n, tensor in trained_weights(student).items()}
    assert any(not torch.equal(trained_weights(fresh)[n], saved[n]) for n in saved)
    put_back_(fresh, saved)
    assert all(torch.equal(trained_weights(fresh)[n], saved[n]) for n in saved)


# -- starting from a trained model -----------------------------------------------------------------------------


@pytest.mark.reproduces
@pytest.mark.parametrize("queries", [(False, False), (False, True), (True, True)], ids=["none", "new", "kept"])
@pytest.mark.parametrize("train", ["full", "attention", "lora"])
def test_a_run_goes_on_from_a_trained_model_and_its_gate_queries_may_be_new(train, queries):
    pytest.importorskip("peft")
    dense = tiny_loaded()
    old, new = (make_student(dense, recipe(train=train, gate_query=query)) for query in queries)
    take_a_step(old, dense)
    digest = start_from_(new, old)
    tokens = NoiseBatches().at(1, 2).tokens
    assert torch.equal(new(input_ids=tokens).logits, old(input_ids=tokens).logits)
    before = trained(old)
    assert all(torch.equal(p, before[n]) for n, p in trained(new).items() if n in before)
    added = trained(new).keys() - before.keys()
    assert len(added) == (2 if queries == (False, True) else 0)
    assert all(n.endswith("gate_query") and (trained(new)[n] == 0).all() for n in added)
    assert digest == start_from_(make_student(dense, recipe(train=train, gate_query=queries[1])), old)
    with torch.no_grad():
        next(iter(before.values())).view(-1)[0] += 1
    assert digest != start_from_(new, old)


@pytest.mark.survives
def test_starting_from_a_model_that_does_not_fit_is_refused_and_nothing_changes():
    dense = tiny_loaded()
    old = make_student(dense, recipe(train="attention", gate_query=True))
    take_a_step(old, dense)
    wider, less = (make_student(tiny_loaded(name), recipe(train="attention")) for name in ("llama-gqa-4-to-1", "llama"))
    other = make_student(dense, recipe(train="attention", gate_query=True))
    trained(other)["model.layers.1.self_attn.gate_query"].data = torch.zeros(4, 4)
    cases = {"gate_query": less, "k_proj": wider, "layers.1.self_attn.gate_query": other}
    for named, student in cases.items():
        before = {n: p.detach().clone() for n, p in trained(student).items()}
        model = make_student(dense, recipe(train="attention")) if named == "k_proj" else old
        with pytest.raises(RecipeError, match=named):
            start_from_(student, model)
        assert all(torch.equal(p, before[n]) for n, p in trained(student).items())


@pytest.mark.survives
def test_weights_too_many_too_few_or_of_another_shape_are_refused_and_nothing_changes():
    student = make_student(tiny_loaded(), recipe(train="attention"))
    before = {n: tensor.clone() for n, tensor in trained_weights(student).items()}
    other = {n: tensor + 1 for n, tensor in before.items()}
    last = list(before)[-1]
    flawed = {
        "too few": {n: tensor for n, tensor in other.items() if n != last},
        "too many": {**other, "stranger": torch.zeros(3)},
        "a gate bias": {**other, "model.layers.0.self_attn.gate_bias": torch.zeros(4)},
        "a gate query": {**other, "model.layers.0.self_attn.gate_query": torch.zeros(4, 8)},
        "another shape": {**other, last: torch.zeros(32)},  # would be broadcast over the matrix
    }
    for flaw, saved in flawed.items():
        with pytest.raises(KeyError, match="stranger" if flaw == "too many" else "self_attn"):
            put_back_(student, saved)
        assert all(torch.equal(tensor, before[n]) for n, tensor in trained_weights(student).items()), flaw


# -- recipes that do not fit -----------------------------------------------------------------------------------


@pytest.mark.survives
def test_lora_without_peft_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RecipeError, match=r"peft package is missing.*pip install 'fewedges\[peft\]'"):
        make_student(tiny_loaded(), recipe(train="lora"))


@pytest.mark.survives
@pytest.mark.parametrize(("field", "wanted"), [("layer_weights", 2), ("layer_budgets", 2), ("head_weights", 4)])
def test_prices_that_do_not_fit_the_model_are_refused(field, wanted):
    dense = tiny_loaded()
    with pytest.raises(RecipeError, match=f"{field}: 3 numbers.*{wanted}, one for each"):
        make_student(dense, recipe(**{field: (1.0, 1.0, 1.0)}))
    make_student(dense, recipe(**{field: (1.0,) * wanted}))


@pytest.mark.matches
def test_a_half_precision_run_casts_what_is_frozen_once():
    dense = tiny_loaded()
    for choices in ({"precision": "fp32", "train": "attention"}, {"precision": "bf16", "train": "full"}):
        assert at_precision(dense, recipe(**choices)) is dense
    cast = at_precision(dense, recipe(precision="bf16", train="attention"))
    assert {p.dtype for p in cast.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in dense.model.parameters()} == {torch.float32}
    frequencies = [dict(x.model.named_buffers())["model.rotary_emb.inv_freq"] for x in (dense, cast)]
    assert torch.equal(*frequencies)  # as transformers loads a bfloat16 model
    assert frequencies[1].dtype == torch.float32
    assert at_precision(cast, recipe(precision="bf16", train="lora")) is cast  # already there: no second copy
    student = make_student(cast, recipe(precision="bf16", train="attention"))
    assert {p.dtype for p in trained(student).values()} == {torch.float32}  # what moves is kept in float32
    assert student.model.norm.weight.data_ptr() == cast.model.model.norm.weight.data_ptr()
