"""Low-rank products beside large tensors of another dtype, some rows at a time: wide copies of them stay in the cache.

A whole copy in fp32 of what is kept in bf16 costs a CPU more, in fetching and clearing its memory, than the products.
Elsewhere all rows go at once. None of this is differentiable: it is for inference, and for inside of a Function.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peftlite.core.slots import HALF_DTYPES
from peftlite.tuners.lora.blocks import blocks, is_large, widened
from peftlite.tuners.lora.masks import drop_, dropped


class How(NamedTuple):
    """What `FusedLora` is told beside tensors.

    Scaling, probability of dropping, dtype of the low-rank products, whether masks are drawn again for backward.
    """

    s: float
    p: float
    dtype: torch.dtype
    seeded: bool


class Kept(NamedTuple):
    """What backward works with: x, A, B, W as they are, u = drop(x) A^T (rows, r), and the mask's bits."""

    x: Tensor
    A: Tensor
    B: Tensor
    W: Tensor
    u: Tensor
    bits: Tensor | None


def entries(x: Tensor, bits: Tensor | None, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """What A is given, some rows at a time: the slice of them, and drop(x) of those, to be used before the next.

    All rows at once in half precision, whose kernels are slow to start, if nothing is made of them.
    """
    if bits is not None:
        return ((rows, dropped(x[rows], bits[rows]).to(dtype)) for rows in blocks(x))
    if x.dtype != dtype:
        return widened(x, dtype)
    if dtype in HALF_DTYPES:
        return iter(((slice(0, len(x)), x),))
    return ((rows, x[rows]) for rows in blocks(x))


def low_of(x: Tensor, bits: Tensor | None, A: Tensor) -> Tensor:
    """drop(x) A^T: (rows, in) -> (rows, r)."""
    if bits is None and (x.dtype == A.dtype or not is_large(x)):
        return F.linear(x.to(A.dtype), A)
    u = A.new_empty(len(x), len(A))
    for rows, part in entries(x, bits, A.dtype):
        torch.mm(part, A.t(), out=u[rows])
    return u


def add_product(y: Tensor, u: Tensor, B: Tensor, s: float = 1.0, bits: Tensor | None = None) -> None:
    """Add drop(s u B) to y, in place, summed in the wider of their dtypes: (rows, out), (rows, r), (r, out)."""
    if y.dtype == u.dtype and bits is None:
        y.addmm_(u, B, alpha=s)
        return
    if torch.promote_types(y.dtype, u.dtype) != u.dtype:
        for rows in blocks(y):
            y[rows].add_(drop_(torch.mm(u[rows], B), None if bits is None else bits[rows]), alpha=s)
    elif bits is None:
        for rows, sums in widened(y, u.dtype):
            y[rows].copy_(sums.addmm_(u[rows], B, alpha=s))
    else:
        for rows in blocks(y):
            y[rows].copy_(drop_(torch.mm(u[rows] * s, B), bits[rows]).add_(y[rows]))


def gradients(
    kept: Kept, s: float, dtype: torch.dtype, need: Sequence[bool], g: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(of u, of A, of B), the last two where needed, from the gradient g (rows, out) of s drop(x) A^T B^T.

    need: which gradients are needed, of the arguments of `FusedLora`.
    """
    x, A, B, _, u, bits = kept
    x, Bs = x.reshape(-1, x.shape[-1]), (B * s).to(dtype)
    gu = A.new_empty(len(g), len(A), dtype=dtype)
    gA = torch.zeros_like(A) if need[3] else None
    gB = B.new_zeros(len(A), len(B)) if need[4] else None  # transposed: large matrices stay as they lie
    for rows, wide in entries(g, None, dtype):
        torch.mm(wide, Bs, out=gu[rows])
        if gB is not None:
            add_sum(gB, u[rows], wide, s)
    if gA is not None:
        for rows, part in entries(x, bits, dtype):
            add_sum(gA, gu[rows], part, 1.0)
    return gu, gA, None if gB is None else gB.t().contiguous()


def add_sum(total: Tensor, low: Tensor, wide: Tensor, s: float) -> None:
    """Add s low^T wide to the total, which may be of a wider dtype: (r, width), (rows, r), (rows, width)."""
    if total.dtype == wide.dtype:
        total.addmm_(low.t(), wide, alpha=s)
    else:
        total.add_(torch.mm(low.t(), wide), alpha=s)
