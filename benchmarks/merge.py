"""Merging and unmerging: time, error, and memory beyond the kept bytes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

import peftlite
from benchmarks.harness import Row, pair
from benchmarks.live import Live
from benchmarks.models import both


def rows(quick: bool) -> Iterator[Row]:
    out, into = (64, 128) if quick else (2048, 8192)
    base = nn.Sequential(nn.Linear(into, out, bias=False)).to(torch.bfloat16)
    theirs, ours = both(base, target_modules=["0"], r=16)
    before = ours[0].base_layer.weight.clone()  # type: ignore[union-attr]

    def their_cycle() -> None:
        theirs[0].merge()
        theirs[0].unmerge()

    def our_cycle() -> None:
        peftlite.merge_adapter(ours)
        peftlite.unmerge_adapter(ours)

    found = pair({"peft": their_cycle, "ours": our_cycle}, rounds=5)
    assert torch.equal(ours[0].base_layer.weight, before)  # type: ignore[union-attr]
    changed = (theirs[0].base_layer.weight != before).float().mean().item()
    note = f"PEFT then has {changed:.1%} of the weights changed, peftlite none"
    ms = {name: spread.median * 1e3 for name, spread in found.items()}
    yield Row(f"merge + unmerge, {out} x {into} bfloat16", "ms", ms["ours"], ms["peft"], goal=0.2, note=note)
    used = {}
    for name, cycle in (("peft", their_cycle), ("ours", our_cycle)):
        with Live() as live:
            cycle()
        used[name] = live.most / before.nbytes
    used["ours"] -= 1  # the kept bytes
    yield Row("memory of merge + unmerge beside kept bytes, in weights", "", used["ours"], used["peft"], goal=0.1)
