"""Several LoRA adapters on one plain `nn.Linear`, bound: side by side, their factors are those of one adapter.

    y = x W^T + b + [x A1^T, x A2^T, ...] [s1 B1, s2 B2, ...]^T      (rows, r1 + r2 + ...) (r1 + r2 + ..., out)

So the input and the output are gone through as often as for one, though each adapter has a dropout mask of its own.
What is not the plain case is left to the modules' own calls, as in bound.py; so are torch.compile, small inputs that
train, and products in the base layer's dtype. Masks are kept as bits, whatever `dropout_mask` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlite.core.lean import DROPOUTS, Parts
from peftlite.core.slots import View
from peftlite.core.variant import Program
from peftlite.tuners.lora.blocks import is_large, is_small
from peftlite.tuners.lora.bound import differentiable_low
from peftlite.tuners.lora.masks import drawn
from peftlite.tuners.lora.passes import Kept, add_product, gradients_above, gradients_below, low_of


class FusedLoras(torch.autograd.Function):
    """y = x W^T + b + sum over i of s_i drop_i(x) A_i^T B_i^T with W frozen; as `FusedLora`.

    x: (..., in), W: (out, in); scales and ps, the dropout probabilities: one for each; factors: A_1, B_1, A_2, B_2, ...
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        scales: Sequence[float],
        ps: Sequence[float],
        *factors: Tensor,
    ) -> Tensor:
        y = F.linear(x, W, bias)
        flat = x.reshape(-1, x.shape[-1])
        bits = [drawn(flat, p) if p else None for p in ps]
        ctx.scales = [s / (1 - p) for s, p in zip(scales, ps, strict=True)]
        As, Bs = factors[::2], factors[1::2]
        if any(ps):
            u = torch.cat([low_of(flat, mask, A) for mask, A in zip(bits, As, strict=True)], 1)
        else:
            u = low_of(flat, None, torch.cat(As))
        add_product(y.view(-1, y.shape[-1]), u, beside(Bs, ctx.scales).t())
        ctx.save_for_backward(x, u, W, *bits, *factors)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, u, W, *rest = ctx.saved_tensors
        scales, need = ctx.scales, ctx.needs_input_grad
        bits, As, Bs = rest[: len(scales)], rest[len(scales) :: 2], rest[len(scales) + 1 :: 2]
        g = grad.reshape(-1, grad.shape[-1])
        parts = list(zip(bits, As, Bs, scales, need[5::2], need[6::2], strict=True))
        gx: Tensor | None = None
        if torch.is_grad_enabled():
            gx = torch.mm(g, W) if need[0] else None
            found: list[Tensor | None] = []
            for mask, A, B, s, need_A, need_B in parts:
                saved = Kept(x, A, B, W, u, mask)
                low, gA, gB = differentiable_low(saved, s, A.dtype, (need_A, need_B), g)
                gx = None if gx is None else gx + low
                found += [gA, gB]
        else:
            gx, found = passed_back(x, u, W, parts, need, g)
        gx = None if gx is None else gx.to(x.dtype).view(x.shape)
        return gx, None, g.sum(0) if need[2] else None, None, None, *found


Part = tuple["Tensor | None", Tensor, Tensor, float, bool, bool]
"""Of one adapter: the mask's bits, A, B, s, whether A and B need gradients."""


