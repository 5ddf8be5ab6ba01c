"""The model card written beside every saved sparse model."""

from typing import Any


def model_card(facts: dict[str, Any]) -> str:
    """Markdown with front matter: what it is, how to load it, how not to, and its numbers."""
    base, last = facts["base"]["name"], facts["last_record"] or {}
    gate = "score + bias[layer, head]" + (" + gate query . key" if facts["recipe"].get("gate_query") else "")
    numbers = "\n".join(f"| {name} | {value:.4g} |" for name, value in _numbers(last).items())
    return f"""---
library_name: fewedges
base_model: {base}
tags: [sparse-attention, interpretability, fewedges]
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

Measured results, if any, are under `facts.results` in `manifest.json`; the full recipe is in `recipe.yaml`.
The licence is that of the base model.
"""


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    shown = ("step", "tokens", "edges_per_query_per_head", "kl", "cross_entropy", "dense_cross_entropy")
    return {name: record[name] for name in shown if isinstance(record.get(name), int | float)}
