"""The model card written beside every saved sparse model."""

from typing import Any

LICENCES = {"smollm2": "apache-2.0"}
"""Of the bases that come without a hub page of their own."""
MEASURED = {
    "cross_entropy": "cross-entropy",
    "kl": "KL to dense",
    "edges_per_query_per_head": "edges per query per head",
    "density": "density",
}


def model_card(facts: dict[str, Any]) -> str:
    """Markdown with front matter: what it is, how to load it, how not to, and its numbers."""
    base, last = facts["base"]["name"], facts["last_record"] or {}
    gate = "score + bias[layer, head]" + (" + scaling * gate query . key" if facts["recipe"].get("gate_query") else "")
    numbers = "\n".join(f"| {name} | {value:.4g} |" for name, value in _numbers(last).items())
    return f"""---
library_name: fewedges
base_model: {base}
{_licence(base)}tags: [sparse-attention, interpretability, fewedges]
---

# Sparse {base}

The attention of `{base}` after sparse attention post-training (arXiv:2512.05865) with fewedges
{facts["versions"].get("fewedges", "")}: an attention edge exists where `{gate} > 0`; all others
are cut.

## Load it

    import fewedges as fe
    sparse = fe.load("this folder")          # verifies sha256 of every file, runs six self-checks
    sparse.model.generate(...)

**Without fewedges this folder is not a model.** It holds what differs from the base (`weights-*.safetensors`), the gate
parameters (`gates-*.safetensors`) and a manifest; the file names are such that `AutoModelForCausalLM.from_pretrained`
refuses the folder. Loading the weights into the plain architecture by hand gives a *dense* model: the gates are not in
any architecture of transformers, and its numbers are not those below.

## Last training record

| | |
|---|---|
{numbers}

{_measured(facts["results"])}The full recipe is in `recipe.yaml`. The licence is that of the base model{_named(base)}.
"""


def _licence(base: str) -> str:
    return f"license: {LICENCES[base]}\n" if base in LICENCES else ""


def _named(base: str) -> str:
    return f" ({LICENCES[base]})" if base in LICENCES else ""


def _measured(results: dict[str, Any]) -> str:
    """A table of dense, control and sparse, and how they were measured; nothing if nothing was."""
    rows = {label: results[label] for label in ("dense", "control", "sparse") if label in results}
    if not rows:
        return ""
    lines = [f"| | {' | '.join(MEASURED.values())} |", "|---" * (len(MEASURED) + 1) + "|"]
    for label, row in rows.items():
        cells = [f"{row[name]:.4g}" if isinstance(row.get(name), int | float) else "" for name in MEASURED]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    known = [
        f"{name} {results[name]}" for name in ("tokens", "context_length", "precision", "device") if name in results
    ]
    lines += ["", f"{', '.join(known)}; more under `facts.results` of `manifest.json`.", "", ""]
    return "## Measured\n\n" + "\n".join(lines)


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    shown = ("step", "tokens", "edges_per_query_per_head", "kl", "cross_entropy", "dense_cross_entropy")
    return {name: record[name] for name in shown if isinstance(record.get(name), int | float)}
