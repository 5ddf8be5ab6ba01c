"""What sparse weights cost and what they buy: a row for every matrix, and the loss beside honest controls.

A control spends the same budget by a simpler method: every matrix keeps as many entries, in the same structure, but
those drawn at random or of the largest magnitude, and is rounded alike: it takes as many bytes. Controls are not
calibrated and not distilled, so a result that was distilled shows what both together bought.
"""

import copy
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import torch

from fewedges import store
from fewedges.errors import RecipeError
from fewedges.measure import report
from fewedges.measure.quality import Protocol, score_tokens
from fewedges.measure.report import Report, default_protocol
from fewedges.model.attention import refuse_patterns
from fewedges.model.loading import Loaded
from fewedges.sparsify.attention.result import Sparse
from fewedges.sparsify.masks import Masks
from fewedges.sparsify.matrices import bytes_of, matrices_of, write_
from fewedges.sparsify.pattern import Pattern, of_kind
from fewedges.sparsify.pixelated import is_pixelated
from fewedges.sparsify.pruned import Pruned, begin
from fewedges.sparsify.pruning import prune_
from fewedges.sparsify.quantizing import quantize_
from fewedges.sparsify.recovery import dense_of
from fewedges.sparsify.rounding import Rounded, rounded
from fewedges.sparsify.score import SCORES, Evidence
from fewedges.sparsify.select import select
from fewedges.sparsify.shrink import keep_layers
from fewedges.weight_recipes import Distil, Prune, Quantize, Structure

