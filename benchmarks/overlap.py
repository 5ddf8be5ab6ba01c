"""Kernels of the pixelated butterfly that overlap, against the same launched one after the other: the same bits?

    python benchmarks/overlap.py          # a Hopper GPU; a minute or two

Six layers with GELU between them, forward and backward: 100 times in a row and 200 times as a CUDA graph, whose results
are overwritten with NaN before each replay. Tiles are chosen once, so only the launches differ. The last column is the
largest relative 2-norm of a result or gradient against batched products in the same dtype.
"""

import sys

import torch
from torch import Tensor, nn

from fewedges.sparsify import cell_gradients, cell_products
from fewedges.sparsify.butterfly import PixelatedLinear, Plan
from fewedges.sparsify.launching import captured

CASES = [  # width, inner width, plan, tokens
    (1024, 4096, Plan(16, 1, 64), 1024),
    (1024, 4096, Plan(16, 1, 64), 8192),
    (1024, 4096, Plan(16, 2, 0), 1024),
    (1024, 4096, Plan(16, 2, 32), 333),
    (4096, 11008, Plan(16, 1, 192), 1024),
]
OVERLAPPING = cell_products.launched


def main() -> None:
    torch.manual_seed(0)
    differ = sum(compare(*case) for case in CASES)
    print("runs that differ", differ)
    sys.exit(1 if differ else 0)


def compare(wide: int, deep: int, plan: Plan, tokens: int) -> int:
    """Runs that differ in any bit from launches one after the other."""
    options = {"device": "cuda", "dtype": torch.bfloat16}
    sides = [(wide, deep), (deep, wide)] * 3
    layers = [PixelatedLinear(*side, plan, kernel="triton").to(**options) for side in sides]
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.GELU())))
    x, pull = torch.randn(tokens, wide, **options, requires_grad=True), torch.randn(tokens, wide, **options)
    leaves = [x, *model.parameters()]

    def step() -> list[Tensor]:
        y = model(x)
        return [y.detach(), *torch.autograd.grad(y, leaves, pull)]

    step()  # tiles are tried
    overlap_(False)
    wanted = [t.clone() for t in step()]
    torch.cuda.synchronize()
    overlap_(True)
    differ = sum(not alike(step(), wanted) for _ in range(100))
    graph, found = captured(step)
    for _ in range(200):
        for t in found:
            t.fill_(torch.nan)
        graph.replay()
        differ += not alike(found, wanted)
    for layer in layers:
        layer.kernel = "reference"
    error = max(
        ((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(wanted, step(), strict=True)
    )
    print(wide, deep, plan, tokens, "runs that differ", differ, f"error {error:.1e}", flush=True)
    return differ


def overlap_(on: bool) -> None:
    """Let kernels overlap, or launch them one after the other."""
    cell_products.launched = cell_gradients.launched = OVERLAPPING if on else lambda device, early: {}


def alike(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


if __name__ == "__main__":
    main()
