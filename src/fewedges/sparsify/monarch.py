"""Two older relatives of the pixelated butterfly, for comparison: the butterfly product, and Monarch.

Both are products of sparse factors, so their work is sequential; the flat butterfly is the first-order term of the
product, and Monarch the product of two factors only.

Shapes: M input vectors, R outputs, C inputs; S side of the product, b block.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewedges.errors import RecipeError


class ButterflyProduct(nn.Module):
    """x -> x (F_1^T F_2^T ... F_p^T): log2(S / b) factors, F_t mixing blocks 2^(t-1) apart (Dao et al. 2019).

    arXiv:1903.05895; blocks of b x b entries instead of single ones are Chen et al. 2022's. S is the next power of
    two (times b); shorter inputs are padded with zeros, longer outputs cut off.
    """

    def __init__(self, in_features: int, out_features: int, block: int = 1):
        super().__init__()
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
    """W = P L P^T R: two block-diagonal matrices and the transpose between them (Dao et al. 2022, arXiv:2204.00595).

    With k blocks, R mixes the inputs within each, L mixes, for each of the q results a block gives, the k blocks:
    W[(o, s), (j, i)] = L[s, o, j] R[j, s, i]. Stored: q (C + k R / q) numbers; for a square S x S and k = q =
    sqrt(S), 2 S sqrt(S).
    """

    def __init__(self, in_features: int, out_features: int, blocks: int):
        super().__init__()
        if blocks < 1 or in_features % blocks or out_features % blocks:
            found = f"{blocks} blocks of {in_features} inputs and {out_features} outputs"
            raise RecipeError("a Monarch matrix", found, "a number of blocks that divides both")
        self.in_features, self.out_features, self.blocks = in_features, out_features, blocks
        self.right = nn.Parameter(torch.empty(blocks, blocks, in_features // blocks))
        """(k, q, C/k), q = k."""
        self.left = nn.Parameter(torch.empty(blocks, out_features // blocks, blocks))
        """(q, R/q, k)."""
        self.reset_()

    @torch.no_grad()
    def reset_(self, std: float | None = None) -> None:
        """Draw both factors so that entries of W have this `std` (1 / sqrt(3 C))."""
        std = (3 * self.in_features) ** -0.5 if std is None else std
        within = (self.in_features / self.blocks) ** -0.5
        self.right.normal_(0, within)
        self.left.normal_(0, std / within)

    def forward(self, x: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch R"]:
        """Two batched products with a transpose after each."""
        parts = x.reshape(-1, self.blocks, x.shape[-1] // self.blocks).transpose(0, 1)  # (k, M, C/k)
        mixed = torch.bmm(parts, self.right.transpose(1, 2)).permute(2, 1, 0)  # (q, M, k)
        y = torch.bmm(mixed, self.left.transpose(1, 2)).permute(1, 2, 0)  # (M, R/q, q)
        return y.reshape(*x.shape[:-1], self.out_features)

    @property
    def weight(self) -> Float[Tensor, "R C"]:
        """W as a dense matrix."""
        return torch.einsum("soj,jsi->osji", self.left, self.right).reshape(self.out_features, self.in_features)

    @torch.no_grad()
    def project_(self, weight: Float[Tensor, "R C"]) -> float:
        """Become the Monarch matrix nearest to `weight`; return the relative error |W - M| / |W|.

        For every (s, j) the entries L[s, o, j] R[j, s, i] are a rank-one matrix over (o, i): its singular value
        decomposition is the global optimum (Dao et al. 2022, section 3.2).
        """
        k = self.blocks
        cells = weight.detach().reshape(self.out_features // k, k, k, self.in_features // k).permute(1, 2, 0, 3)
        u, s, v = torch.linalg.svd(cells, full_matrices=False)  # cells (q, k, R/q, C/k)
        root = s[..., 0].sqrt()[..., None]
        self.left.copy_((u[..., 0] * root).transpose(1, 2))
        self.right.copy_((v[..., 0, :] * root).transpose(0, 1))
        return float(s[..., 1:].norm() / s.norm())

    def flops(self, tokens: int) -> int:
        """Multiplications and additions for so many input vectors."""
        return 2 * tokens * (self.left.numel() + self.right.numel())
