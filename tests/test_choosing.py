"""`fewedges sparsify` for weights: its method chooses its flags; runs, resumed runs, and `measure` of them."""

import json

import pytest
import yaml

import fewedges as fe
from fewedges import choosing, cli
from fewedges.recipes import write_recipe
from fewedges.weight_recipes import METHODS, TRAINED, Method

WANDA = ["--method", "wanda", "--structure", "2:4", "--calibration-windows", "8"]


@pytest.fixture
def asked(monkeypatch):
    """What the two verbs would have been called with."""
    calls = []

    def attention(model, *, out, settings=None, **rest):
        calls.append(("attention", settings))

    def weights(model, *, out, settings=None, **rest):
        calls.append(("weights", settings))

    for name, heard in (("sparsify", attention), ("sparsify_weights", weights)):
        verb = getattr(cli if name == "sparsify" else choosing, name)
        heard.__signature__ = choosing.inspect.signature(verb)
        heard.__annotations__ = verb.__annotations__
        heard.__doc__ = verb.__doc__
        monkeypatch.setattr(cli if name == "sparsify" else choosing, name, heard)
    return calls


def said(words, asked):
    assert cli.main(["sparsify", "m", "--out", "x", *words]) == 0
    return asked.pop()


@pytest.mark.matches
@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], fe.SparseAttention()),
        (["--method", "attention", "--steps", "3"], fe.SparseAttention(steps=3)),
        (["--method=magnitude", "--density", "0.2"], fe.Prune(method="magnitude", density=0.2)),
        (["--method", "sparsegpt", "--structure", "2:4"], fe.Prune(method="sparsegpt", structure="2:4")),
        (["--keep-dense", "up", "down", "--method", "random"], fe.Prune(method="random", keep_dense=("up", "down"))),
        (["--method", "distil", "--layers", "0", "2", "--steps", "9"], fe.Distil(layers=(0, 2), steps=9)),
        (["--method", "quantize", "--bits", "4"], fe.Quantize(bits=4)),
        (["--method", "rigl", "--density", "0.1", "--from-scratch"], fe.Rewire(density=0.1, from_scratch=True)),
        (["--method", "set", "--every", "7"], fe.Rewire(method="set", every=7)),
        (["--method=static", "--structure", "16x16"], fe.Train(structure="16x16")),
        (
            ["--method", "gradual", "--price", "up=2", "--allocation", "cost"],
            fe.Gradual(allocation="cost", price=("up=2",)),
        ),
        (["--method", "tickets", "--density", "0.2", "--rewind", "9"], fe.Rewind(density=0.2, rewind=9)),
    ],
)
def test_the_method_chooses_the_recipe_and_flags_are_its_fields(words, wanted, asked):
    assert said(words, asked) == ("attention" if isinstance(wanted, fe.SparseAttention) else "weights", wanted)


@pytest.mark.matches
def test_a_recipe_file_chooses_too_and_flags_override_it(tmp_path, asked):
    file = tmp_path / "r.yaml"
    write_recipe(fe.Prune(method="wanda", density=0.3, damping=0.5), file)
    assert said(["--recipe", str(file)], asked)[1] == fe.Prune(method="wanda", density=0.3, damping=0.5)
    words = ["--recipe", str(file), "--method", "random", "--density", "0.1"]
    assert said(words, asked)[1] == fe.Prune(method="random", density=0.1, damping=0.5)
    stages = (fe.Prune(method="magnitude"), fe.Distil(steps=3), fe.Quantize())
    write_recipe(stages, file)
    assert said(["--recipe", str(file)], asked) == ("weights", stages)


@pytest.mark.survives
@pytest.mark.parametrize("words", [["--method", "wonda"], ["--method", "wanda", "--kl-margin", "0.1"], ["--bits", "8"]])
def test_a_method_or_flag_that_is_not_there_is_wrong_usage(words, capsys):
    assert cli.main(["sparsify", "addition", "--out", "x", *words]) == 2
    assert len(capsys.readouterr().err) > 20


@pytest.mark.survives
@pytest.mark.parametrize("recipe", [fe.Quantize(), fe.Tickets(), fe.CircuitSearch(), (fe.Prune(), fe.Quantize())])
def test_a_recipe_of_another_kind_is_refused(tmp_path, recipe, capsys):
    write_recipe(recipe, tmp_path / "r.yaml")
    words = ["sparsify", "addition", "--out", "x", "--recipe", str(tmp_path / "r.yaml"), "--method", "wanda"]
    assert cli.main(words) == 2
    assert "error: --method wanda --recipe" in capsys.readouterr().err
    if isinstance(recipe, fe.CircuitSearch):
        assert cli.main(words[:-2]) == 2
        assert "a recipe of" in capsys.readouterr().err


