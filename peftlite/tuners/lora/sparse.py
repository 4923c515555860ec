"""Combining updates of a weight entry by entry: magnitude pruning, DARE, TIES.

All of them are about the entries of the updates themselves, so they are given those: one tensor per adapter, of equal
shapes. What LoRA's factors hold in the same place of two adapters has nothing to do with each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pruned(delta: Tensor, density: float) -> Tensor:
    """The largest entries, this share of them; zeros for the rest."""
    keep = int(density * delta.numel())
    flat = delta.flatten()
    where = flat.abs().topk(keep).indices
    return torch.zeros_like(flat).index_copy_(0, where, flat[where]).view_as(delta)


def dropped(delta: Tensor, density: float, generator: torch.Generator | None) -> Tensor:
    """DARE (https://arxiv.org/abs/2311.03099): random entries, this share of them on average, divided by it.

    Drawn on the CPU, so that a seed means the same on every device.
    """
    keep = torch.rand(delta.shape, generator=generator) < density
    return torch.where(keep.to(delta.device), delta / density, 0.0)


def weighted_sum(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The sum of weight times update."""
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total.add_(delta, alpha=weight)
    return total


def agreeing_mean(deltas: Sequence[Tensor], weights: Sequence[float], method: str) -> Tensor:
    """TIES (https://arxiv.org/abs/2306.01708): each entry's mean of weight * update over those of the majority sign.

    The majority is that of the sums of entries ("total") or of their signs ("frequency"), without the weights' sizes,
    and with their signs: an adapter with a negative weight votes, and counts, for the opposite.
    """
    votes, total = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        votes.add_(delta if method == "total" else delta.sign(), alpha=-1.0 if weight < 0 else 1.0)
    majority = torch.where(votes >= 0, 1.0, -1.0).to(votes.dtype)
    count = torch.zeros_like(total)
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = delta.sign() * (-1.0 if weight < 0 else 1.0) == majority
        total.add_(torch.where(agrees, delta, 0.0), alpha=weight)
        count.add_(agrees)
    return total / count.clamp_min(1)
