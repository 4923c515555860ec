"""One LoRA adapter on one plain `nn.Linear`, bound: the same numbers as calling the modules, in fewer passes.

    inference   y = x W^T + b, then y += s (x A^T) B^T in place
    training    one autograd Function, which keeps x in its own dtype, x A^T, and a bool per element for dropout

Whatever is not the plain case is left to the modules' own calls: hooks on any part, a `forward` patched onto an
instance, subclasses of modules or tensors, autocast, functorch transforms, a base weight that trains, more arguments.
"""

from __future__ import annotations

import math
from itertools import repeat
from operator import contains
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from peftlite.core.slots import View
from peftlite.core.variant import Program

_SMALL = 1 << 17  # elements of x below which a Function in Python costs more than dropout by plain autograd
_LEVELS = 1 << 16  # a dropout mask is drawn from 16 random bits per element

_GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


class FusedLora(torch.autograd.Function):
    """y = x W^T + b + s drop(x) A^T B^T with W frozen; low-rank products in A's dtype, casts are transient.

    x: (..., in), W: (out, in), A: (r, in), B: (out, r), s: scaling, p: dropout probability. Gradients: x, b, A, B.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, s: float, p: float
    ) -> Tensor:
        y = F.linear(x, W, bias)
        keep = keep_mask(x.shape, p, x.device) if p else None
        if p:
            s = s / (1 - p)
        u = F.linear(kept(x.to(A.dtype), keep), A).view(-1, A.shape[0])  # (rows, r)
        flat = y.view(-1, y.shape[-1])
        if y.dtype == A.dtype:
            flat.addmm_(u, B.t(), alpha=s)
        else:
            flat.add_(torch.mm(u, B.t()), alpha=s)
        ctx.save_for_backward(x, u, A, B, W, keep)
        ctx.s = s
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, u, A, B, W, keep = ctx.saved_tensors
        need, s, dtype = ctx.needs_input_grad, ctx.s, A.dtype
        g = grad.reshape(-1, grad.shape[-1])
        g_low = g.to(dtype)
        gu = torch.mm(g_low, B * s)  # (rows, r)
        if torch.is_grad_enabled():  # differentiated again: u must depend on x and A
            u = F.linear(kept(x.to(dtype), keep), A).view(-1, A.shape[0])
        gB = torch.mm(g_low.t(), u) * s if need[4] else None
        del g_low
        gA = torch.mm(gu.t(), kept(x.to(dtype), keep).reshape(-1, x.shape[-1])) if need[3] else None
        gx = grad_of_input(g, gu, W, A, keep).view(x.shape) if need[0] else None
        return gx, None, g.sum(0) if need[2] else None, gA, gB, None, None


def grad_of_input(g: Tensor, gu: Tensor, W: Tensor, A: Tensor, keep: Tensor | None) -> Tensor:
    """G W + drop(Gu A): (rows, out) @ (out, in) + (rows, r) @ (r, in) -> (rows, in)."""
    gx = torch.mm(g, W)
    if keep is None and gx.dtype == A.dtype:
        return gx.addmm_(gu, A)
    low = torch.mm(gu, A)
    return gx.add_(low if keep is None else torch.where(keep.view(low.shape), low, 0.0))


def keep_mask(shape: torch.Size, p: float, device: torch.device) -> Tensor:
    """A bool per element, True with probability 1 - p; cheaper than one float per element."""
    count = math.prod(shape)
    bits = torch.empty((count + 3) // 4, dtype=torch.int64, device=device).random_(-(2**63), None)
    return (bits.view(torch.int16)[:count] >= round(p * _LEVELS) - _LEVELS // 2).view(shape)


def kept(x: Tensor, keep: Tensor | None) -> Tensor:
    """Zeros where the mask does not keep `x`; without rescaling."""
    return x if keep is None else torch.where(keep, x, 0.0)


def suits(a: View) -> bool:
    """Whether an adapter's parts are of the kinds that `BoundLinear` knows."""
    if type(a.layer.wrapped) is not nn.Linear or not (type(a.lora_A) is type(a.lora_B) is nn.Linear):
        return False
    if isinstance(a.scaling, Tensor):  # data, so that hotswapping needs no compilation: never read on the host
        return False
    return "bias" not in dict(a.lora_B.named_parameters()) and type(a.lora_dropout) in (nn.Dropout, nn.Identity)


