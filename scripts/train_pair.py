"""Train a sparse model, or its dense control, in a process of its own: one on each of two GPUs, at the same time.

    CUDA_VISIBLE_DEVICES=0 python scripts/train_pair.py sparse  START --recipe R.yaml --data D --out OUT &
    CUDA_VISIBLE_DEVICES=1 python scripts/train_pair.py control START --recipe R.yaml --data D --out OUT &

gives what `fewedges sparsify START --control` gives, one after the other, on one GPU: OUT with OUT/control in it. START
is a model, or an earlier run (with its control) to go on from. The same command again resumes.
"""

import argparse
from pathlib import Path

import fewedges as fe
from fewedges.recipes import from_dict, read_recipe, to_dict
from fewedges.sparsify.attention.result import origin, save_control, training_data
from fewedges.sparsify.attention.training import post_train


def control(start, recipe, data, folder, pause):
    """Train the control as `sparsify` does, and save it where `fewedges.load` looks for it."""
    dense, starts = origin(start, True)
    batches = training_data(dense, recipe, data)
    options = {"folder": folder, "control": True, "start": starts["control"], "pause_minutes": pause}
    done = post_train(dense, recipe, batches, **options)
    save_control(folder, dense, recipe, batches.describe(), done.model)
    return f"control: {done.records[-1]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sparse", "control"])
    parser.add_argument("start")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--pause-minutes", type=float)
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="recipe fields to change")
    args = parser.parse_args()
    import yaml

    changes = {name: yaml.safe_load(value) for name, _, value in (pair.partition("=") for pair in args.set)}
    recipe = from_dict({**to_dict(read_recipe(args.recipe)), **changes})
    start = fe.load(args.start, device=args.device, probes=False)
    if args.what == "control":
        print(control(start, recipe, args.data, args.out / "control", args.pause_minutes))
    else:
        print(fe.sparsify(start, recipe, data=args.data, out=args.out, pause_minutes=args.pause_minutes))


if __name__ == "__main__":
    main()
