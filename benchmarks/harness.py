"""Measuring two implementations side by side: paired, alternating, medians; nothing is judged here."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

Action = Callable[[], object]
QUICK = False  # set by `--quick`: one round of everything, to find out whether it runs


@dataclass(frozen=True)
class Spread:
    """A median and its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4)
        return cls(median, low, high)


@dataclass
class Row:
    """One line of the table. `goal` is for `ratio` (ours to PEFT's), or, with `floor`, for ours to the floor."""

    measure: str
    unit: str
    ours: float
    peft: float | None = None
    floor: float | None = None
    goal: float | None = None
    goal_is_to_floor: bool = False
    note: str = ""
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        return None if not self.peft else self.ours / self.peft

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        against = self.floor if self.goal_is_to_floor else self.peft
        return None if not against else self.ours / against <= self.goal


def pair(
    actions: Mapping[str, Action], rounds: int = 15, repeat: int = 1, before: Mapping[str, Action] | None = None
) -> dict[str, Spread]:
    """Thread-CPU seconds of each action, run in turn A B A B ...; `before` is run first each time, not counted.

    Without garbage collection meanwhile, as `timeit` has it: one that falls into an action would be most of its time.
    """
    times: dict[str, list[float]] = {name: [] for name in actions}
    if QUICK:
        rounds, repeat = 1, 1
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        _alternate(actions, before or {}, times, rounds, repeat)
    finally:
        gc.enable()
        gc.unfreeze()
    return {name: Spread.of(values) for name, values in times.items()}


def _alternate(
    actions: Mapping[str, Action], before: Mapping[str, Action], times: dict[str, list[float]], rounds: int, repeat: int
) -> None:
    for turn in range(rounds + 1):
        for name, action in actions.items():
            if name in before:
                before[name]()
            gc.collect()
            start = time.thread_time()
            for _ in range(repeat):
                action()
            if turn:  # the first round warms up
                times[name].append((time.thread_time() - start) / repeat)


@contextmanager
def saved_bytes() -> Iterator[Callable[[], int]]:
    """Bytes of distinct storages kept for backward by what runs inside the block."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(kept.values())


def same(one: Tensor, other: Tensor, tolerance: float) -> None:
    """Both implementations must give the same before anything is timed."""
    torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    head = "| measure | PEFT | peftlite | ratio | floor | goal | met |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for row in rows:
        goal = "" if row.goal is None else f"<= {row.goal:g}" + (" x floor" if row.goal_is_to_floor else "")
        met = {None: "", True: "yes", False: "**no**"}[row.met]
        cells = [
            row.measure + (f" ({row.note})" if row.note else ""),
            _show(row.peft, row.unit),
            _show(row.ours, row.unit),
            "" if row.ratio is None else f"{row.ratio:.3g}",
            _show(row.floor, row.unit),
            goal,
            met,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _show(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:.3g} {unit}".strip()
