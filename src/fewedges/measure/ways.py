"""Ways to run a linear layer that keeps a part of its weights: what torch has, and ours. A way is a row in WAYS.

A way gets a case (inputs, weights, a density) and returns the layer ready to run, with what it stores. What it
cannot do it raises: the table that times it writes down the reason. Where torch has more than one call for the same
product (the order of operands decides whether its fast path is found), all are given, and the fastest is timed. The
result lies in memory as a dense layer's does: turning it back is charged to the way that needs it.

Shapes: M input vectors, C inputs, R outputs.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from fewedges.errors import RecipeError
from fewedges.sparsify import pattern as patterns
from fewedges.sparsify.block_kernel import BlockKernel, block_product, gather_blocks, index_blocks
from fewedges.sparsify.butterfly import PixelatedLinear, flat_butterfly
from fewedges.sparsify.launching import Kernel
from fewedges.sparsify.monarch import ButterflyProduct, Monarch
from fewedges.sparsify.pattern import Pattern
from fewedges.sparsify.pixelate import plan_for
from fewedges.sparsify.select import select

Call = Callable[[], Tensor]
CHUNK = 256
"""Columns of a product of factors that are computed at a time in float64."""
FEW, SPENT = 4, 0.9
"""Blocks of a Monarch's factor, as many as the paper's MonarchLinear has by default, and the part of a density that is
still this density. At M = 256 on one thread (benchmarks/monarch_forms.py, results/hardware/cpu/monarch-forms.csv) the
fewest are not the fastest: from density .05 on, 2 blocks take 0.88 to 1.03 of the time of 4, 8 take 0.97 to 1.14, 16
take 1.2 to 1.5, and the densest of rank 1 takes 1.6 (density .05) to 87 times as long (.5). 2 are nearer a low rank."""


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
    pattern: Pattern | None
    """Where weights are stored; of a sum with a low rank, the sparse term's; None for a product of factors."""
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


def blocks(case: Case, b: int, kernel: BlockKernel = "triton") -> Built:
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


def monarch(case: Case) -> Built:
    """Two block-diagonal factors with a permutation between them, in the form that `monarch_form` takes."""
    rows, columns = case.shape
    k, r = monarch_form(case.shape, case.density)
    how = f"{k} blocks a factor, rank {r}, width {k * k * r}"
    return _factored(case, lambda: Monarch(columns, rows, k, rank=r), lambda layer: layer.weight, how)


def monarch_form(shape: tuple[int, int], density: float) -> tuple[int, int]:
    """Blocks a factor and rank of a piece of the Monarch that a density buys: few large blocks, which are fast.

    Of the block counts that divide both sides and, at the largest rank that is not over, spend at least SPENT of what
    the densest spends, the smallest from FEW on; where there is none, the largest below. RecipeError where even rank 1
    is over. The width in between, k k r, bounds the rank of the product: at low densities it lies far below the sides.
    """
    rows, columns = shape
    most = density * rows * columns * (1 + 1e-9)
    counts = [k for k in _divisors(rows, columns) if k > 1]  # one block is a low rank
    ranks = {k: int(most / (k * (rows + columns))) for k in counts}  # k r <= R C / (R + C), so no piece is too small
    spent = {k: r * k for k, r in ranks.items() if r}
    if not spent:
        least = min((k * (rows + columns) for k in counts), default=rows * columns)
        raise _too_thin("a Monarch matrix", least, shape, density)
    near = [k for k, numbers in spent.items() if numbers >= SPENT * max(spent.values())]
    k = min((k for k in near if k >= FEW), default=max(near))
    return k, ranks[k]


def butterfly_product(case: Case) -> Built:
    """log2(S / b) sparse factors one after the other, of the largest blocks b that are not over; S >= both sides."""
    rows, columns = case.shape
    fitting = {b: _product_parameters(rows, columns, b) for b in _divisors(rows, columns)}
    b = _largest("a butterfly product", fitting, case)
    how = f"{(_product_side(rows, columns, b) // b).bit_length() - 1} factors of {b} x {b} blocks"
    return _factored(case, lambda: ButterflyProduct(columns, rows, b), _columnwise, how)


