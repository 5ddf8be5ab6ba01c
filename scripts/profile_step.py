"""Where one training step of SmolLM2-135M's shape spends its time on the GPU, before and after.

    python scripts/profile_step.py --out results/h100/profile.txt

Protocol: random weights, T = 512, LoRA rank 32, bf16, KL to the dense model included; torch.profiler over 3 steps after
6 others; GPU time by kernel, summed over names, per step. `busy` is the sum of kernel times over the wall time.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import torch
from throughput import Noise, random_model
from torch.profiler import ProfilerActivity, profile

from fewedges import store
from fewedges.recipes import SparseAttention
from fewedges.sparsify.attention.training import post_train

WAYS = {
    "eager, plain attention": {"kernel": "reference"},
    "eager, fused attention": {"kernel": "triton"},
    "replayed": {"kernel": "triton", "graph": True},
    "replayed and compiled": {"kernel": "triton", "graph": True, "compiled": True},
}
SKIP, STEPS = 6, 3


def profiled(dense, recipe):
    """(milliseconds per step, [(kernel, milliseconds per step, calls per step)])."""
    profiler, marks = profile(activities=[ProfilerActivity.CUDA]), []

    def watch(record):
        torch.cuda.synchronize()
        if record["step"] == SKIP:
            profiler.__enter__()
        marks.append(time.perf_counter())
        if record["step"] == SKIP + STEPS:
            profiler.__exit__(None, None, None)

    post_train(dense, recipe, Noise(), watch=watch)
    wall = 1e3 * (marks[SKIP + STEPS - 1] - marks[SKIP - 1]) / STEPS
    rows = [(e.key, e.self_device_time_total / 1e3 / STEPS, e.count / STEPS) for e in profiler.key_averages()]
    return wall, sorted((row for row in rows if row[1] > 0), key=lambda row: -row[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--what", nargs="*", default=list(WAYS))
    args = parser.parse_args()
    dense = random_model("cuda")
    base = SparseAttention(
        train="lora", learning_rate=1e-3, lora_rank=32, steps=SKIP + STEPS, log_every=1, precision="bf16",
        batch_size=args.batch_size,
    )  # fmt: skip
    lines = [f"{store.device_name('cuda')}, {store.versions()}, batch {args.batch_size} x 512 tokens"]
    for what in args.what:
        wall, rows = profiled(dense, dataclasses.replace(base, **WAYS[what]))
        total, calls = sum(row[1] for row in rows), sum(row[2] for row in rows)
        lines.append(f"\n{what}: {wall:.1f} ms a step, {calls:.0f} kernels, busy {total / wall:.0%}")
        lines += [f"  {ms:8.2f} ms {count:7.0f} x  {name[:110]}" for name, ms, count in rows[:22]]
        print("\n".join(lines[-24:]), flush=True)
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
