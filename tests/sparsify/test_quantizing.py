"""Quantised models: zeros and bytes, after pruning and in one sweep with it; torchao beside the plain reference."""

import pytest
import torch

from fewedges.errors import ModelError, RecipeError
from fewedges.sparsify.matrices import matrices_of
from fewedges.sparsify.pruning import prune_
from fewedges.sparsify.quantizing import quantize_
from fewedges.sparsify.rounding import rounded
from fewedges.weight_recipes import Prune, Quantize
from tiny import NoiseBatches, tiny_loaded

SMALL = {"calibration_windows": 6, "context_length": 12}


@pytest.mark.matches
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_every_matrix_is_the_rounded_one_and_nothing_else_moves(name):
    loaded, before = tiny_loaded(name), tiny_loaded(name)
    result = quantize_(loaded, Quantize(bits=4, group_size=16))
    for path, matrix in matrices_of(loaded).items():
        wanted = rounded(
            before.model.get_submodule(path).weight if name != "gpt2" else before.model.get_submodule(path).weight.T,
            4,
            16,
        ).dequantise()
        assert torch.equal(matrix.weight, wanted)
        assert result.rounded[path].bits == 4
    inside = {f"{path}.weight" for path in result.rounded}
    for key, value in loaded.model.state_dict().items():
        assert key in inside or torch.equal(value, before.model.state_dict()[key])


@pytest.mark.stays
@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_survive_and_the_ledger_counts_the_bytes(bits):
    result = prune_(tiny_loaded(), Prune(method="wanda", structure="2:4", **SMALL), NoiseBatches())
    dense_bytes = sum(row["parameters"] * 4 for row in result.rows())
    both = quantize_(result, Quantize(bits=bits))
    both.check()
    for row in both.rows():
        rows, columns = row["shape"]
        scales = rows * 4
        assert row["nnz"] == rows * columns // 2
        kept_and_places = rows * columns // 2 * (bits + 2) // 8
        assert row["bytes"] == min(kept_and_places, rows * columns * bits // 8) + scales
    assert sum(row["bytes"] for row in both.rows()) < dense_bytes / 4
    assert f"{bits} bits" in str(both)


@pytest.mark.stays
@pytest.mark.parametrize("structure", ["unstructured", "2:4"])
def test_sparsegpt_rounds_in_its_sweep_or_after_it(structure):
    weights = {}
    for how in ("joint", "after"):
        loaded = tiny_loaded()
        bits = 4 if how == "joint" else None
        result = prune_(loaded, Prune(structure=structure, density=0.5, bits=bits, **SMALL), NoiseBatches())
        if how == "after":
            result = quantize_(result, Quantize(bits=4))
        result.check()
        assert {code.bits for code in result.rounded.values()} == {4}
        assert all(torch.equal(matrices_of(loaded)[n].weight, c.dequantise()) for n, c in result.rounded.items())
        weights[how] = torch.cat([matrix.weight.flatten() for matrix in matrices_of(loaded).values()])
    assert 0 < (weights["joint"] != weights["after"]).float().mean() < 1


@pytest.mark.survives
def test_torchao_is_asked_for_by_name_and_refuses_what_it_cannot():
    with pytest.raises(ModelError, match=r"is no nn.Linear"):
        quantize_(tiny_loaded("gpt2"), Quantize(backend="torchao"))
    with pytest.raises(RecipeError, match="fp8"):
        Quantize(format="fp8")
    with pytest.raises(RecipeError, match="bits"):
        Quantize(bits=3)
    try:
        import torchao  # noqa: F401
    except ImportError:
        with pytest.raises(RecipeError, match=r"pip install 'fewedges\[quantize\]"):
            quantize_(tiny_loaded(), Quantize(backend="torchao"))


@pytest.mark.matches
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, 16)])
def test_torchao_keeps_zeros_and_is_as_near_as_the_reference(bits, group_size):
    pytest.importorskip("torchao")
    result = prune_(tiny_loaded(), Prune(method="magnitude"))
    dense = {name: matrix.weight.clone() for name, matrix in matrices_of(result.loaded).items()}
    quantised = quantize_(result, Quantize(bits=bits, group_size=group_size, backend="torchao"))
    for name, weight in dense.items():
        theirs = quantised.model.get_submodule(name).weight.dequantize()
        mine = rounded(weight, bits, group_size).dequantise()
        assert (theirs[weight == 0] == 0).all()
        assert (theirs - weight).norm() < 1.2 * (mine - weight).norm()
    with pytest.raises(ModelError, match="torchao tensors"):
        quantised.check("saving")
