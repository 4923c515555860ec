"""Random first values of adapters, uniform ones: as torch's generator decides, drawn faster where there are many."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peftlite.core.variant import Placement
from peftlite.registry import later

if TYPE_CHECKING:
    from peftlite.tuners import sfc64
else:
    sfc64 = later("peftlite.tuners.sfc64")

_MANY = 1 << 14  # below, beginning a stream takes longer than drawing


def uniform(shape: tuple[int, ...], bound: float, at: Placement) -> Tensor:
    """U(-bound, bound), where the adapter goes."""
    made = torch.empty(shape, dtype=at.dtype, device=at.device)
    if made.is_meta:  # torch takes its time to draw nothing
        return made
    usual = type(made) is Tensor and made.device.type == "cpu" and made.dtype is torch.float32
    return sfc64.uniform_(made, bound) if usual and made.numel() >= _MANY else made.uniform_(-bound, bound)
