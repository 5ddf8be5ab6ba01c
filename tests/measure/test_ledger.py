"""The ledger: counts by brute force, controls that spend the same budget, the loss beside them."""

import copy
import json
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fewedges as fe
from fewedges.data.addition import Sums
from fewedges.errors import ModelError, RecipeError
from fewedges.measure import ledger as counting
from fewedges.measure.ledger import control, ledger
from fewedges.sparsify.attending import attend_
from fewedges.sparsify.fixed_attention import Local
from fewedges.sparsify.matrices import matrices_of
from fewedges.sparsify.pruned import begin
from fewedges.sparsify.stages import sparsify_weights

RUNS = {
    "unstructured": [fe.Prune(method="wanda", density=0.3, calibration_windows=8)],
    "2:4": [fe.Prune(method="sparsegpt", structure="2:4", calibration_windows=8)],
    "4:8": [fe.Prune(method="magnitude", structure="4:8")],
    "1:8": [fe.Prune(method="magnitude", structure="1:8"), fe.Quantize(bits=4, group_size=32)],
    "16x16": [fe.Prune(method="sparsegpt", structure="16x16", density=0.25, calibration_windows=8)],
    "2:4 of a half": [fe.Prune(method="random", density=0.4), fe.Prune(method="magnitude", structure="2:4")],
    "a half of 2:4": [fe.Prune(method="magnitude", structure="2:4"), fe.Prune(method="magnitude", density=0.4)],
    "smaller at last": [fe.Prune(method="magnitude"), fe.Prune(method="magnitude", structure="channel")],
    "8x8": [fe.Prune(method="magnitude", structure="8x8", density=0.25, keep_dense=("c_attn",))],
    "global": [fe.Prune(method="snip", density=0.4, calibration_windows=8)],
    "channel": [fe.Prune(method="magnitude", structure="channel", density=0.5), fe.Prune(method="random")],
    "joint": [fe.Prune(method="sparsegpt", density=0.5, bits=4, calibration_windows=8, keep_dense=("c_attn",))],
    "all": [fe.Distil(layers=(0, 3), steps=1, batch_size=8), fe.Prune(method="magnitude"), fe.Quantize(bits=8)],
}


@pytest.fixture(scope="module")
def runs(addition):
    return {name: sparsify_weights(addition, stages) for name, stages in RUNS.items()}


def twin(loaded):
    return loaded.with_model(copy.deepcopy(loaded.model))


def by_name(run):
    """Rows in no order: a saved run keeps its masks by name."""
    return {row["name"]: row for row in run.rows()}


@pytest.mark.matches
@pytest.mark.parametrize("name", RUNS)
def test_a_control_and_a_reloaded_run_have_as_many_entries_and_bytes_in_every_matrix(runs, addition, name, tmp_path):
    run = runs[name]
    assert by_name(fe.load(run.save(tmp_path))) == by_name(run)
    for method in counting.CONTROLS:
        other = control(run, twin(addition), method)
        assert other.masks.kinds() == run.masks.kinds()
        for key in ("shape", "nnz", "bytes"):
            assert [row[key] for row in other.rows()] == [row[key] for row in run.rows()]
        assert {n: c.bits for n, c in other.rounded.items()} == {n: c.bits for n, c in run.rounded.items()}
        assert torch.isfinite(other.model(Sums().at(0, 2).tokens).logits).all()
        assert counting._sizes(other) == counting._sizes(run)
        if name == "8x8":
            for pattern in other.masks.patterns.values():
                cells = pattern.mask().unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8))
                assert torch.equal(cells.all(-1).all(-2), cells.any(-1).any(-2))
        if name == "2:4":
            zeros = torch.cat([m.weight.flatten() for m in matrices_of(other.loaded).values()]) == 0
            assert (zeros.unflatten(0, (-1, 4)).sum(-1) == 2).all()


@pytest.mark.matches
def test_the_magnitude_control_keeps_the_largest_of_the_dense_model(runs, addition):
    run = runs["unstructured"]
    for path, pattern in control(run, twin(addition), "magnitude").masks.patterns.items():
        dense = matrices_of(addition)[path].weight.abs()
        assert dense[pattern.mask()].min() >= dense[~pattern.mask()].max()
    first, again, other = (control(run, twin(addition), "random", seed) for seed in (0, 0, 1))
    masks = [
        torch.cat([p.mask().flatten() for _, p in sorted(x.masks.patterns.items())]) for x in (first, again, other)
    ]
    assert torch.equal(masks[0], masks[1])
    share = float((masks[0] & masks[2]).float().mean())
    assert share == pytest.approx(float(masks[0].float().mean()) ** 2, abs=4e-3)  # independent


