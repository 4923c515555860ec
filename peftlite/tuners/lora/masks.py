"""What dropout keeps: each element with its probability to 16 binary digits, and one bit is remembered of it.

    drawn(x, p)             bits (elements / 16): 1 with probability 1 - p
    kept_of(x, bits)        blocks of x, and 0 or 1 for each element
    dropped(x, ones, out)   zeros in x: its bits, taken for whole numbers, times those
    put_(x, new, ones)      new values in x, where it is kept

The elements of a tensor are 16 planes, one after the other, and a number of 16 bits has one bit of each plane: so to
open them takes few instructions for many numbers. All goes by whole numbers, for which torch has vector instructions;
of `torch.where` and comparisons that give booleans it has plain loops, which cost a CPU more than low-rank products.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peftlite.registry import later
from peftlite.tuners.lora.blocks import begin, blocks, room

if TYPE_CHECKING:
    from peftlite.tuners import sfc64
else:
    sfc64 = later("peftlite.tuners.sfc64")

_PLANES = 16
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def drawn(x: Tensor, p: float, seed: int | None = None) -> Tensor:
    """A bit for each element of x, 1 with probability 1 - p: (elements / 16, rounded up) numbers of 16 bits.

    With a seed they are the same each time; without, they come from torch's generator for the device.
    """
    generator = None if seed is None else torch.Generator(x.device).manual_seed(seed)
    count, kept = -(-x.numel() // _PLANES), max(1, 2**16 - round(p * 2**16))
    wide = torch.empty(-(-count // 4), dtype=torch.int64, device=x.device)
    if type(wide) is Tensor and wide.is_cpu:
        sfc64.bits_(wide, kept, generator)
        return wide.view(torch.int16) if count % 4 == 0 else wide.view(torch.int16)[:count]
    random = wide.new_empty(_PLANES * len(wide)).random_(-(2**63), None, generator=generator)
    keep = random.view(torch.int16).ge_(2**15 - kept).view(_PLANES, -1)
    return keep.mul_(_places(x.device)).sum(0, dtype=torch.int16)[:count]


def new_seed() -> int:
    """A number from the generator of the CPU, which checkpoints restore, so that no device is waited for."""
    return int(torch.randint(2**62, (), device="cpu"))


def opened(bits: Tensor, ones: Tensor, start: int = 0) -> Tensor:
    """Fills `ones`, of 16 bits each, with 0 or 1 for as many elements; `start` elements come before them."""
    flat, size, done = ones.view(-1), len(bits), 0
    while done < len(flat):
        plane, at = divmod(start + done, size)
        left = len(flat) - done
        if at or left < size:  # some of a plane
            count = min(size - at, left)
            part, numbers = flat[done : done + count].view(1, -1), bits[at : at + count]
        else:
            count = left // size * size
            part, numbers = flat if count == len(flat) else flat[done : done + count], bits
            part = part.view(-1, size)
        places = _places(bits.device)
        if len(part) < _PLANES:
            places = places[plane : plane + len(part)]
        torch.bitwise_and(numbers, places, out=part).eq_(places)
        done += count
    return ones


@functools.cache
def _places(device: torch.device) -> Tensor:
    """Which bit of a number each plane has: (planes, 1)."""
    return torch.tensor([1 << plane for plane in range(15)] + [-(1 << 15)], dtype=torch.int16, device=device)[:, None]


def kept_of(x: Tensor, bits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The blocks of x (rows, width), with 0 or 1 for each element, in numbers as wide as those of x."""
    whole = _WHOLE[x.dtype.itemsize]
    ones = room(x, torch.int16)
    wide = ones if whole is torch.int16 else room(x, whole)
    for rows in blocks(x):
        count = rows.stop - rows.start
        part = opened(bits, begin(ones, count), rows.start * x.shape[1])
        yield rows, part if wide is ones else begin(wide, count).copy_(part)


def dropped(x: Tensor, ones: Tensor, out: Tensor) -> Tensor:
    """Zeros in place of what is not kept of x: as `out`, of the same dtype."""
    torch.mul(ones, x.view(ones.dtype), out=out.view(ones.dtype))
    return out


def put_(x: Tensor, new: Tensor, ones: Tensor) -> None:
    """The new values in x where it is kept; they are lost."""
    old = x.view(ones.dtype)
    old.bitwise_xor_(new.view(ones.dtype).bitwise_xor_(old).mul_(ones))


def kept(x: Tensor, bits: Tensor | None) -> Tensor:
    """Zeros in place of what is not kept of x, by multiplication, which has gradients."""
    return x if bits is None else x * opened(bits, torch.empty(x.shape, dtype=torch.int16, device=x.device))
