"""Merging and unmerging: time, error, and memory beyond the kept bytes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import peftlite
from benchmarks.harness import Row, pair
from benchmarks.models import both


class Live(TorchDispatchMode):
    """The largest amount of memory that tensors made inside the block held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            storage = out.untyped_storage()
            if id(storage) not in self.known and not any(
                isinstance(a, torch.Tensor) and a.untyped_storage().data_ptr() == storage.data_ptr() for a in args
            ):
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                torch.utils.weak.weakref.finalize(out, self.freed, storage.nbytes())
        return out

    def freed(self, count: int) -> None:
        self.now -= count


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
