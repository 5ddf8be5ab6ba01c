"""Masked attention edges: the ends of the mask, one edge by hand, gradients against differences and the oracle."""

import numpy as np
import pytest
import torch
from pairs import random_prompts, rank_correlation

from fewedges.errors import RecipeError
from fewedges.explain.attention_masking import edge_scores, pair, patched_scores
from fewedges.model.anatomy import anatomy
from fewedges.sparsify.attention.interface import GatePass, attach_
from tiny import SUPPORTED, tiny_model

BOTH = pytest.mark.parametrize("gated", [False, True])


def tiny(name, gated, dtype=torch.float64):
    model = tiny_model(name).to(dtype)
    return attach_(model, anatomy(model), bias_start=-0.05, learned=False) if gated else model


def same_end():
    """Prompts whose last token is that of their corrupt prompt."""
    return random_prompts().subset([0, 1, 3, 4])


def plain_logits(model, tokens, last):
    return model(input_ids=tokens, use_cache=False).logits[torch.arange(len(last)), last]


@pytest.mark.matches
@BOTH
@pytest.mark.parametrize("name", SUPPORTED)
def test_all_edges_are_the_model_and_none_are_the_corrupt_run(name, gated):
    """At the last token, the same in both prompts, all that differs arrives by attention."""
    model, prompts = tiny(name, gated), same_end()
    both = pair(model, prompts)
    full = both.run(both.live.double())
    empty = both.run(torch.zeros_like(both.live, dtype=torch.float64))
    clean, corrupt = (plain_logits(model, tokens, prompts.last) for tokens in (prompts.clean, prompts.corrupt))
    assert (clean - corrupt).abs().max() > 0.01
    # Measured: 2e-7, in gemma2, whose own softmax is in float32; else 4e-15.
    assert (full - clean).abs().max() < 8e-7
    assert (empty - corrupt).abs().max() < 8e-7


@pytest.mark.matches
def test_zero_ablation_of_all_edges_leaves_heads_silent():
    model, prompts = tiny("gpt2", False), random_prompts()
    both = pair(model, prompts, "zero")
    assert not both.other
    hooks = [
        block.attn.c_proj.register_forward_pre_hook(lambda _, args: (torch.zeros_like(args[0]),))
        for block in model.transformer.h
    ]
    try:
        silent = plain_logits(model, prompts.clean, prompts.last)
    finally:
        _ = [hook.remove() for hook in hooks]
    found = both.run(torch.zeros_like(both.live, dtype=torch.float64))
    assert (found - silent).abs().max() < 4e-15  # measured 1e-15
    assert (silent - both.logits).abs().max() > 0.01


def read_by_hand(model, tokens, gated):
    """Weights after the gate (L, B, H, Q, K) and values (L, B, H, K, E) of a GPT-2, by its own means."""
    values, run = [], GatePass(keep_maps=True)
    hooks = [
        block.attn.c_attn.register_forward_hook(lambda _, __, out: values.append(out[..., 64:].unflatten(-1, (4, 8))))
        for block in model.transformer.h
    ]
    try:
        if gated:
            model(input_ids=tokens, use_cache=False, gate_pass=run)
            weights = torch.stack([run.maps[n][0] for n in (0, 1)])
        else:
            model.set_attn_implementation("eager")
            weights = torch.stack(model(input_ids=tokens, use_cache=False, output_attentions=True).attentions)
    finally:
        _ = [hook.remove() for hook in hooks]
    return weights, torch.stack(values).transpose(2, 3)


@pytest.mark.matches
@BOTH
@pytest.mark.parametrize(("layer", "head", "query", "key"), [(0, 1, 4, 3), (0, 3, 5, 2), (1, 2, 6, 4)])
def test_a_mask_of_a_third_mixes_one_edge_of_two_runs(gated, layer, head, query, key):
    model, prompts = tiny("gpt2", gated), random_prompts(count=1)
    both = pair(model, prompts)
    masks = both.live.double()
    masks[layer, 0, head, query, key] = 1 / 3
    found = both.run(masks)
    (w, v), (other_w, other_v) = (read_by_hand(model, x, gated) for x in (prompts.clean, prompts.corrupt))
    place = (layer, 0, head)
    change = other_w[*place, query, key] * other_v[*place, key] - w[*place, query, key] * v[*place, key]

    def mixed(_, args):
        x = args[0].clone()
        x[0, query, head * 8 : head * 8 + 8] += change * 2 / 3
        return (x,)

    hook = model.transformer.h[layer].attn.c_proj.register_forward_pre_hook(mixed)
    try:
        by_hand = plain_logits(model, prompts.clean, prompts.last)
    finally:
        hook.remove()
    if both.live[layer, 0, head, query, key]:
        assert (by_hand - both.logits).abs().max() > 1e-4
    assert (found - by_hand).abs().max() < 2e-14  # measured 5e-15


