"""The ledger of a pixelated model: hand counts of cells, low rank and bytes, and the loss beside the dense model's."""

import copy
import json

import pytest
import torch

import fewedges as fe
from fewedges.data.addition import answer_counts, exact_match, split
from fewedges.errors import ModelError, RecipeError
from fewedges.measure.ledger import measure
from fewedges.sparsify.attending import attending
from fewedges.sparsify.butterfly import PixelatedLinear
from fewedges.sparsify.distilling import losses
from fewedges.sparsify.fixed_attention import Local
from fewedges.sparsify.matrices import matrices_of
from fewedges.sparsify.pixelate import pixelate_
from tiny import tiny_loaded


def counted(model):
    """Cells, numbers of the low rank and bytes of every pixelated layer, from its tensors."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, PixelatedLinear):
            cells = layer.sparse.weight.numel()
            low = layer.low.up.numel() + layer.low.down.numel() if layer.low is not None else 0
            parts = [p for n, p in layer.named_parameters() if n != "bias"]
            found[name] = cells, low, sum(p.numel() * p.element_size() for p in parts)
    return found


@pytest.mark.matches
@pytest.mark.parametrize(("name", "kept"), [("llama", "o_proj"), ("llama-tied", "q_proj"), ("gpt2", "attn.c_proj")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counts_are_those_by_hand(name, kept, dtype):
    dense = tiny_loaded(name)
    dense.model.to(dtype)
    loaded = dense.with_model(copy.deepcopy(dense.model))
    result = pixelate_(loaded, 0.4, block=2, keep_dense=(kept,))
    found = measure(loaded)
    hand, shapes = counted(loaded.model), {n: m.shape for n, m in matrices_of(dense).items()}
    rows = {row["name"]: row for row in found.matrices}
    assert set(rows) == set(shapes)
    for n, (rows_, columns) in shapes.items():
        row, size = rows[n], rows_ * columns
        cells, low, stored = hand.get(n, (None, 0, size * dtype.itemsize))
        assert (row["shape"], row["parameters"], row["bytes"]) == ((rows_, columns), size, stored)
        assert row["nnz"] == (size if cells is None else cells + low)
        assert row["flops"] == 2 * row["nnz"]
        assert row["cells"] == (None if cells is None else cells / size)
        assert (row["low_rank"], row["density"]) == (low / size, row["nnz"] / size)
        assert row["cover(16)"] == (1.0 if cells is None else result.plans[n].pattern(rows_, columns).cover(16))
    total = sum(r * c for r, c in shapes.values())
    stored = sum(row["bytes"] for row in found.matrices)
    whole = sum(p.numel() for p in dense.model.parameters()) * dtype.itemsize
    sizes = {"bytes": total * dtype.itemsize, "model_bytes": whole}
    assert found.models["dense"] == {"density": 1.0, "flops": 2 * total} | sizes
    mine = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    now = sum(row["nnz"] for row in found.matrices) / total
    flops = found.total()["flops"]
    assert flops == sum(row["flops"] for row in found.matrices) == round(2 * total * now)
    assert found.models["pixelated"] == {"density": now, "flops": flops, "bytes": stored, "model_bytes": mine}
    assert mine == whole - total * dtype.itemsize + stored
    assert found.total()["density"] == now < 1
    assert found.total()["cells"] == pytest.approx(sum(c for c, _, _ in hand.values()) / total)
    assert found.total()["low_rank"] == pytest.approx(sum(low for _, low, _ in hand.values()) / total)


@pytest.mark.matches
def test_the_loss_is_measured_beside_the_dense_model(addition, tmp_path):
    loaded = addition.with_model(copy.deepcopy(addition.model))
    pixelate_(loaded, 0.5)
    found = fe.measure(loaded)
    tokens = split().held_out
    with torch.no_grad():
        mine, theirs = (x.model(input_ids=tokens, use_cache=False).logits for x in (loaded, addition))
    wanted = losses(mine, theirs, tokens, answer_counts(tokens))
    row = found.models["pixelated"]
    assert row["kl"] == pytest.approx(float(wanted.kl), rel=1e-5)  # measured 5e-7
    assert row["cross_entropy"] == pytest.approx(float(wanted.cross_entropy), rel=1e-5)
    assert row["accuracy"] == exact_match(loaded.model, tokens) < 0.9
    assert (found.models["dense"]["kl"], found.models["dense"]["accuracy"]) == (0, 1)
    assert found.models["dense"]["bytes"] == 4 * 196608
    assert found.total()["density"] == 97280 / 196608
    text = str(found)
    assert "| transformer.h.0.attn.c_attn | 192x64 | 12,288 | 6,144 | 0.3750 | 6 | 0.1250 | 0.5000 |" in text
    assert text.endswith("addition: pixelated; " + found.protocol().partition("; ")[2])
    assert "6,000 tokens scored of held-out sums" in text
    assert "random" not in text
    assert json.loads(found.json())["total"]["nnz"] == 97280
    assert found.save(tmp_path / "found.json").exists()


@pytest.mark.says
def test_what_is_not_scored_and_what_is_left_dense_is_said():
    loaded = tiny_loaded("gpt2")
    pixelate_(loaded, 0.4, block=2, keep_dense=("mlp.c_proj",))
    text = measure(loaded).markdown()
    assert "| transformer.h.0.mlp.c_proj | 32x128 | 4,096 | 4,096 | dense | 0 | 0.0000 | 1.0000 |" in text
    assert "tiny-gpt2: pixelated; no text was scored (--data FILE)." in text
    with pytest.raises(RecipeError, match="minimal pairs"):
        measure(loaded, pairs="pairs.jsonl")


@pytest.mark.survives
def test_a_dense_model_without_the_patterns_is_not_set_beside_it():
    loaded = tiny_loaded("llama")
    pixelate_(loaded, 0.4, block=2)
    with (
        attending(loaded.model, loaded.anatomy, Local(2)),
        pytest.raises(ModelError, match="measure a pixelated model: fixed"),
    ):
        measure(loaded)
