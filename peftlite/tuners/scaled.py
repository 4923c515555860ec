"""Large activations in half precision times a vector in fp32, some rows at a time: wide copies stay in the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftlite.tuners.lora.blocks import is_large, wide_blocks


class Scaled(torch.autograd.Function):
    """y * l in l's dtype, rounded to y's: y (..., n), l (n,)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(y, scale)
        return times(y, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        y, scale = ctx.saved_tensors
        need_y, need_scale = ctx.needs_input_grad
        if torch.is_grad_enabled():
            wide = grad.to(scale.dtype)
            gs = (wide * y).reshape(-1, len(scale)).sum(0) if need_scale else None
            return (wide * scale).to(y.dtype) if need_y else None, gs
        gs = torch.zeros_like(scale) if need_scale else None
        if gs is not None:
            g, flat = grad.reshape(-1, len(scale)), y.reshape(-1, len(scale))
            for rows, wide in wide_blocks(g, scale.dtype):
                gs += wide.mul_(flat[rows]).sum(0)
        return times(grad, scale).to(y.dtype) if need_y else None, gs


def times(y: Tensor, scale: Tensor) -> Tensor:
    """The product, without gradients."""
    flat, result = y.reshape(-1, len(scale)), torch.empty_like(y, memory_format=torch.contiguous_format)
    into = result.view(-1, len(scale))
    for rows, wide in wide_blocks(flat, scale.dtype):
        into[rows].copy_(wide.mul_(scale))
    return result


def by_columns(y: Tensor, scale: Tensor) -> Tensor:
    """The product as `Scaled` makes it; by torch's own operations where these are wanted or as fast."""
    if (
        y.dtype.itemsize >= scale.dtype.itemsize
        or scale.dim() > 1
        or len(scale) != y.shape[-1]
        or torch.compiler.is_compiling()
        or type(y) is not Tensor
        or type(scale) is not Tensor
        or not is_large(y)
        or torch._C._is_any_autocast_enabled()
        or torch._C._are_functorch_transforms_active()
    ):
        return (y * scale).to(y.dtype)
    return Scaled.apply(y, scale)  # type: ignore[no-any-return, no-untyped-call]
