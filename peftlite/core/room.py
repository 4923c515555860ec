"""Large pages under large tensors: of fresh memory each page costs a fault when it is first written to.

A large page stands for 512 small ones, so that to fill 32 MiB of fresh memory takes 5 ms in place of 15. Systems that
give them only when asked (Linux, with `madvise` in /sys/kernel/mm/transparent_hugepage/enabled) are asked here; a
system that has none to give, or does not know of them, gives what it would have given.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor

LARGE = 4 << 20
"""Bytes from which on it pays to ask."""

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
