"""Memory that wide copies of few rows are written into, and that a thread keeps for the next layer and call.

New memory of this size costs as much as the copies: it is fetched from the system, and cleared, again each time.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from peftlite.core.rows import split

MOST = 1 << 23  # bytes of a room that is kept
_FREE = 2  # rooms that a thread keeps: for an input and for an output
_SHAPES = 4  # for which a room keeps its views


class Room:
    """A piece of a CPU's memory; its views are made once for each shape."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self.size = size
        self.dtype = dtype
        with torch.inference_mode(False):  # it is also written to where that mode is off
            self.memory = torch.empty(size, dtype=dtype, device="cpu")
        self.shaped: dict[tuple[tuple[int, ...], int], tuple[Tensor, tuple[Tensor, ...]]] = {}

    def views(self, sizes: tuple[int, ...], width: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(a matrix (rows, width), its parts of so many rows)."""
        found = self.shaped.get((sizes, width))
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                matrix = self.memory[: sum(sizes) * width].view(-1, width)
                found = matrix, parts(matrix, sizes)
            if len(self.shaped) >= _SHAPES:
                self.shaped.clear()
            self.shaped[sizes, width] = found
        return found


def parts(matrix: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """So many rows each; vectors where each is one, and the dtype is one in which products of vectors are fast."""
    if len(sizes) == matrix.shape[0] and matrix.dtype in (torch.float32, torch.float64):
        return matrix.unbind(0)
    return split(matrix, sizes)


class _Free(threading.local):
    def __init__(self) -> None:
        self.rooms: list[Room] = []


_free = _Free()


def taken(size: int, dtype: torch.dtype) -> Room:
    """A room for so many numbers, whatever they were before, that nobody else has until it is left."""
    room = _free.rooms.pop() if _free.rooms else None
    return room if room is not None and room.size >= size and room.dtype is dtype else Room(size, dtype)


def left(room: Room) -> None:
    """Keep a room for who asks next. One that is not left, since something was raised meanwhile, is let go."""
    if len(_free.rooms) < _FREE and room.memory.nbytes <= MOST and type(room.memory) is Tensor:
        _free.rooms.append(room)