@pytest.mark.says
@pytest.mark.parametrize(
    ("method", "flag"),
    [
        ("wanda", "--keep-dense"),
        ("distil", "--hidden-weight"),
        ("quantize", "--bits"),
        ("rigl", "--from-scratch"),
        ("tickets", "--rounds"),
    ],
)
def test_the_help_of_a_method_shows_its_fields_and_not_those_of_attention(method, flag, capsys):
    assert cli.main(["sparsify", "--method", method, "--help"]) == 0
    text = capsys.readouterr().out
    assert flag in text
    assert "Example: fewedges sparsify smollm2 --method wanda" in text
    assert "--kl-margin" not in text


@pytest.mark.says
def test_no_method_is_missing_from_help_and_a_new_row_is_a_method(capsys, asked, monkeypatch):
    assert cli.main(["sparsify", "--help"]) == 0
    shown = "".join(capsys.readouterr().out.replace("│", "").split())
    assert f"{{attention,{','.join((*METHODS, *TRAINED))},distil,quantize}}" in shown
    monkeypatch.setitem(TRAINED, "fading", Method("random", schedule="cubic", update="train"))
    assert said(["--method", "fading", "--until", "0.5"], asked)[1] == fe.Gradual(method="fading", until=0.5)


# -- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The addition model at 2:4 by Wanda; read only."""
    folder = tmp_path_factory.mktemp("weights") / "run"
    assert cli.main(["sparsify", "addition", *WANDA, "--out", str(folder)]) == 0
    return folder


@pytest.mark.says
def test_a_run_says_what_it_is_and_loads_with_its_masks(run, capsys):
    loaded = fe.load(run)
    loaded.check()
    assert str(loaded) == "addition: prune; density 0.5000 of 196,608 weights"
    assert [row["recipe"] for row in yaml.safe_load((run / "recipe.yaml").read_text())] == ["prune"]
    assert cli.main(["sparsify", "addition", *WANDA, "--out", str(run), "--json"]) == 0  # finished: nothing is done
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"finished", "density", "nnz", "stages"}
    assert (found["finished"], found["nnz"]) == (True, 98304)
    assert cli.main(["sparsify", "addition", *WANDA, "--out", str(run), "--seed", "1"]) == 1
    assert "it holds other stages" in capsys.readouterr().err
    assert cli.main(["sparsify", str(run), "--method", "quantize", "--out", str(run)]) == 2
    assert "another folder" in capsys.readouterr().err


@pytest.mark.says
def test_a_run_is_measured_beside_dense_random_and_magnitude(run, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    assert cli.main(["measure", str(run), "--json", "--out", str(tmp_path / "m.json")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "m.json").read_text()) == found
    assert list(found["models"]) == ["dense", "random", "magnitude", "sparse"]
    assert len(found["matrices"]) == 16
    assert found["total"]["density"] == 0.5
    row = {"cross_entropy", "perplexity", "kl", "accuracy", "density", "flops", "bytes", "model_bytes"}
    assert set(found["models"]["sparse"]) == row
    (tmp_path / "sums.txt").write_text("29+19=048" * 40)
    assert cli.main(["measure", str(run), "--data", str(tmp_path / "sums.txt"), "--context-length", "9"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("cover(16)", "98,304", "random", "magnitude", "sums.txt", "window T = 9"):
        assert part in text


@pytest.mark.says
def test_the_other_verbs_take_a_run_as_the_plain_model_it_is(run, capsys, tmp_path):
    assert cli.main(["info", str(run)]) == 0
    assert "addition: prune" in capsys.readouterr().out
    assert cli.main(["draw", str(run), "--prompt", "29+19=048", "--out", str(tmp_path), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) > 3
    assert cli.main(["sparsify", str(run), "--steps", "1", "--out", str(tmp_path / "x")]) == 2
    assert "a run with sparse weights" in capsys.readouterr().err


@pytest.mark.reproduces
def test_a_paused_distillation_goes_on(run, capsys, tmp_path):
    words = [
        "sparsify",
        str(run),
        "--method",
        "distil",
        "--steps",
        "2",
        "--batch-size",
        "8",
        "--out",
        str(tmp_path / "d"),
    ]
    assert cli.main([*words, "--pause-minutes", "0"]) == 0
    assert "paused: run the same command to go on" in capsys.readouterr().out
    assert cli.main(words) == 0
    said = capsys.readouterr()
    assert "addition: prune, then distil" in said.out
    assert said.err.startswith("step 2  loss ")
    assert fe.load(tmp_path / "d").stages[1] == fe.Distil(steps=2, batch_size=8)


@pytest.mark.says
def test_a_dry_run_prints_model_and_stages_and_writes_nothing(tmp_path, capsys):
    assert cli.main(["sparsify", "addition", *WANDA, "--dry-run", "--out", str(tmp_path / "x")]) == 0
    said = capsys.readouterr().out
    for part in ("L layers", "'structure': '2:4'", f"would write to {tmp_path / 'x'}"):
        assert part in said
    assert list(tmp_path.iterdir()) == []
