"""Which keys the open attention edges of a sparse model read: the first token, the query itself, or others.

    python scripts/where_edges_go.py runs/smollm2 --data valid.txt --windows 4 --out results/smollm2/where_edges_go.json

Protocol: the first windows of the text, hard gates; edges per query per head, averaged over layers and heads, the share
of (layer, head) pairs whose edges go to the first token for more than half, and how edges are shared out among heads.
"""

import argparse
import json
from pathlib import Path

import torch

import fewedges as fe
from fewedges import store
from fewedges.data.text import read_text
from fewedges.model.loading import Loaded


def count(sparse, tokens):
    """Open edges by kind: (3, L, H) for one window, per query."""
    run = fe.GatePass(keep_maps=True)
    with torch.no_grad():
        sparse.model(input_ids=tokens, use_cache=False, gate_pass=run)
    opened = torch.cat([run.maps[layer][1] for layer in sorted(run.maps)])  # (L, H, T, T)
    first = opened[..., 1:, 0].float().sum(-1)
    itself = torch.diagonal(opened, dim1=-2, dim2=-1)[..., 1:].float().sum(-1)
    total = opened.float().sum((-1, -2))
    return torch.stack([first, itself, total - first - itself]) / tokens.shape[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--data", required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--context-length", type=int, default=512)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    sparse = fe.load(args.run)
    assert not isinstance(sparse, Loaded), "a sparse run"
    length = args.context_length
    text = read_text(args.data, sparse.tokenizer, context_length=length)
    windows = torch.from_numpy(text.stream[: args.windows * length].astype("int64")).view(args.windows, 1, length)
    kinds = torch.stack([count(sparse, tokens) for tokens in windows]).mean(0)  # (3, L, H)
    names = ("first token", "the query itself", "other tokens")
    result = {name: float(kind.mean()) for name, kind in zip(names, kinds, strict=True)}
    result["heads with more than half their edges to the first token"] = float(
        (kinds[0] > kinds.sum(0) / 2).float().mean()
    )
    by_head = kinds.sum(0).flatten().sort(descending=True).values
    result["heads"] = len(by_head)
    result["heads below 0.001 edges a query"] = int((by_head < 1e-3).sum())
    for count_ in (30, 90, 200):
        result[f"share of the edges in the {count_} heads with most"] = float(by_head[:count_].sum() / by_head.sum())
    result |= {"windows": args.windows, "context_length": length, "data_sha256": store.sha256_of(args.data)}
    args.out.write_text(json.dumps({**result, "versions": store.versions()}, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
