"""What dropout keeps: 16 random bits decide on each element, and one bit is remembered of it.

    drawn(rows, width)    bits (rows, width / 8): True with probability 1 - p
    opened(bits)          one byte of 0 or 1 per element (rows, width)
    drop_(x, bits)        zeros in x: its bits, taken for whole numbers, times those

All goes by whole numbers, for which torch has vector instructions; of `torch.where` and comparisons that give booleans
it has plain loops, which cost a CPU more than the low-rank products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftlite.tuners.lora.blocks import blocks

_LEVELS = 1 << 16  # an element is kept if its 16 random bits are below the share of these
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
_GATHER = 0x0102040810204080  # times eight bytes of 0 or 1: the highest byte has them as its bits, the first lowest
_SPREAD = 0x0101010101010101  # times a byte: eight times that byte
_SELECT = -0x7FBFDFEFF7FBFDFF  # 0x8040201008040201: of eight bytes, one bit each, the lowest of the first


def drawn(x: Tensor, p: float, seed: int | None = None) -> Tensor:
    """A bit for each element of x (rows, width), 1 with probability 1 - p: (rows, width / 8, rounded up).

    With a seed they are the same each time; without, they come from the device's own generator.
    """
    generator = None if seed is None else torch.Generator(x.device).manual_seed(seed)
    bits = torch.empty(len(x), (x.shape[1] + 7) // 8, dtype=torch.uint8, device=x.device)
    least = min(round(p * _LEVELS), _LEVELS - 1) - _LEVELS // 2
    for rows in blocks(x):
        part = bits[rows]
        random = torch.empty(len(part), 2 * part.shape[1], dtype=torch.int64, device=x.device)
        keep = random.random_(-(2**63), None, generator=generator).view(torch.int16).ge_(least)
        part.copy_(keep.to(torch.uint8).view(torch.int64).mul_(_GATHER) >> 56)
    return bits


def new_seed() -> int:
    """A number from the generator of the CPU, which checkpoints restore, so that no device is waited for."""
    return int(torch.randint(2**62, (), device="cpu"))


def opened(bits: Tensor, width: int) -> Tensor:
    """0 or 1 for each bit, as a byte: (rows, width)."""
    spread = (bits.to(torch.int64) * _SPREAD).bitwise_and_(_SELECT)  # (rows, bytes): eight elements in each
    return spread.view(torch.uint8).to(torch.bool).view(torch.uint8)[:, :width]


def drop_(x: Tensor, bits: Tensor | None) -> Tensor:
    """Zeros, in place, where the bits do not keep x (rows, width); without gradients."""
    if bits is not None:
        x.view(_WHOLE[x.dtype.itemsize]).mul_(opened(bits, x.shape[1]))
    return x


def dropped(x: Tensor, bits: Tensor | None) -> Tensor:
    """The same, and x stays as it is."""
    return x if bits is None else (x.view(_WHOLE[x.dtype.itemsize]) * opened(bits, x.shape[1])).view(x.dtype)


def kept(x: Tensor, bits: Tensor | None) -> Tensor:
    """The same by multiplication, which has gradients."""
    return x if bits is None else x * opened(bits, x.shape[1])
