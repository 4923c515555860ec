"""First values that another generator than torch's draws: as uniform, and decided by torch's seed all the same."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftlite
from peftlite.core.variant import Placement
from peftlite.tuners.draws import uniform

FEW, SOME, MANY = (7, 9), (3, 40001), (5, 1 << 16)  # torch's own generator; one odd count; several blocks


def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return uniform(shape, 0.25, Placement(None, "", torch.device(device), dtype))


def seeded(seed: int, shape: tuple[int, ...], **options: Any) -> Tensor:
    torch.manual_seed(seed)
    return drawn(shape, **options)


@pytest.mark.parametrize("shape", [FEW, SOME, MANY])
def test_the_seed_decides(shape: tuple[int, ...]) -> None:
    one = seeded(3, shape)
    then = drawn(shape)
    assert torch.equal(seeded(3, shape), one)
    assert torch.equal(drawn(shape), then)
    assert not torch.equal(one, then)
    assert not torch.equal(seeded(4, shape), one)
    state = torch.get_rng_state()
    again = drawn(shape)
    torch.set_rng_state(state)
    assert torch.equal(drawn(shape), again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [SOME, MANY])
def test_they_are_uniform(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Moments, and Kolmogorov and Smirnov's distance to the line: within what one in a million exceeds."""
    x = seeded(1, shape, dtype=dtype).double().flatten() / 0.25
    n, coarse = len(x), torch.finfo(dtype).eps
    assert x.abs().max() <= 1 + coarse
    for power, expected in ((1, 0.0), (2, 1 / 3), (3, 0.0), (4, 1 / 5)):
        assert abs((x**power).mean() - expected) < 5 / math.sqrt(n) + coarse
    line = torch.arange(1, n + 1, dtype=torch.float64) / n
    assert ((x.sort().values + 1) / 2 - line).abs().max() < 2.7 / math.sqrt(n) + coarse


def test_one_number_says_nothing_of_another() -> None:
    x = seeded(2, MANY).double().flatten() / 0.25
    other = drawn(MANY).double().flatten() / 0.25
    bound = 5 / 3 / math.sqrt(len(x) - 70000)
    pairs = [(x, other)] + [(x[lag:], x[:-lag]) for lag in (1, 2, 3, 4, 1 << 15, 1 << 16, 70000)]
    for a, b in pairs:
        assert abs((a * b).mean()) < bound
        assert abs(((a**2 - 1 / 3) * (b**2 - 1 / 3)).mean()) < bound


def test_they_have_all_digits_of_fp32() -> None:
    x = seeded(5, MANY).flatten()
    n = len(x)
    repeated = n - len(x.unique())
    assert repeated < n**2 / 2**24  # of 24 bits and a sign, n^2 / 2^26 are expected
    halves = x.frexp().mantissa.abs() * 2**24
    assert torch.equal(halves, halves.round())
    for bit in range(8):
        share = (halves.to(torch.int64) >> bit & 1).double().mean()
        assert abs(share - 0.5) < 0.1, bit


def test_threads_draw_numbers_of_their_own() -> None:
    torch.manual_seed(1)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: drawn(SOME), range(32)))
    assert len({float(x.double().sum()) for x in found}) == 32
    assert all(len(x.unique()) > 0.99 * x.numel() for x in found)


def test_nothing_is_drawn_without_memory() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert drawn(MANY, device="meta").is_meta
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("start", [True, False, "gaussian"])
def test_adapters_begin_as_the_seed_says_in_both_shapes(start: bool | str) -> None:
    config = peftlite.LoraConfig(r=16, target_modules=["0"], init_lora_weights=start)
    base = nn.Sequential(nn.Linear(2048, 2048))
    found = []
    for add in (peftlite.inject, peftlite.get_peft_model, peftlite.inject):
        torch.manual_seed(7 + len(found) // 2)
        model = nn.Sequential(nn.Linear(2048, 2048))
        model.load_state_dict(base.state_dict())
        torch.manual_seed(7 + len(found) // 2)
        add(model, config)
        found.append([model[0].lora_A["default"].weight, model[0].lora_B["default"].weight])
    assert all(map(torch.equal, found[0], found[1]))
    assert not torch.equal(found[0][0], found[2][0])
    A, B = found[0]
    if start == "gaussian":
        assert abs(A.std() * 16 - 1) < 0.02
    else:
        assert 0.999 / math.sqrt(2048) < A.abs().max() <= 1.000001 / math.sqrt(2048)
    assert bool(B.any()) is (start is False)