CONTROLS = ("random", "magnitude")
COVERS = (16, 32, 64)
UNKNOWN = "unknown"
"""What stands for bytes that cannot be told."""
MODELS = {
    "cross_entropy": ("cross-entropy", "{:.4f}"),
    "perplexity": ("perplexity", "{:.2f}"),
    "kl": ("KL to dense", "{:.4f}"),
    "accuracy": ("exact match", "{:.4f}"),
    "density": ("density", "{:.4f}"),
    "flops": ("FLOPs a token", "{:,}"),
    "bytes": ("bytes of matrices", "{:,}"),
    "model_bytes": ("bytes of model", "{:,}"),
}


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Numbers of a model with sparse weights: by matrix, in all, and of the model beside dense and controls."""

    matrices: list[dict[str, Any]]
    """name, shape, parameters, nnz, flops (2 a kept entry: one token), density, cover(16), cover(32), cover(64), bytes
    (None: cannot be told)."""
    models: dict[str, dict[str, Any]]
    """dense, random, magnitude, sparse: density, flops and bytes of the matrices, and of a scored text the loss."""
    facts: dict[str, Any] = field(default_factory=dict)
    """stages, base; of the text: context_length, tokens, file; device, versions."""

    def total(self) -> dict[str, Any]:
        """The sums over matrices (None of what is not known); densities and covers are those of all together."""
        summed: dict[str, Any] = {
            name: sum(row[name] for row in self.matrices) for name in ("parameters", "nnz", "flops")
        }
        summed["bytes"] = _sum(row["bytes"] for row in self.matrices)
        covers = {f"cover({b})": _cover(self.matrices, b) for b in COVERS}
        return {**summed, "density": summed["nnz"] / summed["parameters"], **covers}

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"matrices": self.matrices, "total": self.total(), "models": self.models, **self.facts}

    def json(self) -> str:
        """The same as one json object."""
        return json.dumps(self.to_dict(), indent=2)

    def tables(self) -> list[tuple[list[str], list[list[str]]]]:
        """Header and rows as text: the matrices with their total, then the models."""
        names = [name for name in MODELS if any(name in row for row in self.models.values())]
        cells = [[label, *(_cell(row, name) for name in names)] for label, row in self.models.items()]
        matrices = [_line(row["name"], row) for row in self.matrices]
        header = ["matrix", "shape", "parameters", "nnz", "density", *(f"cover({b})" for b in COVERS), "bytes"]
        return [
            (header, [*matrices, _line("all", self.total())]),
            (["", *(MODELS[name][0] for name in names)], cells),
        ]

    def protocol(self) -> str:
        """How it was measured, in one line."""
        made = self.facts["made"]
        if "file" not in self.facts:
            return f"{made}; no text was scored (--data FILE)."
        where = f"window T = {self.facts['context_length']}, stride {self.facts['stride']}, {self.facts['precision']}"
        scored = f"{self.facts['tokens']:,} tokens scored of {self.facts['file']}, {where}, {self.facts['device']}"
        return f"{made}; {scored}; random and magnitude keep as many entries of every matrix, and are not distilled."

    def markdown(self) -> str:
        """The tables, and under them the protocol."""
        lines = []
        for header, rows in self.tables():
            lines += [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)] + [""]
        return "\n".join([*lines, self.protocol()])

    def save(self, path: Path | str) -> Path:
        """Write the json."""
        store.write_text(Path(path), self.json() + "\n")
        return Path(path)

    def __str__(self) -> str:
        return self.markdown()

    def _repr_html_(self) -> str:
        return f"<pre>{self.markdown()}</pre>"


@overload
def measure(what: Pruned, data: Any = None, protocol: Any = None, *, pairs: Any = None) -> Ledger: ...
@overload
def measure(what: Sparse | Loaded, data: Any = None, protocol: Any = None, *, pairs: Any = None) -> Report: ...
def measure(
    what: Sparse | Loaded | Pruned,
    data: Path | str | None = None,
    protocol: Protocol | None = None,
    *,
    pairs: Path | str | None = None,
) -> Report | Ledger:
    """Measure a model: attention beside dense and control (a Report), or sparse or pixelated weights (a Ledger).

    `data` is a text file or folder; "addition" needs none. `pairs` is a jsonl of minimal pairs (not for weights).
    """
    if pairs is not None and (isinstance(what, Pruned) or is_pixelated(what)):
        raise RecipeError("measure minimal pairs", "not built for sparse weights", "minimal_pairs(run.model, ...)")
    if is_pixelated(what):
        from fewedges.measure.pixelated_ledger import pixelated_ledger

        return pixelated_ledger(what, data, protocol)
    if isinstance(what, Pruned):
        return ledger(what, data, protocol)
    return report.measure(what, data, protocol, pairs=pairs)


def ledger(pruned: Pruned, data: Path | str | None = None, protocol: Protocol | None = None) -> Ledger:
    """Count a result's matrices, and score it beside dense, random and magnitude if there is a text to score.

    Raises ModelError if a zero is lost, or where adapters are on.
    """
    pruned.check_zeros("work on it, before measuring")
    refuse_patterns("measure sparse weights", pruned.model)  # its controls have none
    facts = {"base": pruned.base["name"], "made": str(pruned)}
    if data is None and pruned.base["name"] != "addition":
        return Ledger(matrices=pruned.rows(), models={"sparse": _sizes(pruned)}, facts=facts)
    protocol = default_protocol(pruned.loaded) if protocol is None else protocol
    dense = dense_of(pruned)
    batches, read = report._batches(dense, data, protocol)
    models = {"dense": _scored(begin(dense), dense, batches, protocol)}
    for method in CONTROLS:
        models[method] = _scored(control(pruned, dense, method), dense, batches, protocol)
    models["sparse"] = _scored(pruned, dense, batches, protocol)
    scored = {row.pop("tokens") for row in models.values()}.pop()  # the same for all
    facts |= report._facts(dense, protocol, scored, read)
    return Ledger(matrices=pruned.rows(), models=models, facts=facts)


def control(pruned: Pruned, dense: Loaded, method: str, seed: int = 0) -> Pruned:
    """The dense model with the same budget in every matrix, spent by `method` (random or magnitude).

    First it is made as small as the result is (layers, heads, channels), then masked, then rounded.
    """
    now = begin(dense.with_model(copy.deepcopy(dense.model)))
    for stage in pruned.stages:
        if isinstance(stage, Distil) and stage.layers:
            now = keep_layers(now, stage.layers)
        elif isinstance(stage, Prune) and _shrinks(stage):
            now = prune_(now, Prune(method=method, structure=stage.structure, density=stage.density, seed=seed))
    if pruned.masks.patterns:
        now = _masked_(now, pruned.masks, method, seed)
    if pruned.backend != "plain":
        by = [stage for stage in pruned.stages if isinstance(stage, Quantize) and stage.backend == pruned.backend]
        return quantize_(now, by[-1])
    return _rounded_(now, pruned.rounded)


def _shrinks(stage: Prune) -> bool:
    return Structure.parse(stage.structure).kind in ("head", "channel")


@torch.no_grad()
def _masked_(now: Pruned, masks: Masks, method: str, seed: int) -> Pruned:
    """Keep as many entries of every matrix as `masks` does, in the same structure."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, matrix in sorted(masks.matrices(now.model).items()):  # loaded masks come in another order
        score = SCORES[method].of(matrix.weight, Evidence(generator=generator))
        found[name] = _equal(score, masks.patterns[name])
        matrix.weight.masked_fill_(~found[name].mask(), 0)
    return replace(now, masks=Masks(found))


