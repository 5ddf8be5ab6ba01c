"""The command line: help one can trust, exit codes one can script, json whose keys stay.

Seven processes are started in all; the rest calls `main`.
"""

import functools
import inspect
import json
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fewedges import cli, demo
from fewedges.data.addition import tokenizer
from fewedges.errors import FewedgesError, Interrupted
from fewedges.explain.attention_explaining import read_attention_explained
from fewedges.explain.exchange import read_eap_ig
from fewedges.explain.explaining import read_explained
from fewedges.explain.positions import read_token_edges
from fewedges.recipes import SparseAttention, read_recipe, write_recipe
from tiny import tiny_model

QUICK = ["--steps", "5", "--batch-size", "16", "--context-length", "10", "--log-every", "1", "--warmup-steps", "0"]
SUMS = "29+19=048" + "43+45=088" * 20
VERBS = ("demo", "get", "info", "sparsify", "measure", "draw", "explain", "hardware")


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A sparse addition run of five steps, with its control; read only."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert cli.main(["sparsify", "addition", *QUICK, "--control", "--out", str(folder), "--json"]) == 0
    return folder


@pytest.fixture
def heard(monkeypatch):
    """Every verb replaced by one that only remembers what it was called with."""
    calls = []

    def listening(name, verb):
        @functools.wraps(verb)
        def only(*args, **kwargs):
            calls.append((name, inspect.signature(verb).bind(*args, **kwargs).arguments))

        return only

    replaced = {name: listening(name, verb) for name, verb in cli.VERBS.items()}
    monkeypatch.setattr(cli, "VERBS", replaced)
    monkeypatch.setattr(cli, "sparsify", replaced["sparsify"])
    return calls


def outside(*words):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=60)


# -- help ------------------------------------------------------------------------------------------------------


