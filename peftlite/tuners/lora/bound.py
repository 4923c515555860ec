"""One LoRA adapter on one plain `nn.Linear`, bound: the same numbers as calling the modules, in fewer passes.

    inference   y = x W^T + b, then y += s (x A^T) B^T in place
    training    one autograd Function, which keeps x in its own dtype, x A^T, and a bit per element for dropout

Whatever is not the plain case is left to the modules' own calls: hooks on any part, a `forward` patched onto an
instance, subclasses of modules or tensors, autocast, functorch transforms, a base weight that trains, more arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled, nn
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _is_any_autocast_enabled
from torch.compiler import is_compiling

from peftlite.core.lean import DROPOUTS, IDENTITIES, LINEARS, Parts
from peftlite.core.slots import View
from peftlite.core.variant import Program
from peftlite.tuners.lora.blocks import is_large, is_small
from peftlite.tuners.lora.factors import in_base_dtype
from peftlite.tuners.lora.masks import drawn, kept, new_seed
from peftlite.tuners.lora.passes import How, Kept, add_product, gradients_above, gradients_below, low_of

_DROPPING = (*DROPOUTS, *IDENTITIES)


class FusedLora(torch.autograd.Function):
    """y = x W^T + b + s drop(x) A^T B^T with W frozen; casts for the low-rank products are transient.

    x: (..., in), W: (out, in), A: (r, in), B: (out, r). Gradients: x, b, A, B.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, how: How) -> Tensor:
        y = F.linear(x, W, bias)
        flat = x.reshape(-1, x.shape[-1])
        seed = new_seed() if how.p and how.seeded else None
        bits = drawn(flat, how.p, seed) if how.p else None
        s = how.s / (1 - how.p)
        u = low_of(flat, bits, A.to(how.dtype))  # (rows, r)
        add_product(y.view(-1, y.shape[-1]), u, B.to(how.dtype).t(), s)
        ctx.save_for_backward(x, A, B, W, *((u, bits) if seed is None else (None, None)))
        ctx.how, ctx.s, ctx.seed = how, s, seed
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        saved, how, s, need = ctx.saved_tensors, ctx.how, ctx.s, ctx.needs_input_grad  # once: checkpoints allow no more
        g = grad.reshape(-1, grad.shape[-1])
        x, A, B, W, u, bits = saved
        flat = x.reshape(-1, x.shape[-1])
        if ctx.seed is not None:
            bits = drawn(flat, how.p, ctx.seed)
        if torch.is_grad_enabled():
            return *differentiable(Kept(x, A, B, W, u, bits), s, how.dtype, need, g), None
        if u is None:
            u = low_of(flat, bits, A.to(how.dtype))
        gx = torch.mm(g, W) if need[0] else None  # first: the rest is little, and stays in the caches after it
        gu, gB = gradients_above(g, u, B, s, how.dtype, need[4])
        gA = gradients_below(flat, bits, A, gu, s, gx, need[3])
        gx = None if gx is None else gx.view(x.shape)
        return gx, None, g.sum(0) if need[2] else None, gA, gB, None


