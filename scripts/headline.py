"""All that is said of a sparse run, in one json: loss on two texts, edges by context length, minimal pairs, IOI.

    python scripts/headline.py results/smollm2/run --data valid.txt --wikitext2 wikitext2-test.txt \\
        --pairs blimp-20x200.jsonl --device cuda --out headline.json

The json has the keys of `fewedges measure --json` (of --data at T = 1024, all of it), and beside them `wikitext2` (the
same of that text), `by_context` (edges per query per head, KL and cross-entropy at T = 256, 512, 1024, 2048), `blimp`
and `ioi`: accuracy of dense, control and sparse with its 95 % Wilson interval, and `minus_dense`, the difference to the
dense model on the same items with the 95 % interval of a paired bootstrap (10,000 samples, seed 0). IOI: 1,000 prompts,
seed 0; right is the indirect object above the subject; `first`: the indirect object is the most probable of all tokens.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

import fewedges as fe
from fewedges import store
from fewedges.explain.tasks import last_logits, prompts_for
from fewedges.measure.quality import Protocol, read_pairs, sentence_scores
from fewedges.measure.report import models_of

KEPT = ("cross_entropy", "kl", "edges_per_query_per_head", "density")


def wilson(right, z=1.96):
    """95 % interval of a fraction."""
    n, p = len(right), float(np.mean(right))
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]


def compared(right):
    """Accuracy by model, and what it is above the dense one's, item by item."""
    draws = np.random.default_rng(0).integers(0, len(right["dense"]), (10_000, len(right["dense"])))
    rows = {}
    for label, found in right.items():
        rows[label] = {"accuracy": float(found.mean()), "interval": wilson(found)}
        if label != "dense":
            gain = found - right["dense"]
            spread = np.quantile(gain[draws].mean(1), (0.025, 0.975))
            rows[label]["minus_dense"] = {"mean": float(gain.mean()), "interval": spread.tolist()}
    return rows


def blimp(models, tokenizer, path):
    """Whether the good sentence of each pair is the more probable one; a tie counts half."""
    pairs, right = read_pairs(path), {}
    for label, loaded in models.items():
        good, bad = (
            np.array(sentence_scores(loaded.model, tokenizer, [pair[kind] for pair in pairs], 64))
            for kind in ("good", "bad")
        )
        right[label] = (good > bad) + 0.5 * (good == bad)
    return compared(right) | {"pairs": len(pairs), "sha256": store.sha256_of(path)}


def ioi(models, tokenizer, count):
    """The repeated name beaten by the other one, on prompts of explain/tasks/ioi.py."""
    prompts, right, first = prompts_for("ioi", tokenizer, count), {}, {}
    for label, loaded in models.items():
        parts = [prompts.subset(range(start, min(start + 50, count))) for start in range(0, count, 50)]
        logits = [last_logits(loaded.model, part.clean, part.last) for part in parts]
        right[label], first[label] = (
            torch.cat([getattr(part, name)(x).cpu() for part, x in zip(parts, logits, strict=True)]).double().numpy()
            for name in ("correct", "first")
        )
    return compared(right) | {"prompts": count, "first": compared(first)}


def by_context(sparse, data, lengths, batch):
    """The same weights and text at several context lengths."""
    found = {}
    for length in lengths:
        protocol = Protocol(context_length=length, batch_size=max(1, batch * 1024 // length))
        row = fe.measure(sparse, data, protocol).rows
        found[length] = {label: {name: row[label].get(name) for name in KEPT} for label in row}
        print(length, found[length], flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--wikitext2", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--context-length", type=int, default=1024)
    parser.add_argument("--lengths", type=int, nargs="*", default=[256, 512, 1024, 2048])
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--max-tokens", type=int, help="of each text; all of it otherwise")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    sparse = fe.load(args.run, device=args.device)
    models = models_of(sparse)
    protocol = Protocol(context_length=args.context_length, batch_size=args.batch_size, max_tokens=args.max_tokens)
    found = {"run": args.run, **fe.measure(sparse, args.data, protocol).to_dict()}
    print(json.dumps(found)[:1500], flush=True)
    found["wikitext2"] = fe.measure(sparse, args.wikitext2, protocol).to_dict()
    print({label: found["wikitext2"][label]["cross_entropy"] for label in models}, flush=True)
    found["blimp"] = blimp(models, sparse.tokenizer, args.pairs)
    found["ioi"] = ioi(models, sparse.tokenizer, args.prompts)
    print({name: {x: found[name][x] for x in models} for name in ("blimp", "ioi")}, flush=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    found["by_context"] = by_context(sparse, args.data, args.lengths, args.batch_size)
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
