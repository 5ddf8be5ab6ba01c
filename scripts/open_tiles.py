"""How open gates lie in a sparse model: what hard-gated inference can leave out, and what it cannot.

    python scripts/open_tiles.py results/smollm2/run --data valid.txt --out results/smollm2/open_tiles.json

Protocol: the first window of the text at each length, hard gates, means over all layers and heads. A tile is
64 x 64 scores on or below the diagonal. `tile_closed_by_bound`: tiles that an upper bound of all their scores
proves closed, the lower of two: per-channel minima and maxima of the keys (Quest, arXiv:2406.10774), and
Cauchy-Schwarz around the mean key; `page_closed_by_bound`: the same for one query and 64 or 16 keys, as in
decoding. `tile_without_weight`: tiles that hold less than 2^-24 (2^-10) of every row's softmax, so that even
their exponentials could go. Shapes: H head, G key/value head, T token, E head width, N tiles per side.
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

import torch

import fewedges as fe
from fewedges import store
from fewedges.data.text import read_text
from fewedges.model.attention import attention_by, register
from fewedges.model.loading import Loaded
from fewedges.sparsify.attention.gate import gate_logits, key_bias
from fewedges.sparsify.attention.interface import gated_forward

TILE = 64
CLOSED = -1e30


def counts(query, key, bias, scaling):
    """Every number for one head: query and key (T, E), bias (T,) as each key sees it."""
    length = len(query)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    scores = (query @ key.T * scaling).masked_fill(~causal, CLOSED)
    opened = gate_logits(scores[None, None], bias[None, None])[0, 0] > 0  # (T, T)
    tiles = tiled(opened).any(3).any(1)  # (N, N)
    lower = torch.ones_like(tiles).tril()
    weight = torch.logsumexp(scores.view(length, -1, TILE), 2) - torch.logsumexp(scores, 1)[:, None]  # (T, N)
    bound = {size: upper_bound(query, key, bias, scaling, size) for size in (TILE, 16)}  # (T, T / size)
    seen = {size: causal[:, ::size] for size in (TILE, 16)}
    return {
        "edges_per_query": opened.sum() / length,
        "open_tiles": tiles[lower].float().mean(),
        "open_tiles_of_16_keys": opened.view(-1, TILE, length // 16, 16).any(3).any(1).sum() / (4 * lower.sum()),
        "different_keys_per_64_queries": opened.view(-1, TILE, length).any(1).sum(1).float().mean(),
        "different_keys_per_128_queries": opened.view(-1, 2 * TILE, length).any(1).sum(1).float().mean(),
        "queries_with_an_open_gate": opened.any(1).float().mean(),
        "64_queries_with_an_open_gate": opened.any(1).view(-1, TILE).any(1).float().mean(),
        "tile_closed_by_bound": (bound[TILE].view(-1, TILE, lower.shape[1]) <= 0).all(1)[lower].float().mean(),
        "page_closed_by_bound_64": (bound[TILE] <= 0)[seen[TILE]].float().mean(),
        "page_closed_by_bound_16": (bound[16] <= 0)[seen[16]].float().mean(),
        **{f"tile_without_weight_2^-{bits}": light(weight, bits)[lower].float().mean() for bits in (24, 10)},
    }


def tiled(x):
    """(T, T) as (N, 64, N, 64)."""
    return x.view(len(x) // TILE, TILE, len(x) // TILE, TILE)


def light(weight, bits):
    return (weight < -bits * 0.6931).view(-1, TILE, weight.shape[1]).all(1)


def upper_bound(query, key, bias, scaling, size):
    """The most a gate's logit can be, by query and block of `size` keys, from summaries of the block alone."""
    blocks = key.view(-1, size, key.shape[1])
    high, low, mean = blocks.amax(1), blocks.amin(1), blocks.mean(1)
    channels = query.clamp_min(0) @ high.T + query.clamp_max(0) @ low.T
    radius = (blocks - mean[:, None]).norm(dim=-1).amax(1)
    ball = query @ mean.T + query.norm(dim=-1)[:, None] * radius
    return torch.minimum(channels, ball) * scaling + bias.view(-1, size).amax(1)


def measure(sparse, tokens):
    """Means over layers and heads for one window, and the spread of open tiles over heads."""
    found = defaultdict(list)

    def watched(module, query, key, value, mask, scaling=None, **rest):
        extra = getattr(module, "gate_query", None)
        bias = key_bias(module.gate_bias, extra, key, scaling).float()
        for h in range(query.shape[1]):
            g = h * key.shape[1] // query.shape[1]
            each = (bias[h] if bias.dim() == 1 else bias[0, h]).expand(key.shape[2])
            for name, number in counts(query[0, h].float(), key[0, g].float(), each, scaling).items():
                found[name].append(float(number))
        return gated_forward(module, query, key, value, mask, scaling=scaling, **rest)

    register("fewedges-watched", watched)
    with torch.no_grad(), attention_by(sparse.model, "fewedges-watched"):
        sparse.model(input_ids=tokens, use_cache=False)
    spread = statistics.quantiles(found["open_tiles"], n=10)
    return {name: statistics.fmean(x) for name, x in found.items()} | {"open_tiles_deciles_over_heads": spread}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--data", required=True)
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 1024, 2048])
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sparse = fe.load(args.run)
    assert not isinstance(sparse, Loaded), "a sparse run"
    rows = {}
    for length in args.lengths:
        text = read_text(args.data, sparse.tokenizer, context_length=length)
        ids = torch.from_numpy(text.stream[: args.windows * length].astype("int64")).view(args.windows, 1, length)
        windows = [measure(sparse, tokens) for tokens in ids]
        names = [name for name in windows[0] if not isinstance(windows[0][name], list)]
        rows[length] = {name: statistics.fmean(w[name] for w in windows) for name in names}
        rows[length]["open_tiles_deciles_over_heads"] = windows[0]["open_tiles_deciles_over_heads"]
        print(length, json.dumps(rows[length], indent=1), flush=True)
    facts = {"windows": args.windows, "data_sha256": store.sha256_of(args.data), "versions": store.versions()}
    args.out.write_text(json.dumps({"by_length": rows, **facts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