def differentiable(
    saved: Kept, s: float, dtype: torch.dtype, need: Sequence[bool], g: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of x, W, b, A, B by operations that have gradients themselves; so u is made again from x and A."""
    x, W = saved.x, saved.W
    low, gA, gB = differentiable_low(saved, s, dtype, (need[3], need[4]), g)
    gx = (torch.mm(g, W) + low).to(x.dtype).view(x.shape) if need[0] else None
    return gx, None, g.sum(0) if need[2] else None, gA, gB


def differentiable_low(
    saved: Kept, s: float, dtype: torch.dtype, need: Sequence[bool], g: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of x (rows, in), A and B from the low-rank products alone. need: of A and B."""
    x, A, B, _, _, bits = saved
    wide, given = g.to(dtype), kept(x.reshape(-1, x.shape[-1]).to(dtype), bits)
    gu = torch.mm(wide, (B * s).to(dtype))
    gA = torch.mm(gu.t(), given).to(A.dtype) if need[0] else None
    gB = (torch.mm(wide.t(), torch.mm(given, A.to(dtype).t())) * s).to(B.dtype) if need[1] else None
    return kept(torch.mm(gu, A.to(dtype)), bits), gA, gB


def suits(a: View) -> bool:
    """Whether an adapter's parts are of the kinds that `BoundLinear` knows."""
    return (
        type(a.layer.wrapped) is nn.Linear
        and type(a.lora_A) in LINEARS
        and type(a.lora_B) in LINEARS
        and type(a.lora_dropout) in _DROPPING
        and not isinstance(a.scaling, Tensor)  # data, so that hotswapping needs no compilation: not read on the host
        and a.lora_B._parameters["bias"] is None
    )


Views = tuple[Tensor, Tensor, Tensor, Tensor, "Tensor | None", "Tensor | None", "Batched | None"]
"""A, B, A^T, B^T, W, W^T without gradients: views, which see every write to the parameters; copies would not."""
Batched = tuple[Tensor, Tensor, Tensor]
"""A^T, B^T, W^T as batches of one matrix."""

_LIGHT = 1 << 14  # elements of a base weight that may outlive its parameter for as long as no call comes
_BY_BLAS = 400  # products from which on torch has the same routines do a matrix, and a batch of one


def views_of(A: Tensor, B: Tensor, W: Tensor) -> Views:
    """For as long as the parameters are what they are set to now; None in the place of a weight that is not light.

    Nor do other devices than a CPU get W's: their `linear` may be another kernel than `addmm`, with other last bits.
    """
    a, b, w = A.detach(), B.detach(), W.detach() if W.is_cpu and W.numel() <= _LIGHT else None
    At, Bt = a.t(), b.t()
    if w is None:
        return a, b, At, Bt, None, None, None
    Wt, least = w.t(), min(W.numel(), A.numel(), B.numel())
    alike = A.dtype is W.dtype and least >= _BY_BLAS
    return a, b, At, Bt, w, Wt, (At.unsqueeze(0), Bt.unsqueeze(0), Wt.unsqueeze(0)) if alike else None


class BoundLinear:
    """A program (see `Variant.bind`). Holds the modules' `_parameters`, so that `.to()` and assign-loading are seen."""

    def __init__(self, a: View, slow: Program) -> None:
        base: nn.Module = a.layer.wrapped
        down, up, drop = a.lora_A, a.lora_B, a.lora_dropout
        self.slow = slow
        self.base = base
        self.pw, self.pa, self.pb = base._parameters, down._parameters, up._parameters
        self.s: float = a.scaling
        self.dropout = drop if type(drop) in DROPOUTS else None
        self.parts = Parts(base, down, up, drop)
        self.in_base_dtype, self.seeded = in_base_dtype(a), a.config.runtime_config.dropout_mask == "seed"
        self.views: Views | None = None

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        W, A, B = self.pw.get("weight"), self.pa.get("weight"), self.pb.get("weight")
        compiling = is_compiling()
        if (
            self.parts.touched(compiling)
            or not (type(W) is type(A) is type(B) is nn.Parameter)
            or type(self.base) is not nn.Linear
            or _is_any_autocast_enabled()
            or args
            or kwargs
        ):
            return self.slow(x, *args, **kwargs)
        bias, dropout = self.pw["bias"], self.dropout
        p = dropout.p if dropout is not None and dropout.training else 0.0
        wanted = is_grad_enabled() and (x.requires_grad or A.requires_grad or B.requires_grad or W.requires_grad)
        by_torch = compiling or _are_functorch_transforms_active() or _get_tracing_state() is not None
        if p or wanted or by_torch:
            # with dropout, nothing here depends on `wanted`: a recomputation with gradients must draw the same mask
            if by_torch or W.requires_grad or p >= 1 or is_small(x):
                return self.formula(x, W, bias, A, B, p)
            how = How(self.s, p, W.dtype if self.in_base_dtype else A.dtype, self.seeded)
            return FusedLora.apply(x, W, bias, A, B, how)  # type: ignore[no-untyped-call]
        views = self.views  # one tuple, read once: threads share this object
        if (
            views is None
            or not (A.is_set_to(views[0]) and B.is_set_to(views[1]))
            or not (views[4] is None or W.is_set_to(views[4]))
        ):
            views = self.views = views_of(A, B, W)
        _, _, At, Bt, _, Wt, batched = views
        shape = x.shape
        if batched is not None and bias is not None and len(shape) == 3 and shape[0] == 1:
            At, Bt, Wt = batched  # no view of x, and the same bits
            return torch.baddbmm(bias, x, Wt).baddbmm_(x.bmm(At), Bt, alpha=self.s)
        flat = x if len(shape) == 2 else x.reshape(-1, shape[-1])
        y = F.linear(flat, W, bias) if Wt is None or bias is None else bias.addmm(flat, Wt)  # the same bits
        if A.dtype is y.dtype:
            y.addmm_(flat.mm(At), Bt, alpha=self.s)
        else:
            self.add_cast(y, flat, A, views)
        if len(shape) == 3 and not y.requires_grad:  # in place, and each dimension as an argument, is the cheapest
            return y.resize_(shape[0], shape[1], y.shape[1])
        return y if len(shape) == 2 else y.view(*shape[:-1], y.shape[1])

    def add_cast(self, y: Tensor, x: Tensor, A: Tensor, views: Views) -> None:
        """Add s B A x to y, where A has another dtype: y (rows, out), x (rows, in)."""
        _, _, At, Bt, *_ = views
        if self.in_base_dtype and len(x) > len(A):  # with fewer rows, casting the factors is the more work
            y.addmm_(torch.mm(x, At.to(x.dtype)), Bt.to(x.dtype), alpha=self.s)
        elif is_large(x) or is_large(y) or A.dtype.itemsize <= y.dtype.itemsize:
            add_product(y, low_of(x, None, A), Bt, self.s)
        else:
            u = torch.mm(x.type_as(A), At)
            y.copy_(y.type_as(u).addmm_(u, Bt, alpha=self.s))

    def formula(self, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, p: float) -> Tensor:
        """By torch's own operations: what it compiles and transforms, and with small inputs is the faster."""
        y = F.linear(x, W, bias)
        if self.in_base_dtype:
            A, B = A.to(W.dtype), B.to(W.dtype)
        low = F.linear(F.dropout(x.to(A.dtype), p) if p else x.to(A.dtype), A)
        if p or A.dtype is not y.dtype or is_compiling():
            return (y + F.linear(low, B) * self.s).to(y.dtype)
        # rounded once, as without gradients, so that a recomputation gives the same bits
        rows = torch.addmm(y.reshape(-1, y.shape[-1]), low.reshape(-1, low.shape[-1]), B.t(), alpha=self.s)
        return rows.view(y.shape)
