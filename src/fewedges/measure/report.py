"""One table for dense, control and sparse: json, markdown and terminal, with the protocol it was made by."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fewedges import store
from fewedges.data.batch import Batch
from fewedges.data.text import token_stream
from fewedges.errors import DataError
from fewedges.measure.quality import Protocol, Quality, dense_edges, minimal_pairs, read_pairs, score_models, windows_of
from fewedges.model.attention import has_patterns, refuse_patterns
from fewedges.model.loading import Loaded
from fewedges.sparsify.attending import rules_of
from fewedges.sparsify.attention.result import Sparse

COLUMNS = {
    "cross_entropy": ("cross-entropy", "{:.4f}"),
    "perplexity": ("perplexity", "{:.2f}"),
    "kl": ("KL to dense", "{:.4f}"),
    "edges_per_query_per_head": ("edges/query/head", "{:.3f}"),
    "density": ("density", "{:.2%}"),
    "minimal_pairs": ("minimal pairs", "{:.3f}"),
    "accuracy": ("exact match", "{:.4f}"),
}


@dataclass(frozen=True, kw_only=True)
class Report:
    """Measured numbers: one row for each model, and how they were measured."""

    rows: dict[str, dict[str, Any]]
    """dense, control (if there is one), sparse; or patterned, a model that attends through fixed patterns."""
    facts: dict[str, Any] = field(default_factory=dict)
    """context_length, tokens, stride, file, sha256, device, versions; patterns, the rule of each layer."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the rows, and beside them the facts."""
        return {**self.rows, **self.facts}

    def json(self) -> str:
        """The same as one json object."""
        return json.dumps(self.to_dict(), indent=2)

    def markdown(self) -> str:
        """A table, and under it the protocol."""
        header, rows = table(self)
        lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
        return "\n".join([*lines, "", self.protocol()])

    def protocol(self) -> str:
        """How it was measured, in one line."""
        known = {"file": None, "tokens": 0, "context_length": 0, "stride": None, "device": None}
        known |= {"precision": "fp32", "kernel": "reference"}
        facts = {**known, **self.facts}
        where = f"window T = {facts['context_length']}, stride {facts['stride']}, {facts['precision']}"
        where += ", hard-gate kernel" if facts["kernel"] == "hard" else ""
        dense = f"all gates open would be {dense_edges(facts['context_length']):g} edges per query per head"
        return f"{facts['tokens']:,} tokens scored of {facts['file']}, {where}, {facts['device']}; {dense}."

    def save(self, path: Path | str) -> Path:
        """Write the json."""
        store.write_text(Path(path), self.json() + "\n")
        return Path(path)

    def __str__(self) -> str:
        return self.markdown()

    def _repr_html_(self) -> str:
        header, rows = table(self)
        cells = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
        head = "".join(f"<th>{cell}</th>" for cell in header)
        return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table><p>{self.protocol()}</p>"


def table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text: the columns that any row has."""
    names = [name for name in COLUMNS if any(name in row for row in report.rows.values())]
    header = ["", *(COLUMNS[name][0] for name in names)]
    return header, [[label, *(_cell(row, name) for name in names)] for label, row in report.rows.items()]


def measure(
    what: Sparse | Loaded,
    data: Path | str | None = None,
    protocol: Protocol | None = None,
    *,
    pairs: Path | str | None = None,
) -> Report:
    """Measure a sparse model beside its dense base and control, or a dense model, or one with fixed patterns, alone.

    `data` is a text file or folder; "addition" needs none. `pairs` is a jsonl of minimal pairs.
    """
    models = models_of(what)
    if len(models) > 1:
        refuse_patterns("measure a sparse model", *(loaded.model for loaded in models.values()))
    dense = models["dense"]
    protocol = default_protocol(what) if protocol is None else protocol
    batches, facts = _batches(dense, data, protocol)
    scores = score_models({label: x.model for label, x in models.items()}, dense.model, batches, protocol)
    rows = {}
    for label, loaded in models.items():
        rows[label] = _row(scores[label], label)
        if pairs is not None:
            found = minimal_pairs(loaded.model, dense.tokenizer, read_pairs(pairs))
            rows[label] |= {"minimal_pairs": found.pop("all"), "paradigms": found}
        if dense.name == "addition" and data is None:
            rows[label]["accuracy"] = _addition_accuracy(loaded)
    scored = {row.pop("tokens") for row in rows.values()}.pop()  # the same for all
    if has_patterns(dense.model):
        rows = {"patterned": rows["dense"]}
        facts |= {"patterns": [repr(rule) for rule in rules_of(dense.model, dense.anatomy)]}
    return Report(rows=rows, facts=_facts(dense, protocol, scored, facts))


def default_protocol(what: Sparse | Loaded, *, context_length: int | None = None, **choices: Any) -> Protocol:
    """The protocol with a window that fits: the recipe's, or 512 tokens, or all the model has."""
    dense = models_of(what)["dense"]
    length = what.recipe.context_length if isinstance(what, Sparse) else 512
    fitting = min(length, dense.anatomy.positions or length)
    return Protocol(context_length=context_length or fitting, **choices)


def models_of(what: Sparse | Loaded) -> dict[str, Loaded]:
    """dense, control and sparse, as far as there are any, in this order."""
    if isinstance(what, Loaded):
        return {"dense": what}
    control = {"control": what.control} if what.control is not None else {}
    return {"dense": what.dense, **control, "sparse": what.loaded}


def _row(quality: Quality, label: str) -> dict[str, Any]:
    row = {
        "tokens": quality.tokens,
        "cross_entropy": quality.cross_entropy,
        "perplexity": quality.perplexity,
        "edges_per_query_per_head": quality.edges_per_query_per_head,
        "density": quality.density,
    }
    if label != "dense":
        row["kl"] = quality.kl
    if quality.edges is not None:
        row["edges"] = [[round(x, 4) for x in layer] for layer in quality.edges.tolist()]
    return row


def _batches(dense: Loaded, data: Path | str | None, protocol: Protocol) -> tuple[list[Batch], dict[str, Any]]:
    """What is scored: windows of a text, or the answer digits of the held-out sums."""
    if data is not None:
        stream, facts = token_stream(data, dense.tokenizer)
        return list(windows_of(stream, protocol)), {"file": str(data), "sha256": facts["sha256"]}
    if dense.name != "addition":
        raise DataError(f"measure {dense.name}", "no text to measure on", "--data FILE")
    from fewedges.data.addition import answer_counts, split

    rows = split().held_out.split(500)
    return [Batch(tokens, answer_counts(tokens)) for tokens in rows], {"file": "held-out sums"}


def _addition_accuracy(loaded: Loaded) -> float:
    from fewedges.data.addition import exact_match, split

    return exact_match(loaded.model, split().held_out)


def _facts(dense: Loaded, protocol: Protocol, tokens: int, facts: dict[str, Any]) -> dict[str, Any]:
    device = store.device_name(next(dense.model.parameters()).device)
    known = {"model": dense.name, "tokens": tokens, "device": device, "versions": store.versions()}
    return {**asdict(protocol), "stride": protocol.stride or protocol.context_length, **facts, **known}


def _cell(row: dict[str, Any], name: str) -> str:
    return COLUMNS[name][1].format(row[name]) if name in row else ""
