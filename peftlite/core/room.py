"""Large pages under large tensors: of fresh memory each page costs a fault when it is first written to.

A large page stands for 512 small ones, so that to fill 32 MiB of fresh memory takes 5 ms in place of 15. Systems that
give them only when asked (Linux, with `madvise` in /sys/kernel/mm/transparent_hugepage/enabled) are asked here; a
system that has none to give, or does not know of them, gives what it would have given.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn

LARGE = 4 << 20
"""Bytes from which on it pays to ask."""

_MOST = 8 * LARGE
_HUGE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)
_madvise = ctypes.CDLL(None).madvise if sys.platform == "linux" and _HUGE is not None else None
if _madvise is not None:
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def in_large_pages(tensor: Tensor) -> Tensor:
    """The same tensor, whose memory gets large pages where nothing was written to it yet. No number changes."""
    if _madvise is not None and type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.nbytes >= LARGE:
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        _madvise(start, tensor.data_ptr() + tensor.nbytes - start, _HUGE)  # a wish, which may be refused
    return tensor


def cloned(tensor: Tensor) -> Tensor:
    """`tensor.detach().clone()`, in large pages."""
    tensor = tensor.detach()
    if type(tensor) is not Tensor or tensor.nbytes < LARGE:
        return tensor.clone()
    return in_large_pages(torch.empty_like(tensor)).copy_(tensor)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is one block of memory of this process that may be written into."""
    kind = type(tensor) is Tensor or type(tensor) is nn.Parameter
    return kind and tensor.is_cpu and tensor.is_contiguous() and not tensor.is_inference()


def in_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a plain tensor: the same memory, and written to with it."""
    return tensor.detach().view(-1).view(torch.uint8)


def copied_in_groups(tensors: Iterable[Tensor]) -> list[tuple[list[Tensor], Tensor]]:
    """(the bytes of some of these plain tensors, a copy of them one after the other): a few copies of many tensors.

    The copies are large enough for large pages, and small enough for memory that was in use before.
    """
    groups: list[list[Tensor]] = []
    size = _MOST
    for flat in map(in_bytes, tensors):
        size += len(flat)
        if size > _MOST:
            groups.append([])
            size = len(flat)
        groups[-1].append(flat)
    rooms = [in_large_pages(torch.empty(sum(map(len, group)), dtype=torch.uint8, device="cpu")) for group in groups]
    return [(group, torch.cat(group, out=room)) for group, room in zip(groups, rooms, strict=True)]
