"""Large matrices some rows at a time, so that what is made of them on the way stays in a CPU's cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

LARGE = 1 << 19  # elements, for each thread
SMALL = 1 << 17  # elements


def is_large(x: Tensor) -> bool:
    """Whether a tensor is better taken in blocks."""
    return x.numel() > LARGE


def is_small(x: Tensor) -> bool:
    """Whether training with an input is faster by torch's own operations than by a Function in Python."""
    return x.numel() < SMALL


def blocks(matrix: Tensor) -> Iterator[slice]:
    """Slices of the rows of a matrix that together are all of them; one, where there is no such cache."""
    step = rows_at_once(matrix)
    yield from (slice(start, start + step) for start in range(0, len(matrix), step))


def widened(matrix: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The blocks of a matrix, each with a copy in another dtype, which is overwritten when the next one is asked for.

    New memory for each would cost as much as the copies: what is freed at the heap's end is cleared again before use.
    """
    room = matrix.new_empty(min(rows_at_once(matrix), len(matrix)), matrix.shape[1], dtype=dtype)
    for rows in blocks(matrix):
        part = matrix[rows]
        yield rows, room[: len(part)].copy_(part)


def rows_at_once(matrix: Tensor) -> int:
    """How many rows of a matrix stay in the cache; all, where there is none."""
    rows, width = matrix.shape
    if matrix.device.type != "cpu":
        return max(1, rows)
    return max(1, LARGE * torch.get_num_threads() // max(1, width))
