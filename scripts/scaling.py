"""Training throughput by number of GPUs: the data-parallel step on random weights of SmolLM2-135M's shape.

    python scripts/scaling.py --processes 1 2 --out results/h200/scaling.json

starts itself through torchrun once for each number of processes. `weak` keeps the windows of a GPU, `strong` those of
the whole batch; both are the same work for one process, which is timed once.

Protocol: that of throughput.py (T = 512, LoRA rank 32, bf16, KL to the dense model included, the fused kernel, each
step a CUDA graph) for 10 warm-up steps and 30 timed ones, one by one, host clock around synchronised steps of the
first process; p20, p50, p80 in ms; tokens/s of all processes together, by the median. Efficiency is tokens/s over
(processes x tokens/s of one process).
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from throughput import SHAPE, Noise, random_model

from fewedges import store
from fewedges.recipes import SparseAttention
from fewedges.sparsify.attention.parallel import local_device
from fewedges.sparsify.attention.training import post_train


def recipe(args, batch):
    """The step that is timed."""
    fused = {} if args.device == "cpu" else {"kernel": "triton", "graph": True, "compiled": args.compiled}
    return SparseAttention(
        train="lora", learning_rate=1e-3, lora_rank=32, precision="bf16", log_every=1, batch_size=batch,
        steps=args.warm + args.steps + 1, **fused,
    )  # fmt: skip


def timed(args, dense, batch):
    """Milliseconds of single steps on the first process, tokens/s of all, peak memory of the first."""
    marks = []

    def mark(_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    settings = recipe(args, batch)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    post_train(dense, settings, Noise(), watch=mark)
    if not marks:  # not the first process
        return None
    spans = sorted(1e3 * (b - a) for a, b in itertools.pairwise(marks[args.warm :]))
    low, middle, high = (statistics.quantiles(spans, n=10)[i] for i in (1, 4, 7))
    peak = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
    rate = 1e3 * settings.tokens_per_step / statistics.median(spans)
    quantiles = {"ms_p20": low, "ms_p50": middle, "ms_p80": high, "runs": len(spans)}
    return {"batch": batch, **quantiles, "tokens_per_second": rate, "peak_mib": peak}


def work(args):
    """One process of several: time each kind, and write the rows if it is the first."""
    size = int(os.environ["WORLD_SIZE"])
    device = local_device(args.device)
    SHAPE["vocab_size"] = args.vocabulary
    dense = random_model(device, args.layers)
    kinds = {"weak": args.batch * size, "strong": args.batch} if size > 1 else {"one": args.batch}
    rows = [{"what": what, "processes": size, **(timed(args, dense, batch) or {})} for what, batch in kinds.items()]
    if os.environ["RANK"] == "0":
        facts = {"device": store.device_name(device), "versions": store.versions()}
        args.out.write_text(json.dumps({"rows": rows, **facts}))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def launch(args, size):
    """This script in `size` processes; what the first one wrote."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        flags = [*sys.argv[1:], "--worker", "--out", str(out)]  # the later --out holds
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"]
        subprocess.run([*command, __file__, *flags], check=True)
        return json.loads(out.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--batch", type=int, default=32, help="windows of one GPU (weak), of all (strong)")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--vocabulary", type=int, default=SHAPE["vocab_size"])
    parser.add_argument("--warm", type=int, default=10)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args)
    found = [launch(args, size) for size in args.processes]
    rows = [row for each in found for row in each["rows"]]
    single = [row["tokens_per_second"] for row in rows if row["processes"] == 1]
    for row in rows:
        row["efficiency"] = row["tokens_per_second"] / (row["processes"] * single[0]) if single else None
    text = json.dumps(
        {**found[0], "layers": args.layers, "vocabulary": args.vocabulary, "compiled": args.compiled, "rows": rows},
        indent=1,
    )
    args.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
