"""Trained weights as they lie on disk: in float32, rounded to bfloat16, or as int8 with a scale for each row.

    row = scale * q,   scale = bfloat16(max |row| / 127),   q = round(row / scale) in [-127, 127]

Symmetric absmax rounding, a row at a time (what it costs the shipped model: results/smollm2-1024). A scale has 8 bits
so that scale * q is exact: packing what was unpacked gives the same bytes. What is not a matrix stays in float32.
"""

import torch
from torch import Tensor

SCALE = ".scale"


def pack(weights: dict[str, Tensor], saved: str) -> dict[str, Tensor]:
    """Return the tensors that are written for these weights; `saved` is float32, bfloat16 or int8."""
    if saved != "int8":
        return {name: x.to(getattr(torch, saved)) for name, x in weights.items()}
    packed = {}
    for name, x in weights.items():
        if x.dim() != 2:
            packed[name] = x.float()
            continue
        scale = (x.float().abs().amax(1) / 127).bfloat16()
        steps = x.float() / scale.float().clamp_min(torch.finfo().tiny)[:, None]
        packed[name] = steps.round().clamp(-127, 127).to(torch.int8)
        packed[name + SCALE] = scale
    return packed


def unpack(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights that `pack` wrote."""
    scales = {name.removesuffix(SCALE): x for name, x in packed.items() if name.endswith(SCALE)}
    plain = {name: x for name, x in packed.items() if not name.endswith(SCALE)}
    return {name: x.float() * scales[name].float()[:, None] if name in scales else x for name, x in plain.items()}
