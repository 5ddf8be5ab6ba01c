"""Every rule against a loop over (query, key) written from its paper, published covers, and transformers' BigBird."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewedges.errors import RecipeError
from fewedges.sparsify.attending import masked_attention
from fewedges.sparsify.fixed_attention import (
    BigBird,
    BlockButterfly,
    Fixed,
    Full,
    Heads,
    Local,
    Longformer,
    Strided,
    Union,
)


def loop(n, sees):
    return np.array([[bool(sees(i, j)) for j in range(n)] for i in range(n)])


def local(i, j, w):
    return j in range(i - w + 1, i + 1)


def strided(i, j, l, part):
    first = j in range(max(0, i - l), i + 1)
    second = j <= i and (i - j) % l == 0
    return {"first": first, "second": second, "both": first or second}[part]


def fixed(i, j, l, c, v, part):
    first = j <= i and j // l == i // l
    second = j <= i and j % l in range(l - c * (v + 1), l - c * v)
    return {"first": first, "second": second, "both": first or second}[part]


def longformer(i, j, w, d, tokens):
    return i in tokens or j in tokens or j in [i + d * k for k in range(-w // 2, w // 2 + 1)]


def bigbird_without_randoms(i, j, b, n):
    p, q, last = i // b, j // b, (n - 1) // b
    return p in (0, last) or q in (0, last) or q in (p - 1, p, p + 1)


def butterfly(i, j, b, k, g):
    p, q = i // b, j // b
    return i < g or j < g or p == q or p ^ q in [2**t for t in range(k)]


PARTS = ["both", "first", "second"]
CASES = [(Local(w), lambda i, j, n, w=w: local(i, j, w)) for w in (1, 3, 40)]
CASES += [(Strided(l, p), lambda i, j, n, l=l, p=p: strided(i, j, l, p)) for l in (1, 4, 7) for p in PARTS]
CASES += [
    (Fixed(l, c, v, p), lambda i, j, n, l=l, c=c, v=v, p=p: fixed(i, j, l, c, v, p))
    for l, c, v in [(8, 2, 0), (8, 2, 1), (8, 2, 3), (5, 5, 0), (6, 1, 2)]
    for p in PARTS
]
CASES += [
    (Longformer(w, d, t), lambda i, j, n, w=w, d=d, t=t: longformer(i, j, w, d, t))
    for w, d, t in [(2, 1, ()), (4, 1, (0,)), (4, 3, (0, 7)), (6, 2, (5,))]
]
CASES += [(BigBird(b, 0), lambda i, j, n, b=b: bigbird_without_randoms(i, j, b, n)) for b in (1, 2, 4)]
CASES += [
    (BlockButterfly(b, k, g), lambda i, j, n, b=b, k=k, g=g: butterfly(i, j, b, 9 if k is None else k, g))
    for b, k, g in [(1, None, 0), (2, 2, 0), (3, 1, 2), (4, 0, 5)]
]
CASES += [(Full(), lambda i, j, n: True)]
CASES += [(Union((Local(3), Strided(5, "second"))), lambda i, j, n: local(i, j, 3) or strided(i, j, 5, "second"))]


@pytest.mark.matches
@pytest.mark.parametrize(("rule", "sees"), CASES, ids=[str(rule) for rule, _ in CASES])
@pytest.mark.parametrize("n", [1, 12, 23])
def test_a_rule_is_its_papers_formula(rule, sees, n):
    assert (rule(n).mask().numpy() == loop(n, lambda i, j: sees(i, j, n))).all()


@pytest.mark.stays
@settings(max_examples=30, deadline=None)
@given(st.sampled_from([rule for rule, _ in CASES if not isinstance(rule, BigBird)]), st.integers(1, 30), st.data())
def test_a_shorter_text_sees_the_corner_of_a_longer_one(rule, n, data):
    assert not rule.moves
    m = data.draw(st.integers(1, n))
    assert torch.equal(rule(n).mask()[:m, :m], rule(m).mask())


TABLE = [
    (Local(256), 1, (0.064, 0.068, 0.076, 0.091)),
    (Strided(128, "second"), 0, (0.064, 0.129, 0.258, 0.516)),
    (Strided(128), 0, (0.091, 0.152, 0.273, 0.516)),
    (Fixed(128, 32), 0, (0.139, 0.141, 0.266, 0.516)),
    (BlockButterfly(64), 0, (0.109, 0.109, 0.109, 0.188)),
]
"""facts/methods.md section 2: covers of 16, 32, 64, 128 at n = 4096."""


@pytest.mark.matches
@pytest.mark.parametrize(("rule", "causal", "covers"), TABLE, ids=[str(row[0]) for row in TABLE])
def test_covers_at_4096_tokens_are_those_gathered(rule, causal, covers):
    pattern = rule(4096)
    assert [round(pattern.cover(b), 3) for b in (16, 32, 64, 128)] == pytest.approx(covers, abs=1e-3)


@pytest.mark.matches
def test_the_transpose_makes_the_second_part_block_local():
    rule = Strided(128, "second")
    order, pattern = rule.order(4096), rule(4096)
    moved = pattern.permute(order, order)
    assert [round(moved.cover(b), 4) for b in (16, 32, 64, 128)] == [0.0059, 0.0078, 0.0156, 0.0312]
    assert moved.nnz == pattern.nnz
    assert order.view(128, 32)[:3, :3].tolist() == [[0, 128, 256], [1, 129, 257], [2, 130, 258]]
    assert Strided(128).order(4096) is None
    assert torch.equal(Strided(5, "second").order(12), torch.tensor([0, 5, 10, 1, 6, 11, 2, 7, 3, 8, 4, 9]))


# -- BigBird -----------------------------------------------------------------------------------------------------


@pytest.mark.stays
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 14), st.integers(0, 4), st.integers(1, 3), st.integers(0, 99))
def test_random_blocks_are_new_and_as_many_as_asked(blocks, randoms, heads, seed):
    rule = BigBird(2, randoms, heads, seed)
    fixed_part = rule.blocks_of(blocks, torch.zeros(1, blocks, blocks, dtype=torch.bool))
    drawn = rule.draw(blocks)
    assert not (drawn & fixed_part).any()
    free = (~fixed_part).sum(-1).expand(heads, -1)
    assert torch.equal(drawn.sum(-1), free.clamp(max=randoms))
    assert torch.equal(drawn, BigBird(2, randoms, heads, seed).draw(blocks))
    mask = rule(2 * blocks - 1).mask()
    assert mask.shape[-2:] == (2 * blocks - 1,) * 2
    assert mask.dim() == (3 if heads > 1 else 2)


@pytest.mark.stays
def test_every_free_block_is_drawn_about_as_often():
    rule = BigBird(1, 3, heads=2000)
    counts = rule.draw(12).float().mean(0)
    free = rule.blocks_of(12, torch.zeros(1, 12, 12, dtype=torch.bool))[0].logical_not()
    share = 3 / free.sum(-1, keepdim=True)
    assert ((counts - share).abs() * free).nan_to_num().max() < 0.05  # measured .028


@pytest.mark.matches
@pytest.mark.parametrize("seed", [0, 1])
def test_transformers_bigbird_is_this_masked_softmax_with_its_own_random_blocks(seed):
    """In training mode, where it is right; in eval it counts block 0 once more for every random block."""
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

    block, blocks, randoms, heads = 4, 13, 2, 3
    config = BigBirdConfig(
        hidden_size=24, num_attention_heads=heads, num_random_blocks=randoms, block_size=block, vocab_size=10
    )
    torch.manual_seed(0)
    theirs = BigBirdBlockSparseAttention(config, seed=seed).train()
    n = block * blocks
    x = 3 * torch.randn(2, n, 24)
    blocked, band, rows, columns = BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(2, n), block)
    masks = {"band_mask": band, "from_mask": rows, "to_mask": columns}
    with torch.no_grad():
        wanted = theirs(x, from_blocked_mask=blocked, to_blocked_mask=blocked, **masks)[0]
    np.random.seed(seed)
    plan = theirs._get_rand_attn_plan(n, block, randoms)
    chosen = theirs._bigbird_block_rand_mask_with_head(n, n, block, block, heads, *plan)  # (H)(N - 2, r)
    drawn = torch.zeros(heads, blocks, blocks, dtype=torch.bool)
    drawn[:, 1:-1] = drawn[:, 1:-1].scatter(-1, torch.tensor(np.stack(chosen)).long(), True)
    rule = BigBird(block, randoms, heads)
    kept = rule.blocks_of(blocks, drawn).repeat_interleave(block, -1).repeat_interleave(block, -2)
    assert (drawn & ~rule.blocks_of(blocks, torch.zeros_like(drawn))).sum() == drawn.sum()
    assert kept[:, 1:-1].sum() > rule.blocks_of(blocks, torch.zeros_like(drawn)).sum()
    q, k, v = (p(x).unflatten(-1, (heads, -1)).transpose(1, 2) for p in (theirs.query, theirs.key, theirs.value))
    with torch.no_grad():
        mine = masked_attention(q, k, v, kept[None])
    torch.testing.assert_close(
        mine.transpose(1, 2).flatten(2), wanted, rtol=0, atol=6e-6
    )  # measured 1.9e-6, at values up to 7


# -- joining -----------------------------------------------------------------------------------------------------


@pytest.mark.matches
def test_heads_get_rules_of_their_own():
    mask = Heads((Local(2), Full(), Fixed(4, 1)))(9).mask()
    assert torch.equal(mask, torch.stack([Local(2)(9).mask(), Full()(9).mask(), Fixed(4, 1)(9).mask()]))
    wide = Union((BigBird(2, 1, heads=3), Local(2)))(12).mask()
    assert torch.equal(wide, BigBird(2, 1, heads=3)(12).mask() | Local(2)(12).mask())


@pytest.mark.survives
@pytest.mark.parametrize(
    "make",
    [
        lambda: Local(0),
        lambda: Local(2.5),
        lambda: Strided(0),
        lambda: Strided(4, "third"),
        lambda: Fixed(8, 9),
        lambda: Fixed(8, 4, vertical=2),
        lambda: Fixed(8, 4, vertical=-1),
        lambda: BigBird(0),
        lambda: BigBird(4, -1),
        lambda: Longformer(3),
        lambda: Longformer(4, tokens=(-1,)),
        lambda: BlockButterfly(0),
        lambda: Union(()),
        lambda: Heads((3,)),
        lambda: Heads((BigBird(2, 1, heads=2), Full()))(8),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(make):
    with pytest.raises(RecipeError, match="Try: "):
        make()
