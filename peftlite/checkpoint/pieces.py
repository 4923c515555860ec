"""Many pieces of memory in one call of the system."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import BinaryIO

CHUNK = 16 << 20
"""Bytes that are read or written in one go."""


def pieces_at_once() -> int:
    """How many pieces of memory one call of this system takes; 1024 on most, and by POSIX never less than 16."""
    try:
        return max(16, os.sysconf("SC_IOV_MAX"))  # -1: not known
    except (AttributeError, ValueError, OSError):  # no such function, no such name, no answer
        return 16


PIECES = pieces_at_once()
"""How many pieces one call is given."""


def write_pieces(file: BinaryIO, pieces: Iterable[memoryview]) -> None:
    """Write these at the end of a file, many in each call of the system, which then needs fewer pages to keep them."""
    writev: Callable[[int, Sequence[memoryview]], int] | None = getattr(os, "writev", None)
    if writev is None:  # as on Windows
        for piece in pieces:
            file.write(piece)
        return
    file.flush()
    batch: list[memoryview] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece)
        if size >= CHUNK or len(batch) == PIECES:
            _write_batch(writev, file.fileno(), batch)
            batch, size = [], 0
    _write_batch(writev, file.fileno(), batch)


def _write_batch(writev: Callable[[int, Sequence[memoryview]], int], handle: int, pieces: Sequence[memoryview]) -> None:
    while pieces:
        pieces = _after(pieces, writev(handle, pieces))


def _after(pieces: Sequence[memoryview], count: int) -> Sequence[memoryview]:
    """What is left of these without their first bytes."""
    for at, piece in enumerate(pieces):
        if count < len(piece):
            return [piece[count:], *pieces[at + 1 :]]
        count -= len(piece)
    return []
