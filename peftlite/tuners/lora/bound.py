"""One LoRA adapter on one plain `nn.Linear`, bound: the same numbers as calling the modules, in fewer passes.

    inference   y = x W^T + b, then y += s (x A^T) B^T in place
    training    one autograd Function, which keeps x in its own dtype, x A^T, and a bit per element for dropout

Whatever is not the plain case is left to the modules' own calls: hooks on any part, a `forward` patched onto an
instance, subclasses of modules or tensors, autocast, functorch transforms, a base weight that trains, more arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, repeat
from operator import contains, itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from peftlite.core.slots import View
from peftlite.core.variant import Program
from peftlite.tuners.lora.masks import drawn, kept
from peftlite.tuners.lora.passes import Saved, add_product, gradients, low_of

_SMALL = 1 << 17  # elements of x below which a Function in Python costs more than dropout by plain autograd

_hooks = itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
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
        flat = x.reshape(-1, x.shape[-1])
        bits = drawn(flat, p) if p else None
        s = s / (1 - p)
        u = low_of(flat, bits, A)  # (rows, r)
        add_product(y.view(-1, y.shape[-1]), u, B.t(), s)
        ctx.save_for_backward(x, u, A, B, W, bits)
        ctx.s = s
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        saved, s, need = ctx.saved_tensors, ctx.s, ctx.needs_input_grad  # asked for once: checkpoints allow no more
        g = grad.reshape(-1, grad.shape[-1])
        if torch.is_grad_enabled():
            return *differentiable(saved, s, need, g), None, None
        x, _, A, _, W, bits = saved
        gu, gA, gB = gradients(saved, s, need, g)
        gx = None
        if need[0]:
            gx = torch.mm(g, W)
            add_product(gx, gu, A, bits=bits)
            gx = gx.view(x.shape)
        return gx, None, g.sum(0) if need[2] else None, gA, gB, None, None


def differentiable(saved: Saved, s: float, need: Sequence[bool], g: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of x, W, b, A, B by operations that have gradients themselves; so u is made again from x and A."""
    x, _, A, B, W, bits = saved
    wide, given = g.to(A.dtype), kept(x.reshape(-1, x.shape[-1]).to(A.dtype), bits)
    gu = torch.mm(wide, B * s)
    gx = (torch.mm(g, W) + kept(torch.mm(gu, A), bits)).to(x.dtype).view(x.shape) if need[0] else None
    gA = torch.mm(gu.t(), given) if need[3] else None
    gB = torch.mm(wide.t(), torch.mm(given, A.t())) * s if need[4] else None
    return gx, None, g.sum(0) if need[2] else None, gA, gB


def suits(a: View) -> bool:
    """Whether an adapter's parts are of the kinds that `BoundLinear` knows."""
    if type(a.layer.wrapped) is not nn.Linear or not (type(a.lora_A) is type(a.lora_B) is nn.Linear):
        return False
    if isinstance(a.scaling, Tensor):  # data, so that hotswapping needs no compilation: never read on the host
        return False
    return a.lora_B._parameters["bias"] is None and type(a.lora_dropout) in (nn.Dropout, nn.Identity)


def globally_hooked() -> bool:
    """Whether hooks are registered on all modules."""
    return any(_GLOBAL_HOOKS)


class Parts:
    """Modules whose formula may be used in place of calling them, as long as nobody has put anything in the way."""

    def __init__(self, *modules: nn.Module) -> None:
        self.own = tuple([module.__dict__ for module in modules])
        self.hooks = tuple(chain.from_iterable(map(_hooks, self.own)))

    def touched(self) -> bool:
        """Whether a module has a hook, or a `forward` patched onto it."""
        return any(self.hooks) or any(map(contains, self.own, repeat("forward")))


class BoundLinear:
    """A program (see `Variant.bind`). Holds the modules' `_parameters`, so that `.to()` and assign-loading are seen."""

    def __init__(self, a: View, slow: Program) -> None:
        base: nn.Module = a.layer.wrapped
        down, up, drop = a.lora_A, a.lora_B, a.lora_dropout
        self.slow = slow
        self.base = base
        self.pw, self.pa, self.pb = base._parameters, down._parameters, up._parameters
        self.s: float = a.scaling
        self.dropout = drop if type(drop) is nn.Dropout else None
        parts = Parts(base, down, up, drop)
        self.own, self.hooks = parts.own, parts.hooks
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
        wanted = torch.is_grad_enabled() and (x.requires_grad or A.requires_grad or B.requires_grad or W.requires_grad)
        if not (p or wanted or torch._C._are_functorch_transforms_active()):
            return self.infer(x, W, bias, A, B)
        # with dropout, nothing here depends on `wanted`: a recomputation with gradients must draw the same mask
        small = p and (x.numel() < _SMALL or p >= 1)
        if W.requires_grad or torch._C._are_functorch_transforms_active() or small:
            return self.slow(x)
        return FusedLora.apply(x, W, bias, A, B, self.s, p)  # type: ignore[no-untyped-call]

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
            add_product(y, low_of(flat, None, A), Bt, self.s)
        return y if len(shape) == 2 else y.view(*shape[:-1], y.shape[-1])

    def traced(self, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, p: float) -> Tensor:
        """The formula for torch.compile, which fuses it itself."""
        y = F.linear(x, W, bias)
        low = F.dropout(x, p, True) if p else x
        return (y + F.linear(F.linear(low.to(A.dtype), A), B) * self.s).to(y.dtype)