WAYS: dict[str, Way] = {
    "dense": Way(dense),
    "masked": Way(masked),
    "csr": Way(csr),
    "2:4": Way(two_of_four, density=0.5),
    **{f"bsr {b}": Way(partial(bsr, b=b)) for b in (32, 64, 128)},
    "butterfly": Way(partial(pixelated, rank_share=0.0)),
    "pixelated": Way(partial(pixelated, rank_share=0.25)),
    "monarch": Way(monarch),
    "butterfly product": Way(butterfly_product),
    **{f"bsr {b} (triton)": Way(partial(blocks, b=b)) for b in (32, 64, 128)},
    "butterfly (triton)": Way(partial(pixelated, rank_share=0.0, kernel="triton")),
    "pixelated (triton)": Way(partial(pixelated, rank_share=0.25, kernel="triton")),
}


def examples(side: int = 256, block: int = 16) -> dict[str, Pattern]:
    """Patterns to show what a block costs: 1 % anywhere, as many in blocks (not fewer), a butterfly of all strides."""
    score = torch.rand(side, side, generator=torch.Generator().manual_seed(0))
    blocks = select(score, f"{block}x{block}", 0.01)
    cells = flat_butterfly(side, side, side // block, (side // block).bit_length() - 1)
    return {
        "1% anywhere": select(score, "unstructured", 0.01),
        f"{100 * blocks.density:.2g}% in blocks": blocks,
        f"butterfly, {100 * cells.density:.2g}%": cells,
    }


def _divisors(rows: int, columns: int) -> list[int]:
    both = math.gcd(rows, columns)
    return [size for size in range(1, both + 1) if both % size == 0]


def _product_side(rows: int, columns: int, b: int) -> int:
    """What `ButterflyProduct` pads to: the next power of two, times b."""
    return b * 2 ** (-(-max(rows, columns, 2 * b) // b) - 1).bit_length()


def _product_parameters(rows: int, columns: int, b: int) -> int:
    """In every factor two blocks of b x b in a row of blocks."""
    side = _product_side(rows, columns, b)
    return 2 * b * side * ((side // b).bit_length() - 1)


def _largest(what: str, parameters: Mapping[int, int], case: Case) -> int:
    """The size with most parameters that are not more than asked for; RecipeError where all are."""
    rows, columns = case.shape
    fitting = {size: kept for size, kept in parameters.items() if kept <= case.density * rows * columns * (1 + 1e-9)}
    if not fitting:
        raise _too_thin(what, min(parameters.values(), default=rows * columns), case.shape, case.density)
    return max(fitting, key=lambda size: fitting[size])


def _too_thin(what: str, least: int, shape: tuple[int, int], density: float) -> RecipeError:
    found = f"the thinnest for {shape[1]} inputs and {shape[0]} outputs has {least / math.prod(shape):.3g}"
    return RecipeError(f"{what} of density {density:g}", found, "a higher density, or sides that share factors")


def _factored(case: Case, make: Callable[[], Any], matrix: Callable[[Any], Tensor], how: str) -> Built:
    """A product of factors, drawn by its own rule: no entry of the matrix itself is stored, so it has no pattern."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        layer = make().to(case.x).requires_grad_(False)
    return Built(
        calls={"batched products": lambda: layer(case.x).contiguous()},
        pattern=None,
        parameters=sum(part.numel() for part in layer.parameters()),
        stored=_bytes(list(layer.parameters())),
        exact=lambda: matrix(copy.deepcopy(layer).double()),
        how=how,
    )


def _columnwise(layer: Any) -> Tensor:
    """The matrix of a linear layer, by what it makes of unit vectors: factors written out as S x S would not fit."""
    units = torch.eye(layer.in_features).to(layer.twiddle)
    return torch.cat([layer(part).T for part in units.split(CHUNK)], 1)


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