@pytest.mark.says
def test_help_takes_under_a_second_in_a_fresh_process():
    """Processor time of the best of three, so that a busy machine does not fail it."""

    def once():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run = outside("-m", "fewedges", "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert (run.returncode, run.stderr) == (0, "")
        assert all(verb in run.stdout for verb in VERBS)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(once() for _ in range(3)) < 1.0  # measured 0.25; 0.46 by the clock on two slow cores


@pytest.mark.says
def test_help_of_a_verb_imports_no_torch():
    script = "import sys; from fewedges.cli import main; assert main(['sparsify', '--help']) == 0; "
    script += "print([m for m in ('torch', 'transformers', 'numpy', 'matplotlib') if m in sys.modules])"
    run = outside("-c", script)
    assert run.stdout.splitlines()[-1] == "[]", run.stderr


@pytest.mark.says
def test_an_error_of_a_fresh_process_has_an_exit_code_and_no_traceback():
    run = outside("-m", "fewedges", "sparsify", "addition", "--out", "nowhere")
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr == ("error: fewedges sparsify: no budget. Try: --steps 2000, --tokens 50000000 or --minutes 30\n")


@pytest.mark.says
def test_the_verbs_are_frozen():
    assert tuple(cli.VERBS) == VERBS


@pytest.mark.says
@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_has_an_example_that_parses(verb, capsys, heard):
    assert cli.main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    example = next(line.strip() for line in text.splitlines() if line.strip().startswith(f"Example: fewedges {verb}"))
    _, _, *words = shlex.split(example)
    assert cli.main(words) == 0, capsys.readouterr().err
    assert [name for name, _ in heard] == [verb]
    assert all(f"--{name.replace('_', '-')}" in text for name in keywords(cli.VERBS[verb]) if name != "settings")


def keywords(verb):
    parameters = inspect.signature(verb).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


@pytest.mark.says
def test_the_help_of_sparsify_shows_every_field_of_the_recipe_and_its_help(capsys):
    import dataclasses

    assert cli.main(["sparsify", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert [f.name for f in dataclasses.fields(SparseAttention) if f"--{f.name.replace('_', '-')}" not in text] == []
    assert "Price of one edge per query per head, in nats, at step 0." in text


# -- usage and errors --------------------------------------------------------------------------------------------


@pytest.mark.survives
@pytest.mark.parametrize(
    "words",
    [
        [],
        ["prune"],
        ["--version"],
        ["sparsify", "addition"],
        ["sparsify", "addition", "--out", "x", "--stepz", "3"],
        ["sparsify", "addition", "--out", "x", "--steps", "three"],
        ["sparsify", "addition", "--out", "x", "--steps", "1.5"],
        ["sparsify", "addition", "--out", "x", "--steps", "0"],
        ["sparsify", "addition", "--out", "x", "--steps", "3", "--train", "everything"],
        ["sparsify", "addition", "--out", "x", "--steps", "3", "--kl-margin", "None", "--loss-margin", "None"],
        ["sparsify", "addition", "--out", "x", "--recipe"],
        ["sparsify", "addition", "--out", "x", "--recipe", "no-such.yaml"],
        ["measure"],
        ["measure", "a", "b"],
        ["draw", "addition"],
        ["get", "gpt5"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2_and_says_what_is_wrong(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err) > 20
    assert "Traceback" not in said.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.says
def test_a_misspelt_flag_is_answered_with_the_right_one(capsys):
    assert cli.main(["sparsify", "addition", "--out", "x", "--bach-size", "4"]) == 2
    assert "--batch-size" in capsys.readouterr().err


@pytest.mark.survives
@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["info", "no/such/model"], "load no/such/model"),
        (["info", "model.gguf"], "no such file"),
        (["info", "smollm2"], "fewedges get smollm2"),
        (["measure", "no/such/run"], "load no/such/run"),
        (["measure", "addition", "--data", "no-such.txt"], "no such file"),
        (["measure", "addition", "--context-length", "1"], "context_length"),
        (["draw", "addition", "--prompt", ""], "prompt ''"),
        (["draw", "addition", "--prompt", "hello"], "tokenizer"),
        (["sparsify", "no/such/model", "--steps", "1", "--out", "x"], "load no/such/model"),
        (["sparsify", "addition", "--steps", "1", "--out", "x", "--data", "nothing.txt"], "no such file"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_an_error_is_exit_code_1_with_what_was_asked_found_and_to_try(words, found, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 1
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert found in line
    assert ". Try: " in line
    assert "Traceback" not in said.err
    with pytest.raises(FewedgesError):
        cli.main([*words, "--debug"])


@pytest.mark.survives
@pytest.mark.parametrize(("code", "name"), [(130, "SIGINT"), (143, "SIGTERM")])
def test_a_signal_gives_its_own_exit_code(monkeypatch, capsys, code, name):
    def stopped(*args, **kwargs):
        raise Interrupted(name, "stopped after step 3, saved in run", "the same command again", code=code)

    monkeypatch.setattr(demo, "run_demo", stopped)
    assert cli.main(["demo"]) == code
    assert "saved in run" in capsys.readouterr().err


@pytest.mark.survives
def test_control_c_before_there_is_anything_to_save_is_130(monkeypatch, capsys):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", stopped)
    assert cli.main(["demo"]) == 130
    assert "Traceback" not in capsys.readouterr().err


# -- recipes -----------------------------------------------------------------------------------------------------


@pytest.mark.stays
@pytest.mark.parametrize("form", ["--recipe FILE", "--recipe=FILE"])
def test_flags_override_the_recipe_file_and_the_rest_of_it_stays(tmp_path, heard, form):
    given = SparseAttention(steps=7, learning_rate=0.5, train="lora", layer_weights=(1.0, 2.0), loss_margin=None)
    write_recipe(given, tmp_path / "r.yaml")
    words = form.replace("FILE", str(tmp_path / "r.yaml")).split()
    assert cli.main(["sparsify", "addition", "--out", "x", *words, "--steps", "9", "--bias", "constant"]) == 0
    ((_, arguments),) = heard
    import dataclasses

    assert arguments["settings"] == dataclasses.replace(given, steps=9, bias="constant")


@pytest.mark.survives
def test_a_recipe_file_with_an_unknown_field_is_refused_by_its_name(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("steps: 3\nlearning_rat: 0.1\n")
    assert cli.main(["sparsify", "addition", "--out", str(tmp_path / "x"), "--recipe", str(tmp_path / "r.yaml")]) == 2
    assert "learning_rat" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.says
def test_a_dry_run_prints_model_and_recipe_and_writes_nothing(tmp_path, capsys):
    assert cli.main(["sparsify", "addition", *QUICK, "--dry-run", "--out", str(tmp_path / "x")]) == 0
    said = capsys.readouterr().out
    for part in ("addition", "L layers", "probes passed", "'steps': 5", f"would write to {tmp_path / 'x'}"):
        assert part in said
    assert list(tmp_path.iterdir()) == []


# -- the verbs ---------------------------------------------------------------------------------------------------


@pytest.mark.says
def test_sparsify_leaves_model_log_recipe_curve_and_control(run):
    for name in (
        "manifest.json",
        "README.md",
        "log.jsonl",
        "recipe.yaml",
        "curve.svg",
        "curve.png",
        "control/manifest.json",
    ):
        assert (run / name).stat().st_size > 0
    assert read_recipe(run / "recipe.yaml").steps == 5
    assert len((run / "log.jsonl").read_text().splitlines()) == 5


@pytest.mark.reproduces
def test_the_same_sparsify_command_again_returns_the_finished_run(run, capsys):
    words = ["sparsify", "addition", *QUICK, "--control", "--out", str(run), "--json"]
    before = json.loads((run / "manifest.json").read_text())["files"]
    assert cli.main(words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) == {"finished", "last", "files"}
    assert (printed["finished"], printed["last"]["step"]) == (True, 5)
    assert json.loads((run / "manifest.json").read_text())["files"] == before


@pytest.mark.survives
def test_another_recipe_in_the_same_folder_is_refused_and_the_old_recipe_stays(run, capsys):
    words = ["sparsify", "addition", *QUICK, "--seed", "5", "--control", "--out", str(run)]
    assert cli.main(words) == 1
    assert "seed" in capsys.readouterr().err
    assert read_recipe(run / "recipe.yaml").seed == 0


@pytest.mark.says
def test_a_paused_run_says_so_and_how_to_go_on(tmp_path, capsys):
    words = ["sparsify", "addition", *QUICK, "--pause-minutes", "0", "--out", str(tmp_path / "run")]
    assert cli.main(words) == 0
    said = capsys.readouterr()
    assert "paused: run the same command to go on" in said.out
    assert said.err.startswith("step 1  loss ")
    assert "edges/query/head" in said.err


@pytest.mark.says
def test_info_prints_the_anatomy_or_one_json_object(run, capsys):
    assert cli.main(["info", "addition"]) == 0
    assert "V vocabulary            13" in capsys.readouterr().out
    assert cli.main(["info", str(run), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert set(said) == {"name", "anatomy", "probes"}
    assert said["anatomy"]["family"] == "gpt2"
    assert cli.main(["info", str(run)]) == 0
    assert "sparse addition" in capsys.readouterr().out


ROW = {"cross_entropy", "edges_per_query_per_head", "density"}


@pytest.mark.says
def test_measure_prints_json_whose_keys_stay(run, tmp_path, capsys):
    (tmp_path / "sums.txt").write_text(SUMS)
    words = ["measure", str(run), "--data", str(tmp_path / "sums.txt"), "--json", "--out", str(tmp_path / "m.json")]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    found = json.loads(text)
    assert json.loads((tmp_path / "m.json").read_text()) == found
    assert {"dense", "control", "sparse", "context_length", "tokens"} <= set(found)
    for name in ("dense", "control", "sparse"):
        assert set(found[name]) >= ROW | ({"kl"} if name == "sparse" else set())
    assert found["context_length"] == 10
    assert found["tokens"] == 9 * ((len(SUMS) + 1) // 10)  # whole windows of text and separator, less their first token
    assert found["dense"]["edges_per_query_per_head"] == 5.5
    assert 0 < found["sparse"]["edges_per_query_per_head"] < 5.5
    assert found["sparse"]["density"] == pytest.approx(found["sparse"]["edges_per_query_per_head"] / 5.5)


@pytest.mark.says
def test_measure_of_addition_needs_no_data_and_prints_a_table(run, capsys):
    assert cli.main(["measure", str(run)]) == 0
    said = capsys.readouterr().out
    for part in ("dense", "control", "sparse", "KL to", "exact", "held-out sums", "5.5 edges per query per head"):
        assert part in " ".join(said.split())


@pytest.mark.says
def test_a_dense_model_can_be_measured_alone_or_through_constant_gates(tmp_path, capsys):
    (tmp_path / "sums.txt").write_text(SUMS)
    words = ["measure", "addition", "--data", str(tmp_path / "sums.txt"), "--json"]
    assert cli.main(words) == 0
    assert not {"sparse", "control"} & set(json.loads(capsys.readouterr().out))
    assert cli.main([*words, "--gate-bias", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["sparse"]["kl"] > 0.01


@pytest.mark.says
def test_a_published_sparse_checkpoint_is_measured_through_its_gates(tmp_path, capsys):
    """The path of `fewedges measure flodraye/sparse-olmo7b --gate-bias 0`: an OlmoForCausalLM with gates score > 0."""
    tiny_model("olmo").save_pretrained(tmp_path / "olmo")
    tokenizer().save_pretrained(tmp_path / "olmo")
    (tmp_path / "sums.txt").write_text(SUMS)
    words = [
        "measure",
        str(tmp_path / "olmo"),
        "--data",
        str(tmp_path / "sums.txt"),
        "--context-length",
        "16",
        "--json",
    ]
    assert cli.main([*words, "--gate-bias", "0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["sparse"]["edges_per_query_per_head"] < found["dense"]["edges_per_query_per_head"] == 8.5
    assert found["sparse"]["kl"] > 0.01


@pytest.mark.survives
@pytest.mark.parametrize("content", ["Hello, world, hello", "29+19=048\n", "12", ""], ids=repr)
def test_text_that_addition_cannot_read_is_a_clear_error(run, tmp_path, capsys, content):
    (tmp_path / "text.txt").write_text(content)
    assert cli.main(["measure", str(run), "--data", str(tmp_path / "text.txt")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert ". Try: " in said


@pytest.mark.survives
def test_a_sparse_run_is_not_measured_through_other_gates(run, capsys):
    assert cli.main(["measure", str(run), "--gate-bias", "0"]) in (1, 2)
    assert "gate biases of its own" in capsys.readouterr().err


@pytest.mark.says
def test_draw_writes_connectivity_maps_and_curve(run, tmp_path, capsys):
    assert cli.main(["draw", str(run), "--prompt", "29+19=048", "--out", str(tmp_path / "p"), "--json"]) == 0
    files = [Path(name) for name in json.loads(capsys.readouterr().out)]
    assert {file.stem.split("-")[0] for file in files} == {"connectivity", "heads", "curve"}
    assert {file.suffix for file in files} == {".svg", ".png"}
    assert all(file.parent == tmp_path / "p" and file.stat().st_size > 1000 for file in files)


@pytest.mark.survives
@pytest.mark.parametrize("words", [["demo", "--dry-run"], ["--help"]])
def test_a_reader_that_has_seen_enough_is_no_error(words):
    run = subprocess.Popen(
        [sys.executable, "-m", "fewedges", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    run.stdout.close()
    _, said = run.communicate(timeout=60)
    assert (run.returncode, said) == (141, "")


# -- the demo ----------------------------------------------------------------------------------------------------


@pytest.mark.says
def test_the_demo_prints_one_json_object_whose_keys_stay(tmp_path, capsys, monkeypatch):
    asked = []

    def five_steps(seed=0):
        asked.append(seed)
        return SparseAttention(steps=5, batch_size=16, context_length=10, log_every=1, warmup_steps=0, seed=seed)

    monkeypatch.setattr(demo, "demo_recipe", five_steps)
    assert cli.main(["demo", "--out", str(tmp_path / "demo"), "--json", "--seed", "3"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    found = json.loads(said.out)
    assert asked == [3]
    assert {"dense", "sparse", "seconds", "files"} <= set(found)
    for name in ("dense", "sparse"):
        assert {"accuracy", "edges_per_query_per_head"} <= set(found[name])
        assert 0 <= found[name]["accuracy"] <= 1
    assert found["dense"]["edges_per_query_per_head"] == 5.5 > found["sparse"]["edges_per_query_per_head"]
    files = [Path(name) for name in found["files"]]
    assert all(file.stat().st_size > 500 for file in files)
    assert {"manifest.json", "report.json", "curve-light.svg"} <= {file.name for file in files}


@pytest.mark.says
def test_a_dry_run_of_the_demo_prints_its_recipe_and_writes_nothing(tmp_path, capsys):
    assert cli.main(["demo", "--dry-run", "--out", str(tmp_path / "demo"), "--seed", "7"]) == 0
    said = capsys.readouterr().out
    assert "would train the addition model" in said
    assert "'seed': 7" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.matches
def test_hiding_the_first_token_leaves_out_just_the_edges_of_later_queries_to_it():
    from fewedges.model.capture import Maps
    from fewedges.pictures import _without_first

    opened = np.tril(np.ones((2, 3, 4, 4), dtype=bool))
    shown = _without_first(Maps(list("abcd"), opened / 4, opened))
    gone = opened & ~shown.open
    assert gone[..., 1:, 0].all()
    assert gone.sum() == 2 * 3 * 3
    assert (shown.weights == opened / 4 * shown.open).all()
    assert opened.sum() == 2 * 3 * 10  # what was given is left alone


@pytest.mark.says
def test_explain_writes_which_token_reads_which(tmp_path, capsys):
    words = ["explain", "addition", "--task", "addition", "--count", "8", "--points", "3", "--samples", "5"]
    words += ["--no-controls", "--no-complements", "--positions"]
    assert cli.main(words) in (1, 2)
    assert "--out FOLDER" in capsys.readouterr().err
    assert cli.main([*words, "--out", str(tmp_path)]) == 0
    assert str(tmp_path / "maps-addition-light.svg") in capsys.readouterr().out
    found = read_token_edges(tmp_path / "positions-addition-dense.json")
    assert len(found.edges) > 0
    assert {edge[0] for edge in found.edges.tolist()} <= set(range(8))


@pytest.mark.says
def test_explain_counts_attention_edges_where_it_is_asked_to(tmp_path, capsys):
    words = ["explain", "addition", "--task", "addition", "--count", "8", "--points", "3", "--samples", "5"]
    words += ["--steps", "1", "--edges", "attention", "--no-controls"]
    assert cli.main([*words, "--positions", "--out", str(tmp_path)]) in (1, 2)
    assert "edges=attention" in capsys.readouterr().err
    assert cli.main([*words, "--out", str(tmp_path)]) == 0
    assert str(tmp_path / "attention-circuits-addition-light.png") in capsys.readouterr().out
    found = read_attention_explained(tmp_path / "attention-addition.json")
    assert found.curves["dense"].edges[-1] > found.curves["dense"].edges[0] > 0


EXPLAIN = ["explain", "addition", "--points", "3", "--samples", "5", "--no-controls", "--no-complements"]


@pytest.mark.says
def test_explain_takes_all_rows_of_a_file_and_exports_circuits(tmp_path, capsys):
    sums = [(a, b, f"{a + b:03d}") for a, b in ((12, 35), (27, 41), (33, 18), (52, 19), (64, 23), (71, 26))]
    rows = [
        {"clean": f"{a}+{b}=0", "corrupt": f"{a}+{b + 20}=0", "answers": [s[1]], "wrong": [f"{a + b + 20:03d}"[1]]}
        for a, b, s in sums
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [*EXPLAIN, "--task", str(tmp_path / "own.jsonl"), "--export", str(tmp_path / "circuits")]
    assert cli.main([*words, "--out", str(tmp_path), "--positions", "--task-options", "metric=max_diff"]) == 0
    exported = tmp_path / "circuits" / "own-dense.json"
    assert str(exported) in capsys.readouterr().out
    found = read_explained(tmp_path / "circuits-own.json")
    assert list(read_eap_ig(exported).graph.names(read_eap_ig(exported).mask)) == found.circuits["dense"]
    assert (found.facts["count"], found.facts["prompts"]["metric"]) == (6, "max_diff")
    call = shlex.split(found.facts["manifest"]["call"])
    assert call[:2] == ["fewedges", "explain"]
    assert {"metric=max_diff", str(tmp_path / "own.jsonl"), "--no-controls"} <= set(call)


@pytest.mark.says
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--method", "exact", "--nodes", "--count", "4"], "whole heads and MLPs"),
        (["--method", "learned", "--mask-steps", "2", "--count", "4", "--no-split"], "learned"),
        (["--task-options", "digit=ones", "held_out=false", "--count", "4"], "addition (ones)"),
    ],
)
def test_explain_reaches_every_method_and_the_options_of_tasks(flags, said, capsys):
    assert cli.main([*EXPLAIN, "--task", "addition", *flags]) == 0
    assert said in capsys.readouterr().out


@pytest.mark.survives
@pytest.mark.parametrize(
    "flags",
    [
        ["--edges", "attention", "--export", "x"],
        ["--edges", "attention", "--nodes"],
        ["--edges", "attention", "--method", "learned"],
        ["--method", "exact", "--gim"],
        ["--task-options", "digit"],
    ],
)
def test_what_explain_cannot_do_together_is_refused(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*EXPLAIN, "--task", "addition", "--count", "8", *flags]) in (1, 2)
    assert capsys.readouterr().err.startswith("error: ")
    assert list(tmp_path.glob("x*")) == []
