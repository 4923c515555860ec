"""Rows of different adapters in one batch, in decoding and in prefill. The floor is one adapter for all rows."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import peft
import torch
from torch import Tensor, nn

import peftlite
from benchmarks.calls import name_of, options
from benchmarks.harness import Checked, Goal, Row, error, pair, same
from benchmarks.models import STACK, Stack, given_numbers


def rows(quick: bool) -> Iterator[Row]:
    for dtype, many in ((torch.float32, 1.3), (torch.bfloat16, 1.6)):
        for width, batch, length, adapters, goal in (
            (1024, 64, 1, 8, 1.15),
            (1024, 64, 1, 64, many),
            (512, 256, 1, 256, 2.3),
            (1024, 16, 64, 8, 1.1),
        ):
            yield mixed(dtype, 64 if quick else width, batch, length, 4 if quick else adapters, Goal(goal, "floor"))
        if quick:
            return


@torch.no_grad()
def mixed(dtype: torch.dtype, width: int, batch: int, length: int, adapters: int, goal: Goal) -> Row:
    base = Stack(width).to(dtype).requires_grad_(False)
    names = [f"n{k}" for k in range(adapters)]
    fields: dict[str, Any] = {"r": 16, "target_modules": STACK}
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), peft.LoraConfig(**fields), names[0])
    ours = peftlite.get_peft_model(peftlite.overlay(nn.Sequential(base)), peftlite.LoraConfig(**fields), names[0])
    for name in names[1:]:
        theirs.add_adapter(name, peft.LoraConfig(**fields))
        ours.add_adapter(name, peftlite.LoraConfig(**fields))
    theirs.load_state_dict(given_numbers(theirs))
    ours.load_state_dict(theirs.state_dict())
    theirs.eval(), ours.eval()
    x = torch.randn(batch, length, width).to(dtype)
    order = [names[k % adapters] for k in range(batch)]
    tolerance = 0.1 if dtype is torch.bfloat16 else 1e-3
    truth = in_float64(theirs, x, order)
    checked = same(theirs(x, adapter_names=order), ours(x, adapter_names=order), tolerance, truth)
    more = {name: (lambda m=model: m(x, adapter_names=order)) for name, model in options(ours, dtype).items()}  # type: ignore[misc]
    checked = Checked({**checked.outputs, **{name: error(call(), truth) for name, call in more.items()}})
    found = pair(
        checked,
        {
            "floor": lambda: ours(x),
            "peft": lambda: theirs(x, adapter_names=order),
            "peftlite": lambda: ours(x, adapter_names=order),
            **more,
        },
        rounds=7,
    )
    kind = "decode" if length == 1 else f"prefill x {length}"
    title = f"mixed {kind}, width {width}, batch {batch}, {adapters} adapters, {name_of(dtype)}"
    return Row(title, "ms", found, (goal,), checked)


def in_float64(theirs: Any, x: Tensor, order: list[str]) -> Tensor:
    """Row by row through the layers: y = W x + s B A x."""
    x = x.double()
    for layer in theirs.base_model.model[0].layers:
        y = x @ layer.base_layer.weight.double().T
        for name in set(order):
            rows = [k for k, chosen in enumerate(order) if chosen == name]
            A, B = (part[name].weight.double() for part in (layer.lora_A, layer.lora_B))
            y[rows] += layer.scaling[name] * (x[rows] @ A.T @ B.T)
        x = y
    return x
