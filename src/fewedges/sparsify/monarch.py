"""Two older relatives of the pixelated butterfly, for comparison: the butterfly product, and Monarch.

Both are products of sparse factors, so their work is sequential; the flat butterfly is the first-order term of the
product, and Monarch the product of two factors only.

Shapes: M input vectors, R outputs, C inputs; S side of the product, b block. Of Monarch: k blocks of inputs, l blocks
of outputs, r rank of a piece of W, q = l r results a block of inputs gives.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewedges.errors import ModelError, RecipeError


class ButterflyProduct(nn.Module):
    """x -> x (F_1^T F_2^T ... F_p^T): log2(S / b) factors, F_t mixing blocks 2^(t-1) apart (Dao et al. 2019).

    arXiv:1903.05895; blocks of b x b entries instead of single ones are Chen et al. 2022's. S is the next power of
    two (times b); shorter inputs are padded with zeros, longer outputs cut off.
    """

    def __init__(self, in_features: int, out_features: int, block: int = 1):
        super().__init__()
        if min(in_features, out_features, block) < 1:
            found = f"blocks of {block}, {in_features} inputs and {out_features} outputs"
            raise RecipeError("a butterfly product", found, "at least 1 of each")
        wide = -(-max(in_features, out_features, 2 * block) // block)
        self.in_features, self.out_features, self.block = in_features, out_features, block
        self.factors = (wide - 1).bit_length()
        self.grid = 2**self.factors
        self.twiddle = nn.Parameter(torch.empty(self.factors, self.grid // 2, 2 * block, 2 * block))
        """(p, S/2b, 2b, 2b): in every factor one square matrix a pair of blocks."""
        self.reset_()

    @torch.no_grad()
    def reset_(self, std: float | None = None) -> None:
        """Draw rotations, so that the product is one, and scale it to entries of this `std` (1 / sqrt(3 C)).

        Normal entries of the right variance would do on average only: the product's spread over draws was 48 %.
        """
        std = (3 * self.in_features) ** -0.5 if std is None else std
        self.twiddle.copy_(torch.linalg.qr(torch.randn_like(self.twiddle)).Q)
        self.twiddle[-1] *= std * (self.grid * self.block) ** 0.5

    def forward(self, x: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch R"]:
        """Apply the factors one after the other."""
        side = self.grid * self.block
        y = nn.functional.pad(x.reshape(-1, self.in_features), (0, side - self.in_features))  # (M, S)
        for t, factor in enumerate(self.twiddle):
            pairs = y.unflatten(1, (self.grid >> (t + 1), 2, 1 << t, self.block)).transpose(2, 3)  # (M, g, s, 2, b)
            mixed = torch.bmm(pairs.flatten(3).flatten(1, 2).transpose(0, 1), factor.transpose(1, 2))  # (S/2b, M, 2b)
            back = mixed.transpose(0, 1).unflatten(1, (-1, 1 << t)).unflatten(-1, (2, self.block))  # (M, g, s, 2, b)
            y = back.transpose(2, 3).flatten(1)
        return y[:, : self.out_features].unflatten(0, x.shape[:-1])

    def factor(self, t: int) -> Float[Tensor, "S S"]:
        """Factor t as a dense matrix: y = F_t x."""
        side, stride = self.grid * self.block, 1 << t
        dense = self.twiddle.new_zeros(self.grid, self.grid, self.block, self.block)
        parts = self.twiddle[t].unflatten(2, (2, -1)).unflatten(1, (2, -1)).transpose(2, 3)  # (S/2b, 2, 2, b, b)
        first = torch.arange(self.grid).view(-1, 2, stride)[:, 0].flatten()
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            dense = dense.index_put((first + i * stride, first + j * stride), parts[:, i, j])
        return dense.transpose(1, 2).reshape(side, side)

    @property
    def weight(self) -> Float[Tensor, "R C"]:
        """The product as a dense matrix."""
        product = torch.eye(self.grid * self.block).to(self.twiddle)
        for t in range(self.factors):
            product = self.factor(t) @ product
        return product[: self.out_features, : self.in_features]

    def flops(self, tokens: int) -> int:
        """Multiplications and additions for so many input vectors."""
        return 2 * tokens * self.twiddle.numel()


class Monarch(nn.Module):
    """W = P L P'^T R: two block-diagonal matrices, and a permutation after each (Dao et al. 2022, arXiv:2204.00595).

    R has k `blocks`, which mix the inputs within each; L has l `out_blocks` (k if not given), and every one takes r
    (`rank`) results of every block of R: W[(o, s), (j, i)] = sum_t L[s, o, (j, t)] R[j, (s, t), i]. So W is a grid of
    l x k pieces of rank r, and no entry belongs to two of them. In between there are k l r numbers: `width`, which
    bounds the rank of W. Stored: r (l C + k R). With k = l = sqrt(S) and r = 1 it is the paper's square Monarch, 2 S
    sqrt(S) numbers; with few blocks and a width near min(C, R) it is two large batched products, as a higher density
    wants; k = l = 1 is a low rank. The paper's code wants l to divide k q only; ours is the case in which l divides q,
    and lays the r results that a pair of blocks shares side by side.
    """

    def __init__(
        self, in_features: int, out_features: int, blocks: int, *, out_blocks: int | None = None, rank: int = 1
    ):
        super().__init__()
        outs = blocks if out_blocks is None else out_blocks
        if min(blocks, outs) < 1 or in_features % blocks or out_features % outs:
            found = f"{blocks} blocks of {in_features} inputs, {outs} blocks of {out_features} outputs"
            raise RecipeError("a Monarch matrix", found, "a number of blocks that divides its side, each")
        most = min(in_features // blocks, out_features // outs)
        if not 1 <= rank <= most:
            found = f"a piece of W is {out_features // outs} x {in_features // blocks}"
            raise RecipeError(f"a Monarch matrix of rank {rank} a piece", found, f"rank 1 to {most}")
        self.in_features, self.out_features = in_features, out_features
        self.blocks, self.out_blocks, self.rank = blocks, outs, rank
        self.right = nn.Parameter(torch.empty(blocks, outs * rank, in_features // blocks))
        """(k, q, C/k)."""
        self.left = nn.Parameter(torch.empty(outs, out_features // outs, blocks * rank))
        """(l, R/l, k r)."""
        self.reset_()

    @property
    def width(self) -> int:
        """How many numbers there are between the two products: k l r."""
        return self.blocks * self.out_blocks * self.rank

    @torch.no_grad()
    def reset_(self, std: float | None = None) -> None:
        """Draw both factors so that entries of W, sums over r products, have this `std` (1 / sqrt(3 C))."""
        std = (3 * self.in_features) ** -0.5 if std is None else std
        within = (self.in_features / self.blocks) ** -0.5
        self.right.normal_(0, within)
        self.left.normal_(0, std / (within * self.rank**0.5))

    def forward(self, x: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch R"]:
        """Two batched products with a permutation after each."""
        parts = x.reshape(-1, self.blocks, x.shape[-1] // self.blocks).transpose(0, 1)  # (k, M, C/k)
        mixed = torch.bmm(parts, self.right.transpose(1, 2)).unflatten(2, (self.out_blocks, self.rank))  # (k, M, l, r)
        mixed = mixed.permute(2, 1, 0, 3).flatten(2)  # (l, M, k r)
        y = torch.bmm(mixed, self.left.transpose(1, 2)).permute(1, 2, 0)  # (M, R/l, l)
        return y.reshape(*x.shape[:-1], self.out_features)

    @property
    def weight(self) -> Float[Tensor, "R C"]:
        """W as a dense matrix."""
        left = self.left.unflatten(2, (self.blocks, self.rank))  # (l, R/l, k, r)
        right = self.right.unflatten(1, (self.out_blocks, self.rank))  # (k, l, r, C/k)
        return torch.einsum("sojt,jsti->osji", left, right).reshape(self.out_features, self.in_features)

    @torch.no_grad()
    def project_(self, weight: Float[Tensor, "R C"]) -> float:
        """Become the Monarch matrix nearest to `weight`; return the relative error |W - M| / |W|.

        Every (s, j) is a piece of W of its own, of rank r over (o, i): its truncated singular value decomposition is
        the global optimum (Dao et al. 2022, section 3.2, for r = 1). Works in float32, or float64 where the weight
        is. Raises ModelError where the shape is another.
        """
        k, l, r = self.blocks, self.out_blocks, self.rank
        if tuple(weight.shape) != (self.out_features, self.in_features):
            asked = f"project into a Monarch matrix of {self.in_features} inputs and {self.out_features} outputs"
            hint = f"a weight {(self.out_features, self.in_features)}, outputs first"
            raise ModelError(asked, f"a weight {tuple(weight.shape)}", hint)
        weight = weight if weight.dtype == torch.float64 else weight.float()
        pieces = weight.reshape(self.out_features // l, l, k, -1).permute(1, 2, 0, 3)  # (l, k, R/l, C/k)
        u, s, v = torch.linalg.svd(pieces, full_matrices=False)
        root = s[..., :r].sqrt()  # (l, k, r)
        self.left.copy_((u[..., :r] * root[..., None, :]).transpose(1, 2).flatten(2))
        self.right.copy_((v[..., :r, :] * root[..., None]).transpose(0, 1).flatten(1, 2))
        return float(s[..., r:].norm() / s.norm().clamp(min=torch.finfo(s.dtype).tiny))

    def flops(self, tokens: int) -> int:
        """Multiplications and additions for so many input vectors."""
        return 2 * tokens * (self.left.numel() + self.right.numel())

    def extra_repr(self) -> str:
        """Shown by print(layer)."""
        form = f"{self.blocks} x {self.out_blocks} blocks, rank {self.rank}, width {self.width}"
        return f"{self.in_features}, {self.out_features}, {form}"
