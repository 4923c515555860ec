"""Rows of different LoRA adapters on one layer together: the base layer once, and the low-rank products group by group.

    on a CPU    one pair of products per group of sorted rows, from the adapters' own tensors
    elsewhere   two batched products over the stacked factors, of which each row (or group) picks its own

Nothing is kept from call to call: a stacked copy of the factors would miss writes through `parameter.data`, which leave
no trace, and would take as much memory as the adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlite.core.hosts import LinearHost
from peftlite.core.rows import Order, split
from peftlite.core.slots import View
from peftlite.tuners.lora.blocks import is_large
from peftlite.tuners.lora.bound import Parts, globally_hooked
from peftlite.tuners.lora.passes import add_product, low_of


def banks(a: View) -> bool:
    """Whether an adapter's parts are of the kinds that `LoraBank` knows."""
    if not isinstance(a.layer.host, LinearHost) or {type(a.lora_A), type(a.lora_B)} != {nn.Linear}:
        return False
    return a.lora_B.bias is None and type(a.lora_dropout) in (nn.Dropout, nn.Identity)


class LoraBank:
    """The adapters of one layer that serve a batch together (see `Variant.bank`).

    Holds the modules' `_parameters`, so that `.to()` and assign-loading are seen.
    """

    def __init__(self, layer: Any, views: Sequence[View | None]) -> None:
        present = [a for a in views if a is not None]
        self.layer = layer
        self.base: nn.Module = layer.wrapped
        self.out: int = layer.host.shape[0]
        self.has = [a is not None for a in views]
        self.held = [(a.lora_A._parameters, a.lora_B._parameters) for a in present]
        self.scales = [a.scaling for a in present]
        self.scale_tensors = [s if isinstance(s, Tensor) else torch.tensor(float(s)) for s in self.scales]
        self.dropouts = [a.lora_dropout for a in present]
        self.drops = any(type(dropout) is nn.Dropout for dropout in self.dropouts)
        self.bare = Parts(self.base)
        self.parts = Parts(*(part for a in present for part in (a.lora_A, a.lora_B, a.lora_dropout)))

    def __call__(self, x: Tensor, order: Order) -> Tensor | None:
        compiling = torch.compiler.is_compiling()
        if x.dim() < 2 or not (compiling or self.plain()):
            return None
        As = [down.get("weight") for down, _ in self.held]
        Bs = [up.get("weight") for _, up in self.held]
        p = self.dropout() if self.drops else 0.0
        if p is None or not are_plain([*As, *Bs]):
            return None
        batched = compiling or x.device.type != "cpu"
        if not batched and not torch.is_grad_enabled() and not p and self.base_is_plain():
            return self.infer(x, order, As, Bs)
        y: Tensor = self.base(x)
        given = F.dropout(x, p) if p else x
        products = self.batched if batched else self.by_group
        return (y + products(given, order, As, Bs).view(*x.shape[:-1], self.out)).to(y.dtype)

    def plain(self) -> bool:
        """Whether no hook, patch, autocast or transform wants the modules to be called."""
        return not (
            globally_hooked()
            or self.parts.touched()
            or not self.layer.state.cast_inputs
            or torch._C._is_any_autocast_enabled()
            or torch._C._are_functorch_transforms_active()
        )

    def dropout(self) -> float | None:
        """The probability with which inputs are dropped now; None if it is not the same for all."""
        found = {d.p if type(d) is nn.Dropout and d.training else 0.0 for d in self.dropouts}
        return found.pop() if len(found) == 1 else None

    def base_is_plain(self) -> bool:
        """Whether the base layer is its formula alone: it can be given sorted rows, and its output can be written."""
        return type(self.base) is nn.Linear and not self.bare.touched()

    def infer(self, x: Tensor, order: Order, As: Sequence[Tensor], Bs: Sequence[Tensor]) -> Tensor:
        """The whole layer without gradients: sorted once, each group's product added where it belongs."""
        given = order.sorted(x)
        y: Tensor = self.base(given)
        flat, low_in = y.view(-1, self.out), given.reshape(-1, x.shape[-1])
        wide = flat.dtype != As[0].dtype  # sums are made in the adapters' dtype
        if wide and is_large(flat):
            self.add_in_blocks(low_in, flat, order, As, Bs)
            return order.restored(y)
        low_in = low_in.to(As[0].dtype)
        sums = low_in.new_empty(flat.shape) if wide else flat
        for part, into, A, B, s in self.pieces(low_in, sums, order, As, Bs):
            if A is None or B is None:
                _ = into.zero_() if wide else None
                continue
            low = torch.mm(part, A.t())
            if isinstance(s, Tensor):
                low, s = low * s, 1.0
            into.addmm_(low, B.t(), beta=0 if wide else 1, alpha=s)
        return order.restored(y.add_(sums.view(y.shape)) if wide else y)

    def add_in_blocks(self, x: Tensor, y: Tensor, order: Order, As: Sequence[Tensor], Bs: Sequence[Tensor]) -> None:
        """Add to y what the groups' adapters give for x, without a wide copy of either."""
        for part, into, A, B, s in self.pieces(x, y, order, As, Bs):
            if A is not None and B is not None:
                low = low_of(part, None, A)
                add_product(into, low * s if isinstance(s, Tensor) else low, B.t(), 1.0 if isinstance(s, Tensor) else s)

    def pieces(
        self, x: Tensor, y: Tensor, order: Order, As: Sequence[Tensor], Bs: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor | None, Any]]:
        """(vectors in, vectors out, A, B, s) of each group of sorted rows; None for a group without an adapter."""
        each = len(x) // max(1, sum(order.sizes))  # vectors per entry
        sizes = [size * each for size in order.sizes]
        factors = zip(As, Bs, self.scales, strict=True)
        for has, part, into in zip(self.has, split(x, sizes), split(y, sizes), strict=True):
            yield (part, into, *(next(factors) if has else (None, None, None)))

    def by_group(self, x: Tensor, order: Order, As: Sequence[Tensor], Bs: Sequence[Tensor]) -> Tensor:
        """Scaled B A x for all rows, group by group; differentiable."""
        given = order.sorted(x).to(As[0].dtype)
        flat = given.reshape(-1, x.shape[-1])
        done = [
            part.new_zeros(len(part), self.out) if A is None or B is None else F.linear(F.linear(part, A) * s, B)
            for part, _, A, B, s in self.pieces(flat, flat, order, As, Bs)
        ]
        return order.restored(torch.cat(done).view(*x.shape[:-1], self.out))

    def batched(self, x: Tensor, order: Order, As: Sequence[Tensor], Bs: Sequence[Tensor]) -> Tensor:
        """Scaled B A x for all rows in two batched products, with the group of each row as data.

        Stacks grow by powers of two, so that of compiled code few graphs serve all batches. Groups without an adapter
        have any, with the scale zero.
        """
        dtype, device = As[0].dtype, x.device
        rank = max(len(A) for A in As)
        many = 1 << (len(self.has) - 1).bit_length()
        place = [sum(self.has[:at]) if has else None for at, has in enumerate(self.has)] + [None] * many
        chosen = [0 if at is None else at for at in place[:many]]
        A = torch.stack([F.pad(As[at], (0, 0, 0, rank - len(As[at]))) for at in chosen])  # (many, r, in)
        B = torch.stack([F.pad(Bs[at], (0, rank - Bs[at].shape[1])) for at in chosen])  # (many, out, r)
        none = torch.zeros((), dtype=dtype, device=device)
        scales = [none if at is None else self.scale_tensors[at].to(device, dtype) for at in place[:many]]
        given = x.to(dtype).reshape(len(x), -1, x.shape[-1])  # (entries, vectors, in)
        low = given @ A[order.group].transpose(1, 2) * torch.stack(scales)[order.group, None, None]
        return low @ B[order.group].transpose(1, 2)


def are_plain(factors: Sequence[Any]) -> bool:
    """Whether all are plain parameters of one dtype."""
    return all(type(factor) is nn.Parameter for factor in factors) and len({factor.dtype for factor in factors}) == 1
