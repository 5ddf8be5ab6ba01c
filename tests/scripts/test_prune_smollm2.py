"""The table of pruned models: rows made once, recovery beside its control, old rows recognised."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch

from fewedges.data.addition import Sums
from fewedges.sparsify.recovery import distil_

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"
METHODS = ["magnitude", "wanda", "wanda+distil", "dense+finetune"]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import prune_smollm2

    return prune_smollm2


@pytest.fixture
def run(script, monkeypatch, tmp_path):
    """The script on the addition model, which is small and needs no download; what it says."""
    sums = "".join(json.dumps({"text": f"{a}+{b}={a + b:03}"}) + "\n" for a in range(10, 30) for b in range(10, 30))
    (tmp_path / "sums.jsonl").write_text(sums)
    read = ["--calibration", tmp_path / "sums.jsonl", "--text", tmp_path / "sums.jsonl", "--tokens", 400]
    small = ["--calibration-windows", 8, "--context-length", 10, "--distil-steps", 3, "--distil-batch", 4]
    settings = ["--distil-context", 10, "--densities", 0.4, "--structures", "2:4", "--model", "addition"]

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["prune_smollm2.py", *map(str, [*read, *small, *settings, *words])])
        script.main()

    return call


@pytest.mark.reproduces
def test_rows_are_made_once_and_older_ones_are_recognised(script, run, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    run("--out", out, "--methods", "magnitude", "wanda")
    old = script.rows_in(out)
    assert [(script.name_of(row), script.column_of(row)) for row in old] == [
        (name, column) for name in ("magnitude", "wanda") for column in ("60 %", "2:4")
    ]
    run("--out", out, "--methods", *METHODS)
    rows = script.rows_in(out)
    assert rows[:4] == old
    assert [script.name_of(row) for row in rows[4:]] == ["wanda+distil", "wanda+distil", "dense+finetune"]
    before, after = rows[2], rows[4]
    assert (after["nnz"], after["density"], after["recipe"]) == (before["nnz"], before["density"], before["recipe"])
    assert after["kl"] < before["kl"]
    assert (rows[6]["recipe"], rows[6]["distil"]["kl_weight"], rows[6]["distil"]["loss_weight"]) == (None, 0, 1)
    same = {**after["distil"], "kl_weight": 0, "loss_weight": 1}
    assert rows[6]["distil"] == same  # the control differs in its loss alone
    assert rows[6]["distil_data"] == after["distil_data"]
    rows[0]["facts"]["protocol"]["batch_size"] = 3  # as another device would have scored it
    out.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"recipe": {')
    run("--out", out, "--methods", *METHODS)
    assert len(script.rows_in(out)) == 7
    capsys.readouterr()
    run("--table", out)
    said = capsys.readouterr().out
    cells = " | ".join(script.legible(row["perplexity"]) for row in rows[4:6])
    assert f"| wanda + distillation | {cells} |" in said
    assert f"dense {rows[0]['facts']['dense_perplexity']:.2f}." in said
    assert f"by next-token loss: {rows[6]['perplexity']:.2f}." in said


@pytest.mark.survives
def test_two_protocols_do_not_become_one_table(script, run, tmp_path):
    for seed in (0, 1):
        run("--out", tmp_path / f"{seed}.jsonl", "--methods", "random", "--structures", "--seed", seed)
    with pytest.raises(SystemExit, match=r"two rows for random 60 %"):
        run("--table", tmp_path / "0.jsonl", tmp_path / "1.jsonl")


@pytest.mark.stays
def test_the_recovery_teaches_the_dense_model_nothing(script, addition):
    """Which is why no gain by it can come of the text alone."""
    args = script.arguments("--out x --distil-steps 3 --distil-batch 8 --distil-context 10".split())
    student = addition.with_model(copy.deepcopy(addition.model))
    for finetune in (False, True):
        result = distil_(student, script.training(args, finetune), Sums(), teacher=addition)
        pairs = zip(result.model.parameters(), addition.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) is not finetune


@pytest.mark.matches
def test_perplexities_keep_the_digits_that_mean_something(script):
    found = [script.legible(x) for x in (17.3208, 4172.4545, 99_999.0, 182_003.9, 1.4e10)]
    assert found == ["17.32", "4172.45", "99999.00", "1.8e+05", "1.4e+10"]
