"""Rows of different LoRA adapters on one layer together: the base layer once, and the low-rank products group by group.

    on a CPU    one pair of products per group of sorted rows, from the adapters' own tensors
    elsewhere   two batched products over the stacked factors, of which each row (or group) picks its own

Nothing is kept from call to call: a stacked copy of the factors would miss writes through `parameter.data`, which leave
no trace, and would take as much memory as the adapters. Where each row has an adapter of its own, products of matrices
and vectors take as long as reading the factors' bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import count, repeat
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlite.core.hosts import LinearHost
from peftlite.core.lean import DROPOUTS, IDENTITIES, LINEARS, Parts
from peftlite.core.rows import Order, Runs
from peftlite.core.slots import View
from peftlite.tuners.lora.blocks import rows_at_once
from peftlite.tuners.lora.factors import in_base_dtype
from peftlite.tuners.lora.passes import add_product, low_of
from peftlite.tuners.lora.rooms import left, parts, taken

Factors = tuple[Tensor, Tensor, float]
"""A (r, in), B (out, r) and the scaling of one adapter."""


def banks(a: View) -> bool:
    """Whether an adapter's parts are of the kinds that `LoraBank` knows."""
    if not isinstance(a.layer.host, LinearHost) or not {type(a.lora_A), type(a.lora_B)} <= set(LINEARS):
        return False
    return a.lora_B.bias is None and type(a.lora_dropout) in (*DROPOUTS, *IDENTITIES)


