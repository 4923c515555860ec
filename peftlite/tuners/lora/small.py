"""DoRA on one small `nn.Linear`, bound: the changed weight is made in each call, which takes the fewest steps.

    y = x (g (W + s B A))^T + b     with g = m / |W + s B A|

On a base in half precision that serves for g alone, and the rest is as in `Dora.forward`: a fresh adapter leaves every
bit as it was. That is also what is better for large layers and many inputs. What is not the plain case is left to the
modules' own calls, as in bound.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlite.core.lean import DROPOUTS, Parts
from peftlite.core.slots import HALF_DTYPES, View
from peftlite.core.variant import Program
from peftlite.tuners.lora.bound import suits
from peftlite.tuners.lora.factors import in_base_dtype

SMALL = 1 << 16
"""Elements of a weight to which adding B A takes less time than to go round it."""

_BASES = (torch.float32, *HALF_DTYPES)


class BoundDora:
    """A program (see `Variant.bind`). Holds the modules' `_parameters`, as `BoundLinear` does."""

    def __init__(self, a: View, slow: Program) -> None:
        base: nn.Module = a.layer.wrapped
        parts = (base, a.lora_A, a.lora_B, a.lora_magnitude_vector)
        self.slow = slow
        self.base = base
        self.held: Any = tuple([part._parameters for part in parts])
        self.s: float = a.scaling
        self.dropout = a.lora_dropout if type(a.lora_dropout) in DROPOUTS else None
        self.parts = Parts(*parts, a.lora_dropout)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        tensors: list[Any] = [held.get("weight") for held in self.held]
        if args or kwargs or not self.plain(x, tensors):
            return self.slow(x, *args, **kwargs)
        W, A, B, m = tensors
        bias, scaled = self.held[0]["bias"], B * self.s
        changed = torch.addmm(W.to(A.dtype), scaled, A)
        g = m / torch.linalg.vector_norm(changed.detach(), dim=1)
        if W.dtype is A.dtype:
            return F.linear(x, changed * g.unsqueeze(1), bias)
        return directed(F.linear(x, W, bias), bias, g, F.linear(F.linear(x.to(A.dtype), A), scaled))

    def plain(self, x: Tensor, tensors: list[Any]) -> bool:
        """Whether nothing stands between the modules' calls and their formulas, and this one is the fastest."""
        dropout, (W, *own) = self.dropout, tensors
        return not (
            torch.compiler.is_compiling()
            or self.parts.touched()
            or (dropout is not None and dropout.training and dropout.p)
            or type(self.base) is not nn.Linear
            or any(type(one) is not nn.Parameter or one.dtype is not torch.float32 for one in own)
            or type(W) is not nn.Parameter
            or W.dtype not in _BASES
            or x.dtype is not W.dtype
            or x.numel() > W.numel()
            or torch._C._is_any_autocast_enabled()
            or torch._C._are_functorch_transforms_active()
        )


def bound_if_small(a: View, slow: Program) -> Program | None:
    """The program, where it may be of use."""
    if a.layer.merged_adapters or not suits(a) or in_base_dtype(a) or a.layer.wrapped.weight.numel() > SMALL:
        return None
    return BoundDora(a, slow)


def directed(y: Tensor, bias: Tensor | None, g: Tensor, added: Tensor) -> Tensor:
    """The layer's output g (y - bias + added) + bias, in y's dtype; with g = 1 and added = 0 it is y, bit for bit."""
    if bias is None:
        return (g * (y + added)).to(y.dtype)
    return torch.addcmul(torch.addcmul(y, g - 1, y - bias), g, added).to(y.dtype)
