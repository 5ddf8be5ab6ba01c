"""Does sparse post-training of a model of OLMo-7B's size fit on one GPU, and how fast is it?

    python scripts/olmo7b.py --out results/h100/olmo7b.json     # and olmo7b.csv beside it

Protocol: OlmoConfig() of transformers (allenai/OLMo-7B: 32 layers, 32 heads, width 4096), random weights in bf16 (the
real ones are not at hand; nothing here depends on their values), LoRA rank 32 on all linear layers, T = 1024, KL to the
dense model, the fused kernel; 3 warm-up steps, then 30 timed ones; p20, p50, p80 of a step in ms, tokens/s by the
median, peak memory by torch.
"""

import argparse
import csv
import dataclasses
import itertools
import json
import statistics
import time
import traceback
from pathlib import Path

import torch
import transformers

from fewedges import store
from fewedges.data.batch import Batch
from fewedges.model.anatomy import anatomy
from fewedges.model.loading import Loaded
from fewedges.recipes import SparseAttention
from fewedges.sparsify.attention.training import post_train


class Noise:
    """Random tokens in full windows."""

    def __init__(self, length, vocabulary):
        self.context_length, self.vocabulary = length, vocabulary

    def at(self, step, size):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, self.vocabulary, (size, self.context_length), generator=generator)
        counts = torch.ones_like(tokens, dtype=torch.bool)
        counts[:, 0] = False
        return Batch(tokens, counts)

    def describe(self):
        return {"name": "noise"}


def load(device, layers):
    """The random model, made in place in bf16."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = transformers.OlmoForCausalLM(transformers.OlmoConfig(num_hidden_layers=layers))
    finally:
        torch.set_default_dtype(before)
    model.eval().requires_grad_(False)
    return Loaded(name="random OLMo-7B", model=model, tokenizer=None, anatomy=anatomy(model))


def timed(dense, recipe):
    """Quantiles of a step in ms, tokens/s by the median, peak GiB, and the log."""
    marks, records = [], []

    def watch(record):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
        records.append(record)

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    post_train(dense, recipe, Noise(recipe.context_length, dense.anatomy.vocabulary), watch=watch)
    spans = [b - a for a, b in itertools.pairwise(marks[2:])]
    rate = recipe.tokens_per_step / statistics.median(spans)
    low, middle, high = (1e3 * statistics.quantiles(spans, n=10)[i] for i in (1, 4, 7))
    return {
        "ms": [low, middle, high],
        "tokens_per_second": rate,
        "seconds_per_step": sorted(spans),
        "hours_for_100M_tokens": 1e8 / rate / 3600,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
        "kl": [r["kl"] for r in records],
        "edges": [r["edges_per_query_per_head"] for r in records],
        "gradient_norm": [r["gradient_norm"] for r in records],
    }


def table(path, rows, length):
    """The rows as the other benchmarks write theirs."""
    versions, named = store.versions(), {"dtype": "bfloat16", "device": store.device_name("cuda")}
    with path.open("w", newline="") as file:
        names = "what shape dtype device torch ms_p20 ms_p50 ms_p80 peak_mib runs tokens_per_second".split()
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row in (row for row in rows if "ms" in row):
            shape = {"what": row["how"], "shape": f"OLMo-7B B{row['batch']} T{length} LoRA 32", **named}
            shape["torch"] = f"{versions['torch']} triton {versions['triton']}"
            times = {f"ms_p{q}": f"{ms:.1f}" for q, ms in zip((20, 50, 80), row["ms"], strict=True)}
            runs = {"runs": len(row["seconds_per_step"]), "tokens_per_second": f"{row['tokens_per_second']:.0f}"}
            writer.writerow({**shape, **times, "peak_mib": f"{row['peak_gib'] * 1024:.0f}", **runs})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=33)
    parser.add_argument("--kernel", default="triton")
    parser.add_argument("--what", nargs="*", default=["eager:4", "eager:8"])
    args = parser.parse_args()
    dense = load(args.device, args.layers)
    base = SparseAttention(
        train="lora", learning_rate=1e-3, lora_rank=32, steps=args.steps, log_every=1, precision="bf16",
        kernel=args.kernel, context_length=args.length, gate_query=True,
    )  # fmt: skip
    rows = []
    for what in args.what:
        how, batch = what.split(":")
        recipe = dataclasses.replace(base, batch_size=int(batch), compiled=how == "compiled")
        row = {"how": how, "batch": int(batch)}
        try:
            rows.append(row | timed(dense, recipe))
        except Exception as error:
            traceback.print_exc()
            rows.append(row | {"error": f"{type(error).__name__}: {error}"[:300]})
        print(rows[-1], flush=True)
        facts = {"parameters": dense.anatomy.parameters, "length": args.length, "versions": store.versions()}
        args.out.write_text(json.dumps({"rows": rows, "device": store.device_name(args.device), **facts}, indent=1))
        if torch.cuda.is_available():
            table(args.out.with_suffix(".csv"), rows, args.length)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