class LoraBank:
    """The adapters of one layer that serve a batch together (see `Variant.bank`).

    Holds the modules' `_parameters`, so that `.to()` and assign-loading are seen.
    """

    def __init__(self, layer: Any, views: Sequence[View | None]) -> None:
        present = [a for a in views if a is not None]
        self.layer = layer
        self.base: nn.Module = layer.wrapped
        self.out: int = layer.host.shape[0]
        numbers = count()
        self.places = [None if a is None else next(numbers) for a in views]
        """Of each group, which of the factors are its own; None for a group without an adapter."""
        self.downs = [a.lora_A._parameters for a in present]
        self.ups = [a.lora_B._parameters for a in present]
        self.scales = [a.scaling for a in present]
        self.scale_tensors = [s if isinstance(s, Tensor) else torch.tensor(float(s)) for s in self.scales]
        self.dropouts = [a.lora_dropout for a in present]
        self.in_base_dtype = any(in_base_dtype(a) for a in present)  # and so all
        self.drops = any(type(dropout) in DROPOUTS for dropout in self.dropouts)
        self.bare = Parts(self.base)
        self.parts = Parts(*(part for a in present for part in (a.lora_A, a.lora_B, a.lora_dropout)))

    def __call__(self, x: Tensor, order: Order) -> Tensor | None:
        compiling = torch.compiler.is_compiling()
        if x.dim() < 2 or not (compiling or self.plain()):
            return None
        As: list[Any] = list(map(dict.get, self.downs, repeat("weight")))
        Bs: list[Any] = list(map(dict.get, self.ups, repeat("weight")))
        p = self.dropout() if self.drops else 0.0
        if p is None or not are_plain([*As, *Bs]):
            return None
        batched = compiling or x.device.type != "cpu"
        if self.in_base_dtype:  # of few vectors, casting factors is more work
            many = batched or x.numel() > x.shape[-1] * sum(map(len, As))
            dtype = self.layer.host.dtype if many else As[0].dtype
            As, Bs = ([factor.to(dtype) for factor in factors] for factors in (As, Bs))
        if not batched and not torch.is_grad_enabled() and not p and self.base_is_plain():
            return self.infer(x, order, As, Bs)
        y: Tensor = self.base(x)
        given = F.dropout(x, p) if p else x
        products = self.batched if batched else self.by_group
        return (y + products(given, order, As, Bs).view(*x.shape[:-1], self.out)).to(y.dtype)

    def plain(self) -> bool:
        """Whether no hook, patch, autocast or transform wants the modules to be called."""
        return not (
            self.parts.touched()
            or not self.layer.state.cast_inputs
            or torch._C._is_any_autocast_enabled()
            or torch._C._are_functorch_transforms_active()
        )

    def dropout(self) -> float | None:
        """The probability with which inputs are dropped now; None if it is not the same for all."""
        found = {d.p if type(d) in DROPOUTS and d.training else 0.0 for d in self.dropouts}
        return found.pop() if len(found) == 1 else None

    def base_is_plain(self) -> bool:
        """Whether the base layer is its formula alone: it can be given sorted rows, and its output can be written."""
        return type(self.base) is nn.Linear and not self.bare.touched()

    def infer(self, x: Tensor, order: Order, As: Sequence[Tensor], Bs: Sequence[Tensor]) -> Tensor:
        """The whole layer without gradients: sorted once, each group's product added where it belongs.

        Where the factors have another dtype, sums are made in that; of small groups, of several at a time.
        """
        given = order.sorted(x)
        y: Tensor = self.base(given)
        flat, low_in, dtype = y.view(-1, self.out), given.reshape(-1, x.shape[-1]), As[0].dtype
        factors = list(zip(As, Bs, map(float, self.scales), strict=True))
        each = flat.shape[0] // order.count
        same, widens = flat.dtype is dtype, torch.promote_types(flat.dtype, dtype) is dtype
        step = flat.shape[0] if same else rows_at_once(flat if self.out > x.shape[-1] else low_in) if widens else 1
        for rows, runs in together(order.runs, each, step):
            part, into = low_in[rows], flat[rows]
            if same:
                self.add(part, into, runs, factors)
            elif len(runs) > 1:
                self.add_wide(part, into, runs, factors)
            elif (at := self.places[runs[0][0]]) is not None:
                A, B, s = factors[at]
                add_product(into, low_of(part, None, A), B.t(), s)
        return order.restored(y)

    def add_wide(self, x: Tensor, y: Tensor, runs: Runs, factors: Sequence[Factors]) -> None:
        """The same as `add` by way of copies in the factors' dtype, in rooms that are used again."""
        dtype, sizes = factors[0][0].dtype, tuple([size for _, size in runs])
        given, sums = taken(x.numel(), dtype), taken(y.numel(), dtype)
        wide_x, xs = given.views(sizes, x.shape[1])
        wide_y, ys = sums.views(sizes, y.shape[1])
        wide_x.copy_(x)
        wide_y.copy_(y)
        self.add_parts(xs, ys, runs, factors)
        y.copy_(wide_y)
        left(sums)
        left(given)

    def add(self, x: Tensor, y: Tensor, runs: Runs, factors: Sequence[Factors]) -> None:
        """Add to the vectors y what the groups' adapters give for the vectors x, both brought together by group."""
        sizes = [size for _, size in runs]
        self.add_parts(parts(x, sizes), parts(y, sizes), runs, factors)

    def add_parts(self, xs: Sequence[Tensor], ys: Sequence[Tensor], runs: Runs, factors: Sequence[Factors]) -> None:
        """The same for the groups' matrices, or vectors where each is alone in its group."""
        alone, mv, linear = xs[0].dim() == 1, torch.mv, F.linear
        for at, x, y in zip([self.places[group] for group, _ in runs], xs, ys, strict=True):
            if at is not None:
                A, B, s = factors[at]
                if alone:
                    y.addmv_(B, mv(A, x), alpha=s)
                else:
                    y.addmm_(linear(x, A), B.t(), alpha=s)

    def by_group(self, x: Tensor, order: Order, As: Sequence[Tensor], Bs: Sequence[Tensor]) -> Tensor:
        """Scaled B A x for all rows, group by group; differentiable."""
        given = order.sorted(x).to(As[0].dtype)
        done = []
        for group, part in order.parts(given):
            at, low = self.places[group], part.reshape(-1, x.shape[-1])
            made = None if at is None else F.linear(F.linear(low, As[at]) * self.scales[at], Bs[at])
            done.append(low.new_zeros(len(low), self.out) if made is None else made)
        return order.restored(torch.cat(done).view(*x.shape[:-1], self.out))

    def batched(self, x: Tensor, order: Order, As: Sequence[Tensor], Bs: Sequence[Tensor]) -> Tensor:
        """Scaled B A x for all rows in two batched products, with the group of each row as data.

        Stacks grow by powers of two, so that of compiled code few graphs serve all batches. Groups without an adapter
        have any, with the scale zero.
        """
        dtype, device = As[0].dtype, x.device
        rank = max(len(A) for A in As)
        many = 1 << (len(self.places) - 1).bit_length()
        place = [*self.places, *[None] * many]
        chosen = [0 if at is None else at for at in place[:many]]
        A = torch.stack([F.pad(As[at], (0, 0, 0, rank - len(As[at]))) for at in chosen])  # (many, r, in)
        B = torch.stack([F.pad(Bs[at], (0, rank - Bs[at].shape[1])) for at in chosen])  # (many, out, r)
        none = torch.zeros((), dtype=dtype, device=device)
        scales = [none if at is None else self.scale_tensors[at].to(device, dtype) for at in place[:many]]
        given = x.to(dtype).reshape(len(x), -1, x.shape[-1])  # (entries, vectors, in)
        low = given @ A[order.group].transpose(1, 2) * torch.stack(scales)[order.group, None, None]
        return low @ B[order.group].transpose(1, 2)


@lru_cache(maxsize=64)
def together(runs: Runs, each: int, step: int) -> tuple[tuple[slice, Runs], ...]:
    """Slices of vectors, and (group, vectors) in each slice: as many as fit into `step` vectors, or a larger one.

    runs: (group, rows), where there are `each` vectors per row.
    """
    found: list[tuple[slice, list[tuple[int, int]]]] = []
    end = 0
    for group, entries in runs:
        size = entries * each
        if size and found and end + size - found[-1][0].start <= step:
            rows, inside = found[-1]
            inside.append((group, size))
            found[-1] = slice(rows.start, end + size), inside
        elif size:
            found.append((slice(end, end + size), [(group, size)]))
        end += size
    return tuple([(rows, tuple(inside)) for rows, inside in found])


def are_plain(factors: Sequence[Any]) -> bool:
    """Whether all are plain parameters of one dtype."""
    return set(map(type, factors)) == {nn.Parameter} and len(set(map(attrgetter("dtype"), factors))) == 1
