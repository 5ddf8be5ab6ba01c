"""A block-pruned model run by its blocks: the same numbers, fewer of them."""

import copy

import pytest
import torch

import fewedges as fe
from fewedges.errors import ModelError, RecipeError
from fewedges.sparsify.blocked import BlockLinear, by_blocks, kernel_for
from fewedges.sparsify.masks import WATCH
from fewedges.sparsify.pruned import begin
from fewedges.sparsify.pruning import prune_
from fewedges.weight_recipes import Prune
from tiny import tiny_loaded

KEEP = {"gpt2": (), "opt": ("fc1", "fc2")}
"""Matrices that 32 x 32 does not divide."""


def pruned(name="gpt2", structure="32x32", density=0.5):
    recipe = Prune(method="magnitude", structure=structure, density=density, keep_dense=KEEP[name])
    return prune_(begin(tiny_loaded(name)), recipe, None)


def tokens(seed=0):
    return torch.randint(0, 32, (2, 7), generator=torch.Generator().manual_seed(seed))


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, BlockLinear)}


@pytest.mark.matches
@pytest.mark.parametrize("kernel", ["reference", "batched"])
@pytest.mark.parametrize("name", KEEP)
def test_the_copy_gives_the_logits_and_gradients_of_the_masked_model(name, kernel):
    result = pruned(name)
    model = by_blocks(result, kernel=kernel)
    assert layers(model).keys() == result.masks.patterns.keys()
    results = []
    for one in (result.model.requires_grad_(True), model.requires_grad_(True)):
        out = one(input_ids=tokens(), labels=tokens())
        out.loss.backward()
        results.append(out.logits.detach())
    scale = results[0].abs().max()
    assert (results[0] - results[1]).abs().max() <= 1e-6 * scale  # measured 2.7e-7 batched, 0 by the reference
    for path, layer in layers(model).items():
        pattern, module = result.masks.patterns[path], result.model.get_submodule(path)
        whole = module.weight.grad if isinstance(module, torch.nn.Linear) else module.weight.grad.T
        assert layer.index.blocks * 32 * 32 == pattern.nnz
        kept = whole.unflatten(0, (-1, 32)).unflatten(-1, (-1, 32)).transpose(1, 2)[pattern.kept]
        assert torch.allclose(layer.values.grad, kept, rtol=1e-4, atol=9e-7 * float(whole.abs().max()))  # 2.4e-7


@pytest.mark.matches
def test_any_mask_may_be_run_by_the_blocks_that_it_touches():
    result = pruned(structure="unstructured", density=0.002)
    model = by_blocks(result, block=32, kernel="reference")
    for path, layer in layers(model).items():
        assert layer.index.density == pytest.approx(result.masks.patterns[path].cover(32))
    assert min(layer.index.density for layer in layers(model).values()) < 1
    with torch.no_grad():
        wanted, found = (one(input_ids=tokens()).logits for one in (result.model, model))
    assert (wanted - found).abs().max() <= 4e-7 * wanted.abs().max()  # measured 0


@pytest.mark.stays
def test_the_pruned_model_is_left_alone_and_the_copy_is_its_own():
    result = pruned()
    before = {name: p.clone() for name, p in result.model.named_parameters()}
    model = by_blocks(result, kernel="reference")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    model(input_ids=tokens())
    assert not vars(model)[WATCH].matrices  # no zeros to lose, and no dense matrix kept alive for them
    assert "transformer.h.0.mlp.c_fc.values" in model.state_dict()
    result.check()
    assert all(torch.equal(p, before[name]) for name, p in result.model.named_parameters())


@pytest.mark.stays
def test_what_was_frozen_or_in_evaluation_stays_so():
    result = pruned()
    result.model.eval().requires_grad_(False)
    result.model.transformer.h[0].mlp.c_fc.train().requires_grad_(True)
    found = layers(by_blocks(result, kernel="reference"))
    asked = {name: (one.training, one.values.requires_grad, one.bias.requires_grad) for name, one in found.items()}
    assert asked.pop("transformer.h.0.mlp.c_fc") == (True, True, True)
    assert set(asked.values()) == {(False, False, False)}


@pytest.mark.stays
def test_places_follow_their_values_and_autocast_is_followed():
    model = copy.deepcopy(by_blocks(pruned(), kernel="reference"))
    layer = next(iter(layers(model).values()))
    on_meta = copy.deepcopy(layer).to("meta")
    assert (on_meta.index.columns.device.type, layer.index.columns.device.type) == ("meta", "cpu")
    assert layer.double()(torch.randn(3, layer.in_features, dtype=torch.float64)).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.float()(torch.randn(3, layer.in_features)).dtype == torch.bfloat16


@pytest.mark.survives
def test_masks_without_blocks_are_refused():
    with pytest.raises(RecipeError, match=r"run by blocks: masks of kind 2:4.*structure=\"64x64\""):
        by_blocks(pruned(structure="2:4"))
    with pytest.raises(RecipeError, match="masks of kind unstructured, no matrix in whole blocks of 64"):
        by_blocks(pruned(structure="unstructured"), block=64)
    with pytest.raises(RecipeError, match="masks of kind none"):
        by_blocks(begin(tiny_loaded("gpt2")))
    with pytest.raises(RecipeError, match="there is none of that name"):
        by_blocks(pruned(), kernel="cuda")


@pytest.mark.survives
def test_lost_zeros_and_a_missing_gpu_are_errors():
    result = pruned()
    model = by_blocks(result, kernel="triton")
    with pytest.raises(ModelError, match="not on a GPU"):
        model(input_ids=tokens())
    name = next(iter(result.masks.patterns))
    with torch.no_grad():
        result.model.get_submodule(name).weight.fill_(1.0)
    with pytest.raises(ModelError, match="run by blocks"):
        by_blocks(result)


@pytest.mark.stays
def test_without_a_kernel_it_is_one_that_runs_where_the_matrix_lies():
    result = pruned()
    model = by_blocks(result)
    assert {layer.kernel for layer in layers(model).values()} == {"batched"}
    with torch.no_grad():
        wanted, found = (one(input_ids=tokens()).logits for one in (result.model, model))
    assert (wanted - found).abs().max() <= 9e-7 * wanted.abs().max()  # measured 2.3e-7
    assert [kernel_for(torch.device(name)) for name in ("cpu", "mps", "cuda:1")] == ["batched", "batched", "triton"]


@pytest.mark.says
def test_a_printed_layer_says_what_it_holds():
    layer = layers(by_blocks(pruned(), kernel="reference"))["transformer.h.0.mlp.c_fc"]
    assert f"{layer.index.blocks} blocks of 32, density=" in repr(layer)
    assert "kernel=reference" in repr(layer)
    assert fe.by_blocks is by_blocks
