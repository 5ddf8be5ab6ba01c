"""Rounding a matrix to few bits: symmetric, by absolute maximum, one scale a row or a group of columns.

Zero is a level, so zeros stay zeros. This is the plain reference that torchao's kernels are compared with.

Shapes: R rows (outputs), C columns (inputs), g groups of columns.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

from fewedges.errors import RecipeError, StoreError


@dataclass(frozen=True, eq=False)
class Rounded:
    """Codes and scales of one matrix: value = code * scale of its row and group."""

    codes: Int8[Tensor, "R C"]
    """Whole numbers in [-(2^(bits-1) - 1), 2^(bits-1) - 1]; the lowest is not used, so that the grid is symmetric."""
    scales: Float[Tensor, "R g"]
    bits: int

    def dequantise(self) -> Float[Tensor, "R C"]:
        """The values the codes stand for, in the scales' format."""
        return self.codes.to(self.scales.dtype) * _spread(self.scales, self.codes.shape[1])

    @property
    def bytes(self) -> int:
        """Bytes of codes (two of 4 bits a byte) and scales."""
        return -(-self.codes.numel() * self.bits // 8) + self.scales.numel() * self.scales.element_size()

    def tensors(self) -> dict[str, Tensor]:
        """What is saved: codes, packed two to a byte where they have 4 bits, and scales."""
        return {"codes": pack(self.codes) if self.bits == 4 else self.codes, "scales": self.scales}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], shape: tuple[int, int], bits: int) -> "Rounded":
        """The inverse of `tensors`; a wrong size is a StoreError."""
        codes = tensors["codes"]
        codes = unpack(codes, shape[0] * shape[1]) if bits == 4 else codes
        if codes.numel() != shape[0] * shape[1]:
            raise StoreError("load quantised weights", f"{codes.numel()} codes for {shape}", "a fresh copy")
        return cls(codes.view(shape), tensors["scales"], bits)


def scales_of(weight: Float[Tensor, "R C"], bits: int, group_size: int | None = None) -> Float[Tensor, "R g"]:
    """Largest magnitude of each row (and group of columns) over the highest level; 1 where all is zero."""
    rows, columns = weight.shape
    size = columns if group_size is None else group_size
    if columns % size:
        raise RecipeError(f"group_size {size}", f"a matrix with {columns} inputs", "a divisor of every input width")
    highest = weight.reshape(rows, -1, size).abs().amax(-1)  # (R, g)
    return torch.where(highest > 0, highest / levels(bits), torch.ones_like(highest))


def levels(bits: int) -> int:
    """The highest code."""
    return 2 ** (bits - 1) - 1


def round_to(weight: Float[Tensor, "R n"], scale: Float[Tensor, "R #n"], bits: int) -> Float[Tensor, "R n"]:
    """The nearest level of the grid, as a value."""
    return (weight / scale).round().clamp(-levels(bits), levels(bits)) * scale


def rounded(
    weight: Float[Tensor, "R C"], bits: int, group_size: int | None = None, scales: Tensor | None = None
) -> Rounded:
    """Round a matrix; with `scales`, on the grid that it was already fitted to."""
    scales = scales_of(weight, bits, group_size) if scales is None else scales
    codes = (weight / _spread(scales, weight.shape[1])).round().clamp(-levels(bits), levels(bits))
    return Rounded(codes.to(torch.int8), scales, bits)


def pack(codes: Int8[Tensor, "*shape"]) -> UInt8[Tensor, "n"]:
    """Two 4-bit codes a byte, the earlier one in the low half; an odd last one stands alone."""
    line = (codes.reshape(-1) & 0xF).to(torch.uint8)
    line = torch.nn.functional.pad(line, (0, line.numel() % 2))
    return line[0::2] | (line[1::2] << 4)


def unpack(packed: UInt8[Tensor, "n"], count: int) -> Int8[Tensor, "count"]:
    """The inverse of `pack`."""
    halves = torch.stack([packed & 0xF, packed >> 4], dim=-1).reshape(-1)[:count].to(torch.int8)
    return torch.where(halves > 7, halves - 16, halves)


def _spread(scales: Float[Tensor, "R g"], columns: int) -> Float[Tensor, "R C"]:
    return scales.repeat_interleave(columns // scales.shape[1], dim=1)
