"""SmolLM2-135M pruned by every method: perplexity on WikiText-2, one json row a setting.

    python scripts/prune_smollm2.py --out results/pruning/smollm2.jsonl
    python scripts/prune_smollm2.py --methods sparsegpt --structures 2:4 --densities --device cuda --out h100.jsonl
    python scripts/prune_smollm2.py --table results/pruning/smollm2.jsonl

Resumable: a setting whose row (same protocol) is in --out is not run again. Every row holds the dense baseline and
the protocol: what was read (sha256), windows, context, arithmetic, device, versions, and how long pruning took.

METHOD+distil prunes and then trains towards the dense model's logits, masks held, on the stream that calibration
windows are drawn from. That loss is 0 for the dense model, so it cannot learn the text in passing; what plain
training on the same batches in the same order does for the dense model is the control, dense+finetune.
"""

import argparse
import copy
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from rows import append, rows_in

import fewedges as fe
from fewedges import store
from fewedges.data.text import read_text, token_stream
from fewedges.measure.quality import score_tokens, windows_of
from fewedges.sparsify.pruned import begin
from fewedges.sparsify.pruning import READ, calibration_tokens, prune_
from fewedges.sparsify.recovery import distil_
from fewedges.weight_recipes import METHODS, Distil, Prune

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
RECOVERED, CONTROL = "sparsegpt+distil", "dense+finetune"
SECONDS = ("prune_seconds", "distil_seconds")
ROWS = ("random", "magnitude", "wanda", "sparsegpt", RECOVERED)


def arguments(given=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    names = [*METHODS, *(f"{name}+distil" for name in METHODS), CONTROL]
    parser.add_argument("--methods", nargs="*", default=[*ROWS, CONTROL], choices=names, metavar="METHOD")
    parser.add_argument("--densities", nargs="*", type=float, default=[0.5, 0.4, 0.3], help="unstructured")
    parser.add_argument("--structures", nargs="*", default=["2:4", "4:8"], help="beside unstructured")
    parser.add_argument("--calibration", type=Path, default=SHARED / "train.txt.xz")
    parser.add_argument("--calibration-windows", type=int, default=128)
    parser.add_argument("--context-length", type=int, default=2048, help="of calibration and of scoring")
    parser.add_argument("--micro-batch", type=int, help="windows a pass; default 1 on a CPU (fits its cache), else 8")
    parser.add_argument("--text", type=Path, default=SHARED / "eval" / "wikitext2-test.txt")
    parser.add_argument("--tokens", type=int, help="score at most so many")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help="of the calibration passes")
    parser.add_argument("--distil-steps", type=int, default=250)
    parser.add_argument("--distil-batch", type=int, default=8, help="windows a step")
    parser.add_argument("--distil-context", type=int, default=1024, help="tokens a window")
    parser.add_argument("--distil-rate", type=float, default=3e-4, help="peak learning rate")
    parser.add_argument("--distil-precision", choices=["fp32", "bf16"], help="default fp32 on a CPU, else bf16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="also save each pruned model in a folder here")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", nargs="+", type=Path, metavar="FILE", help="print what these hold, and stop")
    args = parser.parse_args(given)
    if args.table is None and args.out is None:
        parser.error("--out FILE, or --table FILE...")
    return args


# -- what is asked for ---------------------------------------------------------------------------------------------


def prunings(method, args):
    """Every pruning by a method."""
    options = {
        "calibration_windows": args.calibration_windows,
        "context_length": args.context_length,
        "micro_batch": args.micro_batch or (1 if args.device == "cpu" else 8),
        "precision": args.precision,
        "seed": args.seed,
    }
    for density in args.densities:
        yield Prune(method=method, density=density, **options)
    for structure in args.structures:
        yield Prune(method=method, structure=structure, **options)


def training(args, finetune):
    """The recovery after pruning, or the control: alike but for the loss, which is the text's own."""
    return Distil(
        kl_weight=0.0 if finetune else 1.0,
        loss_weight=1.0 if finetune else 0.0,
        learning_rate=args.distil_rate,
        context_length=args.distil_context,
        batch_size=args.distil_batch,
        steps=args.distil_steps,
        precision=args.distil_precision or ("fp32" if args.device == "cpu" else "bf16"),
        seed=args.seed,
    )


