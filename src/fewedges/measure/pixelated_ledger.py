"""What a pixelated model costs and what it buys: cells and low rank of every matrix, the dense model beside it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewedges.measure import report
from fewedges.measure.ledger import COVERS, Ledger, _cell, _cover
from fewedges.measure.quality import Protocol, score_models
from fewedges.measure.report import default_protocol
from fewedges.model.attention import refuse_patterns
from fewedges.model.loading import Loaded
from fewedges.sparsify.pixelated import PixelatedModel, begin_pixelated, rows_of
from fewedges.sparsify.recovery import dense_of

HEADER = ["matrix", "shape", "parameters", "stored", "cells", "rank", "low rank", "density"]


@dataclass(frozen=True, kw_only=True)
class PixelatedLedger(Ledger):
    """Numbers of a pixelated model. In `matrices`, beside a ledger's own: cells, low_rank (both densities) and rank.

    nnz counts the numbers stored, without bias and gamma (bytes hold gamma); cover(b) is that of the cells alone.
    """

    def total(self) -> dict[str, Any]:
        """The sums over matrices; densities and covers are those of all together, a dense matrix's in density alone."""
        size = sum(row["parameters"] for row in self.matrices)
        summed = {name: sum(row[name] for row in self.matrices) for name in ("nnz", "flops", "bytes")}
        parts = {n: sum((row[n] or 0) * row["parameters"] for row in self.matrices) for n in ("cells", "low_rank")}
        parts = {name: part / size for name, part in parts.items()}
        covers = {f"cover({b})": _cover(self.matrices, b) for b in COVERS}
        return {"parameters": size, **summed, **parts, "density": summed["nnz"] / size, **covers}

    def tables(self) -> list[tuple[list[str], list[list[str]]]]:
        """Header and rows as text: the matrices with their total, then the models."""
        header = [*HEADER, *(f"cells' cover({b})" for b in COVERS), "bytes"]
        return [(header, [*map(_line, self.matrices), _line({"name": "all", **self.total()})]), super().tables()[1]]

    def protocol(self) -> str:
        """How it was measured, in one line."""
        said = super().protocol()
        return said.partition("; random and magnitude")[0] + "." * ("; random and magnitude" in said)


def pixelated_ledger(
    what: PixelatedModel | Loaded, data: Path | str | None = None, protocol: Protocol | None = None
) -> PixelatedLedger:
    """Count a pixelated model's matrices, and score it beside its dense model if there is a text to score.

    Of a `Loaded` the dense model is what is loaded by its name. Raises ModelError where adapters are on.
    """
    loaded = what.loaded if isinstance(what, PixelatedModel) else what
    refuse_patterns("measure a pixelated model", loaded.model)  # the dense one beside it has none
    rows, sizes = rows_of(loaded), _sizes(loaded)
    if data is None and loaded.name != "addition":
        return PixelatedLedger(matrices=rows, models=sizes, facts={"base": loaded.name, "made": _made(what)})
    now = what if isinstance(what, PixelatedModel) else begin_pixelated(what)
    protocol, dense = default_protocol(loaded) if protocol is None else protocol, dense_of(now)
    batches, read = report._batches(dense, data, protocol)
    scores = score_models({"dense": dense.model, "pixelated": now.model}, dense.model, batches, protocol)
    models = {}
    for label, model in (("dense", dense), ("pixelated", loaded)):
        found = scores[label]
        models[label] = {"cross_entropy": found.cross_entropy, "perplexity": found.perplexity, "kl": found.kl}
        models[label] |= sizes[label]
        if data is None:
            models[label]["accuracy"] = report._addition_accuracy(model)
    facts = report._facts(dense, protocol, scores["dense"].tokens, read)
    return PixelatedLedger(matrices=rows, models=models, facts={"base": loaded.name, "made": _made(what), **facts})


def _made(what: PixelatedModel | Loaded) -> str:
    return str(what) if isinstance(what, PixelatedModel) else f"{what.name}: pixelated"


def _sizes(loaded: Loaded) -> dict[str, dict[str, Any]]:
    """Density, FLOPs a token and bytes of the matrices, of the model bytes; dense (in the same format) and as is."""
    rows = rows_of(loaded)
    parameters = {id(p): p for p in loaded.model.parameters()}.values()
    size, stored, counted = (sum(row[name] for row in rows) for name in ("parameters", "nnz", "bytes"))
    whole = size * next(iter(parameters)).element_size()
    model = sum(p.numel() * p.element_size() for p in parameters)
    return {
        "dense": {"density": 1.0, "flops": 2 * size, "bytes": whole, "model_bytes": model - counted + whole},
        "pixelated": {"density": stored / size, "flops": 2 * stored, "bytes": counted, "model_bytes": model},
    }


def _line(row: dict[str, Any]) -> list[str]:
    cells, rank = row["cells"], row.get("rank")
    return [
        row["name"],
        "x".join(map(str, row.get("shape", ()))),
        f"{row['parameters']:,}",
        f"{row['nnz']:,}",
        "dense" if cells is None else f"{cells:.4f}",
        "" if rank is None else str(rank),
        f"{row['low_rank']:.4f}",
        f"{row['density']:.4f}",
        *(f"{row[f'cover({b})']:.3f}" for b in COVERS),
        _cell(row, "bytes"),
    ]
