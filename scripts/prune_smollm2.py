"""SmolLM2-135M pruned by every method: perplexity on WikiText-2, one json row a setting.

    python scripts/prune_smollm2.py --out results/pruning/smollm2.jsonl
    python scripts/prune_smollm2.py --methods sparsegpt --structures 2:4 --densities --device cuda --out h100.jsonl

Resumable: a setting whose row (same protocol) is in --out is not run again. Every row holds the dense baseline and
the protocol: what was read (sha256), windows, context, arithmetic, device, versions, and how long pruning took.
"""

import argparse
import copy
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch

import fewedges as fe
from fewedges import store
from fewedges.data.text import token_stream
from fewedges.measure.quality import score_tokens, windows_of
from fewedges.sparsify.pruning import calibration_tokens, prune_
from fewedges.weight_recipes import Prune

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--methods", nargs="*", default=["random", "magnitude", "wanda", "sparsegpt"])
    parser.add_argument("--densities", nargs="*", type=float, default=[0.5, 0.4, 0.3], help="unstructured")
    parser.add_argument("--structures", nargs="*", default=["2:4", "4:8"], help="beside unstructured")
    parser.add_argument("--calibration", type=Path, default=SHARED / "train.txt.xz")
    parser.add_argument("--calibration-windows", type=int, default=128)
    parser.add_argument("--context-length", type=int, default=2048, help="of calibration and of scoring")
    parser.add_argument("--micro-batch", type=int, help="windows a pass; default 1 on a CPU (fits its cache), else 8")
    parser.add_argument("--text", type=Path, default=SHARED / "eval" / "wikitext2-test.txt")
    parser.add_argument("--tokens", type=int, help="score at most so many")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help="of the calibration passes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="also save each pruned model in a folder here")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def settings(args):
    """Every recipe asked for."""
    options = {
        "calibration_windows": args.calibration_windows,
        "context_length": args.context_length,
        "micro_batch": args.micro_batch or (1 if args.device == "cpu" else 8),
        "precision": args.precision,
        "seed": args.seed,
    }
    for method in args.methods:
        for density in args.densities:
            yield Prune(method=method, density=density, **options)
        for structure in args.structures:
            yield Prune(method=method, structure=structure, **options)


def done(path):
    """Rows of earlier runs; a last line that was cut off does not count."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def synchronise(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def run(recipe, dense, data, stream, protocol, args):
    """Prune a copy, time it, score it."""
    loaded = dense.with_model(copy.deepcopy(dense.model))
    synchronise(args.device)
    start = time.perf_counter()
    result = prune_(loaded, recipe, data)
    synchronise(args.device)
    seconds = time.perf_counter() - start
    quality = score_tokens(result.model, dense.model, windows_of(stream, protocol), protocol)
    if args.keep is not None:
        result.save(args.keep / f"{recipe.method}-{recipe.structure.replace(':', 'of')}-{recipe.density}")
    rows = result.rows()
    return {
        "perplexity": quality.perplexity,
        "cross_entropy": quality.cross_entropy,
        "kl": quality.kl,
        "density": result.masks.density,
        "nnz": result.masks.nnz,
        "pruned_parameters": result.masks.size,
        "bytes": sum(row["bytes"] for row in rows),
        "prune_seconds": round(seconds, 2),
        "seconds_per_block": round(seconds / len(loaded.anatomy.layers), 3),
    }


def main():
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    dense = fe.load(args.model, device=args.device, probes=False)
    stream, text_facts = token_stream(args.text, dense.tokenizer)
    protocol = fe.Protocol(context_length=args.context_length, max_tokens=args.tokens, batch_size=1)
    base = score_tokens(dense.model, dense.model, windows_of(stream, protocol), protocol)
    first = Prune(calibration_windows=args.calibration_windows, context_length=args.context_length, seed=args.seed)
    data, data_facts = calibration_tokens(dense, first, args.calibration)
    facts = {
        "model": args.model,
        "text": {"file": args.text.name, "sha256": text_facts["sha256"], "tokens_scored": base.tokens},
        "protocol": asdict(protocol),
        "calibration": {**data_facts, "name": args.calibration.name},
        "dense_perplexity": base.perplexity,
    }
    print(json.dumps(facts), flush=True)
    known = [(row["recipe"], row["facts"]) for row in done(args.out)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for recipe in settings(args):
        key = json.loads(json.dumps([asdict(recipe), facts]))
        if any(key[0] == recipe_ and _alike(key[1], facts_) for recipe_, facts_ in known):
            continue
        found = run(recipe, dense, data, stream, protocol, args)
        where = {"device": store.device_name(args.device), "threads": torch.get_num_threads()}
        row = {"recipe": asdict(recipe), **found, "facts": facts, **where, "versions": store.versions()}
        with open(args.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        shown = {name: round(found[name], 4) for name in ("perplexity", "density", "prune_seconds")}
        print(recipe.method, recipe.structure, recipe.density, shown, flush=True)


def _alike(a, b):
    """The same protocol; the baseline itself may differ in its last digits between machines."""
    return {**a, "dense_perplexity": 0} == {**b, "dense_perplexity": 0}


if __name__ == "__main__":
    main()
