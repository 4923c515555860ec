"""Low-rank products beside large tensors of another dtype, some rows at a time: wide copies of them stay in the cache.

A whole copy in fp32 of what is kept in bf16 costs a CPU more, in fetching and clearing its memory, than the products.
Elsewhere all rows go at once. None of this is differentiable: it is for inference, and for inside of a Function.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peftlite.core.slots import HALF_DTYPES
from peftlite.tuners.lora.blocks import begin, blocks, cut, is_large, room, wide_blocks
from peftlite.tuners.lora.masks import dropped, kept_of, put_


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


def entries(x: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The blocks of x in this dtype, to be used before the next is asked for.

    All rows at once in half precision, whose kernels are slow to start, if nothing is made of them.
    """
    if x.dtype != dtype:
        return wide_blocks(x, dtype)
    if dtype in HALF_DTYPES:
        return iter(((slice(0, len(x)), x),))
    return ((rows, cut(x, rows)) for rows in blocks(x))


def low_of(x: Tensor, bits: Tensor | None, A: Tensor) -> Tensor:
    """drop(x) A^T: (rows, in) -> (rows, r)."""
    if bits is None and (x.dtype == A.dtype or not is_large(x)):
        return F.linear(x.to(A.dtype), A)
    u, At = A.new_empty(len(x), len(A)), A.t()
    if bits is None:
        for rows, part in wide_blocks(x, A.dtype):
            set_product(cut(u, rows), part, At)
        return u
    rooms = rooms_for(x, A.dtype)
    for rows, ones in kept_of(x, bits):
        set_product(cut(u, rows), given(cut(x, rows), ones, rooms), At)
    return u


def set_product(into: Tensor, one: Tensor, other: Tensor) -> None:
    """By the operation that sums are made by as well: code of two would have to be fetched after each large product."""
    into.addmm_(one, other, beta=0)


def rooms_for(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """For blocks of x in its own dtype and in another; one, where these are the same."""
    narrow = room(x, x.dtype)
    return narrow, narrow if x.dtype == dtype else room(x, dtype)


def given(x: Tensor, ones: Tensor, rooms: tuple[Tensor, Tensor]) -> Tensor:
    """What A is given of a block of x, in the second room."""
    narrow, wide = (begin(memory, len(x)) for memory in rooms)
    part = dropped(x, ones, narrow)
    return part if rooms[0] is rooms[1] else wide.copy_(part)


def add_product(y: Tensor, u: Tensor, B: Tensor, s: float = 1.0) -> None:
    """Add s u B to y, in place, summed in the wider of their dtypes: (rows, out), (rows, r), (r, out)."""
    if y.dtype == u.dtype:
        y.addmm_(u, B, alpha=s)
    elif (sums := torch.promote_types(y.dtype, u.dtype)) == u.dtype:
        for rows, wide in wide_blocks(y, sums):
            cut(y, rows).copy_(wide.addmm_(cut(u, rows), B, alpha=s))
    else:
        for rows in blocks(y):
            cut(y, rows).add_(torch.mm(cut(u, rows), B), alpha=s)


def gradients_above(
    g: Tensor, u: Tensor, B: Tensor, s: float, dtype: torch.dtype, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """(of u, but for the factor s, and of B if wanted), from the gradient g (rows, out) of s u B^T."""
    gu, wide_B = B.new_empty(len(g), B.shape[1], dtype=dtype), B.to(dtype)
    gB = B.new_zeros(B.shape[1], len(B)) if wanted else None  # transposed: large matrices stay as they lie
    for rows, wide in entries(g, dtype):
        set_product(cut(gu, rows), wide, wide_B)
        if gB is not None:
            add_sum(gB, cut(u, rows), wide, s)
    return gu, None if gB is None else gB.t().contiguous()


def gradients_below(
    x: Tensor, bits: Tensor | None, A: Tensor, gu: Tensor, s: float, gx: Tensor | None, wanted: bool
) -> Tensor | None:
    """The gradient of A, if wanted, from that of u = drop(x) A^T, s gu; adds that of x (rows, in) to gx, in place."""
    dtype, gA = gu.dtype, torch.zeros_like(A) if wanted else None
    if bits is not None:
        below_dropout(x, bits, A.to(dtype), gu, s, gx, gA)
        return gA
    if gA is not None:
        for rows, part in entries(x, dtype):
            add_sum(gA, cut(gu, rows), part, s)
    if gx is not None:
        add_product(gx, gu, A.to(dtype), s)
    return gA


def below_dropout(
    x: Tensor, bits: Tensor, A: Tensor, gu: Tensor, s: float, gx: Tensor | None, gA: Tensor | None
) -> None:
    """Add to gx and gA, in place, what there is of these."""
    rooms = rooms_for(x, A.dtype)
    for rows, ones in kept_of(x, bits):
        low = cut(gu, rows)
        if gA is not None:
            add_sum(gA, low, given(cut(x, rows), ones, rooms), s)
        if gx is None:
            continue
        old = cut(gx, rows)
        new, wide = (begin(memory, len(low)) for memory in rooms)
        if x.dtype == A.dtype:
            old.add_(dropped(torch.mm(low, A, out=new), ones, new), alpha=s)
        elif torch.promote_types(x.dtype, A.dtype) == A.dtype:
            put_(old, new.copy_(wide.copy_(old).addmm_(low, A, alpha=s)), ones)
        else:
            put_(old, new.copy_(old).add_(torch.mm(low, A, out=wide), alpha=s), ones)


def add_sum(total: Tensor, low: Tensor, wide: Tensor, s: float) -> None:
    """Add s low^T wide to the total, which may be of a wider dtype: (r, width), (rows, r), (rows, width)."""
    if total.dtype == wide.dtype:
        total.addmm_(low.t(), wide, alpha=s)
    else:
        total.add_(torch.mm(low.t(), wide), alpha=s)
