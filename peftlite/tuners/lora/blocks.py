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
    step, count = rows_at_once(matrix), len(matrix)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def cut(matrix: Tensor, rows: slice) -> Tensor:
    """Some rows of a matrix; itself where these are all: after a large product, a call that is new finds cold code."""
    return matrix if rows.stop - rows.start == len(matrix) else matrix[rows]


def room(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for the largest block of a matrix in another dtype, to be used again for the next.

    New memory for each would cost as much as the copies: what is freed at the heap's end is cleared again before use.
    """
    return matrix.new_empty(min(rows_at_once(matrix), len(matrix)), matrix.shape[1], dtype=dtype)


def begin(memory: Tensor, count: int) -> Tensor:
    """As much of a room as this many rows need."""
    return memory if count == len(memory) else memory[:count]


def wide_blocks(matrix: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The blocks of a matrix, each with a copy in another dtype, which the next one's will overwrite."""
    wide = room(matrix, dtype)
    for rows in blocks(matrix):
        part = cut(matrix, rows)
        yield rows, begin(wide, len(part)).copy_(part)


def rows_at_once(matrix: Tensor) -> int:
    """How many rows of a matrix stay in the cache; all, where there is none."""
    rows, width = matrix.shape
    if matrix.device.type != "cpu":
        return max(1, rows)
    return max(1, LARGE * torch.get_num_threads() // max(1, width))
