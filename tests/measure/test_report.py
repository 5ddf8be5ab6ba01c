"""The report: fixed keys, honest protocol, and the numbers of quality.py in their places."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import fewedges as fe
from fewedges.data import addition as sums
from fewedges.data.text import token_stream
from fewedges.errors import DataError, ModelError
from fewedges.measure.quality import Protocol, score_tokens, windows_of
from fewedges.measure.report import COLUMNS, Report, default_protocol, models_of, table
from fewedges.sparsify.attending import attending, patterns
from fewedges.sparsify.attention.result import gates_only
from fewedges.sparsify.fixed_attention import BigBird, Fixed, Heads, Local, Strided
from fewedges.sparsify.hashing import HashedAttention
from tiny import tiny_loaded, tiny_model

LENGTH = 8
ROW = {"cross_entropy", "perplexity", "edges_per_query_per_head", "density"}


@pytest.fixture
def text(tmp_path):
    digits = np.random.default_rng(0).integers(0, 10, 200)
    path = tmp_path / "digits.txt"
    path.write_text("".join(map(str, digits)))
    return path


def sparse_model(*, control=False):
    dense = replace(tiny_loaded("llama"), tokenizer=sums.tokenizer())
    sparse = gates_only(dense, -0.1)
    return replace(sparse, control=dense.with_model(tiny_model("llama", seed=1))) if control else sparse


def measured(text, *, control=False, **choices):
    protocol = Protocol(**({"context_length": LENGTH, "batch_size": 4} | choices))
    return fe.measure(sparse_model(control=control), text, protocol)


@pytest.mark.says
@pytest.mark.parametrize("control", [False, True])
def test_the_json_has_its_fixed_keys(text, control):
    found = json.loads(measured(text, control=control).json())
    labels = ["dense", "control", "sparse"] if control else ["dense", "sparse"]
    assert list(found)[: len(labels)] == labels
    assert found["dense"].keys() == ROW
    assert found["sparse"].keys() == ROW | {"kl", "edges"}
    if control:
        assert found["control"].keys() == ROW | {"kl"}
    facts = {"context_length", "tokens", "stride", "max_tokens", "batch_size", "precision", "kernel", "file", "sha256"}
    assert found.keys() - set(labels) == facts | {"model", "device", "versions"}
    assert found["stride"] == found["context_length"] == LENGTH  # resolved, not None
    assert all(isinstance(found[label][name], float) for label in labels for name in ROW)


@pytest.mark.matches
def test_every_number_is_that_of_its_model(text):
    sparse = sparse_model(control=True)
    protocol = Protocol(context_length=LENGTH, batch_size=4)
    report = fe.measure(sparse, text, protocol)
    stream, facts = token_stream(text, sparse.tokenizer)
    for label, loaded in models_of(sparse).items():
        wanted = score_tokens(loaded.model, sparse.dense.model, windows_of(stream, protocol), protocol)
        row = report.rows[label]
        assert {name: row[name] for name in ROW} == {name: getattr(wanted, name) for name in ROW}
        assert row.get("kl", 0.0) == wanted.kl
    assert report.facts["tokens"] == wanted.tokens == len(stream) // LENGTH * (LENGTH - 1)
    assert report.facts["sha256"] == facts["sha256"]
    assert report.rows["dense"]["density"] == report.rows["control"]["density"] == 1
    assert report.rows["dense"]["edges_per_query_per_head"] == (LENGTH + 1) / 2
    assert 0.05 < report.rows["sparse"]["density"] < 0.95
    edges = np.array(report.rows["sparse"]["edges"])
    assert edges.shape == (2, 4)
    assert edges.mean() == pytest.approx(report.rows["sparse"]["edges_per_query_per_head"], abs=5e-5)  # four decimals


ROUNDED = 1.2e-6  # measured 1.9e-8 here, 3.1e-7 on another machine: an ulp of float32 at 4.3 nats is 4.8e-7


@pytest.mark.matches
def test_the_batch_size_changes_no_number(text):
    one, many = (measured(text, batch_size=size).rows for size in (1, 16))
    for label in one:
        for name in ROW - {"perplexity"}:
            assert one[label][name] == pytest.approx(many[label][name], abs=ROUNDED), name


@pytest.mark.reproduces
def test_measuring_twice_gives_the_same_report(text):
    assert measured(text).json() == measured(text).json()


@pytest.mark.says
def test_the_markdown_has_a_table_and_the_protocol(text):
    lines = measured(text, control=True, stride=4, max_tokens=100).markdown().splitlines()
    names = "cross-entropy | perplexity | KL to dense | edges/query/head | density"
    assert lines[0] == f"|  | {names} |"
    assert set(lines[1]) == {"|", " ", "-"}
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| dense", "| control", "| sparse"]
    assert lines[2].split(" | ")[3] == ""  # the dense model has no KL to itself
    assert lines[2].endswith("| 4.500 | 100.00% |")
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert lines[5] == ""
    protocol = lines[6]
    for part in ("99 tokens scored of", text.name, "window T = 8", "stride 4", "fp32", "CPU", "would be 4.5 edges per"):
        assert part in protocol


@pytest.mark.says
def test_a_report_prints_as_markdown_and_shows_as_html(text):
    report = measured(text)
    assert str(report) == report.markdown()
    html = report._repr_html_()
    assert html.count("<tr>") == 3
    assert html.count("<td>") == html.count("</td>") == 2 * 6
    assert report.protocol() in html


@pytest.mark.says
def test_only_columns_that_some_row_has_are_shown():
    header, rows = table(Report(rows={"dense": {"density": 1.0}, "sparse": {"density": 0.01, "minimal_pairs": 0.75}}))
    assert header == ["", "density", "minimal pairs"]
    assert rows == [["dense", "100.00%", ""], ["sparse", "1.00%", "0.750"]]
    assert next(iter(COLUMNS)) == "cross_entropy"


@pytest.mark.reproduces
def test_a_saved_report_is_its_json(text, tmp_path):
    report = measured(text)
    path = report.save(tmp_path / "report.json")
    assert json.loads(path.read_text()) == json.loads(report.json()) == json.loads(json.dumps(report.to_dict()))


@pytest.mark.matches
def test_minimal_pairs_are_measured_for_every_model(text, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"paradigm": p, "good": "12+34=046", "bad": b} for p, b in (("a", "12+34=046"), ("b", "1"))]
    pairs.write_text("\n".join(map(json.dumps, rows)))
    report = fe.measure(sparse_model(), text, Protocol(context_length=LENGTH), pairs=pairs)
    for row in report.rows.values():
        assert row["paradigms"] == {"a": 0.5, "b": 0.0}  # a tie; a longer sentence is less probable
        assert row["minimal_pairs"] == 0.25
    assert "minimal pairs" in report.markdown()


@pytest.mark.matches
def test_a_dense_model_alone_has_one_row(text):
    report = fe.measure(sparse_model().dense, text, Protocol(context_length=LENGTH))
    assert list(report.rows) == ["dense"]
    assert "KL" not in report.markdown()


@pytest.mark.matches
def test_addition_is_measured_without_a_text_by_its_answers(addition):
    sparse = gates_only(addition, 30.0)
    report = fe.measure(sparse)
    assert report.facts["file"] == "held-out sums"
    assert report.facts["tokens"] == 3 * 2000
    assert report.facts["context_length"] == 10
    assert report.rows["dense"]["accuracy"] > 0.99
    assert report.rows["dense"]["edges_per_query_per_head"] == 5.5
    assert report.rows["sparse"]["density"] <= 1
    assert "exact match" in report.markdown()


@pytest.mark.matches
def test_the_window_fits_the_model_unless_one_is_asked_for():
    dense = sparse_model().dense
    assert default_protocol(dense).context_length == 64
    assert default_protocol(sparse_model()).context_length == 64  # the recipe's 512 do not fit
    assert default_protocol(dense, context_length=16, stride=4) == Protocol(context_length=16, stride=4)


@pytest.mark.survives
def test_a_model_without_its_own_text_needs_one(tmp_path):
    with pytest.raises(DataError, match=r"measure tiny-llama: no text to measure on.*--data FILE"):
        fe.measure(sparse_model())
    with pytest.raises(DataError, match=r"absent\.txt: no such file"):
        fe.measure(sparse_model(), tmp_path / "absent.txt")


@pytest.mark.stays
def test_measuring_changes_no_model(text):
    sparse = sparse_model()
    before = {name: tensor.clone() for name, tensor in sparse.model.state_dict().items()}
    implementation = sparse.dense.model.config._attn_implementation
    fe.measure(sparse, text, Protocol(context_length=LENGTH))
    assert all(torch.equal(tensor, before[name]) for name, tensor in sparse.model.state_dict().items())
    assert sparse.dense.model.config._attn_implementation == implementation


RULES = [Heads((Local(3), Strided(3, "second"), Fixed(4, 1), BigBird(1, 1))), Local(2)]


@pytest.mark.matches
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["llama", "mistral-window"])
@pytest.mark.parametrize("run", ["masked", "flex"])
def test_the_edges_of_fixed_patterns_are_those_they_keep(text, name, run):
    loaded = replace(tiny_loaded(name), tokenizer=sums.tokenizer())
    protocol = Protocol(context_length=LENGTH, batch_size=4)
    dense = fe.measure(loaded, text, protocol)
    with attending(loaded.model, loaded.anatomy, RULES, run=run):
        found = fe.measure(loaded, text, protocol)
        kept = [pattern.mask() for pattern in patterns(loaded.model, loaded.anatomy, LENGTH)]
    if name == "mistral-window":
        kept = [mask.triu(-3) for mask in kept]  # the model's own window of 4 cuts them further
    wanted = torch.stack([mask.sum((-1, -2)).expand(4) for mask in kept]) / LENGTH  # (L, H)
    row = found.rows["patterned"]
    assert list(found.rows) == ["patterned"]  # nothing is said of the dense model, nor of a KL to it
    assert row.keys() == ROW | {"edges"}
    assert row["edges"] == [[round(x, 4) for x in layer] for layer in wanted.tolist()]
    assert row["edges_per_query_per_head"] == pytest.approx(float(wanted.mean()), rel=1e-6)  # float32
    assert row["density"] == pytest.approx(float(wanted.mean()) / ((LENGTH + 1) / 2), rel=1e-6)
    assert abs(row["cross_entropy"] - dense.rows["dense"]["cross_entropy"]) > 0.001  # measured 0.006 and more
    assert found.facts["patterns"] == [repr(rule) for rule in RULES]
    assert dense.rows["dense"]["density"] == 1
    assert "patterns" not in dense.facts


@pytest.mark.matches
def test_the_edges_of_a_router_are_those_it_found(text):
    loaded, seen = replace(tiny_loaded("llama"), tokenizer=sums.tokenizer()), []

    class Noted(HashedAttention):
        def route(self, query, key, allowed):
            seen.append((super().route(query, key, allowed).mask() & allowed).sum(-1).float().mean(-1))  # (B, H)
            return super().route(query, key, allowed)

    with attending(loaded.model, loaded.anatomy, [Noted(4, rounds=1), Local(2)]):
        row = fe.measure(loaded, text, Protocol(context_length=LENGTH, batch_size=4)).rows["patterned"]
    assert row["edges"][0] == pytest.approx(torch.cat(seen).mean(0).tolist(), abs=6e-5)  # four decimals
    assert min(row["edges"][0]) < 4


@pytest.mark.survives
def test_a_sparse_model_with_patterns_is_no_comparison(text):
    sparse = sparse_model(control=True)
    for loaded in (sparse.dense, sparse.control):
        with (
            attending(loaded.model, loaded.anatomy, Local(2)),
            pytest.raises(ModelError, match="measure a sparse model: fixed"),
        ):
            fe.measure(sparse, text, Protocol(context_length=LENGTH))
