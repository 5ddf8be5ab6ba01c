"""What a result says of itself: the run, its files, the call; and results from before it said so."""

import json
import re
from pathlib import Path

import pytest
import torch

import fewedges as fe
from fewedges import cli, store
from fewedges.errors import ModelError
from fewedges.explain.attention_explaining import explain_attention, read_attention_explained, suited
from fewedges.explain.attention_ranking import role_scores
from fewedges.explain.explaining import explain, read_explained
from fewedges.explain.hooks import wire
from fewedges.explain.manifest import call_of, command_of, described, manifest_of
from fewedges.explain.tasks import prompts_for
from fewedges.recipes import CircuitSearch
from fewedges.sparsify.attending import attending
from fewedges.sparsify.attention.result import load
from fewedges.sparsify.fixed_attention import Local

QUICK = CircuitSearch(count=8, points=3, samples=5, steps=1, controls=False)
COMMITTED = Path(__file__).parents[2] / "results" / "circuits"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved run of two small steps, with its control."""
    path = tmp_path_factory.mktemp("manifest") / "run"
    small = {"steps": 2, "batch_size": 16, "context_length": 10, "learning_rate": 1e-6, "bias_learning_rate": 1e-6}
    fe.sparsify(fe.load("addition", probes=False), fe.SparseAttention(**small), out=path, control=True)
    return path


@pytest.fixture(scope="module")
def sparse(folder):
    return load(folder, probes=False)


@pytest.mark.says
def test_a_result_names_the_run_its_files_and_the_call(folder, sparse, tmp_path):
    found = explain(sparse, "addition", QUICK, source=folder, digit="ones")
    path = found.save(tmp_path / "x.json")
    facts = json.loads(path.read_text())["facts"]
    said = facts["manifest"]
    assert said["run"]["name"] == str(folder)
    assert said["run"]["checksum"] == json.loads((folder / "manifest.json").read_text())["checksum"]
    assert {name.split("-")[0] for name in said["run"]["files"]} == {"weights", "gates"}
    for name, digest in said["run"]["files"].items():
        assert store.sha256_of(folder / name) == digest
    assert said["run"]["base"]["name"] == said["models"]["dense"]["name"] == "addition"
    assert set(said["run"]["control"]["files"]) == {p.name for p in (folder / "control").glob("*.safetensors")}
    assert set(said["models"]) == {"dense", "control", "sparse"}
    assert said["call"] == (
        "explain(..., 'addition', CircuitSearch(steps=1, points=3, count=8, samples=5, controls=False), digit='ones')"
    )
    assert re.match(r"20\d\d-\d\d-\d\dT", said["created"])
    assert {"method", "ablation", "seed", "versions", "device"} <= set(facts)
    assert f"run {folder} (manifest {said['run']['checksum'][:12]}), dense base addition" in str(found)
    assert str(read_explained(path)) == str(found)


@pytest.mark.says
def test_attention_edges_say_the_same(folder, sparse):
    found = explain_attention(sparse, "addition", suited(QUICK), source=folder)
    said = found.facts["manifest"]
    assert said["run"]["checksum"] == store.read_manifest(folder)["checksum"]
    assert said["call"].startswith("explain_attention(..., 'addition'")
    assert described(found.facts) in str(found)


@pytest.mark.matches
def test_weights_in_memory_are_told_apart_without_a_folder(sparse):
    before = manifest_of(sparse, None, "")["models"]
    assert manifest_of(sparse, None, "")["run"] is None
    bias = sparse.loaded.anatomy.modules(sparse.model)[0].gate_bias
    with torch.no_grad():
        bias[0] += 1
        after = manifest_of(sparse, None, "")["models"]
        bias[0] -= 1
    assert before["sparse"]["gates_sha256"] != after["sparse"]["gates_sha256"]
    assert before["sparse"]["weights_sha256"] == after["sparse"]["weights_sha256"]
    assert before["sparse"]["weights_sha256"] != before["dense"]["weights_sha256"]


@pytest.mark.matches
@pytest.mark.parametrize(
    "search",
    [
        CircuitSearch(),
        QUICK,
        CircuitSearch(method="learned", mask_density=0.1, key_readers="head", memory=10**8, grid="mib"),
        CircuitSearch(nodes=True, split=False, how="signed", method="exact"),
    ],
)
def test_command_and_call_are_those_that_were_run(search, monkeypatch):
    heard = {}

    def explain(run: cli.Model, *, task: str = "", settings: cli.Search = cli.SEARCH, device: str = "") -> None:
        heard.update(run=run, task=task, settings=settings, device=device)

    monkeypatch.setattr(cli, "VERBS", {"explain": explain, "info": cli.info})
    words = command_of("runs/x", "ioi", search, ["--device", "cuda"])
    assert cli.main(words[1:]) == 0
    assert heard == {"run": "runs/x", "task": "ioi", "settings": search, "device": "cuda"}
    call = call_of("ioi", search, {"corruption": "abc"})
    names = {"explain": lambda *given, **options: (given[1:], options), "CircuitSearch": CircuitSearch}
    assert eval(call, names) == (("ioi", search), {"corruption": "abc"})  # noqa: S307 (our own words)


@pytest.mark.survives
def test_results_without_a_manifest_still_load(sparse, tmp_path):
    found = explain(sparse, "addition", QUICK)
    data = json.loads(found.save(tmp_path / "x.json").read_text())
    del data["facts"]["manifest"], data["rankings"]
    (tmp_path / "x.json").write_text(json.dumps(data))
    old = read_explained(tmp_path / "x.json")
    assert old.ratio() == found.ratio()
    assert "run " not in str(old).splitlines()[1]


@pytest.mark.survives
@pytest.mark.usefixtures("as_users_call")
def test_committed_results_still_load():
    assert "times fewer edges" in str(read_explained(COMMITTED / "circuits-addition.json"))
    for kind, read in (("circuits", read_explained), ("attention", read_attention_explained)):
        paths = [path for path in COMMITTED.rglob(f"{kind}-*.json") if "-first-look" not in path.name]
        assert paths
        assert all(len(read(path).curves) > 1 for path in paths)


@pytest.mark.survives
def test_what_would_read_dense_weights_of_a_model_with_patterns_is_refused():
    loaded = fe.load("addition", probes=False)
    prompts = prompts_for("addition", loaded.tokenizer, 4, 0)
    with attending(loaded.model, loaded.anatomy, Local(2)):
        for verb in (explain, explain_attention):
            with pytest.raises(ModelError, match=r"explain a model: fixed .*detach_patterns_"):
                verb(loaded, "addition", QUICK if verb is explain else suited(QUICK))
        for read in (
            lambda: fe.token_edges(loaded, prompts),
            lambda: fe.attention(loaded, "43+45=088"),
            lambda: role_scores(loaded.model, prompts),
            lambda: wire(loaded.model, loaded.anatomy),
        ):
            with pytest.raises(ModelError, match=r"run attention by .*: fixed"):
                read()
    assert fe.attention(loaded, "43+45=088")["dense"].open.any()