def plans(args):
    """Each pruning (None: the dense model) with all that is to be scored of it: as pruned (None), or trained after."""
    found = {}
    for name in dict.fromkeys(args.methods):
        method, _, then = name.partition("+")
        for pruning in [None] if method == "dense" else prunings(method, args):
            found.setdefault(pruning, []).append(training(args, then == "finetune") if then else None)
    return {pruning: sorted(after, key=lambda recipe: recipe is not None) for pruning, after in found.items()}


def synchronise(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


# -- one row -------------------------------------------------------------------------------------------------------


def timed(device, what):
    """What a call returns, and its seconds."""
    synchronise(device)
    start = time.perf_counter()
    found = what()
    synchronise(device)
    return found, round(time.perf_counter() - start, 2)


def pruned(recipe, dense, data, args):
    """A pruned copy of the dense model (recipe None: the copy), and what making it took."""
    loaded = dense.with_model(copy.deepcopy(dense.model))
    if recipe is None:
        return begin(loaded), {}
    result, seconds = timed(args.device, lambda: prune_(loaded, recipe, data))
    return result, {"prune_seconds": seconds, "seconds_per_block": round(seconds / len(loaded.anatomy.layers), 3)}


def recovered(result, recipe, dense, args):
    """The result trained further, in place, and what that took."""
    limit = READ * args.calibration_windows * args.context_length  # what calibration_tokens reads: the same stream
    options = {"context_length": recipe.context_length, "seed": recipe.seed, "max_tokens": limit}
    text, seen = read_text(args.calibration, dense.tokenizer, **options), []
    result, seconds = timed(args.device, lambda: distil_(result, recipe, text, teacher=dense, watch=seen.append))
    facts = {"distil": asdict(recipe), "distil_seconds": seconds, "distil_data": text.describe()}
    facts["distil_tokens"] = recipe.steps * recipe.batch_size * recipe.context_length
    return result, facts | {f"distil_{name}": [seen[0][name], seen[-1][name]] for name in ("kl", "cross_entropy")}


def scores(result, dense, stream, protocol):
    """Quality and size."""
    quality = score_tokens(result.model, dense.model, windows_of(stream, protocol), protocol)
    return {
        "perplexity": quality.perplexity,
        "cross_entropy": quality.cross_entropy,
        "kl": quality.kl,
        "density": result.masks.density,
        "nnz": result.masks.nnz,
        "pruned_parameters": result.masks.size,
        "bytes": sum(row["bytes"] for row in result.rows()),
    }


def key_of(row):
    """What makes two rows one; older rows know of no distillation, and windows a pass change no score."""
    facts = row["facts"] | {"dense_perplexity": 0, "protocol": row["facts"]["protocol"] | {"batch_size": 0}}
    return json.dumps([row["recipe"], row.get("distil"), facts], sort_keys=True)


def stub_of(recipe, then, facts):
    """As much of a row as is known before it is made."""
    stub = {"recipe": None if recipe is None else asdict(recipe), "facts": facts}
    return json.loads(json.dumps(stub if then is None else stub | {"distil": asdict(then)}))


def keep(result, row, args):
    """Save a model, where that is asked for."""
    if args.keep is not None:
        recipe = row["recipe"] or {"structure": "dense", "density": 1}
        result.save(args.keep / f"{name_of(row)}-{recipe['structure'].replace(':', 'of')}-{recipe['density']}")


def name_of(row):
    """The method as it is asked for."""
    if row["recipe"] is None:
        return CONTROL
    return row["recipe"]["method"] + ("+distil" if row.get("distil") else "")


def column_of(row):
    """The setting as it is read."""
    recipe = row["recipe"]
    return f"{100 * (1 - recipe['density']):.0f} %" if recipe["structure"] == "unstructured" else recipe["structure"]


# -- the table -----------------------------------------------------------------------------------------------------


def table(paths):
    """The rows of several files (of equal ones the last) as a markdown table with its protocol."""
    rows = list({key_of(row): row for path in paths for row in rows_in(path)}.values())
    if not rows:
        sys.exit(f"no rows in {', '.join(map(str, paths))}")
    cells = {}
    for row in rows:
        place = (name_of(row), "" if row["recipe"] is None else column_of(row))
        if place in cells:
            sys.exit(f"two rows for {' '.join(place)} that differ in recipe or protocol: choose files, or cut one")
        cells[place] = row
    wide = sorted({place for name, place in cells if name != CONTROL}, key=lambda x: (":" in x, x))
    lines = [*caption(rows, cells.get((CONTROL, ""))), ""]
    lines += [f"| | {' | '.join(wide)} | seconds |", "|---" * (len(wide) + 2) + "|"]
    for name in dict.fromkeys([*ROWS, *(name for name, _ in cells if name != CONTROL)]):
        if mine := {place: row for (of, place), row in cells.items() if of == name}:
            found = [legible(mine[place]["perplexity"]) if place in mine else "" for place in wide]
            label = name.replace("+distil", " + distillation")
            lines.append(f"| {label} | {' | '.join(found)} | {seconds(mine.values())} |")
    return "\n".join(lines)


def legible(perplexity):
    """Two decimals, or two digits of what is far beyond a use."""
    return f"{perplexity:.2f}" if perplexity < 1e5 else f"{perplexity:.1e}"


def seconds(rows):
    """Pruning and training, shortest to longest."""
    spans = sorted(sum(row.get(name, 0) for name in SECONDS) for row in rows)
    return f"{spans[0]:.0f}" if spans[0] == spans[-1] else f"{spans[0]:.0f} to {spans[-1]:.0f}"


def caption(rows, control):
    """Baseline, control and protocol."""
    facts, recipe = rows[0]["facts"], next(row["recipe"] for row in rows if row["recipe"])
    text, protocol, read = facts["text"], facts["protocol"], facts["calibration"]["name"]
    dense = " or ".join(sorted({f"{row['facts']['dense_perplexity']:.2f}" for row in rows}))
    yield f"Perplexity on {text['file']} ({text['tokens_scored']:,} tokens, {protocol['precision']}, each window of"
    yield f"{protocol['context_length']} from an empty context); dense {dense}."
    yield f"Calibrated on {recipe['calibration_windows']} x {recipe['context_length']} tokens of {read}."
    for distil in [row["distil"] for row in rows if row.get("distil") and row is not control][:1]:
        size = f"{distil['steps']} steps of {distil['batch_size']} x {distil['context_length']} tokens"
        yield f"Distillation: KL to dense, {size} of the same stream, {distil['precision']}, peak rate"
        yield f"{distil['learning_rate']:g}."
    if control is not None:
        yield f"Control, dense trained on the same batches by next-token loss: {control['perplexity']:.2f}."
    where = sorted({f"{row['device']}, torch {row['versions']['torch']}" for row in rows})
    yield f"{'; '.join(where)}. Columns: share of entries pruned, or N:M kept."


def main():
    args = arguments()
    if args.table is not None:
        return print(table(args.table))
    if args.threads:
        torch.set_num_threads(args.threads)
    dense = fe.load(args.model, device=args.device, probes=False)
    stream, text_facts = token_stream(args.text, dense.tokenizer)
    size = 1 if args.device == "cpu" else 4
    protocol = fe.Protocol(context_length=args.context_length, max_tokens=args.tokens, batch_size=size)
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
    known = {key_of(row) for row in rows_in(args.out)}
    where = {"device": store.device_name(args.device), "threads": torch.get_num_threads(), "versions": store.versions()}
    for recipe, after in plans(args).items():
        stubs = [stub_of(recipe, then, facts) for then in after]
        todo = [then for then, stub in zip(after, stubs, strict=True) if key_of(stub) not in known]
        if not todo:
            continue
        result, made = pruned(recipe, dense, data, args)
        for then in todo:
            if then is not None:
                result, trained = recovered(result, then, dense, args)
                made = made | trained
            row = {"recipe": None if recipe is None else asdict(recipe), **scores(result, dense, stream, protocol)}
            row |= {**made, "facts": facts, **where}
            append(args.out, row)
            keep(result, row, args)
            shown = {name: round(row[name], 4) for name in ("perplexity", "density", *SECONDS) if name in row}
            print(name_of(row), "" if recipe is None else column_of(row), shown, flush=True)
    return None


if __name__ == "__main__":
    main()
