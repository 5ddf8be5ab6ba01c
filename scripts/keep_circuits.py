"""Keep what `fewedges explain --json` printed as this repository commits it: six digits, and no lists of edges.

    python scripts/keep_circuits.py RAW.json KEPT.json             # curves, ratios, accuracies, rankings, facts
    python scripts/keep_circuits.py RAW.json KEPT.json --edges     # also the dense and the sparse circuit

Ratios, intervals and facts stay as they are; curves and node scores are rounded to six significant digits.
"""

import argparse
import json
from pathlib import Path

from fewedges import store
from fewedges.explain.explaining import read_explained


def rounded(x):
    """Every float in it with six digits."""
    if isinstance(x, dict):
        return {name: rounded(value) for name, value in x.items()}
    if isinstance(x, list):
        return [rounded(value) for value in x]
    return float(f"{x:.6g}") if isinstance(x, float) else x


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path)
    parser.add_argument("kept", type=Path)
    parser.add_argument("--edges", action="store_true", help="keep the lists of edges of dense and sparse")
    options = parser.parse_args()
    found = json.loads(options.raw.read_text())
    wanted = ("dense", "sparse") if options.edges else ()
    found["circuits"] = {label: edges for label, edges in found["circuits"].items() if label in wanted}
    found |= {name: rounded(found[name]) for name in ("curves", "rankings")}
    options.kept.parent.mkdir(parents=True, exist_ok=True)
    store.write_text(options.kept, json.dumps(found) + "\n")
    print(options.kept, f"{options.kept.stat().st_size / 2**20:.2f} MiB, {read_explained(options.kept).ratio():.2f}")


if __name__ == "__main__":
    main()
