"""SLIDE: a wide layer that computes, learns, moves and saves its active neurons alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import slow_tables
from safetensors.torch import load_file, save_file

from fewedges.errors import DataError, RecipeError
from fewedges.sparsify.slide import RowAdam, SlideLinear
from fewedges.sparsify.slide_hash import Functions, Hashing, Tables


def layer_and_inputs(seed=0, **options):
    torch.manual_seed(seed)
    layer = SlideLinear(12, 60, Hashing(codes=3, tables=4), seed=seed, **options)
    return layer, torch.randn(7, 12), torch.randint(-1, 60, (7, 3))


@pytest.mark.matches
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.integers(0, 2), st.sampled_from([0, 1, 20, 60]), st.booleans())
def test_active_neurons_are_found_often_enough_or_labels_or_fill_up(seed, above, least, labelled):
    layer, x, labels = layer_and_inputs(seed, above=above, least=least)
    row, neuron = layer.active(x, labels if labelled else None)
    tables, keys = slow_tables(layer.functions.keys(layer.weight), 128), layer.functions.keys(x)
    for i in range(7):
        mine = neuron[row == i].tolist()
        votes = [n for table, key in zip(tables, keys[i].tolist(), strict=True) for n in table.get(key, [])]
        sure = {n for n in votes if votes.count(n) > above}
        sure |= {int(n) for n in labels[i] if n >= 0} if labelled else set()
        assert mine == sorted(set(mine))
        assert sure <= set(mine)
        assert len(mine) == max(len(sure), least)


@pytest.mark.stays
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.integers(0, 1), st.sampled_from([1, 3, 8, 60]))
def test_of_the_found_those_found_most_often_are_kept(seed, above, most):
    layer, x, _ = layer_and_inputs(seed, above=above, most=most)
    row, neuron = layer.active(x)
    vector, found, times = (part.tolist() for part in layer.tables.find(layer.functions.keys(x)))
    for i in range(7):
        count = {n: t for v, n, t in zip(vector, found, times, strict=True) if v == i and t > above}
        mine = neuron[row == i].tolist()
        assert sorted((count[n] for n in mine), reverse=True) == sorted(count.values(), reverse=True)[:most]
        assert mine == sorted(set(mine))


@pytest.mark.stays
def test_of_equally_often_found_ones_each_is_kept_equally_often():
    torch.manual_seed(0)
    layer = SlideLinear(12, 60, Hashing(codes=1, tables=1), most=5)
    x = torch.randn(1, 12)
    found = layer.tables.find(layer.functions.keys(x))[1]
    kept = torch.bincount(layer.active(x.expand(2000, 12))[1], minlength=60)
    share = kept[found] / 2000 * len(found) / 5
    assert kept.sum() == 10_000 == kept[found].sum()
    assert float((share - 1).abs().max()) < 0.4  # measured .12; the first five alone would be 6.8


@pytest.mark.stays
@pytest.mark.parametrize("least", [5, 50])
def test_what_fills_up_is_drawn_evenly(least):
    """5 are drawn and drawn again, of 50 of 60 the places in line are."""
    torch.manual_seed(0)
    layer = SlideLinear(12, 60, Hashing(codes=40, tables=1), least=least)
    kept = torch.bincount(layer.active(torch.randn(4000, 12))[1], minlength=60) / 4000
    assert float((kept - least / 60).abs().max()) < 0.03  # measured .015; a standard deviation is .004 to .006


@pytest.mark.matches
def test_logits_loss_and_gradients_are_those_of_a_softmax_over_the_active():
    layer, x, labels = layer_and_inputs(above=0, least=10)
    labels[0] = torch.tensor([5, -1, 9])
    x.requires_grad_()
    active = layer(x, labels)
    mask, every = active.pattern().mask(), layer.all_logits(x)
    torch.testing.assert_close(active.logit, every[mask], rtol=0, atol=1e-6)  # measured 2.7e-7
    logs = torch.log_softmax(every.masked_fill(~mask, -torch.inf), -1)
    wanted = -sum(
        logs[i, [n for n in line if n >= 0]].mean() for i, line in enumerate(labels.tolist()) if max(line) >= 0
    )
    loss = active.loss(labels)
    assert loss.item() == pytest.approx(float(wanted.detach()) / 7, abs=1.9e-6)  # measured 4.8e-7
    loss.backward()
    leaves = (layer.weight, layer.bias, x)
    for mine, slow in zip((p.grad for p in leaves), torch.autograd.grad(wanted / 7, leaves), strict=True):
        torch.testing.assert_close(mine.to_dense(), slow, rtol=0, atol=1.3e-7)  # measured 3.4e-8
    assert layer.weight.grad.is_sparse
    assert set(layer.weight.grad.coalesce().indices()[0].tolist()) == set(active.neuron.tolist())


@pytest.mark.stays
def test_only_active_neurons_move_and_tables_follow_on_time():
    layer, x, labels = layer_and_inputs(refill=10, redraw=30)
    optimizer, before = torch.optim.SparseAdam(layer.parameters(), 0.1), layer.weight.detach().clone()
    active = layer(x, labels)
    active.loss(labels).backward()
    optimizer.step()
    moved = (layer.weight != before).any(-1).nonzero()[:, 0]
    assert 0 < len(moved) < 60
    assert set(moved.tolist()) <= set(active.neuron.tolist())
    old = layer.functions
    assert [layer.seen_(7) for _ in range(6)] == [False, True, True, False, True, True]  # 14, 21, 35 and 42
    assert layer.seed == 1
    assert not torch.equal(layer.functions.projection, old.projection)
    assert torch.equal(layer.tables.key, Tables.of(layer.functions.keys(layer.weight), 128).key)


@pytest.mark.matches
@pytest.mark.parametrize("width", [1, 12])
def test_rows_move_as_by_sparse_adam(width):
    torch.manual_seed(0)
    mine = torch.nn.Parameter(torch.randn(3000, width))
    slow = torch.nn.Parameter(mine.detach().clone())
    optimizers = RowAdam([mine], 0.05, eps=1e-4), torch.optim.SparseAdam([slow], 0.05, eps=1e-4)
    for step in range(4):
        rows = torch.randint(0, 3000, (1, 20_000)) if step % 2 else torch.arange(0, 3000, 2)[None]  # twice, or in order
        for weight, optimizer in zip((mine, slow), optimizers, strict=True):
            value = torch.randn(rows.shape[1], width, generator=torch.Generator().manual_seed(step))
            with torch.sparse.check_sparse_tensor_invariants():  # said aloud: torch 2.11 warns where nobody did
                weight.grad = torch.sparse_coo_tensor(rows, value, weight.shape)
                optimizer.step()
    torch.testing.assert_close(mine, slow, rtol=0, atol=9e-7)  # measured 2.4e-7


def learning(seed, hashing=None, **options):
    """A layer that draws ties and fillers, and fills its tables every third step, every seventh by new functions."""
    torch.manual_seed(seed)
    rules = {"least": 9, "most": 6, "refill": 21, "redraw": 49, **options}
    layer = SlideLinear(12, 60, hashing or Hashing(codes=3, tables=4), **rules, seed=seed)
    return layer, RowAdam(layer.parameters(), 0.1)


def go_on(layer, optimizer, steps):
    """Train by the batches of these steps: what was active in each, and the tables after it."""
    seen = []
    for step in steps:
        g = torch.Generator().manual_seed(step)
        x, labels = torch.randn(7, 12, generator=g), torch.randint(-1, 60, (7, 3), generator=g)
        optimizer.zero_grad()
        active = layer(x, labels)
        active.loss(labels).backward()
        optimizer.step()
        layer.seen_(7)
        seen.append([active.row, active.neuron, active.logit.detach(), layer.tables.key, layer.tables.neuron])
    return seen


@pytest.mark.reproduces
@pytest.mark.parametrize("stop", [2, 8, 11])  # before a refill, after one redraw, and with older tables than weights
def test_a_layer_saved_and_loaded_goes_on_as_if_it_had_not_been(stop, tmp_path):
    layer, optimizer = learning(3)
    go_on(layer, optimizer, range(stop))
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer")
    twin, other = learning(4)
    twin.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    other.load_state_dict(torch.load(tmp_path / "optimizer", weights_only=True))
    wanted, mine = (go_on(*pair, range(stop, 16)) for pair in ((layer, optimizer), (twin, other)))
    for step, (theirs, ours) in enumerate(zip(wanted, mine, strict=True)):
        assert all(map(torch.equal, theirs, ours)), step
    assert torch.equal(twin.weight, layer.weight)
    assert (twin.seed, twin.inputs_seen) == (layer.seed, layer.inputs_seen) == (5, 112)


@pytest.mark.stays
def test_tables_move_with_the_layer_and_are_not_filled_again_by_it():
    layer, optimizer = learning(3)
    go_on(layer, optimizer, range(2))
    before, newer = layer.tables, Tables.of(layer.functions.keys(layer.weight), 128)
    assert not torch.equal(before.neuron, newer.neuron)  # weights have moved since
    layer.double()
    assert torch.equal(layer.tables.key, before.key)
    assert torch.equal(layer.tables.neuron, before.neuron)
    assert layer.keys.dtype == torch.uint8  # as small as 8 keys allow
    layer.to("meta")
    assert {part.device.type for part in (layer.tables.key, layer.functions.projection)} == {"meta"}


@pytest.mark.stays
def test_weights_alone_fill_new_tables():
    layer, optimizer = learning(3)
    go_on(layer, optimizer, range(8))
    twin, _ = learning(3)
    alone = {name: value for name, value in layer.state_dict().items() if name in ("weight", "bias")}
    twin.load_state_dict(alone, strict=False)
    assert (twin.seed, twin.inputs_seen) == (3, 0)
    assert torch.equal(twin.tables.neuron, Tables.of(twin.functions.keys(layer.weight), 128).neuron)


@pytest.mark.survives
@pytest.mark.parametrize("family", [{"codes": 2}, {"tables": 5}, {"kind": "dwta"}, {"kind": "wta", "bin": 2}])
def test_tables_of_other_functions_are_not_loaded(family):
    layer, _ = learning(0)
    twin, _ = learning(0, Hashing(**{"codes": 3, "tables": 4, **family}))
    before = twin.weight.detach().clone()
    with pytest.raises(RecipeError, match=r"there, .* here\. Try: the same Hashing"):
        twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.weight, before)


@pytest.mark.survives
@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ([[60], [5]], "label 60. Try: 0 to 59"),  # would be neuron 0 of the next input
        ([[5], [60]], "label 60"),
        ([[5], [-2]], "label -2"),
        ([[5.0], [6.0]], r"torch.float32 of shape \(2, 1\). Try: integers"),
        ([[True], [False]], "torch.bool"),
        ([5, 6], r"torch.int64 of shape \(2,\)"),
        ([[5]], r"shape \(1, 1\). Try: integers of shape \(2, k\)"),
    ],
)
def test_labels_that_are_no_neurons_are_refused(labels, found, as_users_call):
    layer, x, _ = layer_and_inputs(least=60)  # all active: nothing else would refuse a label
    labels, active = torch.tensor(labels), layer(x[:2])
    for use in (lambda: layer(x[:2], labels), lambda: active.loss(labels)):
        with pytest.raises(DataError, match=f"labels of 2 inputs among 60 neurons: .*{found}"):
            use()
    assert active.loss(torch.tensor([[59], [-1]], dtype=torch.int8)).isfinite()


def extreme_classification(classes=2000, words=600, seed=0):
    """Bags of words: every class has 8 words of its own liking; a document draws 6 of them and 4 others."""
    generator = torch.Generator().manual_seed(seed)
    liked = torch.rand(classes, words, generator=generator).argsort(-1)[:, :8]

    def draw(count, seed):
        g = torch.Generator().manual_seed(seed)
        label = torch.randint(0, classes, (count,), generator=g)
        own = liked[label].gather(1, torch.rand(count, 8, generator=g).argsort(-1)[:, :6])
        return torch.cat([own, torch.randint(0, words, (count, 4), generator=g)], 1), label

    return draw


def trained(hashing, steps, classes=500, batch=64, **options):
    """A network words -> 32 -> classes; the wide layer, hidden vectors of new documents and their labels."""
    torch.manual_seed(0)
    draw = extreme_classification(classes)
    bag, layer = torch.nn.EmbeddingBag(600, 32, mode="sum"), SlideLinear(32, classes, hashing, **options)
    sparse, dense = torch.optim.SparseAdam(layer.parameters(), 0.01), torch.optim.Adam(bag.parameters(), 0.01)
    for step in range(steps):
        words, label = draw(batch, 1000 + step)
        sparse.zero_grad()
        dense.zero_grad()
        layer(torch.relu(bag(words)), label[:, None]).loss(label[:, None]).backward()
        sparse.step()
        dense.step()
        layer.seen_(batch)
    words, label = draw(1000, 1)
    with torch.no_grad():
        return layer, torch.relu(bag(words)), label


@pytest.mark.stays
def test_a_wide_layer_learns_from_few_neurons_better_than_from_random_ones():
    right, recall, share = {}, {}, {}
    nothing_found, often = Hashing(codes=40, tables=1), {"refill": 640, "redraw": 6400}
    for name, hashing, options in [
        ("hashed", Hashing(codes=8, tables=16), often),
        ("random", nothing_found, {"least": 8}),
    ]:
        layer, hidden, label = trained(hashing, 200, **options)
        best, found = layer.all_logits(hidden).argmax(-1), layer(hidden).pattern()
        right[name] = float((best == label).float().mean())
        recall[name] = float(found.mask()[torch.arange(1000), best].float().mean())
        share[name] = found.density
    assert max(share.values()) < 0.02  # measured .015, and .016 at random
    assert right["hashed"] > right["random"] + 0.03 > 0.2  # measured .39 and .34; the whole layer gets .71
    assert recall["hashed"] > 4 * share["hashed"]  # the largest logit of all is among those computed: measured .12


@pytest.mark.survives
@pytest.mark.parametrize(
    "make",
    [
        lambda: Hashing(kind="minhash"),
        lambda: Hashing(codes=0),
        lambda: Hashing(kind="wta", codes=30),
        lambda: Functions(Hashing(kind="wta", bin=8), 4),
        lambda: SlideLinear(4, 8, least=9),
        lambda: SlideLinear(4, 8, refill=0),
        lambda: SlideLinear(4, 8, most=0),
        lambda: SlideLinear(4, 8).bfloat16()(torch.randn(1, 4)),
        lambda: SlideLinear(4, 8, Hashing(codes=60, tables=1))(torch.randn(1, 4)).loss(torch.tensor([[3]])),
    ],
)
def test_what_makes_no_sense_is_refused(make):
    with pytest.raises(RecipeError, match="Try: "):
        make()