def passed_back(
    x: Tensor, u: Tensor, W: Tensor, parts: Sequence[Part], need: Sequence[bool], g: Tensor
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of x, A_1, B_1, ..., from the output's, g (rows, out); u: all drop_i(x) A_i^T, side by side."""
    bits, As, Bs, scales, need_A, need_B = zip(*parts, strict=True)
    flat, gx = x.reshape(-1, x.shape[-1]), torch.mm(g, W) if need[0] else None
    gu, gB = gradients_above(g, u, beside(Bs, scales), 1.0, As[0].dtype, any(need_B))
    sizes = [len(one) for one in As]
    gAs: Sequence[Tensor | None]
    if any(mask is not None for mask in bits):
        gus = torch.split(gu, sizes, 1)
        gAs = [gradients_below(flat, bits[at], As[at], gus[at], 1.0, gx, need_A[at]) for at in range(len(As))]
    else:
        gA = gradients_below(flat, None, torch.cat(As), gu, 1.0, gx, any(need_A))
        gAs = [None] * len(As) if gA is None else torch.split(gA, sizes)
    gBs: Sequence[Tensor | None] = [None] * len(As) if gB is None else torch.split(gB, sizes, 1)
    found: list[Tensor | None] = []
    for part, one, other in zip(parts, gAs, gBs, strict=True):
        found += [one if part[4] else None, other * part[3] if part[5] and other is not None else None]
    return gx, found


def beside(Bs: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """[s1 B1, s2 B2, ...]: (out, r1 + r2 + ...)."""
    return torch.cat([B * s for B, s in zip(Bs, scales, strict=True)], 1)


class BoundLoras:
    """A program (see `Variant.bind_several`) for adapters that all suit `BoundLinear`; holds what that one holds."""

    def __init__(self, views: Sequence[View], slow: Program) -> None:
        base: nn.Module = views[0].layer.wrapped
        self.slow = slow
        self.base = base
        self.pw = base._parameters
        self.held = [part._parameters for a in views for part in (a.lora_A, a.lora_B)]
        self.scales: list[float] = [a.scaling for a in views]
        self.dropouts = [a.lora_dropout for a in views]
        modules = [part for a in views for part in (a.lora_A, a.lora_B, a.lora_dropout)]
        self.parts = Parts(base, *modules)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        W, factors = self.pw.get("weight"), [held.get("weight") for held in self.held]
        if args or kwargs or not self.plain(W, factors):
            return self.slow(x, *args, **kwargs)
        ps = [d.p if type(d) in DROPOUTS and d.training else 0.0 for d in self.dropouts]
        trains = any(ps) or (torch.is_grad_enabled() and any(t.requires_grad for t in (x, W, *factors)))
        if not trains:
            return self.infer(x, W, factors[::2], factors[1::2])
        # with dropout, nothing here depends on who wants gradients: a recomputation must draw the same masks
        if is_small(x) or max(ps) >= 1 or W.requires_grad:  # type: ignore[union-attr]
            return self.slow(x)
        return FusedLoras.apply(x, W, self.pw["bias"], self.scales, ps, *factors)  # type: ignore[no-untyped-call]

    def plain(self, W: Any, factors: Sequence[Any]) -> bool:
        """Whether nothing stands between the modules' calls and their formulas, and torch's own are not wanted."""
        return not (
            torch.compiler.is_compiling()
            or self.parts.touched()
            or type(self.base) is not nn.Linear
            or any(type(one) is not nn.Parameter for one in (W, *factors))
            or len({one.dtype for one in factors}) > 1
            or torch._C._is_any_autocast_enabled()
            or torch._C._are_functorch_transforms_active()
        )

    def infer(self, x: Tensor, W: Any, As: Sequence[Any], Bs: Sequence[Any]) -> Tensor:
        """The adapted layer without gradients."""
        flat = x.reshape(-1, x.shape[-1])
        y = F.linear(flat, W, self.pw["bias"])
        if y.dtype == As[0].dtype:
            self.add(y, flat, As, Bs)
        elif is_large(flat) or is_large(y) or As[0].dtype.itemsize <= y.dtype.itemsize:
            add_product(y, low_of(flat, None, torch.cat(list(As))), beside(Bs, self.scales).t())
        else:
            sums = y.to(As[0].dtype)
            self.add(sums, flat.to(sums.dtype), As, Bs)
            y.copy_(sums)
        return y.view(*x.shape[:-1], y.shape[1])

    def add(self, y: Tensor, x: Tensor, As: Sequence[Any], Bs: Sequence[Any]) -> None:
        """Add every adapter's product to y (rows, out), in place, all of one dtype."""
        for A, B, s in zip(As, Bs, self.scales, strict=True):
            y.addmm_(torch.mm(x, A.t()), B.t(), alpha=s)
