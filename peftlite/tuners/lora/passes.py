"""Low-rank products beside large tensors of another dtype, some rows at a time: wide copies of them stay in the cache.

A whole copy in fp32 of what is kept in bf16 costs a CPU more, in fetching and clearing its memory, than the products.
Elsewhere all rows go at once. None of this is differentiable: it is for inference, and for inside of a Function.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Saved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, "Tensor | None"]
"""What `FusedLora` keeps for backward: x, u = drop(x) A^T (rows, r), A, B, W, and the mask (rows, in)."""
LARGE = 1 << 18
"""From how many elements on a tensor is taken in blocks, of so many for each thread."""


def blocks(*matrices: Tensor) -> Iterator[slice]:
    """Slices of the rows that matrices have in common."""
    rows, width = len(matrices[0]), max(matrix.shape[1] for matrix in matrices)
    step = rows
    if matrices[0].device.type == "cpu":
        step = max(1, LARGE * torch.get_num_threads() // max(1, width))
    yield from (slice(start, start + step) for start in range(0, rows, step or 1))


def kept(x: Tensor, keep: Tensor | None) -> Tensor:
    """Zeros where the mask does not keep `x`; without rescaling."""
    return x if keep is None else torch.where(keep, x, 0.0)


def entered(x: Tensor, keep: Tensor | None, dtype: torch.dtype, rows: slice) -> Tensor:
    """Some rows of what A is given."""
    return kept(x[rows].to(dtype), None if keep is None else keep[rows])


def low_of(x: Tensor, keep: Tensor | None, A: Tensor) -> Tensor:
    """drop(x) A^T: (rows, in) -> (rows, r)."""
    if x.numel() <= LARGE or (x.dtype == A.dtype and keep is None):
        return F.linear(kept(x.to(A.dtype), keep), A)
    u = A.new_empty(len(x), len(A))
    for rows in blocks(x):
        u[rows] = F.linear(entered(x, keep, A.dtype, rows), A)
    return u


def add_product(y: Tensor, u: Tensor, B: Tensor, s: float = 1.0, keep: Tensor | None = None) -> None:
    """Add drop(s u B) to y, in place, summed in u's dtype: (rows, out), (rows, r), (r, out)."""
    if y.dtype == u.dtype and keep is None:
        y.addmm_(u, B, alpha=s)
    elif y.numel() <= LARGE:
        y.add_(kept(torch.mm(u, B), keep), alpha=s)
    else:
        for rows in blocks(y):
            part = y[rows]
            if keep is None:
                part.copy_(part.to(u.dtype).addmm_(u[rows], B, alpha=s))
            else:
                part.add_(kept(torch.mm(u[rows], B), keep[rows]), alpha=s)


def gradients(saved: Saved, s: float, need: Sequence[bool], g: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(of u, of A, of B), the last two where needed, from the gradient g (rows, out) of s drop(x) A^T B^T.

    need: which gradients are needed, of the arguments of `FusedLora`.
    """
    x, u, A, B, _, keep = saved
    x, Bs = x.reshape(-1, x.shape[-1]), B * s
    gu = A.new_empty(len(g), len(A))
    gA = torch.zeros_like(A) if need[3] else None
    gB = torch.zeros_like(B) if need[4] else None
    for rows in blocks(g, x):
        wide = g[rows].to(A.dtype)
        gu[rows] = torch.mm(wide, Bs)
        if gB is not None:
            gB.addmm_(wide.t(), u[rows], alpha=s)
        if gA is not None:
            gA.addmm_(gu[rows].t(), entered(x, keep, A.dtype, rows))
    return gu, gA, gB