@pytest.mark.matches
def test_totals_are_those_of_all_entries_and_blocks_together(runs):
    run = runs["8x8"]
    total = ledger(run).total()
    matrices = matrices_of(run.loaded)
    keep = {
        n: run.masks.patterns[n].mask() if n in run.masks.patterns else m.weight == m.weight
        for n, m in matrices.items()
    }
    live, blocks = 0, 0
    for kept in keep.values():
        for i in range(0, kept.shape[0], 32):
            for j in range(0, kept.shape[1], 32):
                live, blocks = live + bool(kept[i : i + 32, j : j + 32].any()), blocks + 1
    assert total["cover(32)"] == pytest.approx(live / blocks)
    assert total["nnz"] == sum(int(kept.sum()) for kept in keep.values())
    assert total["density"] == total["nnz"] / total["parameters"]
    assert total["bytes"] == sum(row["bytes"] for row in run.rows())


@pytest.mark.matches
def test_the_loss_is_that_of_the_measure_of_a_dense_model(runs, addition):
    found = fe.measure(runs["unstructured"])
    assert list(found.models) == ["dense", "random", "magnitude", "sparse"]
    alone = fe.measure(runs["unstructured"].loaded).rows["dense"]
    for name in ("cross_entropy", "perplexity", "accuracy"):
        assert found.models["sparse"][name] == alone[name]
    assert found.models["dense"]["accuracy"] == 1
    assert found.models["dense"]["kl"] == 0
    assert found.models["dense"]["density"] == 1
    assert found.models["sparse"]["kl"] > 0
    sizes = sum(p.numel() * 4 for p in addition.model.parameters())
    assert found.models["dense"]["model_bytes"] == sizes
    values = found.models["sparse"]
    assert values["model_bytes"] - values["bytes"] == sizes - found.models["dense"]["bytes"]


@pytest.mark.matches
def test_flops_of_dense_matrices_are_those_torch_counts_and_of_sparse_ones_their_share(runs, addition):
    run, found = runs["unstructured"], fe.measure(runs["unstructured"])
    for name, matrix in matrices_of(addition).items():
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            matrix.module(torch.randn(1, matrix.shape[1]))
        (row,) = [row for row in found.matrices if row["name"] == name]
        share = (run.masks.patterns[name].mask().sum() / matrix.parameter.numel()).item()
        assert row["flops"] == round(counted.get_total_flops() * share)
    assert found.models["dense"]["flops"] == 2 * found.total()["parameters"]
    assert found.models["sparse"]["flops"] == found.models["random"]["flops"] == found.total()["flops"]
    assert "| FLOPs a token |" in str(found)


@pytest.mark.says
def test_the_ledger_says_how_it_was_made_and_keeps_its_keys(runs, tmp_path):
    found = fe.measure(runs["all"])
    data = json.loads(found.save(tmp_path / "l.json").read_text())
    assert {"matrices", "total", "models", "base", "made", "tokens", "context_length", "versions"} <= set(data)
    row = {"name", "shape", "parameters", "nnz", "density", "cover(16)", "cover(32)", "cover(64)", "bytes", "flops"}
    assert all(set(matrix) == row for matrix in data["matrices"])
    assert set(data["total"]) == row - {"name", "shape"}
    text = str(found)
    for part in (
        "cover(64)",
        "| all |",
        "| magnitude |",
        "distil, then prune, then quantize",
        "6,000 tokens",
        "not distilled",
    ):
        assert part in text
    assert found._repr_html_().startswith("<pre>")


@pytest.mark.says
def test_without_a_text_the_matrices_are_counted_and_nothing_is_scored(runs, addition):
    named = begin(twin(addition).with_model(addition.model))
    named = type(named)(**{**vars(named), "base": {**named.base, "name": "some/model"}})
    found = ledger(named)
    assert set(found.models) == {"sparse"}
    assert "no text was scored" in str(found)
    assert not math.isnan(found.total()["density"])
    with pytest.raises(RecipeError, match="minimal pairs"):
        fe.measure(runs["unstructured"], pairs="pairs.jsonl")


@pytest.mark.survives
def test_controls_without_the_patterns_of_a_run_are_not_set_beside_it(addition):
    loaded = twin(addition)
    attend_(loaded.model, loaded.anatomy, Local(2))
    with pytest.raises(ModelError, match="measure sparse weights: fixed"):
        fe.measure(sparsify_weights(loaded, fe.Prune(method="magnitude")))
