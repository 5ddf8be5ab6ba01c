"""Training throughput on random weights of SmolLM2-135M's shape: tokens/s by kernel and batch size.

`graph` is the fused kernel with each step replayed as one CUDA graph; `compiled` the same with compiled layers;
`query` the same with gate queries.

    python scripts/throughput.py --device cuda --out results/throughput.csv

Protocol: 5 warm-up steps, then 40 timed ones one by one, host clock around synchronised steps, T = 512, LoRA
rank 32, bf16, KL to the dense model included; p20, p50, p80 in ms, tokens/s by the median.
"""

import argparse
import csv
import dataclasses
import itertools
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

SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip


WARM = 5
WAYS = ("reference:16", "triton:16", "graph:16", "compiled:16", "query:16")


class Noise:
    """Random tokens."""

    def at(self, step, size):
        tokens = torch.randint(0, 1000, (size, 512), generator=torch.Generator().manual_seed(step))
        counts = torch.ones_like(tokens, dtype=torch.bool)
        counts[:, 0] = False
        return Batch(tokens, counts)

    def describe(self):
        return {"name": "noise"}


def random_model(device, layers=30):
    """SmolLM2-135M's shape with random weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SHAPE, "num_hidden_layers": layers})
    model = transformers.LlamaForCausalLM(config).to(device).eval().requires_grad_(False)
    return Loaded(name="random", model=model, tokenizer=None, anatomy=anatomy(model))


def throughput(dense, recipe):
    """Quantiles of single steps after five in ms, tokens/s by the median, peak memory."""
    marks = []

    def mark(_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    post_train(dense, recipe, Noise(), watch=mark)
    spans = [1e3 * (b - a) for a, b in itertools.pairwise(marks[WARM:])]
    low, middle, high = (statistics.quantiles(spans, n=10)[i] for i in (1, 4, 7))
    peak = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0
    quantiles = {"ms_p20": f"{low:.2f}", "ms_p50": f"{middle:.2f}", "ms_p80": f"{high:.2f}", "peak_mib": f"{peak:.0f}"}
    rate = 1e3 * recipe.tokens_per_step / statistics.median(spans)
    return {**quantiles, "runs": len(spans), "tokens_per_second": f"{rate:.0f}"}


def kind(base, what):
    """The recipe that a name like `compiled:16` stands for."""
    how, batch = what.split(":")
    graph, compiled = how in ("graph", "compiled", "query"), how in ("compiled", "query")
    kernel = "reference" if how == "reference" else "triton"
    changes = {"kernel": kernel, "graph": graph, "compiled": compiled, "gate_query": how == "query"}
    return dataclasses.replace(base, batch_size=int(batch), **changes)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--steps", type=int, default=WARM + 40)
    parser.add_argument("--what", nargs="*", default=list(WAYS))
    args = parser.parse_args()
    dense = random_model(args.device, args.layers)
    base = SparseAttention(
        train="lora", learning_rate=1e-3, lora_rank=32, steps=args.steps, log_every=1, precision="bf16"
    )
    versions = store.versions()
    facts = {"device": store.device_name(args.device), "torch": f"{versions['torch']} triton {versions['triton']}"}
    for what in args.what:
        row = {"what": what, "shape": f"SmolLM2-135M T512 layers {args.layers}", "dtype": "bfloat16", **facts}
        try:
            row |= throughput(dense, kind(base, what))
        except Exception as error:
            traceback.print_exc()
            print(what, "left out:", f"{type(error).__name__}: {error}"[:200], flush=True)
            continue
        print(row, flush=True)
        fresh = not args.out.exists()
        with args.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if fresh:
                writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__":
    main()
