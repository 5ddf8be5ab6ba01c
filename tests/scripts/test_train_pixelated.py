"""The script that trains pixelated models from scratch: arms of one cost, runs that repeat, limits by hand."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import pixelated_arms as arms
import train_pixelated as script

from fewedges.errors import RecipeError

SIZES = {
    "width": 128, "layers": 2, "head": 16, "length": 16, "batch": 2, "density": 0.25, "rank_share": 0.25, "block": 8,
    "small_width": None, "seed": 0, "device": "cpu", "kernel": "reference", "eager": True, "no_compile": True,
    "eval_batches": 1, "warm_up": 2,
}  # fmt: skip
TEXT = "".join(f"{n} and {n + 1} are {2 * n + 1}.\n" for n in range(600))


@pytest.fixture
def args(tmp_path):
    for name in ("data", "valid"):
        (tmp_path / f"{name}.txt").write_text(TEXT + "<|endoftext|>\n")
    return SimpleNamespace(**SIZES, data=tmp_path / "data.txt", valid=tmp_path / "valid.txt")


@pytest.mark.stays
def test_arms_hold_as_many_parameters_and_random_as_many_cells(args):
    kept = {
        kind: [p.parameters(*shape) if p else shape[0] * shape[1] for shape, p in arms.matrices(kind, args)]
        for kind in arms.ARMS
    }
    assert kept["random"] == kept["pixelated"]
    plans = [plan for _, plan in arms.matrices("random", args)]
    assert [(plan.layout, plan.seed) for plan in plans] == [("random", place) for place in range(8)]
    for low, cells, (shape, _) in zip(kept["low-rank"], kept["pixelated"], arms.matrices("dense", args), strict=True):
        assert abs(low - cells) <= 4 * sum(shape)  # a rank is a multiple of 8: half a step away at most
    assert abs(sum(kept["pixelated"]) / sum(kept["dense"]) - args.density) <= 0.0625
    small, width = sum(kept["small"]), arms.narrow(args)
    assert all(
        abs(small - sum(kept["pixelated"])) <= abs(24 * w * w - sum(kept["pixelated"]))
        for w in (width - 16, width + 16)
    )


@pytest.mark.matches
def test_what_is_built_is_what_is_counted(args):
    for kind in arms.ARMS:
        model = arms.build(kind, args)
        held = [p.numel() for name, p in model.transformer.h.named_parameters() if p.dim() > 1]
        assert sum(held) == sum(p.parameters(*s) if p else s[0] * s[1] for s, p in arms.matrices(kind, args))


@pytest.mark.matches
def test_costs_are_those_counted_by_hand(args):
    args.width, args.layers, args.length, args.batch = 1024, 1, 512, 8
    row = arms.cost("dense", args, {"flops": 1e12, "bandwidth": 1e30})
    flops = 6 * 12 * 1024**2 + 7 * 512 * 1024 + 10 * 256 * 1024
    assert row["flops_per_token"] == flops
    assert row["least_ms"] == pytest.approx(1e3 * 4096 * flops / 1e12)  # memory is free
    row = arms.cost("dense", args, {"flops": 1e30, "bandwidth": 1e12})
    parameters = 12 * 1024**2 + 1024 * (256 + 512 + 13)
    products = 3 * 2 * (4 + 2 + 5 + 5) * 1024
    moved = products + 148 * 1024 + 52 * parameters / 4096
    assert row["least_ms"] == pytest.approx(1e3 * 4096 * moved / 1e12)  # arithmetic is free
    both = arms.limits(args, {"flops": 1e12, "bandwidth": 1e30})
    assert both["dense"]["limit"] == both["dense"]["limit_arithmetic"] == 1
    assert both["pixelated"]["limit"] == pytest.approx(both["pixelated"]["limit_arithmetic"])
    assert 3 < both["pixelated"]["limit"] < 4


@pytest.mark.reproduces
def test_training_again_from_the_start_gives_the_same_curve(args):
    data, valid = arms.texts(args)
    trainer = arms.Trainer(arms.build("pixelated", args), args, data, valid)
    first, other, again = (trainer.run(8, rate, every=4)["curve"] for rate in (3e-3, 1e-3, 3e-3))
    losses = [[row["loss"] for row in curve] for curve in (first, other, again)]
    assert losses[0] == losses[2] != losses[1]
    assert losses[0][-1] < losses[0][0] - 1  # measured: 5.46 to 2.92


@pytest.mark.matches
def test_the_logits_are_those_of_transformers(args):
    model, tokens = arms.build("dense", args).eval(), arms.texts(args)[0].at(0, 2).tokens
    assert torch.equal(arms.logits_of(model, tokens), model(tokens).logits)  # a row times 1, and zeros


@pytest.mark.reproduces
def test_the_same_command_goes_on_and_another_protocol_is_refused(args, tmp_path, monkeypatch):
    out = tmp_path / "out.json"

    def call(*flags):
        given = ["--dry", "--out", out, "--data", args.data, "--valid", args.valid, "--seconds", 1e6, "--arms", *flags]
        monkeypatch.setattr(sys, "argv", ["train_pixelated.py", *map(str, given)])
        script.main()
        return json.loads(out.read_text())

    early = call("low-rank-longer", "small")
    assert list(early["arms"]) == ["small"]  # nothing to be longer than, without a dense arm
    assert "ratio" not in early["arms"]["small"]
    late = call("dense", "small", "low-rank")
    assert list(late["arms"]) == ["small", "dense", "low-rank"]
    assert late["arms"]["small"]["curve"] == early["arms"]["small"]["curve"]
    assert late["arms"]["dense"]["ratio"] <= 1
    args.data.write_text(TEXT + "more\n")
    with pytest.raises(RecipeError, match="another data"):
        call("random")


@pytest.mark.matches
def test_when_a_loss_is_reached():
    curve = [{"seconds": s, "loss": loss} for s, loss in ((0, 5.0), (10, 3.0), (20, None), (30, 1.0), (40, 2.0))]
    assert script.reached(curve, 4.0) == 5
    assert script.reached(curve, 2.0) == 20
    assert script.reached(curve, 0.5) is None
    assert script.reached(curve, None) is None


@pytest.mark.says
def test_the_help_says_what_the_arms_are(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_pixelated.py", "--help"])
    with pytest.raises(SystemExit):
        script.arguments()
    said = capsys.readouterr().out
    assert all(name in said for name in (*arms.ARMS, "--only-figures", "-longer"))
