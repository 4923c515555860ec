"""Large matrices some rows at a time, so that what is made of them on the way stays in a CPU's cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

LARGE = 1 << 17  # elements, for each thread


def is_large(x: Tensor) -> bool:
    """Whether a tensor is better taken in blocks."""
    return x.numel() > LARGE


def blocks(matrix: Tensor) -> Iterator[slice]:
    """Slices of the rows of a matrix that together are all of them; one, where there is no such cache."""
    rows, width = matrix.shape
    step = rows
    if matrix.device.type == "cpu":
        step = max(1, LARGE * torch.get_num_threads() // max(1, width))
    yield from (slice(start, start + step) for start in range(0, rows, step or 1))
