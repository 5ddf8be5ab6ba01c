"""Masks through training, LoRA and storage; a lost zero is an error."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewedges.errors import ModelError, StoreError
from fewedges.sparsify.masks import Masks, held, merge_masked, pack_bits, refuse_dense_merge_, unpack_bits
from fewedges.sparsify.matrices import matrices_of
from fewedges.sparsify.pattern import NM, Blocks, Pattern
from fewedges.sparsify.pruning import prune_
from fewedges.weight_recipes import Prune
from tiny import NoiseBatches, tiny_loaded

OPTIMIZERS = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9, weight_decay=0.1),
}


def pruned(name="llama"):
    return prune_(tiny_loaded(name), Prune(method="magnitude", density=0.4))


def with_adapters(model, **options):
    from peft import LoraConfig, get_peft_model

    flipped = model.config.model_type == "gpt2"
    settings = {"target_modules": "all-linear", "fan_in_fan_out": flipped, "init_lora_weights": False, **options}
    return get_peft_model(model, LoraConfig(r=4, **settings))


def train(model, optimizer, steps=3):
    for step in range(steps):
        tokens = NoiseBatches().at(step, 4).tokens
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.stays
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_zeros_stay_through_training_and_the_rest_moves(name, kind):
    result = pruned(name)
    model = result.model.requires_grad_(True)
    before = {path: m.weight.clone() for path, m in matrices_of(result.loaded).items()}
    optimizer = OPTIMIZERS[kind](model.parameters())
    with held(model, result.masks, optimizer) as guard:
        train(model, optimizer)
        for path, matrix in guard.matrices.items():
            gone = ~result.masks.patterns[path].mask()
            assert all((matrix.oriented(x)[gone] == 0).all() for x in guard.state_of(matrix))
            assert guard.state_of(matrix)
            moved = matrix.weight != before[path]
            assert moved[~gone].float().mean() > 0.9
    result.check()
    assert model.state_dict().keys() == tiny_loaded(name).model.state_dict().keys()
    hooks = [h for p in model.parameters() for h in (p._post_accumulate_grad_hooks or {})]
    assert not hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.stays
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_dense_model_in_training_is_masked_on_entry_with_its_momenta(kind):
    masks = pruned().masks
    model = tiny_loaded().model.requires_grad_(True)
    optimizer = OPTIMIZERS[kind](model.parameters())
    train(model, optimizer)
    with held(model, masks, optimizer) as guard:
        for path, matrix in guard.matrices.items():
            gone = ~masks.patterns[path].mask()
            assert (matrix.weight[gone] == 0).all()
            assert guard.state_of(matrix)
            assert all((x[gone] == 0).all() and (x[~gone] != 0).any() for x in guard.state_of(matrix))


@pytest.mark.stays
def test_gradients_of_masked_entries_are_gone_before_clipping_sees_them():
    result = pruned()
    model = result.model.requires_grad_(True)
    with held(model, result.masks, torch.optim.SGD(model.parameters(), lr=0.1)) as guard:
        for dense in (False, True):
            guard.dense_gradients = dense
            tokens = NoiseBatches().at(0, 2).tokens
            model(input_ids=tokens, labels=tokens).loss.backward()
            for path, matrix in guard.matrices.items():
                slope = matrix.oriented(matrix.parameter.grad)[~result.masks.patterns[path].mask()]
                assert bool((slope != 0).any()) == dense
            model.zero_grad()


@pytest.mark.survives
def test_training_without_the_guard_loses_zeros_and_that_is_an_error():
    result = pruned()
    model = result.model.requires_grad_(True)
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), steps=1)
    with pytest.raises(ModelError, match=r"zeros of 14 matrices are lost.*masks.held"):
        result.check("training")


@pytest.mark.survives
def test_a_zero_lost_inside_the_guard_is_an_error_on_the_way_out():
    result = pruned()
    matrix = next(iter(result.masks.matrices(result.model).values()))
    with pytest.raises(ModelError, match="after training"), held(result.model, result.masks):
        matrix.weight.fill_(1.0)
    assert result.masks.lost(result.model)


@pytest.mark.survives
def test_not_a_number_is_no_zero_and_a_foreign_model_is_refused():
    result = pruned()
    path, pattern = next(iter(result.masks.patterns.items()))
    where = (~pattern.mask()).nonzero()[0]
    result.masks.matrices(result.model)[path].weight[tuple(where)] = torch.nan
    assert result.masks.lost(result.model) == {path: 1}
    with pytest.raises(ModelError, match="the model it was made for"):
        result.masks.check(tiny_loaded("gpt2").model)
    with pytest.raises(ModelError, match="the mask is"):
        Masks({path: Pattern(torch.ones(3, 3, dtype=torch.bool))}).check(result.model)


@pytest.mark.stays
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_lora_merges_into_the_mask_or_not_at_all(name):
    result = pruned(name)
    adapted = with_adapters(result.model)
    refuse_dense_merge_(adapted)
    for merge in (adapted.merge_and_unload, adapted.merge_adapter, adapted.base_model.merge_and_unload):
        with pytest.raises(ModelError, match="has no zeros"):
            merge()
    path = next(iter(result.masks.patterns))
    layer = adapted.base_model.model.get_submodule(path)
    weight = layer.base_layer.weight.detach().clone()
    delta = layer.get_delta_weight("default").detach()
    mask = result.masks.patterns[path].mask()
    merged = merge_masked(adapted, result.masks)
    stored = mask.T if name == "gpt2" else mask
    torch.testing.assert_close(merged.get_submodule(path).weight, (weight + delta) * stored, rtol=0, atol=1e-6)
    assert (delta * ~stored).abs().max() > 0.01
    result.masks.check(merged)


@pytest.mark.survives
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_that_runs_with_adapters_refuses_by_itself_to_merge_them_densely(name):
    result = pruned(name)
    adapted = with_adapters(result.model)
    adapted(input_ids=NoiseBatches().at(0, 2).tokens)
    for merge in (adapted.merge_and_unload, adapted.merge_adapter, adapted.base_model.merge_and_unload):
        with pytest.raises(ModelError, match=r"has no zeros.*sparsify.masks.merge_masked\(adapted, pruned.masks\)"):
            merge()
    merged = merge_masked(adapted, result.masks)
    merged(NoiseBatches().at(0, 2).tokens)
    result.check()
    assert merged is result.model


@pytest.mark.survives
@pytest.mark.parametrize("how", ["merge_and_unload", "merge_adapter"])
@pytest.mark.parametrize("copied", [False, True])
def test_a_merge_that_nobody_saw_is_noticed_before_the_next_forward_pass_and_save(how, copied, tmp_path):
    result = pruned()
    model = copy.deepcopy(result.model) if copied else result.model
    adapted = with_adapters(model, target_modules=["up_proj"], layers_to_transform=[1])
    getattr(adapted, how)()
    with pytest.raises(ModelError, match=r"zeros of 1 matrices are lost.*layers.1.mlp.up_proj"):
        model(NoiseBatches().at(0, 2).tokens)
    with pytest.raises(ModelError, match="zeros of 1 matrices are lost"):
        model.save_pretrained(tmp_path)
    if copied:
        result.check()
        result.model(NoiseBatches().at(0, 2).tokens)


@pytest.mark.stays
def test_masks_that_move_in_training_are_the_ones_watched_afterwards():
    result = pruned()
    model = result.model.requires_grad_(True)
    tokens = NoiseBatches().at(0, 2).tokens
    with held(model, result.masks) as guard:
        for path, matrix in guard.matrices.items():
            guard.kept[path] = ~guard.kept[path]
            matrix.weight.copy_(guard.kept[path])
        with torch.no_grad():
            model(tokens)  # as an evaluation in the middle does
        model.state_dict()
    model.requires_grad_(False)
    model(tokens)
    matrix.weight.fill_(1.0)
    with pytest.raises(ModelError, match="zeros of 1 matrices"):
        model(tokens)


@pytest.mark.stays
def test_masks_come_back_with_their_kinds_and_without_kinds_as_plain_ones():
    mask = torch.tensor([True, False, False, True]).repeat(8, 3)
    masks = Masks({"a": NM(mask, 2, 4), "b": Blocks(torch.eye(3, dtype=torch.bool), 4, 2), "c": Pattern(mask)})
    shapes = {name: pattern.shape for name, pattern in masks.patterns.items()}
    again = Masks.from_tensors(masks.tensors(), shapes, masks.kinds())
    assert again.kinds() == {"a": "2:4", "b": "4x2", "c": "unstructured"}
    old = Masks.from_tensors(masks.tensors(), shapes)
    assert set(old.kinds().values()) == {"unstructured"}
    for name, pattern in masks.patterns.items():
        assert torch.equal(again.patterns[name].mask(), pattern.mask())
        assert torch.equal(old.patterns[name].mask(), pattern.mask())
        assert again.patterns[name].bytes() == pattern.bytes()
    for wrong in ("1:4", "2x2", "dense", "5:7"):
        with pytest.raises(StoreError, match="load the mask of a"):
            Masks.from_tensors(masks.tensors(), shapes, {"a": wrong})


@pytest.mark.stays
@settings(max_examples=50, deadline=None)
@given(st.integers(1, 7), st.integers(1, 19), st.integers(0, 999))
def test_bits_come_back(rows, columns, seed):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_bits(mask)
    assert packed.numel() == -(-rows * columns // 8)
    assert torch.equal(unpack_bits(packed, (rows, columns)), mask)


@pytest.mark.survives
def test_bits_of_another_size_are_refused():
    with pytest.raises(StoreError, match="2 bytes"):
        unpack_bits(torch.zeros(2, dtype=torch.uint8), (3, 9))


@pytest.mark.stays
def test_a_shuffled_mask_has_the_same_densities_elsewhere():
    masks = pruned().masks
    other = masks.shuffled(seed=1)
    for path, pattern in masks.patterns.items():
        assert other.patterns[path].nnz == pattern.nnz
        assert not torch.equal(other.patterns[path].mask(), pattern.mask())
    assert torch.equal(masks.shuffled(1).patterns[path].mask(), other.patterns[path].mask())
