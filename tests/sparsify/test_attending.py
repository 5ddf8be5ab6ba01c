"""Fixed patterns inside real architectures: the masked softmax they say, padded and cached alike, put back after."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from fewedges.errors import ModelError, RecipeError
from fewedges.model.attention import attention_by, dense_attention, register
from fewedges.model.probes import causal, decode, padding
from fewedges.sparsify.attending import (
    BLOCK,
    ROOM,
    Laid,
    attend_,
    attending,
    block_mask,
    blocked,
    detach_patterns_,
    edges_of,
    flex_attention,
    masked_attention,
    patterns,
)
from fewedges.sparsify.attention.interface import attach_
from fewedges.sparsify.fixed_attention import BigBird, BlockButterfly, Fixed, Full, Heads, Local, Strided, Union
from tiny import SUPPORTED, NoiseBatches, tiny_loaded

LAYERS = [
    Heads((Local(3), Strided(3, "second"), Fixed(4, 1), BlockButterfly(2, 1, first=1))),
    Union((Strided(4), Fixed(4, 2))),
]
"""A rule for each of two layers; the first differs by head."""
SPLIT = Heads((Strided(4, "first"), Strided(4, "second"), Strided(5, "second"), Local(2)))
"""Heads of three orders, also inside a group of two."""
LENGTH = 12


def tokens(batch=2, length=LENGTH, seed=0):
    return NoiseBatches(length=length).at(seed, batch).tokens


def logits(model, given, **options):
    with torch.no_grad():
        return model(input_ids=given, **({"use_cache": False} | options)).logits


def slow(loaded, rules, given):
    """The model with its weights and a mask joined to every layer's, through the plain softmax."""
    at = {id(module): number for number, module in enumerate(loaded.anatomy.modules(loaded.model))}

    def oracle(module, query, key, value, attention_mask, scaling=None, softcap=None, **_):
        mask = rules[at[id(module)]](key.shape[-2]).mask()
        mask = mask if mask.dim() == 3 else mask[None]
        heads = [
            dense_attention(
                module, query[:, h : h + 1], key[:, g : g + 1], value[:, g : g + 1],
                attention_mask & mask[h % len(mask)], scaling=scaling, softcap=softcap,
            )[0]
            for h in range(query.shape[1])
            for g in [h * key.shape[1] // query.shape[1]]
        ]  # fmt: skip
        return torch.cat(heads, 2), None

    register("slow-fixed", oracle)
    with attention_by(loaded.model, "slow-fixed"):
        return logits(loaded.model, given)


@pytest.mark.matches
@pytest.mark.parametrize("name", SUPPORTED)
def test_a_model_attends_through_its_layers_and_heads_own_patterns(name):
    loaded = tiny_loaded(name)
    dense, wanted = logits(loaded.model, tokens()), slow(loaded, LAYERS, tokens())
    with attending(loaded.model, loaded.anatomy, LAYERS):
        mine = logits(loaded.model, tokens())
    assert (mine - wanted).abs().max() <= 2.9e-6 * wanted.abs().max()  # measured at most 7.3e-7
    assert (wanted - dense).abs().max() > 0.05 * dense.abs().max()
    assert torch.equal(logits(loaded.model, tokens()), dense)  # put back


@pytest.mark.stays
@pytest.mark.parametrize("name", SUPPORTED)
def test_padding_and_a_cache_change_nothing(name):
    loaded = tiny_loaded(name)
    attend_(loaded.model, loaded.anatomy, LAYERS)

    def forward(given, raw=False, **options):
        with torch.no_grad():
            out = loaded.model(input_ids=given, **({"use_cache": False} | options))
        return out if raw else out.logits

    causal(loaded.model, loaded.anatomy, forward)
    padding(loaded.model, loaded.anatomy, forward)
    if any(layer.window for layer in loaded.anatomy.layers):
        with pytest.raises(ModelError, match="use_cache=False"):
            decode(loaded.model, loaded.anatomy, forward)
    else:
        decode(loaded.model, loaded.anatomy, forward)


@pytest.mark.stays
def test_a_rule_that_moves_with_the_length_decodes_when_laid_for_one():
    loaded, rule = tiny_loaded("llama"), BigBird(1, 1, heads=4)

    def gap():
        full = logits(loaded.model, tokens(1))
        return float((logits(loaded.model, tokens(1)[:, :9]) - full[:, :9]).abs().max() / full.abs().max())

    with attending(loaded.model, loaded.anatomy, rule, length=LENGTH):
        assert gap() <= 2e-6  # measured 5e-7
        with pytest.raises(ModelError, match="laid for 12"):
            logits(loaded.model, tokens(1, LENGTH + 1))
    with attending(loaded.model, loaded.anatomy, rule):
        assert gap() > 0.01


@pytest.mark.stays
def test_batches_of_different_padding_are_laid_by_position():
    loaded, given = tiny_loaded("gpt2"), tokens(2)
    attend_(loaded.model, loaded.anatomy, LAYERS)
    alone = [logits(loaded.model, given[:1]), logits(loaded.model, given[1:, 4:])]
    mask = torch.ones_like(given)
    mask[1, :4] = 0
    together = logits(loaded.model, given, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    scale = together.abs().max()
    assert (together[:1] - alone[0]).abs().max() <= 1.2e-6 * scale
    assert (together[1:, 4:] - alone[1]).abs().max() <= 1.2e-6 * scale  # measured 3.1e-7


@pytest.mark.matches
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.booleans(), st.sampled_from([None, 2.0]))
def test_masked_attention_and_its_gradient_are_the_softmax_over_kept_keys(seed, by_head, softcap):
    torch.manual_seed(seed)
    q, k, v = (torch.randn(2, h, 7, 4, dtype=torch.double, requires_grad=True) for h in (4, 2, 2))
    kept = torch.rand(2, 4 if by_head else 1, 7, 7) < 0.4
    kept[:, :, 3] = False  # a query without a key
    mine = masked_attention(q, k, v, kept, scaling=0.7, softcap=softcap)
    wanted = torch.zeros_like(mine)
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(7)).tolist():
        at = kept[b, h if by_head else 0, i].nonzero()[:, 0]
        scores = 0.7 * k[b, h // 2, at] @ q[b, h, i]
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        wanted[b, h, i] = torch.softmax(scores, 0) @ v[b, h // 2, at] if len(at) else 0
    torch.testing.assert_close(mine, wanted, rtol=0, atol=3.5e-15)  # measured 9e-16
    upstream = torch.randn_like(mine)
    for a, b in zip(*(torch.autograd.grad(y, (q, k, v), upstream) for y in (mine, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=8e-15)  # measured 2e-15


@pytest.mark.matches
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["llama", "llama-gqa-4-to-1", "gpt2", "gemma2"])
def test_flex_attention_gives_the_same_logits(name, padded):
    loaded = tiny_loaded(name)
    rules = [SPLIT, Strided(5, "second")]  # heads in orders of their own, and a layer in one transposed order
    mask = torch.ones_like(tokens())
    mask[1, : 4 * padded] = 0  # then the batch has two masks
    options = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    with attending(loaded.model, loaded.anatomy, rules):
        wanted = logits(loaded.model, tokens(), **options)
    with attending(loaded.model, loaded.anatomy, rules, run="flex"):
        mine = logits(loaded.model, tokens(), **options)
    assert (mine - wanted).abs().max() <= 1.6e-6 * wanted.abs().max()  # measured 4.1e-7


@pytest.mark.matches
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_each_head_runs_in_its_own_order(groups):
    """Split heads over several blocks; query heads of one key/value head in different orders."""
    torch.manual_seed(0)
    n = 2 * BLOCK + 37
    rule = Heads((Strided(16, "first"), Strided(16, "second"), Local(9), Strided(5, "second")))
    q, k, v = torch.randn(2, 4, n, 8), torch.randn(2, groups, n, 8), torch.randn(2, groups, n, 8)
    causal = torch.ones(2, 1, n, n, dtype=torch.bool).tril()
    kept = Laid(rule, 4, None, "flex").kept(causal, q, k)
    assert kept.order.shape == (4, n)
    mine, wanted = flex_attention(q, k, v, kept), masked_attention(q, k, v, rule(n).mask()[None] & causal)
    assert (mine - wanted).abs().max() <= 7e-7 * wanted.abs().max()  # measured 1.8e-7
    assert torch.equal(edges_of(kept, q), rule(n).mask().sum(-1).float().expand(2, 4, n))  # told by query


def touched(kept):
    """Blocks of each head that FlexAttention computes."""
    blocks = kept.blocks
    return (blocks.kv_num_blocks + blocks.full_kv_num_blocks).sum(-1)[0].tolist()


@pytest.mark.stays
def test_split_heads_touch_the_blocks_of_their_own_parts():
    n = 8 * BLOCK
    causal = torch.ones(1, 1, n, n, dtype=torch.bool).tril()
    q = torch.randn(1, 2, n, 8)
    rules = Strided(BLOCK, "first"), Strided(BLOCK, "second")
    split = Laid(Heads(rules), 2, None, "flex").kept(causal, q, q)
    alone = [Laid(rule, 2, None, "flex").kept(causal, q, q) for rule in rules]
    assert touched(split) == [touched(one)[0] for one in alone] == [15, 8]
    assert touched(blocked(Heads(rules)(n).mask()[None] & causal)) == [15, 36]  # all of the causal triangle
    both = Heads((rules[1], rules[1]))
    assert torch.equal(Laid(both, 2, None, "flex").kept(causal, q, q).order, alone[1].order)  # one order for all
    assert Heads((rules[0], Local(3))).order(n) is None


@pytest.mark.matches
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_gives_0_to_a_query_without_a_key():
    q, k, v = torch.randn(3, 1, 2, 20, 8)
    kept = torch.rand(1, 2, 20, 20) < 0.3
    kept[:, :, 5] = False
    mine, wanted = flex_attention(q, k, v, blocked(kept)), masked_attention(q, k, v, kept)
    assert not mine[:, :, 5].any()
    torch.testing.assert_close(mine, wanted, rtol=0, atol=9e-7)  # measured 2.4e-7


@pytest.mark.matches
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 999), st.integers(1, 300), st.integers(1, 300), st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 3)]))
def test_the_block_mask_is_the_one_that_torch_evaluates_entry_by_entry(seed, queries, keys, shape):
    torch.manual_seed(seed)
    scale = torch.rand(-(-queries // 64), -(-keys // 64)).repeat_interleave(64, 0).repeat_interleave(64, 1)
    kept = torch.rand(*shape, queries, keys) < 2 * scale[:queries, :keys] - 0.5  # blocks with all, some and no entries
    mine = block_mask(kept)
    wanted = create_block_mask(lambda b, h, q, k: kept[b, h, q, k], *shape, queries, keys, device="cpu")
    for name in ("kv", "full_kv", "q", "full_q"):
        counts = [getattr(blocks, f"{name}_num_blocks") for blocks in (mine, wanted)]
        assert torch.equal(*counts)
        for row in range(counts[0].shape[-1]):  # what stands behind the count is not read
            listed = [getattr(blocks, f"{name}_indices")[..., row, :] for blocks in (mine, wanted)]
            there = torch.arange(listed[0].shape[-1]) < counts[0][..., row, None]
            assert torch.equal(*(x.masked_fill(~there, -1) for x in listed))


@pytest.mark.stays
@pytest.mark.parametrize("run", ["masked", "flex"])
def test_layers_with_one_rule_lay_it_once_for_a_mask_and_anew_when_the_mask_changes(run):
    loaded = tiny_loaded("llama")
    rule = Heads((Local(3), Strided(3), Fixed(4, 1), BlockButterfly(2, 1, first=1)))  # in the order of the text
    attend_(loaded.model, loaded.anatomy, rule, run=run)
    laid, other = (module.fixed_attention for module in loaded.anatomy.modules(loaded.model))
    assert other is laid
    query, key = torch.randn(2, 4, LENGTH, 8), torch.randn(2, 2, LENGTH, 8)
    mask = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    first = laid.kept(mask, query, key)
    assert first.mask.shape == (1, 4, LENGTH, LENGTH)  # no padding: one for the batch
    assert laid.kept(mask, query, key) is first
    assert laid.kept(mask.clone(), query, key) is not first
    mask[1, :, :, :3] = False  # the second text begins at 3
    changed = laid.kept(mask, query, key)
    assert torch.equal(changed.mask[:1], first.mask)
    assert torch.equal(changed.mask[1, :, 3:, 3:], first.mask[0, :, : LENGTH - 3, : LENGTH - 3])
    with torch.inference_mode():  # a mask made here has no version: its entries are looked at
        there = mask.clone()
        before = laid.kept(there, query, key)
        assert laid.kept(there, query, key) is before
        there[0, :, :, :2] = False
        after = laid.kept(there, query, key)
        assert after is not before
        assert not torch.equal(after.mask, before.mask)
    assert not copy.deepcopy(laid)._seen


@pytest.mark.stays
@pytest.mark.parametrize("length", [None, LENGTH])
def test_tokens_that_come_one_by_one_share_what_is_laid(length, monkeypatch):
    sizes, lay = [], Laid._lay
    monkeypatch.setattr(Laid, "_lay", lambda self, n: sizes.append(n) or lay(self, n))
    laid = Laid(Strided(3), 4, length, "masked")
    for n in range(4, LENGTH + 1):
        assert torch.equal(laid.pattern(n), Strided(3)(n).mask()[None])
    assert sizes == ([4, 5 + ROOM] if length is None else [4])
    assert laid.pattern(7).shape == (1, 7, 7)  # a new text sees the corner
    moving = Laid(BigBird(1, 1), 4, None, "masked")
    for n in (6, 7, 8):
        assert torch.equal(moving.pattern(n), BigBird(1, 1)(n).mask()[None])


@pytest.mark.stays
def test_patterns_for_a_while_leave_those_from_before():
    loaded = tiny_loaded("llama")
    attend_(loaded.model, loaded.anatomy, LAYERS)
    before = logits(loaded.model, tokens())
    with attending(loaded.model, loaded.anatomy, Local(2)):
        assert not torch.allclose(logits(loaded.model, tokens()), before)
    assert torch.equal(logits(loaded.model, tokens()), before)


@pytest.mark.matches
def test_patterns_tell_what_each_layer_sees():
    loaded = tiny_loaded("llama")
    attend_(loaded.model, loaded.anatomy, [LAYERS[0], Full()])
    first, second = patterns(loaded.model, loaded.anatomy, 10)
    assert first.shape == (4, 10, 10)
    assert second.nnz == 55
    assert torch.equal(first.mask(), LAYERS[0](10).mask().tril())


@pytest.mark.stays
def test_a_model_with_patterns_can_be_copied_trained_and_saved_as_before(tmp_path):
    loaded = tiny_loaded("llama")
    keys = set(loaded.model.state_dict())
    attend_(loaded.model, loaded.anatomy, LAYERS)
    twin = copy.deepcopy(loaded.model).requires_grad_(True)
    assert set(twin.state_dict()) == keys
    twin(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in twin.parameters())
    assert torch.equal(logits(twin, tokens()), logits(loaded.model, tokens()))


@pytest.mark.survives
def test_rules_that_do_not_fit_are_refused_and_the_model_left_alone():
    loaded = tiny_loaded("llama")
    before = logits(loaded.model, tokens())
    with pytest.raises(RecipeError, match="3 rules for 2 layers"):
        attend_(loaded.model, loaded.anatomy, [Full()] * 3)
    with pytest.raises(RecipeError, match="3 heads, the layer 4"):
        attend_(loaded.model, loaded.anatomy, Heads((Full(),) * 3))
    with pytest.raises(RuntimeError, match="stop"), attending(loaded.model, loaded.anatomy, Local(1)):
        raise RuntimeError("stop")
    assert torch.equal(logits(loaded.model, tokens()), before)
    assert not any(hasattr(m, "fixed_attention") for m in loaded.model.modules())


@pytest.mark.says
@pytest.mark.parametrize(
    ("given", "options", "said"),
    [
        (Full(), {"run": "foo"}, "run='foo'.*masked, flex"),
        (Full(), {"length": 0}, "length=0.*1 or more"),
        (5, {}, "attend by 5.*no rule.*Local"),
        (Local, {}, "attend by .*Local.*no rule"),
        ([Full(), "local"], {}, "attend by 'local'.*no rule"),
        (lambda n: torch.ones(n, n), {}, "gives a Tensor.*Pattern"),
    ],
)
def test_what_is_no_rule_and_no_way_to_run_is_named_and_the_model_left_alone(given, options, said):
    loaded = tiny_loaded("llama")
    before = loaded.model.config._attn_implementation
    with pytest.raises(RecipeError, match=f"(?s){said}"):
        attend_(loaded.model, loaded.anatomy, given, **options)
    assert loaded.model.config._attn_implementation == before
    assert not any(hasattr(m, "fixed_attention") for m in loaded.model.modules())


@pytest.mark.stays
def test_patterns_come_off_again_also_from_a_copy():
    loaded = tiny_loaded("gemma2")  # runs by eager, for its softcap
    dense = logits(loaded.model, tokens())
    attend_(loaded.model, loaded.anatomy, Local(2))
    attend_(loaded.model, loaded.anatomy, LAYERS)
    assert not torch.equal(logits(loaded.model, tokens()), dense)
    with attending(loaded.model, loaded.anatomy, Local(1)):
        twin = copy.deepcopy(loaded.model)
    for model in (twin, loaded.model):
        assert torch.equal(logits(detach_patterns_(model, loaded.anatomy), tokens()), dense)
        assert model.config._attn_implementation == "eager"
        assert not any(hasattr(m, "fixed_attention") for m in model.modules())
        with pytest.raises(ModelError, match="none are attached"):
            detach_patterns_(model, loaded.anatomy)


@pytest.mark.survives
def test_gates_and_patterns_do_not_replace_each_other():
    loaded = tiny_loaded("llama")
    attend_(loaded.model, loaded.anatomy, Local(2))
    before = logits(loaded.model, tokens())
    with pytest.raises(ModelError, match=r"attach gates.*detach_patterns_"):
        attach_(loaded.model, loaded.anatomy)
    with (
        pytest.raises(ModelError, match=r"run attention by slow-fixed.*no part of the weights"),
        attention_by(loaded.model, "slow-fixed"),
    ):
        pass
    assert torch.equal(logits(loaded.model, tokens()), before)
    gated = tiny_loaded("llama")
    attach_(gated.model, gated.anatomy, bias_start=-0.1)
    before = logits(gated.model, tokens())
    with pytest.raises(ModelError, match="its gates would no longer run"):
        attend_(gated.model, gated.anatomy, Local(2))
    assert torch.equal(logits(gated.model, tokens()), before)
