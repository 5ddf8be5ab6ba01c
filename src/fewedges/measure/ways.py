"""Ways to run a linear layer that keeps a part of its weights: what torch has, and ours. A way is a row in WAYS.

A way gets a case (inputs, weights, a density) and returns the layer ready to run, with what it stores. What it
cannot do it raises: the table that times it writes down the reason. Where torch has more than one call for the same
product (the order of operands decides whether its fast path is found), all are given, and the fastest is timed. The
result lies in memory as a dense layer's does: turning it back is charged to the way that needs it.

Shapes: M input vectors, C inputs, R outputs.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from fewedges.sparsify import pattern as patterns
from fewedges.sparsify.block_kernel import block_product, gather_blocks, index_blocks
from fewedges.sparsify.butterfly import PixelatedLinear
from fewedges.sparsify.launching import Kernel
from fewedges.sparsify.pattern import Pattern
from fewedges.sparsify.pixelate import plan_for
from fewedges.sparsify.select import select

Call = Callable[[], Tensor]


@dataclass(frozen=True, eq=False)
class Case:
    """What is to be computed: x W^T, with a fraction of W kept."""

    x: Float[Tensor, "M C"]
    weight: Float[Tensor, "R C"]
    density: float
    seed: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(R, C)."""
        rows, columns = self.weight.shape
        return rows, columns

    def random(self) -> Float[Tensor, "R C"]:
        """A score that says nothing: a pattern's cost does not depend on which weights are good."""
        generator = torch.Generator(self.x.device).manual_seed(self.seed)
        return torch.rand(self.shape, generator=generator, device=self.x.device)


@dataclass(frozen=True, eq=False)
class Built:
    """A layer ready to run."""

    calls: Mapping[str, Call]
    """The same product, said in different ways; each gives (M, R), contiguous as a dense layer's."""
    pattern: Pattern
    """Where weights are stored; of a sum with a low rank, the sparse term's."""
    parameters: int
    """Numbers kept; as many multiplications a vector."""
    stored: int
    """Bytes of the weights as they lie in memory, with their indices."""
    exact: Callable[[], Tensor]
    """The (R, C) matrix that is multiplied by, in float64."""
    how: str = ""


@dataclass(frozen=True)
class Way:
    """How to build it; `density` where there is only one."""

    build: Callable[[Case], Built]
    density: float | None = None


def dense(case: Case) -> Built:
    """All weights; the density asked for is ignored."""
    kept = patterns.dense(case.shape, case.weight.device)
    return _built(case.weight, kept, {"F.linear(x, W)": lambda: linear(case.x, case.weight)}, [case.weight])


def masked(case: Case) -> Built:
    """A dense product after W * mask: what a mask costs when nothing is gained from its zeros."""
    kept = select(case.random(), "unstructured", case.density)
    mask = kept.mask().to(case.weight.dtype)
    calls = {"F.linear(x, W * mask)": lambda: linear(case.x, case.weight * mask)}
    return _built(case.weight * mask, kept, calls, [case.weight, mask])


def csr(case: Case) -> Built:
    """Compressed rows, entries anywhere."""
    kept = select(case.random(), "unstructured", case.density)
    return _compressed(case, kept, lambda weight: weight.to_sparse_csr())


def bsr(case: Case, b: int) -> Built:
    """Compressed rows of b x b blocks, blocks anywhere."""
    kept = select(case.random(), f"{b}x{b}", case.density)
    return _compressed(case, kept, lambda weight: weight.to_sparse_bsr((b, b)))


def two_of_four(case: Case) -> Built:
    """Two of every four neighbours, by the sparse tensor cores of NVIDIA GPUs."""
    kept = select(case.random(), "2:4")
    weight = case.weight * kept.mask()
    sparse = torch.sparse.to_sparse_semi_structured(weight)
    parts = [part for name in ("packed", "meta") if (part := getattr(sparse, name, None)) is not None]
    return _built(weight, kept, {"F.linear(x, W)": lambda: linear(case.x, sparse).contiguous()}, parts)


def blocks(case: Case, b: int, kernel: Kernel = "triton") -> Built:
    """Blocks of b x b anywhere, by the block-sparse kernel."""
    kept = select(case.random(), f"{b}x{b}", case.density)
    index = index_blocks(kept, b).to(case.x.device)
    weight = case.weight * kept.mask()
    values = gather_blocks(weight, index)
    calls = {"block_product": lambda: block_product(case.x, values, index, kernel=kernel)}  # type: ignore[call-arg]
    return _built(weight, kept, calls, [values, index.start, index.columns])


def pixelated(case: Case, rank_share: float, kernel: Kernel = "reference") -> Built:
    """A flat block butterfly, with a low rank beside it if `rank_share` says so."""
    rows, columns = case.shape
    plan = plan_for(case.shape, case.density, rank_share)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        layer = PixelatedLinear(columns, rows, plan, bias=False, kernel=kernel).to(case.x).requires_grad_(False)
    return Built(
        calls={"gathered bmm" if kernel == "reference" else "fused kernel": lambda: layer(case.x)},
        pattern=plan.pattern(rows, columns),
        parameters=plan.parameters(rows, columns),
        stored=_bytes([*layer.parameters(), *layer.buffers()]),
        exact=lambda: copy.deepcopy(layer).double().weight,
        how=f"cells {rows // plan.grid} x {columns // plan.grid}, grid {plan.grid}, rank {plan.rank}",
    )


WAYS: dict[str, Way] = {
    "dense": Way(dense),
    "masked": Way(masked),
    "csr": Way(csr),
    "2:4": Way(two_of_four, density=0.5),
    **{f"bsr {b}": Way(partial(bsr, b=b)) for b in (32, 64, 128)},
    "butterfly": Way(partial(pixelated, rank_share=0.0)),
    "pixelated": Way(partial(pixelated, rank_share=0.25)),
    **{f"bsr {b} (triton)": Way(partial(blocks, b=b)) for b in (32, 64, 128)},
    "butterfly (triton)": Way(partial(pixelated, rank_share=0.0, kernel="triton")),
    "pixelated (triton)": Way(partial(pixelated, rank_share=0.25, kernel="triton")),
}


def _compressed(case: Case, kept: Pattern, compress: Callable[[Tensor], Tensor]) -> Built:
    """torch's sparse layouts: F.linear of them, and W x^T, turned back; which is faster depends on the device."""
    weight = case.weight * kept.mask()
    sparse = compress(weight)
    calls: dict[str, Call] = {
        "W @ x.T": lambda: (sparse @ case.x.T).T.contiguous(),
        "F.linear(x, W)": lambda: linear(case.x, sparse).contiguous(),
    }
    return _built(weight, kept, calls, [sparse.values(), *_indices(sparse)])


def _indices(sparse: Any) -> list[Tensor]:
    return [sparse.crow_indices(), sparse.col_indices()]


def _built(weight: Tensor, kept: Pattern, calls: Mapping[str, Call], parts: Sequence[Tensor]) -> Built:
    return Built(calls, kept, kept.nnz, _bytes(parts), exact=weight.double)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
