"""Training throughput on random weights of SmolLM2-135M's shape: tokens/s by kernel and batch size.

`graph` is the fused kernel with each step replayed as one CUDA graph; `compiled` the same with compiled layers;
`query` the same with gate queries.

    python scripts/throughput.py --device cuda --out results/throughput.json

Protocol: 5 warm-up steps, then 15 timed ones one by one, host clock around synchronised steps, T = 512, LoRA
rank 32, bf16, KL to the dense model included; median tokens/s.
"""

import argparse
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

SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip


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
    """Median tokens/s and peak memory of single steps after five."""
    marks = []

    def mark(_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    post_train(dense, recipe, Noise(), watch=mark)
    spans = [b - a for a, b in itertools.pairwise(marks[5:])]
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    return {"tokens_per_second": recipe.tokens_per_step / statistics.median(spans), "peak_gib": peak}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--what",
        nargs="*",
        default=["reference:16", "triton:16", "graph:16", "graph:32", "compiled:16", "compiled:32", "query:32"],
    )
    args = parser.parse_args()
    dense = random_model(args.device, args.layers)
    base = SparseAttention(
        train="lora", learning_rate=1e-3, lora_rank=32, steps=args.steps, log_every=1, precision="bf16"
    )
    rows = []
    for what in args.what:
        how, batch = what.split(":")
        kernel = "reference" if how == "reference" else "triton"
        graph, compiled = how in ("graph", "compiled", "query"), how in ("compiled", "query")
        recipe = dataclasses.replace(
            base, kernel=kernel, graph=graph, compiled=compiled, gate_query=how == "query", batch_size=int(batch)
        )
        try:
            rows.append({"how": how, "batch": int(batch), **throughput(dense, recipe)})
        except Exception as error:
            traceback.print_exc()
            rows.append({"how": how, "batch": int(batch), "error": f"{type(error).__name__}: {error}"})
        print(rows[-1], flush=True)
    facts = {"device": store.device_name(args.device), "versions": store.versions()}
    args.out.write_text(json.dumps({"rows": rows, **facts}, indent=1))


if __name__ == "__main__":
    main()
