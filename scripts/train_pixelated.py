"""GPT-2's layout trained from scratch on bytes: dense, pixelated and controls, by steps and by wall clock.

    python scripts/train_pixelated.py --out results/h100/training.json --data train.txt.xz --valid valid.txt
    python scripts/train_pixelated.py --out try.json --dry                       # all arms, tiny, on the CPU
    python scripts/train_pixelated.py --limits                                   # what FLOPs and bytes allow, by width
    python scripts/train_pixelated.py --out results/h100/training.json --only-figures docs/figures

Arms: `dense`; `pixelated` (butterfly cells and a low rank); `random` (as many cells elsewhere, the same rank);
`low-rank` (as many parameters, all of them in the rank); `small` (dense, as many parameters, narrower); each for the
same steps on the same batches. NAME-longer is the same model trained for as many steps as fit into --share of the dense
model's time. Rows are written as arms end; the same command goes on with those that are missing, and an arm that would
not end within --seconds of the start is left for it.

Every step is one CUDA graph of forward, backward, clipping and fused AdamW, of layers compiled by torch.compile; the
kernels of pixelated layers are breaks in what is compiled. Seconds are those of the steps (host clock around
synchronised stretches of them): evaluating, compiling, trying tiles and capturing are not in them; the latter three are
`first_use_seconds`. bfloat16 autocast over float32 weights. `--sweep RATES` first tries learning rates on short runs.
"""

import argparse
import itertools
import json
import time
import traceback
from pathlib import Path

from pixelated_arms import ARMS, Trainer, build, kind_of, limits, narrow, peaks_of, shorten_tiles_, texts

from fewedges import store
from fewedges.errors import RecipeError

STARTED = time.perf_counter()
DEFAULT = ("dense", "pixelated", "pixelated-longer", "small", "small-longer", "random", "low-rank")
RATES = {"dense": 3e-4, "pixelated": 6e-4, "random": 6e-4, "low-rank": 6e-4, "small": 6e-4}
"""A sparse or narrow model bears a higher rate, its rows sum fewer inputs (at width 192 on a CPU, 200 steps: dense 1e-3
to 2e-3, pixelated 2e-3 or more). --sweep tries rates, --lr sets them."""
SAME = (
    "width", "layers", "head", "length", "batch", "density", "rank_share", "block", "steps", "warm_up", "every",
    "eval_batches", "share", "sweep_steps", "seed",
)  # fmt: skip
"""Flags with which all rows of one json were made."""
DRY = {
    "width": 64, "layers": 2, "head": 16, "length": 32, "batch": 4, "steps": 12, "warm_up": 2, "every": 4,
    "eval_batches": 2, "sweep_steps": 4, "block": 8, "device": "cpu",
}  # fmt: skip


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the json that is written, and read to go on")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/train.txt.xz"))
    parser.add_argument("--valid", type=Path, default=Path("../shared/data/valid.txt"))
    parser.add_argument("--arms", nargs="*", default=DEFAULT, help=f"of {', '.join(ARMS)}, or one of them with -longer")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--head", type=int, default=128, help="width of a head")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32, help="windows a step")
    parser.add_argument("--density", type=float, default=0.25, help="of the matrices of the blocks")
    parser.add_argument("--rank-share", type=float, default=0.25)
    parser.add_argument("--block", type=int, default=32, help="sides of cells and ranks are multiples of it")
    parser.add_argument("--small-width", type=int, help="default: as many parameters in the blocks")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--warm-up", type=int, default=60, help="steps; at most a fifth of a run")
    parser.add_argument("--every", type=int, default=30, help="steps between evaluations")
    parser.add_argument("--eval-batches", type=int, default=8, help="of held-out windows, the same for all")
    parser.add_argument("--share", type=float, default=0.78, help="of dense's time, for the -longer arms")
    parser.add_argument("--lr", nargs="*", default=[], metavar="ARM=RATE", help="peak learning rates")
    parser.add_argument(
        "--sweep", nargs="*", type=float, default=[], help="learning rates to try for every kind of arm"
    )
    parser.add_argument("--sweep-steps", type=int, default=150)
    parser.add_argument("--only-sweep", action="store_true", help="do not train the arms")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=235, help="an arm that would not end by then is left out")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kernel", default="triton", choices=("reference", "triton"), help="of pixelated layers")
    parser.add_argument("--eager", action="store_true", help="no CUDA graph and no torch.compile")
    parser.add_argument("--no-compile", action="store_true", help="CUDA graphs of uncompiled layers")
    parser.add_argument("--all-tiles", action="store_true", help="try every tile shape: some 20 s more to compile")
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU, by the reference kernel")
    parser.add_argument("--limits", action="store_true", help="print limits by width and stop")
    parser.add_argument("--only-figures", type=Path, metavar="DIR", help="draw what --out holds, and stop")
    args = parser.parse_args()
    if args.dry:
        vars(args).update(DRY)
    args.eager |= args.device == "cpu"
    args.kernel = "reference" if args.device == "cpu" else args.kernel
    return args