def _equal(score: torch.Tensor, wanted: Pattern) -> Pattern:
    """The highest scores, as many as `wanted` has and of its kind."""
    if wanted.kind in ("dense", "unstructured"):
        return of_kind(select(score, "unstructured", wanted.nnz).mask(), wanted.kind)
    kind = Structure.parse(wanted.kind)
    if kind.kind == "block":
        return select(score, kind, wanted.nnz // (kind.n * kind.m))
    allowed = select(score, kind).mask()  # of N:M a second stage may have left less than N
    return of_kind(select(score.masked_fill(~allowed, -torch.inf), "unstructured", wanted.nnz).mask(), wanted.kind)


@torch.no_grad()
def _rounded_(now: Pruned, codes: Mapping[str, Rounded]) -> Pruned:
    """Round the same matrices to as many bits, with as many scales."""
    matrices = matrices_of(now.loaded)
    found = {}
    for name, code in codes.items():
        weight, groups = matrices[name].weight, code.scales.shape[1]
        found[name] = rounded(weight, code.bits, weight.shape[1] // groups)
        write_(matrices[name], found[name].dequantise())
    return replace(now, rounded=found)


def _scored(pruned: Pruned, dense: Loaded, batches: list[Any], protocol: Protocol) -> dict[str, Any]:
    quality = score_tokens(pruned.model, dense.model, batches, protocol)
    row = {"tokens": quality.tokens, "cross_entropy": quality.cross_entropy, "perplexity": quality.perplexity}
    row |= {"kl": quality.kl, **_sizes(pruned)}
    if dense.name == "addition" and batches[0].counts[:, 1:7].sum() == 0:  # its own held-out sums
        row["accuracy"] = report._addition_accuracy(pruned.loaded)
    return row


def _sizes(pruned: Pruned) -> dict[str, Any]:
    """Density, FLOPs a token and bytes of the matrices, and bytes of the model: all else is dense."""
    rows = pruned.rows()
    inside = {f"{row['name']}.weight" for row in rows}
    rest = _sum(bytes_of(p) for name, p in pruned.model.named_parameters() if name not in inside)
    counted = _sum(row["bytes"] for row in rows)
    density = sum(row["nnz"] for row in rows) / sum(row["parameters"] for row in rows)
    flops = sum(row["flops"] for row in rows)
    return {"density": density, "flops": flops, "bytes": counted, "model_bytes": _sum([counted, rest])}


def _sum(counts: Iterable[int | None]) -> int | None:
    """The sum; None where a part is not known."""
    parts = list(counts)
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _cover(rows: list[dict[str, Any]], b: int) -> float:
    blocks = [math.ceil(row["shape"][0] / b) * math.ceil(row["shape"][1] / b) for row in rows]
    return sum(row[f"cover({b})"] * count for row, count in zip(rows, blocks, strict=True)) / sum(blocks)


def _line(name: str, row: dict[str, Any]) -> list[str]:
    shape = "x".join(map(str, row["shape"])) if "shape" in row else ""
    covers = [f"{row[f'cover({b})']:.3f}" for b in COVERS]
    return [
        name,
        shape,
        f"{row['parameters']:,}",
        f"{row['nnz']:,}",
        f"{row['density']:.4f}",
        *covers,
        _cell(row, "bytes"),
    ]


def _cell(row: dict[str, Any], name: str) -> str:
    if name not in row:
        return ""
    return UNKNOWN if row[name] is None else MODELS[name][1].format(row[name])
