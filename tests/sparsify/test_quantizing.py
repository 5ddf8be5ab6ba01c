"""Quantised models: zeros and bytes, after pruning and in one sweep with it; torchao beside the plain reference."""

from dataclasses import replace

import pytest
import torch

from fewedges.errors import ModelError, RecipeError
from fewedges.measure.ledger import control, ledger
from fewedges.sparsify.matrices import bytes_of, matrices_of
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


class Coded(torch.Tensor):
    """A tensor made of others, as torchao's are: it looks like float32 and holds codes and scales."""

    @staticmethod
    def __new__(cls, codes, scales):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scales.dtype)

    def __init__(self, codes, scales):
        self.codes, self.scales = codes, scales

    def __tensor_flatten__(self):
        return ["codes", "scales"], None

    @classmethod
    def __tensor_unflatten__(cls, parts, _, __, ___):
        return cls(parts["codes"], parts["scales"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        a = args[0]
        if function is torch.ops.aten.detach.default:
            return cls(a.codes, a.scales)
        raise NotImplementedError(function)

    def dequantize(self, *_):
        return self.codes * self.scales


class Silent(torch.Tensor):
    """A tensor of another kind that does not say what it holds."""


def coded(matrix):
    code = rounded(matrix.weight, 8)
    return torch.nn.Parameter(Coded(code.codes, code.scales), requires_grad=False)


@pytest.mark.matches
def test_bytes_of_a_tensor_made_of_others_are_theirs():
    codes, scales = torch.zeros(6, 4, dtype=torch.int8), torch.ones(6, 1)
    assert bytes_of(torch.zeros(6, 4)) == 96
    assert bytes_of(torch.nn.Parameter(torch.zeros(6, 4, dtype=torch.bfloat16))) == 48
    assert bytes_of(Coded(codes, scales)) == 24 + 6 * 4
    assert bytes_of(Coded(Coded(codes, scales), scales)) == 24 + 2 * 6 * 4
    assert bytes_of(torch.zeros(6, 4).as_subclass(Silent)) is None
    assert bytes_of(Coded(codes.as_subclass(Silent), scales)) is None


@pytest.mark.matches
def test_the_ledger_counts_codes_and_scales_as_they_lie_in_memory_and_sees_a_lost_zero():
    result = prune_(tiny_loaded(), Prune(method="magnitude"))
    for matrix in matrices_of(result.loaded).values():
        matrix.module.weight = coded(matrix)
    run = replace(result, backend="torchao")
    assert all(row["bytes"] == row["parameters"] + 4 * row["shape"][0] for row in run.rows())
    rest = sum(p.numel() * 4 for n, p in run.model.named_parameters() if not n.endswith("_proj.weight"))
    sizes = ledger(run).models["sparse"]
    assert sizes["model_bytes"] - sizes["bytes"] == rest
    matrix.parameter.codes.fill_(1)
    with pytest.raises(ModelError, match="zeros of 1 matrices are lost"):
        ledger(run)


@pytest.mark.says
def test_bytes_that_cannot_be_told_are_said_to_be_unknown():
    result = prune_(tiny_loaded(), Prune(method="magnitude"))
    matrix = next(iter(matrices_of(result.loaded).values()))
    matrix.module.weight = torch.nn.Parameter(matrix.weight.as_subclass(Silent), requires_grad=False)
    found = ledger(replace(result, backend="torchao"))
    assert [row["bytes"] is None for row in found.matrices] == [True] + [False] * 13
    assert found.total()["bytes"] is found.models["sparse"]["bytes"] is found.models["sparse"]["model_bytes"] is None
    lines = str(found).splitlines()
    assert [lines[at].endswith("| unknown |") for at in (2, 3, 16)] == [True, False, True]  # a matrix, another, all


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
    for row in quantised.rows():  # its kernels' codes lie in a byte each; a zero point (a byte) stands beside a scale
        (rows, columns), groups = row["shape"], 1 if group_size is None else row["shape"][1] // group_size
        assert row["bytes"] == rows * columns + rows * groups * (4 + 1)
    quantised.check_zeros()
    with pytest.raises(ModelError, match="torchao tensors"):
        quantised.check("saving")


@pytest.mark.matches
@pytest.mark.filterwarnings("ignore")
def test_controls_of_torchao_are_rounded_by_it_and_take_as_many_bytes():
    pytest.importorskip("torchao")
    result = quantize_(prune_(tiny_loaded(), Prune(method="magnitude")), Quantize(bits=8, backend="torchao"))
    for method in ("random", "magnitude"):
        other = control(result, tiny_loaded(), method)
        assert [row["bytes"] for row in other.rows()] == [row["bytes"] for row in result.rows()]
        assert torch.isfinite(other.model(NoiseBatches().at(0, 2).tokens).logits).all()
