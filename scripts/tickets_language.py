"""Lottery tickets, RigL and SNIP beside their controls, on a small language model of bytes.

    python scripts/tickets_language.py --device cuda --seeds 0 --out seed-0.jsonl     # and 1 and 2, side by side
    python scripts/tickets_language.py --table seed-0.jsonl seed-1.jsonl seed-2.jsonl

A GPT-2 layout (4 layers, 4 heads, D = 256, T = 256, 257 tokens: bytes and one between documents) learns the shared
text from random weights, dense and at about a fifth of its matrices' entries, each way for the same number of
optimiser steps on the same batches of the same seed: the arms of arms.py. Measured at the last step (nothing is
picked): cross-entropy on all of the validation text, every window of T from an empty context.

One row an arm and seed, written as it comes; what is in --out is not run again. A ticket once found is kept beside
--out until all arms of its seed are done. `--dry` tries everything in seconds.
"""

import argparse
import json
import lzma
import math
import shutil
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from arms import ARMS, Course, Trial, train_, trained
from rows import append, rows_in
from transformers import GPT2Config, GPT2LMHeadModel

from fewedges import store
from fewedges.data.text import SEPARATOR, Text
from fewedges.model.anatomy import anatomy
from fewedges.model.attention import CAUSAL, register_causal
from fewedges.model.loading import Loaded
from fewedges.weight_recipes import Rewire, Tickets

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
BETWEEN = 256
"""The token between two documents; all others are bytes."""
DRY = {"layers": 1, "width": 32, "context_length": 32, "batch": 4, "steps": 20, "rounds": 2, "rewind": 2}
DRY |= {"rigl_every": 4, "snip_windows": 8, "look_every": 10, "text_bytes": 20_000, "valid_bytes": 4_000}
NOT_PROTOCOL = ("text", "valid", "out", "seeds", "arms", "device", "eager", "threads", "dry", "table")


def arguments(given=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=SHARED / "train.txt.xz")
    parser.add_argument("--valid", type=Path, default=SHARED / "valid.txt")
    parser.add_argument("--text-bytes", type=int, default=32_000_000, help="read at most so many of --text")
    parser.add_argument("--valid-bytes", type=int, default=10_000_000, help="read at most so many of --valid")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=32, help="windows an optimiser step")
    parser.add_argument("--context-length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=7, help="of iterative pruning, a fifth each")
    parser.add_argument("--rewind", type=int, default=60, help="step whose weights the ticket goes back to")
    parser.add_argument("--snip-windows", type=int, default=128)
    parser.add_argument("--rigl-every", type=int, default=50)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--look-every", type=int, default=200, help="steps between two looks at the validation text")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--eager", action="store_true", help="on a GPU: no CUDA graph")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="a tiny run, to see that all works")
    parser.add_argument("--table", nargs="+", type=Path, metavar="FILE", help="print what these hold, and stop")
    args = parser.parse_args(given)
    if args.table is None and args.out is None:
        parser.error("--out FILE, or --table FILE...")
    for name, value in DRY.items() if args.dry else ():
        setattr(args, name, value)
    return args


# -- the model and its text ----------------------------------------------------------------------------------------


