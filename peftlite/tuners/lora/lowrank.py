"""Low-rank matrices as a pair of factors: sums of them, their size, and the best ones of lower rank.

Everything comes in stacks of n matrices (n, out, in): the experts of a fused parameter, the groups of a convolution, or
just one. Small matrices are worked on in float64, where the device has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class LowRank(NamedTuple):
    """The matrices B A (n, out, in), with A (n, r, in) and B (n, out, r)."""

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        """The number of columns of B."""
        return self.A.shape[1]

    @property
    def most(self) -> int:
        """The largest rank that matrices of this shape can have."""
        return min(self.A.shape[2], self.B.shape[1])

    def dense(self) -> Tensor:
        """The product (n, out, in)."""
        return self.B @ self.A


class Approximation(NamedTuple):
    """How near an adapter of limited rank is to what it stands for, by the path of each layer.

    `ranks` has the rank that the adapter got there; `errors` |D - B A| / |D|, Frobenius norms, where D is the exact
    update of the weight. 0 means that nothing was left out, so that the two differ by rounding alone.
    """

    ranks: Mapping[str, int]
    errors: Mapping[str, float]
    relative_error: float
    """The same for all layers together, as one long vector."""

    @classmethod
    def of(cls, parts: Mapping[str, Part]) -> Approximation:
        """The sum of what is known of each layer."""
        total = math.hypot(*(part.norm for part in parts.values()))
        missed = math.hypot(*(part.norm * part.error for part in parts.values()))
        return cls(
            {path: part.rank for path, part in parts.items()},
            {path: part.error for path, part in parts.items()},
            missed / total if total else 0.0,
        )


class Part(NamedTuple):
    """One layer's share of an `Approximation`: its rank, its relative error, and the norm that it is relative to."""

    rank: int
    error: float
    norm: float


def summed(parts: Sequence[LowRank]) -> LowRank:
    """The sum of products as one: A's rows and B's columns side by side. Nothing is rounded."""
    return LowRank(torch.cat([part.A for part in parts], 1), torch.cat([part.B for part in parts], 2))


def undivided(delta: Tensor) -> LowRank:
    """Any matrices (n, out, in), bit for bit, as a product with the identity."""
    n, out, into = delta.shape
    one = torch.eye(min(out, into), dtype=delta.dtype, device=delta.device).expand(n, -1, -1)
    return LowRank(delta, one) if out <= into else LowRank(one, delta)


def core(product: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """(Q, K, P) with B A = Q K P^T, K (n, k, k) small and Q, P with orthonormal columns."""
    Q, left = torch.linalg.qr(precise(product.B))
    P, right = torch.linalg.qr(precise(product.A).mT)
    return Q, left @ right.mT, P


def norm(matrices: Tensor | LowRank) -> float:
    """The Frobenius norm over the whole stack."""
    if isinstance(matrices, LowRank):
        matrices = core(matrices)[1] if matrices.rank < matrices.most else matrices.dense()
    return float(torch.linalg.vector_norm(matrices))


def distance(exact: Tensor | LowRank, near: LowRank) -> float:
    """|exact - near| / |exact|; of products, where that is less work, without forming them."""
    whole = norm(exact)
    if isinstance(exact, Tensor):
        missed = norm(exact - near.dense().to(exact.dtype))
    else:
        missed = norm(summed([exact, LowRank(near.A.to(exact.A), -near.B.to(exact.B))]))
    return missed / whole if whole else 0.0


class Decomposed(NamedTuple):
    """Singular value decompositions U S Vh of a stack: (n, out, k), (n, k), (n, k, in)."""

    U: Tensor
    S: Tensor
    Vh: Tensor

    @classmethod
    def of(cls, matrices: Tensor | LowRank, driver: str | None = None) -> Decomposed:
        """Of matrices, or of a product, whose factors are all that is worked on then."""
        if isinstance(matrices, Tensor):
            return cls(*torch.linalg.svd(matrices, full_matrices=False, driver=driver))
        Q, K, P = core(matrices)
        U, S, Vh = torch.linalg.svd(K, full_matrices=False, driver=driver)
        return cls(Q @ U, S, Vh @ P.mT)

    def cut(self, rank: int) -> LowRank:
        """The best product of this rank: A has orthonormal rows, B the sizes."""
        return LowRank(self.Vh[:, :rank], self.U[:, :, :rank] * self.S[:, None, :rank])

    def rank_for(self, energy: float) -> int:
        """The least rank that keeps this share of the sum of squared singular values, of every matrix of the stack."""
        squares = self.S.double() if self.S.device.type != "mps" else self.S
        kept = squares.square().cumsum(1)
        enough = kept >= energy * kept[:, -1:]
        return int(enough.int().argmax(1).max()) + 1


def clamped(product: LowRank, quantile: float) -> LowRank:
    """Both factors, their entries limited to what this share of all of them do not exceed."""
    entries = torch.cat([product.A.flatten(), product.B.flatten()]).sort().values
    place = quantile * (len(entries) - 1)
    below, above = entries[math.floor(place)], entries[math.ceil(place)]
    limit = float(below + (above - below) * (place - math.floor(place)))
    return LowRank(product.A.clamp(-limit, limit), product.B.clamp(-limit, limit))


def precise(tensor: Tensor) -> Tensor:
    """In float64, or fp32 where the device has nothing better."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)