@pytest.mark.stays
@BOTH
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window", "gemma3"])
def test_leaving_out_the_common_start_changes_nothing(name, gated):
    model, prompts = tiny(name, gated), random_prompts()
    short, long = pair(model, prompts), pair(model, prompts, skip=False)
    assert (short.same, long.same) == (2, 0)
    masks = torch.rand(short.live.shape, dtype=torch.float64) * short.live
    assert (short.run(masks) - short.logits).abs().max() > 0.01
    assert (short.run(masks) - long.run(masks)).abs().max() < 4e-15  # measured 1e-15
    assert (edge_scores(short, 2) - edge_scores(long, 2)).abs().max() < 4e-15


@pytest.mark.stays
def test_live_edges_are_causal_within_the_prompt_and_open_in_one_of_the_runs():
    model, prompts = tiny("llama", True), random_prompts()
    both = pair(model, prompts)
    runs = [GatePass(keep_maps=True), GatePass(keep_maps=True)]
    for run, tokens in zip(runs, (prompts.clean, prompts.corrupt), strict=True):
        model(input_ids=tokens, use_cache=False, gate_pass=run)
    opened = torch.stack([runs[0].maps[n][1] | runs[1].maps[n][1] for n in (0, 1)])
    assert torch.equal(both.live, opened & prompts.mask[:, None, :, None])
    assert 0.1 < both.live.double().mean() < 0.5


# -- scores --------------------------------------------------------------------------------------------------------


@pytest.mark.matches
@BOTH
def test_one_step_is_the_slope_at_a_half(gated):
    model, prompts = tiny("gpt2", gated), random_prompts()
    both = pair(model, prompts)
    scores, step = edge_scores(both, 1), 1e-5
    for edge in torch.nonzero(scores.abs() > 0.3 * scores.abs().max())[:6].tolist():
        ends = []
        for sign in (1, -1):
            masks = both.live.double() / 2
            masks[tuple(edge)] += sign * step
            ends.append(both.metric(both.run(masks)).sum())
        wrong = abs((ends[0] - ends[1]) / (2 * step) - scores[tuple(edge)])
        assert wrong < 1e-9 * scores.abs().max()  # measured 2.5e-10


@pytest.mark.matches
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "qwen3"])
def test_scores_of_a_dense_model_add_up(name):
    prompts = random_prompts()
    both = pair(tiny(name, False), prompts)
    nothing = both.metric(both.run(torch.zeros_like(both.live, dtype=torch.float64)))
    effect = both.metric(both.logits) - nothing
    wrong = [(edge_scores(both, n).sum((0, 2, 3, 4)) - effect).abs().max() / effect.abs().max() for n in (4, 64)]
    assert wrong[1] < 0.01
    assert wrong[1] < wrong[0] / 2


@pytest.mark.matches
@pytest.mark.parametrize(
    ("name", "gated", "least"),
    [
        *(("llama", False, 0.76), ("gpt2", False, 0.88), ("gpt-neox", False, 0.93)),
        *(("llama", True, 0.65), ("gpt2", True, 0.71), ("gpt-neox", True, 0.69)),
    ],
)
def test_scores_correlate_with_patching_edges_one_by_one(name, gated, least):
    """Measured: 0.786, 0.904, 0.950 dense; 0.680, 0.740, 0.720 gated.

    A score is a mean over the way from no edge to all, a patch is made at its end.
    """
    both = pair(tiny(name, gated), random_prompts(count=3))
    fast = edge_scores(both, 16)
    layer, row, head, query, key = torch.nonzero(both.live & (fast != 0)).T.numpy()
    edges = np.stack([row, layer, head, query, key], 1)
    exact = patched_scores(both, edges, size=97)
    found = rank_correlation(fast[layer, row, head, query, key].numpy(), exact)
    assert found > least


@pytest.mark.matches
def test_the_oracle_does_one_edge_at_a_time():
    both = pair(tiny("llama", False), random_prompts())
    edges = np.array([[0, 0, 1, 4, 3], [3, 1, 2, 6, 4], [0, 0, 1, 4, 3]])
    found = patched_scores(both, edges, size=2)
    for edge, score in zip(edges, found, strict=True):
        masks = both.live.double()
        masks[edge[1], edge[0], edge[2], edge[3], edge[4]] = 0
        without = both.metric(both.run(masks))
        assert abs(both.metric(both.logits)[edge[0]] - without[edge[0]] - score) < 1e-14  # measured 2e-15
    assert np.abs(found).min() > 1e-6


@pytest.mark.survives
def test_an_ablation_that_edges_do_not_have_is_refused():
    with pytest.raises(RecipeError, match="no such ablation"):
        pair(tiny_model(), random_prompts(), "mean")
