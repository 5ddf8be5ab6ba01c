"""Heads and channels that are really gone: the small model computes what the masked large one does."""

import copy

import pytest
import torch

from fewedges.errors import ModelError, RecipeError
from fewedges.sparsify.matrices import blocks_of
from fewedges.sparsify.pruned import begin
from fewedges.sparsify.pruning import prune_
from fewedges.sparsify.shrink import channel_cut, head_cut
from fewedges.weight_recipes import Prune
from tiny import SUPPORTED, NoiseBatches, tiny_loaded

SMALL = {"calibration_windows": 4, "context_length": 12}
TIED_HEADS = {"gpt2", "gpt-neox", "opt", "olmo2"}
ONE_GROUP = {"llama-gqa-4-to-1"}


def shrunk(name, kind, method="wanda", density=0.5):
    loaded = tiny_loaded(name)
    return loaded, prune_(loaded, Prune(method=method, structure=kind, density=density, **SMALL), NoiseBatches())


def kept_by_weight(small, large, path, dim):
    """Which rows or columns of a large matrix the small one has, found by comparing them."""
    a, b = (m.get_submodule(path).weight.detach() for m in (small, large))
    a, b = (a, b) if dim == 0 else (a.T, b.T)
    return [next(j for j in range(len(b)) if torch.equal(row, b[j])) for row in a]


@pytest.mark.matches
@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_without_channels_the_small_model_is_the_masked_large_one(name, method):
    loaded, result = shrunk(name, "channel", method)
    large, given = copy.deepcopy(loaded), NoiseBatches().at(0, 3).tokens
    for block, layer in zip(blocks_of(large), large.anatomy.layers, strict=True):
        cut = channel_cut(block, layer, large)
        flipped = 0 if cut.writer.transposed else 1
        kept = kept_by_weight(result.model, loaded.model, cut.writer.name, flipped)
        assert len(kept) == cut.units // 2
        gone = torch.tensor([j for j in range(cut.units) if j not in kept])
        cut.writer.weight[:, gone] = 0
    mine, wanted = result.model(given).logits, large.model(given).logits
    torch.testing.assert_close(mine, wanted, rtol=0, atol=float(4e-6 * wanted.abs().max()))  # measured 1e-6
    assert (mine - loaded.model(given).logits).abs().max() > 0.01 * wanted.abs().max()
    assert result.loaded.anatomy.parameters < loaded.anatomy.parameters


@pytest.mark.matches
@pytest.mark.parametrize("name", sorted(set(SUPPORTED) - TIED_HEADS - ONE_GROUP))
@pytest.mark.parametrize("method", ["random", "wanda"])
def test_without_heads_the_small_model_is_the_masked_large_one(name, method):
    loaded, result = shrunk(name, "head", method)
    large, given = copy.deepcopy(loaded), NoiseBatches().at(0, 3).tokens
    for block, layer in zip(blocks_of(large), large.anatomy.layers, strict=True):
        cut = head_cut(block, layer)
        kept = kept_by_weight(result.model, loaded.model, cut.writer.name, 1)
        units = {j // cut.width for j in kept}
        assert len(units) == 1
        assert len(kept) == cut.width  # whole units: every column of the one that stays
        gone = torch.tensor([j for j in range(cut.writer.shape[1]) if j not in kept])
        cut.writer.weight[:, gone] = 0
    mine, wanted = result.model(given).logits, large.model(given).logits
    torch.testing.assert_close(mine, wanted, rtol=0, atol=float(4e-6 * wanted.abs().max()))  # measured 1e-6
    body = result.loaded.anatomy
    assert (body.heads, body.layers[0].kv_heads, body.layers[0].width) == (2, 1, 8)
    assert result.model.config.num_key_value_heads == 1


@pytest.mark.survives
@pytest.mark.parametrize("name", sorted(TIED_HEADS))
def test_families_whose_configuration_ties_head_width_are_refused(name):
    with pytest.raises(ModelError, match="structure channel"):
        shrunk(name, "head", "magnitude")


@pytest.mark.survives
def test_a_density_that_removes_nothing_is_refused():
    with pytest.raises(RecipeError, match="none would go"):
        shrunk("llama-gqa-4-to-1", "head", "magnitude")
    with pytest.raises(RecipeError, match="keep_dense"):
        prune_(tiny_loaded(), Prune(method="magnitude", structure="channel", keep_dense=("up_proj",)))


@pytest.mark.stays
def test_the_given_model_is_left_alone_and_masks_shrink_along():
    loaded = tiny_loaded()
    first = prune_(loaded, Prune(method="magnitude", structure="unstructured", density=0.3))
    before = {n: p.clone() for n, p in loaded.model.named_parameters()}
    second = prune_(first, Prune(method="magnitude", structure="channel"))
    third = prune_(second, Prune(method="magnitude", structure="head"))
    assert all(torch.equal(p, before[n]) for n, p in loaded.model.named_parameters())
    third.check()
    assert {tuple(p.shape) for p in third.masks.patterns.values()} == {(16, 32), (8, 32), (32, 16), (24, 32), (32, 24)}
    assert begin(third) is third
    assert third.config == {"intermediate_size": 24, "num_attention_heads": 2, "head_dim": 8, "num_key_value_heads": 1}