def main():
    args = arguments()
    if args.limits:
        return print_limits(args)
    if args.out is None:
        raise SystemExit("--out FILE is needed")
    if args.only_figures:
        return draw(json.loads(args.out.read_text()), args)
    unknown = [name for name in args.arms if kind_of(name) not in ARMS]
    if unknown:
        raise RecipeError(f"--arms {unknown[0]}", "no such arm", f"some of {', '.join(ARMS)}, also with -longer")
    data, valid = texts(args)
    found = begun(args, data, valid)
    if not args.all_tiles and args.device != "cpu":
        shorten_tiles_()
    failed = []
    for kind in dict.fromkeys(map(kind_of, args.arms)):
        wanted = [name for name in args.arms if kind_of(name) == kind and name not in found["arms"]]
        wanted = [] if args.only_sweep else wanted
        rates = [rate for rate in args.sweep if f"{rate:g}" not in found["sweep"].setdefault(kind, {})]
        try:
            if rates or wanted:
                run_kind(kind, wanted, rates, found, args, data, valid)
        except Exception:  # the other arms are not lost
            traceback.print_exc()
            failed.append(kind)
    print(*summary(found), sep="\n", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


# -- arms ----------------------------------------------------------------------------------------------------------


def run_kind(kind, names, rates, found, args, data, valid):
    """Build one kind of model, try its learning rates, train its arms."""
    began = time.perf_counter()
    model = build(kind, args)
    trainer = Trainer(model, args, data, valid)
    facts = trainer.facts() | {"first_use_seconds": time.perf_counter() - began}
    tell(f"{kind}: ready in {facts['first_use_seconds']:.1f} s, {1e3 * trainer.pace:.2f} ms a step")
    for rate in rates:
        if fits(f"{kind} at {rate:g}", trainer, args.sweep_steps, args):
            run = trainer.run(args.sweep_steps, rate, every=args.sweep_steps)
            found["sweep"][kind][f"{rate:g}"] = run["curve"][-1]["loss"]
            tell(f"{kind} at {rate:g}: {run['curve'][-1]['loss']}")
            write(found, args)
    for name in names:
        steps = args.steps if name == kind else longer(trainer, found, args)
        if steps is None:
            tell(f"{name}: left out, the dense arm is not there yet")
        elif fits(name, trainer, steps, args):
            rate = rate_of(kind, name, found, args)
            run = trainer.run(steps, rate, every=args.every)
            limit = found["limits"][kind]
            found["arms"][name] = {"kind": kind, "learning_rate": rate, "steps": steps, **facts, **limit, **run}
            compare(found)
            write(found, args)
            tell(f"{name}: {steps} steps, {run['seconds']:.1f} s, loss {run['curve'][-1]['loss']}")
    trainer.close()


def longer(trainer, found, args):
    """How many steps fit into a share of the dense arm's time; None while there is no dense arm."""
    dense = found["arms"].get("dense")
    return dense and int(args.share * dense["seconds"] / trainer.pace)


def fits(name, trainer, steps, args):
    """Whether so many steps, and evaluations a third as long a batch, end in time."""
    evaluations = (steps / args.every + 2) * args.eval_batches / 3
    needed, left = trainer.pace * (steps + evaluations), args.seconds - (time.perf_counter() - STARTED)
    if needed > left:
        tell(f"{name}: left out, it needs {needed:.0f} s of {left:.0f}: the same command again goes on with it")
    return needed <= left


def rate_of(kind, name, found, args):
    """--lr, or the best of a sweep, or the default."""
    given = dict(pair.split("=") for pair in args.lr)
    tried = {rate: loss for rate, loss in found["sweep"].get(kind, {}).items() if loss is not None}
    best = float(min(tried, key=tried.get)) if tried else RATES[kind]
    return float(given.get(name, given.get(kind, best)))


def compare(found):
    """When each arm comes to the dense arm's last loss, straight between evaluations; and as a part of dense's time."""
    dense = found["arms"].get("dense")
    for arm in found["arms"].values() if dense else ():
        arm["seconds_to_dense_loss"] = reached(arm["curve"], dense["curve"][-1]["loss"])
        seconds = arm["seconds_to_dense_loss"]
        arm["ratio"] = None if seconds is None else seconds / dense["seconds"]


def reached(curve, level):
    """Seconds at which the loss first is at `level`; None if it never is."""
    known = [(row["seconds"], row["loss"]) for row in curve if row["loss"] is not None]
    for (early, high), (late, low) in itertools.pairwise(known):
        if level is not None and low <= level <= high:
            return late if high == low else early + (late - early) * (high - level) / (high - low)
    return None


# -- what is written -----------------------------------------------------------------------------------------------


def begun(args, data, valid):
    """What --out holds, if it is of the same protocol, or a new record."""
    protocol = {name: getattr(args, name) for name in SAME} | {
        "layout": "GPT-2: tied embeddings, learned positions, tanh GELU, bytes as tokens, no dropout",
        "optimiser": "AdamW, betas .9 .95, decay .1 of matrices, gradients clipped at norm 1; warm-up, cosine to 0",
        "precision": "bfloat16 autocast, float32 weights" if args.device != "cpu" else "float32",
        "small_width": args.small_width or narrow(args),
        "data": data.describe(),
        "valid": valid.describe(),
    }
    if args.out.exists():
        found = json.loads(args.out.read_text())
        changed = sorted(
            name for name in protocol if found["protocol"].get(name) != json.loads(json.dumps(protocol[name]))
        )
        if changed:
            hint = "the same flags, or another --out"
            raise RecipeError(f"go on with {args.out}", f"it was made with another {changed[0]}", hint)
        return found
    peaks = peaks_of(args.device)
    found = {
        "protocol": protocol,
        "device": store.device_name(args.device),
        "versions": store.versions(),
        "peaks": peaks,
    }
    return found | {"limits": limits(args, peaks), "sweep": {}, "arms": {}}


def write(found, args):
    from fewedges.sparsify.launching import trials

    found["tiles"] = found.get("tiles", []) + [
        row for row in trials() if row["chosen"] and row not in found.get("tiles", [])
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    store.write_text(args.out, json.dumps(found, indent=1) + "\n")


def summary(found):
    """A line an arm."""
    yield f"{'arm':18}{'rate':>8}{'steps':>7}{'ms p50':>8}{'seconds':>9}{'loss':>8}{'to dense':>10}{'limit':>7}"
    for name, arm in found["arms"].items():
        ratio = "never" if arm.get("ratio") is None else f"{arm['ratio']:.2f}"
        loss = arm["curve"][-1]["loss"]
        numbers = f"{arm['ms_p50']:8.2f}{arm['seconds']:9.1f}{loss if loss is None else round(loss, 4)!s:>8}"
        yield f"{name:18}{arm['learning_rate']:8.1e}{arm['steps']:7}{numbers}{ratio:>10}{arm['limit']:7.2f}"
    for kind, tried in found["sweep"].items():
        if tried:
            yield f"sweep {kind}: " + ", ".join(f"{rate} {loss}" for rate, loss in tried.items())


def print_limits(args):
    """Dense time over arm's time at an H100's peaks of a product (790 TFLOP/s) and a copy (3 TB/s), by width."""
    for width in (1024, 1536, 2048, 2560, 3072, 4096):
        args.width = width
        rows = limits(args, {"flops": 790e12, "bandwidth": 3e12})
        print(width, f"dense {rows['dense']['least_ms']:.1f} ms a step at best;", end=" ")
        print(*(f"{name} {row['limit_arithmetic']:.2f} {row['limit']:.2f};" for name, row in rows.items()))


def draw(found, args):
    from fewedges.draw.theme import THEMES, save
    from fewedges.draw.training import races

    for theme in THEMES:
        print(*save(races(found, theme=theme), args.only_figures / f"training-{theme}"), sep="\n")


def tell(line):
    print(f"{time.perf_counter() - STARTED:6.1f} s  {line}", flush=True)


if __name__ == "__main__":
    main()