def globally_hooked() -> bool:
    """Whether hooks are registered on all modules."""
    return any(_GLOBAL_HOOKS)


class Parts:
    """Modules whose formula may be used in place of calling them, as long as nobody has put anything in the way."""

    def __init__(self, *modules: nn.Module) -> None:
        self.own = tuple(module.__dict__ for module in modules)
        self.hooks = tuple(
            hooks
            for part in modules
            for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
        )

    def touched(self) -> bool:
        """Whether a module has a hook, or a `forward` patched onto it."""
        return any(self.hooks) or any(map(contains, self.own, repeat("forward")))


class BoundLinear:
    """A program (see `Variant.bind`). Holds the modules' `_parameters`, so that `.to()` and assign-loading are seen."""

    def __init__(self, a: View, slow: Program) -> None:
        base: nn.Module = a.layer.wrapped
        parts = (base, a.lora_A, a.lora_B, a.lora_dropout)
        self.slow = slow
        self.base = base
        self.pw, self.pa, self.pb = (part._parameters for part in parts[:3])
        self.s: float = a.scaling
        self.dropout = a.lora_dropout if type(a.lora_dropout) is nn.Dropout else None
        self.own = tuple(part.__dict__ for part in parts)
        self.hooks = tuple(
            hooks
            for part in parts
            for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
        )
        self.turned: tuple[int, Tensor | None] = (0, None)

    def plain(self, W: Any, A: Any, B: Any) -> bool:
        """Whether nothing stands between the modules' calls and their formulas."""
        base, down, up, drop = self.own
        return not (
            any(self.hooks)
            or any(_GLOBAL_HOOKS)
            or "forward" in base
            or "forward" in down
            or "forward" in up
            or "forward" in drop
            or not (type(W) is type(A) is type(B) is nn.Parameter)
            or type(self.base) is not nn.Linear
            or torch._C._is_any_autocast_enabled()
        )

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        W, A, B = self.pw.get("weight"), self.pa.get("weight"), self.pb.get("weight")
        if args or kwargs or W is None or A is None or B is None or not self.plain(W, A, B):
            return self.slow(x, *args, **kwargs)
        bias = self.pw["bias"]
        dropout = self.dropout
        p = dropout.p if dropout is not None and dropout.training else 0.0
        if torch.compiler.is_compiling():
            return self.traced(x, W, bias, A, B, p)
        if torch.is_grad_enabled() and (x.requires_grad or A.requires_grad or B.requires_grad or W.requires_grad):
            if W.requires_grad or torch._C._are_functorch_transforms_active() or (p and x.numel() < _SMALL):
                return self.slow(x)
            return FusedLora.apply(x, W, bias, A, B, self.s, p)  # type: ignore[no-untyped-call]
        if p or torch._C._are_functorch_transforms_active():
            return self.slow(x)
        return self.infer(x, W, bias, A, B)

    def infer(self, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
        """The adapted layer without gradients. A view of B is kept, which sees every write to B; a copy would not."""
        place, Bt = self.turned  # one tuple, read once: threads share this object
        if Bt is None or place != B.data_ptr():
            Bt = B.detach().t()
            self.turned = (B.data_ptr(), Bt)
        shape = x.shape
        flat = x if len(shape) == 2 else x.reshape(-1, shape[-1])
        y = F.linear(flat, W, bias)
        if A.dtype == y.dtype:
            y.addmm_(F.linear(flat, A), Bt, alpha=self.s)
        else:
            y.add_(torch.mm(F.linear(flat.to(A.dtype), A), Bt), alpha=self.s)
        return y if len(shape) == 2 else y.view(*shape[:-1], y.shape[-1])

    def traced(self, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, p: float) -> Tensor:
        """The formula for torch.compile, which fuses it itself."""
        y = F.linear(x, W, bias)
        low = F.dropout(x, p, True) if p else x
        return (y + F.linear(F.linear(low.to(A.dtype), A), B) * self.s).to(y.dtype)
