"""LoftQ (https://arxiv.org/abs/2310.08659): the base weight is rounded to few bits, and the factors make up for it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from peftlite.core.hosts import Host

_GROUP = 64  # weights that share a scale
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The values of NF4 (https://arxiv.org/abs/2305.14314): quantiles of the normal distribution."""


def cannot(host: Host, r: int) -> str | None:
    """Why a layer cannot begin so."""
    if host.dtype.itemsize < 2 or not host.parameter.is_floating_point():
        return "it is quantised already; `replace_lora_weights_loftq` is for such layers"
    return None


def approximate(
    W: Tensor, r: int, scaling: float, loftq_bits: int = 4, loftq_iter: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """(Q, A, B) with Q of few bits and scaling * B A near W - Q.

    In turns, Q is W less the last product, rounded, and scaling * B A the best approximation of W - Q of rank r.
    """
    product = torch.zeros_like(W)
    for _ in range(loftq_iter):
        Q = rounded(W - product, loftq_bits)
        A, B = nearest(W - Q, r, scaling)
        product = scaling * (B @ A)
    return Q, A, B


def nearest(error: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Balanced factors whose scaled product is the best approximation of `error` of rank r."""
    U, S, Vh = torch.linalg.svd(error, full_matrices=False)
    root = (S[:r] / scaling).sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root


def rounded(W: Tensor, bits: int) -> Tensor:
    """W to NF4, or to 255 equal steps, in groups of 64 neighbours with a scale of their own."""
    flat = torch.nn.functional.pad(W.flatten(), (0, -W.numel() % _GROUP)).view(-1, _GROUP)
    scales = flat.abs().amax(1, keepdim=True).clamp_min(torch.finfo(W.dtype).tiny)
    unit = flat / scales
    if bits == 4:
        levels = torch.tensor(NF4, dtype=W.dtype, device=W.device)
        edges = (levels[1:] + levels[:-1]) / 2
        unit = levels[torch.bucketize(unit, edges)]
    else:
        steps = 2 ** (bits - 1) - 1
        unit = (unit * steps).round() / steps
    return (unit * scales).flatten()[: math.prod(W.shape)].view(W.shape)
