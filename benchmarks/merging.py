"""Merging and unmerging: time, error, and memory beyond the kept bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import peftlite
from benchmarks.harness import Action, Goal, Row, amounts, pair, same
from benchmarks.live import Live
from benchmarks.models import both


def rows(quick: bool) -> Iterator[Row]:
    out, into = (64, 128) if quick else (2048, 8192)
    theirs, ours = both(nn.Sequential(nn.Linear(into, out, bias=False)).to(torch.bfloat16), target_modules=["0"], r=16)
    before = weight(ours).clone()
    cycles: dict[str, tuple[Action, Action]] = {
        "peft": (theirs[0].merge, theirs[0].unmerge),
        "peftlite": (lambda: peftlite.merge_adapter(ours), lambda: peftlite.unmerge_adapter(ours)),
    }
    with torch.no_grad():
        A, B = (part["default"].weight.double() for part in (theirs[0].lora_A, theirs[0].lora_B))
        truth = before.double() + theirs[0].scaling["default"] * B @ A
    for merge, _ in cycles.values():
        merge()
    checked = same(weight(theirs), weight(ours), 1e-2, truth)
    most = {}
    for name, (merge, unmerge) in cycles.items():
        unmerge()
        with Live() as live:
            merge()
            unmerge()
        most[name] = live.most / before.nbytes
    most["peftlite"] -= 1  # the kept bytes
    title = f"{out} x {into} bfloat16"
    found = pair(checked, {name: both_ways(*cycle) for name, cycle in cycles.items()}, rounds=7)
    assert torch.equal(weight(ours), before)
    changed = (weight(theirs) != before).double().mean().item()
    note = f"PEFT then has {changed:.1%} of the weights changed, peftlite none"
    yield Row(f"merge + unmerge, {title}", "ms", found, (Goal(0.2),), checked, note)
    note = "in units of the weight; beside the base's own bytes, which peftlite keeps"
    yield Row(f"memory of merge + unmerge, {title}", "", amounts(most), (Goal(0.1, ""),), checked, note)


def weight(model: Any) -> torch.Tensor:
    found: torch.Tensor = model[0].base_layer.weight
    return found.detach()


def both_ways(merge: Action, unmerge: Action) -> Action:
    return lambda: (merge(), unmerge())
