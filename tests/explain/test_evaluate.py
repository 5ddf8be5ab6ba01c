"""Circuits against the model itself, against patching by hand, and against each other."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import random_prompts
from test_hooks import WIRED, state_of

from fewedges.errors import DataError, RecipeError
from fewedges.explain.evaluate import circuits_at_once, evaluate
from fewedges.explain.running import prompts_at_once
from fewedges.explain.select import prune

FORMS = [{}, {"key_readers": "head"}, {"split": False}]


def forms():
    for name in WIRED:
        for form in FORMS if name != "phi3" else FORMS[:1]:
            yield pytest.param(name, form, id=f"{name}-{'-'.join(map(str, form.values()))}")


def metric_of(wiring, prompts, tokens):
    with torch.no_grad():
        logits = wiring.model(tokens).logits[torch.arange(len(prompts)), prompts.last]
    return prompts.measure_metric(logits).numpy()


def random_masks(graph, count=4, seed=0, share=0.7):
    return graph.real & (np.random.default_rng(seed).random((count, *graph.real.shape)) < share)


@pytest.mark.matches
@pytest.mark.parametrize(("name", "form"), [*forms()])
def test_all_edges_are_the_model_and_none_the_corrupt_run(name, form, wired):
    wiring, prompts = wired(name, **form), random_prompts()
    real = wiring.graph.real
    found = evaluate(wiring, prompts, np.stack([real, real & False]))
    clean, corrupt = (metric_of(wiring, prompts, tokens) for tokens in (prompts.clean, prompts.corrupt))
    assert np.abs(found.full - clean).max() < 1e-12
    assert np.abs(found.metric - np.stack([clean, corrupt])).max() < 1e-12  # measured 2e-14
    assert np.abs(found.explained - [1, 0]).max() < 1e-12
    assert found.kl[0].max() < 1e-12 < found.kl[1].min()
    assert (found.correct[0] == found.full_correct).all()


@pytest.mark.matches
def test_in_float32_full_is_1_and_empty_0_within_1e_5():
    from fewedges.explain.hooks import wire
    from fewedges.model.anatomy import anatomy
    from tiny import tiny_model

    for name in ("gpt2", "llama"):
        model = tiny_model(name)
        wiring = wire(model, anatomy(model))
        real = wiring.graph.real
        found = evaluate(wiring, random_prompts(), np.stack([real, real & False]))
        assert np.abs(found.explained - [1, 0]).max() < 1e-5  # measured: 4.6e-6, of an effect of 0.015 only


@pytest.mark.matches
@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "qwen2", "opt"])
def test_one_edge_left_out_is_patching_by_hand(name, wired):
    """m0 -> logits and a0.h1 -> m1, patched with plain hooks on the model."""
    wiring, prompts = wired(name), random_prompts()
    graph, rows = wiring.graph, torch.arange(len(prompts))
    kept = {}

    def keep(key):
        return lambda _, args, output: kept.__setitem__(key, output.view(len(prompts), -1, 32))

    def change(module, edit):
        return module.register_forward_pre_hook(lambda _, args: (args[0] + edit.view(args[0].shape),))

    first, second = wiring.blocks
    width = first.weight.shape[1]

    def head_write(module, args):
        kept["head"] = args[0][..., width : 2 * width] @ first.weight[1]

    written = {}
    for side in ("clean", "corrupt"):
        hooks = [first.mlp.register_forward_hook(keep("mlp")), first.writer.register_forward_pre_hook(head_write)]
        metric_of(wiring, prompts, getattr(prompts, side))
        written[side] = dict(kept)
        _ = [hook.remove() for hook in hooks]
    expected = []
    for key, target in (("mlp", wiring.final_norm), ("head", second.mlp_norm)):
        hook = change(target, written["corrupt"][key] - written["clean"][key])
        expected.append(metric_of(wiring, prompts, prompts.clean))
        hook.remove()
    masks = np.repeat(graph.real[None], 2, axis=0)
    masks[0][graph.index("m0->logits")] = masks[1][graph.index("a0.h1->m1")] = False
    found = evaluate(wiring, prompts, masks).metric
    assert len(rows) == found.shape[1]
    assert np.abs(found - np.stack(expected)).max() < 1e-12  # measured 1.1e-14
    assert np.abs(found - metric_of(wiring, prompts, prompts.clean)).max() > 1e-3  # the edges matter


@pytest.mark.matches
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_many_circuits_at_once_are_the_same_one_by_one_and_in_small_memory(name, wired):
    wiring, prompts = wired(name), random_prompts()
    masks = random_masks(wiring.graph, 5)
    assert circuits_at_once(wiring, (5, 7), 5, 2**29) == 5
    together = evaluate(wiring, prompts, masks)
    alone = np.concatenate([evaluate(wiring, prompts, mask[None]).metric for mask in masks])
    small = evaluate(wiring, prompts, masks, memory=1)
    assert prompts_at_once(wiring, 7, 1) == prompts_at_once(wiring, 7, 0) == 1  # 0 is a limit, None the default one
    assert prompts_at_once(wiring, 7) == prompts_at_once(wiring, 7, 3 * 2**28) > 1
    assert np.abs(together.metric - alone).max() < 1e-12
    assert np.abs(together.metric - small.metric).max() < 1e-12
    assert np.abs(together.kl - small.kl).max() < 1e-12


@pytest.mark.stays
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), share=st.floats(0.1, 0.9))
def test_pruning_dead_ends_changes_no_output(seed, share, wired):
    wiring, prompts = wired("llama"), random_prompts(3)
    mask = random_masks(wiring.graph, 1, seed, share)[0]
    both = evaluate(wiring, prompts, np.stack([mask, prune(wiring.graph, mask)])).metric
    assert np.abs(both[0] - both[1]).max() < 1e-12


@pytest.mark.stays
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999))
def test_padding_and_company_change_nothing(seed, wired):
    wiring, prompts = wired("gpt2"), random_prompts(4, seed=seed)
    masks = random_masks(wiring.graph, 2, seed)
    whole = evaluate(wiring, prompts, masks).metric
    alone = [evaluate(wiring, prompts.subset([row]), masks).metric[:, 0] for row in range(4)]
    assert np.abs(whole - np.stack(alone, axis=1)).max() < 1e-12


@pytest.mark.matches
@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt-neox"])
def test_ungrouped_circuits_agree_with_grouped_ones(name, wired):
    """Dropping a key input per group is dropping it for every head of the group."""
    prompts, grouped, single = random_prompts(), wired(name), wired(name, key_readers="head")
    mask = random_masks(grouped.graph, 1)[0]
    wide = single.graph.real.copy()
    share = grouped.graph.heads // grouped.graph.key_readers
    for layer in range(2):
        for role in "qkv":
            for head in range(grouped.graph.heads):
                index = head if role == "q" else head // share
                wide[:, single.graph.reader(layer, role, head)] = mask[:, grouped.graph.reader(layer, role, index)]
        wide[:, single.graph.mlp_reader(layer)] = mask[:, grouped.graph.mlp_reader(layer)]
    wide[:, -1] = mask[:, -1]
    found = [evaluate(w, prompts, m[None]).metric for w, m in ((grouped, mask), (single, wide))]
    assert np.abs(found[0] - found[1]).max() < 1e-12


# -- ablations -----------------------------------------------------------------------------------------------------


@pytest.mark.matches
@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt-neox"])
@pytest.mark.parametrize("ablation", ["zero", "mean", "mean-position", "resample"])
def test_other_ablations_keep_the_full_model_and_put_their_values_into_the_empty_one(name, ablation, wired):
    wiring = wired(name)
    prompts = random_prompts(6) if ablation == "resample" else random_prompts(6).subset([0, 3])
    real = wiring.graph.real
    found = evaluate(wiring, prompts, np.stack([real, real & False]), ablation=ablation)
    assert np.abs(found.explained - [1, 0]).max() < 1e-12
    logits = ablated_by_hand(wiring, prompts, ablation)
    if logits is not None:
        assert np.abs(prompts.measure_metric(logits).numpy() - found.metric[1]).max() < 1e-12


def ablated_by_hand(wiring, prompts, ablation):
    """The logits of a stream of constants: positions, biases, and means where sources were averaged."""
    from fewedges.explain.ablation import position_part
    from fewedges.explain.running import run

    if ablation == "resample":
        return None
    with torch.no_grad():
        places = position_part(wiring, prompts.clean.shape[1], {})
        written, mask = run(wiring, prompts.clean, prompts.last, {}), prompts.mask[..., None]
        reduced = {
            "zero": lambda x: torch.zeros_like(x[:1, :1]),
            "mean": lambda x: (x * mask).sum((0, 1), keepdim=True) / mask.sum(),
            "mean-position": lambda x: (x * mask).sum(0, keepdim=True) / mask.sum(0),
        }[ablation]
        stream = places + reduced(written.input - places)
        for block, heads, mlp in zip(wiring.blocks, written.heads, written.mlps, strict=True):
            stream = stream + reduced(block.writer(heads) - (0 if block.bias is None else block.bias)) + reduced(mlp)
            stream = stream + (0 if block.bias is None else block.bias)
        normed = wiring.final_norm(stream.expand(len(prompts), -1, -1)[torch.arange(len(prompts)), prompts.last])
        return wiring.model.get_output_embeddings()(normed)


@pytest.mark.reproduces
def test_resampling_is_a_function_of_its_seed_and_never_the_prompt_itself(wired):
    from fewedges.explain.ablation import Ablating

    wiring, prompts = wired("gpt2"), random_prompts(9)
    drawn = [Ablating(wiring, prompts, "resample", seed=seed).other for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    for row, length in enumerate((prompts.last + 1).tolist()):
        assert not torch.equal(drawn[0][row, :length], prompts.clean[row, :length])
        assert any(torch.equal(drawn[0][row, :length], other[:length]) for other in prompts.clean)


@pytest.mark.survives
def test_a_failing_pass_leaves_the_model_as_it_was(wired):
    wiring, prompts = wired("gpt2"), random_prompts()
    before = state_of(wiring.model)
    with pytest.raises(TypeError):
        evaluate(wiring, prompts, wiring.graph.real[None], options={"no_such_argument": 1, "use_cache": True})
    hook = wiring.blocks[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(wiring, prompts, wiring.graph.real[None])
    hook.remove()
    assert state_of(wiring.model) == before


@pytest.mark.says
@pytest.mark.usefixtures("as_users_call")
def test_bad_requests_say_what_would_be_good(wired):
    wiring, prompts = wired("gpt2"), random_prompts()
    real = wiring.graph.real
    with pytest.raises(RecipeError, match="masks of shape"):
        evaluate(wiring, prompts, real)
    with pytest.raises(RecipeError, match="no such ablation"):
        evaluate(wiring, prompts, real[None], ablation="none")
    with pytest.raises(DataError, match="no other prompt"):
        evaluate(wiring, prompts.subset([0]), real[None], ablation="resample")
    with pytest.raises(DataError, match="mean-position"):
        evaluate(wiring, prompts, real[None], ablation="mean-position", reference=prompts.subset([2]))
