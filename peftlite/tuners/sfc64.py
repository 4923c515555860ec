"""Random numbers by numpy's SFC64, in half the time of torch's own generator, which gives the seed of each stream."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.random import SFC64
from numpy.random.bit_generator import ISeedSequence
from torch import Tensor

_BLOCK = 1 << 16  # numbers that are in the cache from the draw until they are scaled
_WORDS = 1 << 13  # numbers of 64 bits that stay in the cache while bits are made of them


class _Drawn(ISeedSequence):
    """Seeds from one of torch's generators, by default its own one, as they are."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> Any:
        seeds = torch.empty(n_words, dtype=torch.int64, device="cpu").random_(generator=self.generator)
        return seeds.numpy().view(dtype)[:n_words]


def uniform_(tensor: Tensor, bound: float) -> Tensor:
    """U(-bound, bound) into a contiguous fp32 tensor on the CPU: whole numbers of 32 bits, scaled."""
    stream = SFC64(_Drawn())  # type: ignore[arg-type]
    flat = tensor.view(-1)
    for begin in range(0, len(flat), _BLOCK):
        part = flat[begin : begin + _BLOCK]
        pairs = stream.random_raw((len(part) + 1) // 2)  # of 64 bits each
        part.copy_(torch.from_numpy(pairs).view(torch.int32)[: len(part)]).mul_(bound * 2.0**-31)
    return tensor


def bits_(tensor: Tensor, share: int, generator: torch.Generator | None) -> Tensor:
    """Bits that are 1 with probability share / 2^16 into a contiguous int64 tensor on the CPU; share: 1 to 2^16.

    A bit that is 1 with probability q becomes one of (1 + q) / 2 if a fair one is or-ed, and of q / 2 with an and: so
    the digits of the share, from the lowest that is not zero, take a fair bit each, and 64 are made at a time.
    """
    if share == 1 << 16:
        return tensor.fill_(-1)
    digits = f"{share:016b}".rstrip("0")
    stream, numbers = SFC64(_Drawn(generator)), tensor.numpy().view(np.uint64)  # type: ignore[arg-type]
    for begin in range(0, len(numbers), _WORDS):
        part = numbers[begin : begin + _WORDS]
        part[:] = stream.random_raw(len(part))
        for digit in digits[-2::-1]:
            combine = np.bitwise_or if digit == "1" else np.bitwise_and
            combine(part, stream.random_raw(len(part)), out=part)
    return tensor
