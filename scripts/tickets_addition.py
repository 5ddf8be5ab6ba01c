"""Lottery tickets, RigL and SNIP beside their controls, on addition: `python scripts/tickets_addition.py --out FILE`.

A small GPT-2 (2 layers, 4 heads, D = 64) learns two-digit addition from random weights, dense and at about a fifth of
its matrices' entries, each way for the same number of optimiser steps on the same batches of the same seed: the arms
of arms.py.

Measured at the last step (nothing is picked): exact match of all three answer digits on the 2,000 held-out sums, and
their cross-entropy. Also the first step at which half and nine tenths of the sums are right. Resumable by seed.
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import torch
from arms import ARMS, OF_TICKET, Course, Trial, train_, trained
from transformers import GPT2Config, GPT2LMHeadModel

from fewedges import store
from fewedges.data.addition import ANSWER, LENGTH, VOCABULARY, Sums, exact_match, split
from fewedges.model.anatomy import anatomy
from fewedges.model.loading import Loaded
from fewedges.weight_recipes import Rewire, Tickets


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=7, help="of iterative pruning, a fifth each")
    parser.add_argument("--rewind", type=int, default=60, help="step whose weights the ticket goes back to")
    parser.add_argument("--snip-problems", type=int, default=1024)
    parser.add_argument("--rigl-every", type=int, default=50)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--look-every", type=int, default=50, help="steps between two looks at the held-out sums")
    parser.add_argument("--only", nargs="*", help="arms to run; for trying")
    return parser.parse_args()


# -- the model and its training ------------------------------------------------------------------------------------


def fresh(args, seed):
    """An untrained model."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(VOCABULARY),
        n_positions=LENGTH,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=4,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    return Loaded(name="addition from scratch", model=model, tokenizer=None, anatomy=anatomy(model))


def answer_loss(model, tokens):
    """Mean cross-entropy of the answer digits, in nats."""
    logits = model(input_ids=tokens).logits[:, ANSWER.start - 1 : ANSWER.stop - 1]  # (B, 3, V)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, ANSWER].flatten())


@torch.no_grad()
def outcome(model, curve):
    model.eval()
    first = {f"step_at_{int(100 * level)}": next((s for s, a in curve if a >= level), None) for level in (0.5, 0.9)}
    return {
        "accuracy": exact_match(model, split().held_out),
        "loss": round(answer_loss(model, split().held_out).item(), 5),
        "train_accuracy": exact_match(model, split().train),
        **first,
    }


def trial(args, seed):
    """What one seed trains, and how."""
    loaded = fresh(args, seed)
    model, sums = loaded.model, Sums(seed=seed)
    course = Course(steps=args.steps, lr=args.lr, weight_decay=args.weight_decay, look_every=args.look_every)
    tickets = Tickets(rounds=args.rounds, rate=0.2, rewind=args.rewind, steps=args.steps)

    def train(masks, start, stop, rewire=None):
        if stop == start:
            return None
        what = {"batch": lambda step: sums.at(step, args.batch).tokens, "loss": answer_loss}
        what["look"] = lambda: exact_match(model, split().held_out)
        curve = train_(model, masks, course, start, stop, rewire, **what)
        return {**outcome(model, curve), "curve": curve}

    return Trial(
        seed=seed,
        loaded=loaded,
        tickets=tickets,
        rewire=Rewire(density=tickets.density, every=args.rigl_every, steps=args.steps, seed=seed),
        train=train,
        look=lambda: answer_loss(model, Sums(seed=seed + 1000).at(0, args.snip_problems).tokens),
    )


def one_seed(args, seed, watch):
    """Every arm of one seed; those of a ticket only with the ticket itself."""
    wanted = tuple(name for name in ARMS if not args.only or name in args.only)
    wanted = wanted if "ticket" in wanted else tuple(name for name in wanted if name not in OF_TICKET)
    found, densities, rounds = {}, {}, None
    for arm in trained(trial(args, seed), wanted):
        found[arm.name] = arm.row
        densities[arm.name] = {path: round(p.density, 4) for path, p in arm.masks.patterns.items()}
        watch(seed, arm.name, arm.row)
        if arm.rounds is not None:
            rounds = [{"density": row["density"], **short(row["trained"])} for row in arm.rounds]
    return {"seed": seed, "arms": found, "rounds": rounds, "densities": densities}


def short(row):
    return {name: value for name, value in row.items() if name != "curve"}


# -- the file ------------------------------------------------------------------------------------------------------


def summary(runs):
    """Median, lowest and highest accuracy of every arm, and the median loss."""
    table = {}
    for name in runs[0]["arms"]:
        rows = [run["arms"][name] for run in runs]
        values = [row["accuracy"] for row in rows]
        table[name] = {
            "accuracy": [round(f(values), 4) for f in (min, statistics.median, max)],
            "loss_median": round(statistics.median(row["loss"] for row in rows), 4),
        }
    return table


def main():
    args = arguments()
    torch.set_num_threads(1)
    recipe = Tickets(rounds=args.rounds, rate=0.2, rewind=args.rewind, steps=args.steps)
    chosen = {name: value for name, value in vars(args).items() if name not in ("out", "seeds", "only")}
    protocol = {"settings": chosen, "tickets": asdict(recipe), "density": round(recipe.density, 4)}
    old = json.loads(args.out.read_text()) if args.out.exists() else {}
    runs = old["runs"] if old.get("protocol") == protocol else []

    def watch(seed, name, row):
        print(seed, f"{name:15s}", short(row), flush=True)

    for seed in args.seeds:
        if any(run["seed"] == seed for run in runs):
            continue
        began = time.monotonic()
        runs.append(one_seed(args, seed, watch) | {"seconds": round(time.monotonic() - began, 1)})
        facts = {"device": store.device_name("cpu"), "versions": store.versions()}
        whole = {"summary": summary(runs), "protocol": protocol, **facts, "runs": runs}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        store.write_text(args.out, json.dumps(whole) + "\n")
    print(json.dumps(summary(runs), indent=1))


if __name__ == "__main__":
    main()
