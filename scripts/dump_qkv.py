"""Write query, key, value and gate bias of some layers of a sparse model on real text, for benchmarks/inference.py.

    python scripts/dump_qkv.py results/smollm2/run --data valid.txt --length 2048 --layers 4 16 27 --out qkv.safetensors

One window, bfloat16: 2048 tokens of SmolLM2 are 2.9 MB a layer. Keys in the file: layer.NN.query (1, H, T, E),
.key and .value (1, G, T, E), .bias (H,) or (1, H, T); scaling and layers stand in the metadata.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

import fewedges as fe
from fewedges.data.text import read_text
from fewedges.model.attention import attention_by, register
from fewedges.model.loading import Loaded
from fewedges.sparsify.attention.gate import key_bias
from fewedges.sparsify.attention.interface import gated_forward


def dump(sparse, tokens, layers):
    """The tensors of these layers, and the model's scaling."""
    tensors, scales = {}, set()

    def kept(module, query, key, value, mask, scaling=None, **rest):
        if module.layer_idx in layers:
            bias = key_bias(module.gate_bias, getattr(module, "gate_query", None), key, scaling).float()
            found = {"query": query.bfloat16(), "key": key.bfloat16(), "value": value.bfloat16(), "bias": bias}
            tensors.update({f"layer.{module.layer_idx}.{n}": x.contiguous().cpu().clone() for n, x in found.items()})
            scales.add(scaling)
        return gated_forward(module, query, key, value, mask, scaling=scaling, **rest)

    register("fewedges-kept", kept)
    with torch.no_grad(), attention_by(sparse.model, "fewedges-kept"):
        sparse.model(input_ids=tokens, use_cache=False)
    (scaling,) = scales
    return tensors, scaling


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--data", required=True)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16, 27])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sparse = fe.load(args.run, device=args.device)
    assert not isinstance(sparse, Loaded), "a sparse run"
    text = read_text(args.data, sparse.tokenizer, context_length=args.length)
    tokens = torch.from_numpy(text.stream[: args.length].astype("int64"))[None].to(args.device)
    tensors, scaling = dump(sparse, tokens, set(args.layers))
    facts = {"scaling": scaling, "layers": args.layers, "length": args.length, "run": args.run}
    save_file(tensors, args.out, {"facts": json.dumps(facts)})
    print(args.out, f"{args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
