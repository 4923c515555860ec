"""Rows of different adapters in one batch, in decoding and in prefill."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import peft
import torch
from torch import nn

import peftlite
from benchmarks.harness import Row, pair, same
from benchmarks.models import STACK, Stack


def rows(quick: bool) -> Iterator[Row]:
    for dtype, many in ((torch.float32, 1.3), (torch.bfloat16, 1.6)):
        for width, batch, length, adapters, goal in (
            (1024, 64, 1, 8, 1.15),
            (1024, 64, 1, 64, many),
            (512, 256, 1, 256, 2.3),
            (1024, 16, 64, 8, 1.1),
        ):
            yield mixed(dtype, 64 if quick else width, batch, length, 4 if quick else adapters, goal)


@torch.no_grad()
def mixed(dtype: torch.dtype, width: int, batch: int, length: int, adapters: int, goal: float) -> Row:
    torch.manual_seed(0)
    base = Stack(width).to(dtype).requires_grad_(False)
    names = [f"n{k}" for k in range(adapters)]
    fields = {"r": 16, "target_modules": STACK}
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), peft.LoraConfig(**fields), names[0])
    ours = peftlite.get_peft_model(peftlite.overlay(nn.Sequential(base)), peftlite.LoraConfig(**fields), names[0])
    for name in names[1:]:
        theirs.add_adapter(name, peft.LoraConfig(**fields))
        ours.add_adapter(name, peftlite.LoraConfig(**fields))
    values = {k: torch.randn_like(v) * 0.05 if "lora_" in k else v for k, v in theirs.state_dict().items()}
    theirs.load_state_dict(values)
    ours.load_state_dict(values)
    theirs.eval(), ours.eval()
    x = torch.randn(batch, length, width).to(dtype)
    order = [names[k % adapters] for k in range(batch)]
    same(theirs(x, adapter_names=order), ours(x, adapter_names=order), 0.1 if dtype is torch.bfloat16 else 1e-3)
    found = pair(
        {
            "floor": lambda: ours(x),
            "peft": lambda: theirs(x, adapter_names=order),
            "ours": lambda: ours(x, adapter_names=order),
        },
        rounds=7,
    )
    ms = {name: spread.median * 1e3 for name, spread in found.items()}
    kind = "decode" if length == 1 else f"prefill x {length}"
    title = f"mixed {kind}, width {width}, batch {batch}, {adapters} adapters, {str(dtype).removeprefix('torch.')}"
    return Row(title, "ms", ms["ours"], ms["peft"], ms["floor"], goal=goal, goal_is_to_floor=True)
