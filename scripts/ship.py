"""Make the form of a run that comes with the package: adapters in int8, gates as they are, its control likewise.

    python scripts/ship.py /path/to/run --results results/smollm2-1024/shipped.json
    python scripts/ship.py /path/to/run --results results/circuits/few-heads/headline.json --name smollm2-few-heads

writes src/fewedges/assets/NAME, which `fewedges.load(NAME)` reads. With --results, the json of `fewedges measure
--json` goes into the manifest and the model card: measure the folder, and run this again.
"""

import argparse
import dataclasses
import json
import shutil
from pathlib import Path

import fewedges as fe
from fewedges.sparsify.attention.packing import pack, unpack
from fewedges.sparsify.attention.result import ASSETS, SHIPPED
from fewedges.sparsify.attention.student import trained_weights


def pack_(model):
    """Round the adapters to what will be written."""
    weights = trained_weights(model)
    for name, value in unpack(pack(weights, "int8")).items():
        weights[name].copy_(value)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--name", default=SHIPPED[0], choices=SHIPPED)
    parser.add_argument("--out", type=Path, help="default: the package's assets, under --name")
    args = parser.parse_args()
    args.out = args.out or ASSETS / args.name
    sparse = fe.load(args.run)
    for model in (sparse.model, sparse.control.model):
        pack_(model)
    recipe = dataclasses.replace(sparse.recipe, saved="int8")
    results = json.loads(args.results.read_text()) if args.results else {}
    records = sparse.records[-1:]  # the log stays where the run is
    shutil.rmtree(args.out, ignore_errors=True)
    dataclasses.replace(sparse, recipe=recipe, results=results, records=records).save(args.out)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