def fresh(args, seed):
    """An untrained model."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=BETWEEN + 1,
        n_positions=args.context_length,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=4,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=BETWEEN,
        eos_token_id=BETWEEN,
    )
    model = GPT2LMHeadModel(config).to(args.device)
    register_causal()
    model.set_attn_implementation(CAUSAL)  # no mask is built: it would be built anew in every replayed step
    return Loaded(name="bytes from scratch", model=model, tokenizer=None, anatomy=anatomy(model))


def read_bytes(path, limit):
    """A text as tokens (N,): its first `limit` bytes, the line between documents as one token."""
    with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
        parts = file.read(limit).split(f"\n{SEPARATOR}\n".encode())
    between = np.array([BETWEEN], dtype=np.uint16)
    pieces = [piece for part in parts for piece in (np.frombuffer(part, dtype=np.uint8).astype(np.uint16), between)]
    return np.concatenate(pieces[:-1])


def next_token_loss(model, tokens):
    """Mean cross-entropy in nats a token."""
    tokens = tokens.to(model.device)
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]  # (B, T - 1, V)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.no_grad()
def validate(model, windows):
    """Cross-entropy over all windows (N, T), in nats a token."""
    total = sum(next_token_loss(model, piece).double() * len(piece) for piece in windows.split(128))
    return round(float(total) / len(windows), 6)


def trial(args, seed, protocol, text, valid):
    """What one seed trains, and how."""
    loaded = fresh(args, seed)
    model, length = loaded.model, args.context_length
    stream, look_stream = (Text("bytes", text, length, seed=number) for number in (seed, seed + 1000))
    windows = torch.from_numpy(valid[: len(valid) // length * length].astype(np.int64)).view(-1, length).to(args.device)
    captured = torch.device(args.device).type == "cuda" and not args.eager
    options = {"lr": args.lr, "weight_decay": args.weight_decay, "look_every": args.look_every, "captured": captured}
    course, tickets = Course(steps=args.steps, **options), Tickets(**protocol["tickets"])
    what = {"batch": lambda step: stream.at(step, args.batch).tokens, "loss": next_token_loss}
    what["look"] = lambda: validate(model, windows)

    def train(masks, start, stop, rewire=None):
        if stop == start:
            return None
        began = time.monotonic()
        curve = train_(model, masks, course, start, stop, rewire, **what)
        return {"cross_entropy": curve[-1][1], "curve": curve, "seconds": round(time.monotonic() - began, 2)}

    return Trial(
        seed=seed,
        loaded=loaded,
        tickets=tickets,
        rewire=Rewire(density=tickets.density, every=args.rigl_every, steps=args.steps, seed=seed),
        train=train,
        look=lambda: next_token_loss(model, look_stream.at(0, args.snip_windows).tokens),
        keep=args.out.parent / f"{args.out.stem}-ticket-{seed}",
        identity=protocol,
    )


# -- rows ----------------------------------------------------------------------------------------------------------


def row_of(arm, seed, protocol, where):
    """What is written of an arm."""
    rounds = {} if arm.rounds is None else {"rounds": [short(row["trained"], row["density"]) for row in arm.rounds]}
    bits = {"bits_per_byte": round(arm.row["cross_entropy"] / math.log(2), 5), "density": round(arm.masks.density, 5)}
    densities = {path: round(pattern.density, 4) for path, pattern in arm.masks.patterns.items()}
    return {"seed": seed, "arm": arm.name, **arm.row, **bits, **rounds, "densities": densities, **where} | protocol


def short(row, density):
    return {"density": round(density, 4), "cross_entropy": row["cross_entropy"], "seconds": row["seconds"]}


def table(paths):
    """The rows of several files as markdown tables; another protocol among them is an error."""
    rows = {(row["arm"], row["seed"]): row for path in paths for row in rows_in(path)}
    if not rows:
        sys.exit(f"no rows in {', '.join(map(str, paths))}")
    first = next(iter(rows.values()))
    if odd := next((row for row in rows.values() if row["protocol"] != first["protocol"]), None):
        sys.exit(f"seed {odd['seed']}, {odd['arm']}: another protocol than seed {first['seed']}, {first['arm']}")
    dense = {seed: row["cross_entropy"] for (arm, seed), row in rows.items() if arm == "dense"}
    lines = [
        *caption(first),
        "",
        "| arm | density | cross-entropy, nats a token | bits a byte | above dense, nats | seeds |",
    ]
    lines += ["|---|---|---|---|---|---|"]
    of = {arm: {seed: row for (name, seed), row in rows.items() if name == arm} for arm in ARMS}
    lines += [f"| {' | '.join(cells(arm, mine, dense))} |" for arm, mine in of.items() if mine]
    if of["ticket"]:
        lines += ["", "The ticket's rounds:", "", "| density | cross-entropy, nats a token |", "|---|---|"]
        for rounds in zip(*(row["rounds"] for row in of["ticket"].values()), strict=True):
            lines += [f"| {rounds[0]['density']:.4f} | {spread([row['cross_entropy'] for row in rounds])} |"]
    return "\n".join(lines)


def caption(row):
    """What was trained and scored."""
    protocol, settings = row["protocol"], row["protocol"]["settings"]
    shape = f"GPT-2 layout, {settings['layers']} layers, D {settings['width']}, {protocol['parameters']:,} parameters"
    yield f"{shape}; {settings['steps']} steps of {settings['batch']} x {settings['context_length']} bytes."
    yield f"Scored on {protocol['valid']['tokens']:,} bytes of {protocol['valid']['file']}; mean (lowest to highest)"
    yield f"over seeds. {row['device']}, torch {row['versions']['torch']}, {protocol['floats']}."


def cells(arm, mine, dense):
    """A line of the table, from one arm's rows by seed."""
    above = [row["cross_entropy"] - dense[seed] for seed, row in mine.items() if seed in dense]
    return [
        arm,
        f"{next(iter(mine.values()))['density']:.4f}",
        spread([row["cross_entropy"] for row in mine.values()]),
        spread([row["bits_per_byte"] for row in mine.values()]),
        spread(above, "+") if above else "",
        ", ".join(map(str, sorted(mine))),
    ]


def spread(values, sign=""):
    """Mean, lowest and highest."""
    mean, low, high = (f"{f(values):{sign}.4f}" for f in (statistics.mean, min, max))
    return f"{mean} ({low} to {high})"


def protocol_of(args, text, valid):
    """All that decides a result but the seed."""
    tickets = Tickets(rounds=args.rounds, rate=0.2, rewind=args.rewind, steps=args.steps)
    named = {"text": (args.text, text), "valid": (args.valid, valid)}
    read = {
        name: {"file": path.name, "sha256": store.sha256_of(path), "tokens": len(ids)}
        for name, (path, ids) in named.items()
    }
    settings = {name: value for name, value in vars(args).items() if name not in NOT_PROTOCOL}
    floats = "TF32 matrix products" if torch.device(args.device).type == "cuda" else "float32"
    parameters = sum(p.numel() for p in fresh(args, 0).model.parameters())
    return {"settings": settings, "tickets": asdict(tickets), **read, "floats": floats, "parameters": parameters}


def main():
    args = arguments()
    if args.table is not None:
        return print(table(args.table))
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU
    text, valid = read_bytes(args.text, args.text_bytes), read_bytes(args.valid, args.valid_bytes)
    protocol = json.loads(json.dumps(protocol_of(args, text, valid)))
    done = {(row["seed"], row["arm"]) for row in rows_in(args.out) if row["protocol"] == protocol}
    where = {"device": store.device_name(args.device), "versions": store.versions()}
    for seed in args.seeds:
        todo = trial(args, seed, protocol, text, valid)
        for arm in trained(todo, tuple(name for name in args.arms if (seed, name) not in done)):
            row = row_of(arm, seed, {"protocol": protocol}, where)
            append(args.out, row)
            done.add((seed, arm.name))
            print(seed, f"{arm.name:15s}", row["cross_entropy"], row["bits_per_byte"], row["seconds"], flush=True)
        if all((seed, name) in done for name in ARMS):
            shutil.rmtree(todo.keep, ignore_errors=True)
    print(table([args.out]))
    return None


if __name__ == "__main__":
    main()
