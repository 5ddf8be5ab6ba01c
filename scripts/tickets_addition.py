"""Lottery tickets, RigL and SNIP beside their controls, on addition: `python scripts/tickets_addition.py --out FILE`.

A small GPT-2 (2 layers, 4 heads, D = 64) learns two-digit addition from random weights, dense and at about a fifth of
its matrices' entries, each way for the same number of optimiser steps on the same batches of the same seed:

    dense              all entries
    ticket             iterative magnitude pruning, survivors back at their weights of step `rewind`
    ticket_from_0      that mask, initial weights
    reinitialised      that mask, new initial weights
    shuffled           that mask shuffled inside every matrix, weights of step `rewind`
    snip               the mask of one look at the gradient before training, initial weights
    snip_shuffled      that mask shuffled inside every matrix: same density in each, so only the places differ
    static             a random mask, densities by Erdos-Renyi-kernel
    rigl               the same first mask, then moved to where the gradient is large

Measured at the last step (nothing is picked): exact match of all three answer digits on the 2,000 held-out sums, and
their cross-entropy. Also the first step at which half and nine tenths of the sums are right. Resumable by seed.
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fewedges import store
from fewedges.data.addition import ANSWER, LENGTH, VOCABULARY, Sums, exact_match, split
from fewedges.model.anatomy import anatomy
from fewedges.model.loading import Loaded
from fewedges.sparsify.lottery import find_ticket, reinitialised_, rewind_
from fewedges.sparsify.masks import Masks, held
from fewedges.sparsify.matrices import matrices_of
from fewedges.sparsify.pattern import dense
from fewedges.sparsify.rewiring import random_masks, rewired
from fewedges.sparsify.score import SCORES, Evidence
from fewedges.sparsify.select import select_global
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


def rate(done):
    """Learning rate as a fraction of its peak: 5 % warm-up, then a cosine to zero."""
    return min(done / 0.05, 1.0) * 0.5 * (1 + math.cos(math.pi * done))


def optimizer_of(model, args):
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))


def train_(model, args, seed, masks, start=0, stop=None, recipe=None):
    """Optimiser steps `start` to `stop` - 1 under masks (moving ones with a Rewire recipe); what came of it."""
    stop = args.steps if stop is None else stop
    if stop == start:
        return None
    sums, optimizer, curve = Sums(seed=seed), optimizer_of(model, args), []
    model.train()
    holding = held(model, masks, optimizer) if recipe is None else rewired(model, masks, optimizer, recipe)
    with holding as mover:
        for step in range(start, stop):
            for group in optimizer.param_groups:
                group["lr"] = args.lr * rate(step / args.steps)
            if recipe is not None:
                mover.prepare(step)
            answer_loss(model, sums.at(step, args.batch).tokens).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if recipe is None or not mover.rewire_(step):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if (step + 1) % args.look_every == 0 or step + 1 == stop:
                curve.append((step + 1, exact_match(model, split().held_out)))
    return {**outcome(model, curve), "curve": curve}


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


# -- the masks ----------------------------------------------------------------------------------------------------


def snip_masks(loaded, args, seed, density):
    """The largest |w dL/dw| over all matrices, L the loss that training minimises, at the initial weights."""
    matrices = matrices_of(loaded)
    loss = answer_loss(loaded.model, Sums(seed=seed + 1000).at(0, args.snip_problems).tokens)
    slopes = torch.autograd.grad(loss, [matrix.parameter for matrix in matrices.values()])
    scores = {
        name: SCORES["snip"].of(matrix.weight, Evidence(gradient=matrix.oriented(slope)))
        for (name, matrix), slope in zip(matrices.items(), slopes, strict=True)
    }
    return Masks(select_global(scores, "unstructured", density))


def one_seed(args, seed, watch):
    """Every arm of one seed."""
    loaded = fresh(args, seed)
    model = loaded.model
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    recipe = Tickets(rounds=args.rounds, rate=0.2, rewind=args.rewind, steps=args.steps)
    density = recipe.density
    found, densities = {}, {}

    def arm(name, masks, weights, start=0, rewire=None):
        if args.only and name not in args.only:
            return
        rewind_(model, weights, masks)
        found[name] = train_(model, args, seed, masks, start, recipe=rewire)
        densities[name] = {path: round(p.density, 4) for path, p in masks.patterns.items()}
        watch(seed, name, found[name])

    full = Masks({name: dense(matrix.shape) for name, matrix in matrices_of(loaded).items()})
    arm("dense", full, initial)
    static = random_masks(matrices_of(loaded), density, "erk", seed=seed)
    rigl = Rewire(density=density, every=args.rigl_every, steps=args.steps)
    arm("static", static, initial)
    arm("rigl", static, initial, rewire=rigl)
    model.load_state_dict(initial)
    snip = snip_masks(loaded, args, seed, density)
    arm("snip", snip, initial)
    arm("snip_shuffled", snip.shuffled(seed), initial)
    rounds = None
    if not args.only or "ticket" in args.only:
        model.load_state_dict(initial)
        ticket = find_ticket(loaded, recipe, lambda masks, a, b: train_(model, args, seed, masks, a, b))
        rounds = [{"density": row["density"], **short(row["trained"])} for row in ticket.rounds]
        found["ticket"] = ticket.rounds[-1]["trained"]
        densities["ticket"] = {path: round(p.density, 4) for path, p in ticket.masks.patterns.items()}
        watch(seed, "ticket", found["ticket"])
        arm("shuffled", ticket.masks.shuffled(seed), ticket.early, start=args.rewind)
        arm("ticket_from_0", ticket.masks, initial)
        reinitialised_(model, seed + 100)
        arm("reinitialised", ticket.masks, {name: value.clone() for name, value in model.state_dict().items()})
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
