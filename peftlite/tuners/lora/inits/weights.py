"""First factors that follow from the base layer's weight W (out, in) alone.

Each function gives A (r, in) and B (out, r) in W's dtype. Where the rank exceeds what W has, the factors have as many
rows and columns as W has singular values; whoever calls fills up the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EXTRA = 8  # columns beyond the rank that a random projection needs to find the top singular vectors well

Pair = tuple[Tensor, Tensor]


def pissa(W: Tensor, r: int, scaling: float, niter: int | None = None) -> Pair:
    """PiSSA (https://arxiv.org/abs/2404.02948): scaling * B A is the best approximation of W of rank r.

    A = sqrt(S / scaling) V^T and B = U sqrt(S / scaling) of W = U S V^T; with `niter` from a random projection and as
    many power iterations, which costs little more than reading W some times.
    """
    if niter is None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    else:
        U, S, Vh = lowrank_svd(W, r, niter)
    root = (S[:r] / scaling).sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root


def olora(W: Tensor, r: int, scaling: float) -> Pair:
    """OLoRA (https://arxiv.org/abs/2406.01775): B and A are the first columns of Q and rows of R of W = Q R."""
    Q, R = torch.linalg.qr(W)
    return R[:r], Q[:, :r]


def orthogonal(W: Tensor, r: int, scaling: float) -> Pair:
    """Neither factor is zero, and B A is: A's columns and B's rows are in orthogonal halves of the rank's space."""
    basis, _ = torch.linalg.qr(torch.randn(r, r, dtype=W.dtype, device=W.device))
    half = r // 2
    A = basis[:, :half] @ torch.randn(half, W.shape[1], dtype=W.dtype, device=W.device) / 10
    B = torch.randn(W.shape[0], half, dtype=W.dtype, device=W.device) @ basis[:, half:].T / 10
    return A, B


def mica(W: Tensor, r: int, scaling: float) -> Pair:
    """MiCA: A = 0, and B, which does not train, the left singular vectors of W's r smallest singular values."""
    U, _, _ = torch.linalg.svd(W, full_matrices=False)
    return torch.zeros(r, W.shape[1], dtype=W.dtype, device=W.device), U[:, -r:].contiguous()


def lowrank_svd(W: Tensor, r: int, niter: int) -> tuple[Tensor, Tensor, Tensor]:
    """(U, S, V^T) of W to rank r, by a random projection with `niter` power iterations (Halko et al., 2011).

    The projection is the same on every device and in every run, so that a reloaded adapter finds the same factors.
    """
    q = min(r + _EXTRA, *W.shape)
    generator = torch.Generator().manual_seed(0)
    Q, _ = torch.linalg.qr(W @ torch.randn(W.shape[1], q, generator=generator).to(W))
    for _ in range(niter):
        Q, _ = torch.linalg.qr((Q.T @ W).T)  # faster than W.T @ Q
        Q, _ = torch.linalg.qr(W @ Q)
    U, S, Vh = torch.linalg.svd(Q.T @ W, full_matrices=False)
    return (Q @ U)[:, :r], S[:r], Vh[:r]
