"""Print the tables of README.md from the committed results; a test holds README to them.

python scripts/tables.py
"""

import json
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "results"


def addition() -> str:
    """One row for each seed of results/addition.json, and the dense model's."""
    runs = json.loads((RESULTS / "addition.json").read_text())["runs"]
    lines = ["| | exact match, 2,000 unseen sums | edges per query per head | density |", "|---|---|---|---|"]
    for label, row in [("dense", runs[0]["dense"])] + [(f"sparse, seed {run['seed']}", run["sparse"]) for run in runs]:
        edges = f"{row['edges_per_query_per_head']:.3f}"
        lines.append(f"| {label} | {row['accuracy']:.2%} | {edges} | {row['density']:.2%} |")
    return "\n".join(lines)


def smollm2() -> str:
    """Dense, control and sparse of results/smollm2, on both texts."""
    texts = {"validation": "valid.json", "WikiText-2 test": "wikitext2.json"}
    reports = {name: json.loads((RESULTS / "smollm2" / file).read_text()) for name, file in texts.items()}
    head = ["", "edges per query per head", "density"]
    for name, report in reports.items():
        head += [f"cross-entropy, {name} ({report['tokens']:,} tokens)", "KL to dense"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for label in ("dense", "control", "sparse"):
        row = next(iter(reports.values()))[label]
        cells = [label, f"{row['edges_per_query_per_head']:.2f}", f"{row['density']:.2%}"]
        for report in reports.values():
            scored = report[label]
            cells += [f"{scored['cross_entropy']:.4f}", f"{scored['kl']:.4f}" if "kl" in scored else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def headline() -> str:
    """Dense, control and sparse of results/smollm2-1024, two seeds of each leg."""
    read = {path.stem: json.loads(path.read_text()) for path in (RESULTS / "smollm2-1024").glob("*-seed-?.json")}
    first = read["headline-seed-0"]
    rows = [("dense", first, "dense")]
    for leg, name in (("headline", "sparse"), ("sparser", "sparser")):
        for title, label in ((f"control of {name}", "control"), (name, "sparse")):
            rows += [(f"{title}, seed {seed}", read[f"{leg}-seed-{seed}"], label) for seed in (0, 1)]
    head = ["", "edges per query per head", "density", f"cross-entropy, validation ({first['tokens']:,} tokens)", "KL"]
    head += [f"cross-entropy, WikiText-2 test ({first['wikitext2']['tokens']:,} tokens)", "KL", "BLiMP", "IOI"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, report, label in rows:
        row, wiki = report[label], report["wikitext2"][label]
        cells = [name, f"{row['edges_per_query_per_head']:.2f}", f"{row['density']:.3%}"]
        for scored in (row, wiki):
            cells += [f"{scored['cross_entropy']:.4f}", f"{scored['kl']:.3f}" if "kl" in scored else ""]
        cells += [f"{report[task][label]['accuracy']:.1%}" for task in ("blimp", "ioi")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(addition(), smollm2(), headline(), sep="\n\n")
