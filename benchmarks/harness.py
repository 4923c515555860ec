"""Measuring implementations side by side: paired, alternating, medians with quartiles; nothing is judged here.

checked = same(...)                              raises unless both implementations give the same
found = pair(checked, {"floor": f, "peft": g, "peftlite": h})
Row("measure", "ms", found, (Goal(0.9),))
"""

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
IMPLEMENTATIONS = ("peft", "peftlite")
UNITS = {"": 1.0, "s": 1.0, "ms": 1e3, "us": 1e6, "MiB": 1 / 2**20, "KiB": 1 / 2**10}


class Settings:
    """What `--quick` and `--impl` ask for."""

    quick = False  # one round of everything, to find out whether it runs
    timed: tuple[str, ...] = IMPLEMENTATIONS


@dataclass(frozen=True)
class Spread:
    """A median and its quartiles; of times, by the thread's CPU clock, with the median by the wall clock beside."""

    median: float
    low: float
    high: float
    wall: float | None = None

    @classmethod
    def of(cls, values: list[float], wall: list[float] | None = None) -> Spread:
        by_wall = statistics.median(wall) if wall else None
        if len(values) < 2:
            return cls(values[0], values[0], values[0], by_wall)
        low, median, high = statistics.quantiles(values, n=4)
        return cls(median, low, high, by_wall)

    def minus(self, other: Spread) -> Spread:
        """This one without another's medians."""
        wall = None if self.wall is None or other.wall is None else self.wall - other.wall
        return Spread(self.median - other.median, self.low - other.median, self.high - other.median, wall)


@dataclass(frozen=True)
class Goal:
    """What peftlite's median is at most, in units of PEFT's (`against="peft"`), of the floor, or as it is ("")."""

    most: float
    against: str = "peft"

    def __str__(self) -> str:
        return f"<= {self.most:g}" + {"peft": "", "floor": " x floor", "": " itself"}[self.against]

    def met(self, found: Mapping[str, Spread]) -> bool | None:
        """None where it was not measured."""
        if "peftlite" not in found or (self.against and self.against not in found):
            return None
        unit = found[self.against].median if self.against else 1.0
        return found["peftlite"].median <= self.most * unit


@dataclass(frozen=True)
class Row:
    """One line of a table. `found` is in seconds or bytes, by "peft", "peftlite", "floor", "by hand", "merged"."""

    measure: str
    unit: str
    found: Mapping[str, Spread]
    goals: tuple[Goal, ...] = ()
    checked: Checked | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """peftlite's median to PEFT's, by the CPU clock."""
        return self._ratio(lambda spread: spread.median)

    @property
    def wall_ratio(self) -> float | None:
        """The same by the wall clock."""
        return self._ratio(lambda spread: spread.wall)

    @property
    def met(self) -> bool | None:
        """Whether all goals are; None where there is none, or one was not measured."""
        met = [goal.met(self.found) for goal in self.goals]
        return None if not met or None in met else all(met)

    def _ratio(self, of: Callable[[Spread], float | None]) -> float | None:
        if not {"peft", "peftlite"} <= set(self.found):
            return None
        ours, theirs = of(self.found["peftlite"]), of(self.found["peft"])
        return ours / theirs if theirs and ours is not None else None


@dataclass(frozen=True)
class Curve:
    """How something grows: for each implementation, a spread at each place of the axis."""

    measure: str
    axis: str
    unit: str
    found: Mapping[str, Mapping[int, Spread]]


@dataclass(frozen=True)
class Checked:
    """Both implementations gave the same; their relative errors against float64, where those were taken.

    `outputs` and `gradients` are by implementation.
    """

    outputs: Mapping[str, float] = field(default_factory=dict)
    gradients: Mapping[str, float] = field(default_factory=dict)


def same(one: Tensor, other: Tensor, tolerance: float, truth: Tensor | None = None) -> Checked:
    """Both implementations must give the same before anything is timed: PEFT's output and ours.

    `tolerance` is in units of the largest number. Raises: AssertionError.
    """
    size = max(1.0, one.detach().double().abs().max().item())
    off = (other.detach().double() - one.detach().double()).abs().max().item()
    agree(one.shape == other.shape and off <= tolerance * size, f"outputs differ by {off:.2e}")
    if truth is None:
        return Checked()
    return Checked({"peft": error(one, truth), "peftlite": error(other, truth)})


def equal(one: object, other: object) -> Checked:
    """The same for what is no tensor, such as names and shapes. Raises: AssertionError."""
    agree(one == other, f"{str(one)[:1000]} is not {str(other)[:1000]}")
    return Checked()


def agree(agreed: bool, why: str) -> None:
    """Stop where the two implementations do not do the same: a time would mean nothing."""
    if not agreed:
        raise AssertionError(f"PEFT and peftlite do not do the same: {why}")


def error(found: Tensor, truth: Tensor) -> float:
    """The norm of the difference, relative to the norm of what is true."""
    return ((found.detach().double() - truth.detach()).norm() / truth.detach().norm()).item()


def pair(
    checked: Checked,
    actions: Mapping[str, Action],
    rounds: int = 11,
    repeat: int = 1,
    before: Mapping[str, Action] | None = None,
) -> dict[str, Spread]:
    """Seconds that each action takes, run in turn A B A B ...; `before` is run first each time, not counted.

    Without garbage collection meanwhile, as `timeit` has it: one that falls into an action would be most of its time.
    It asks for what `same` returns, so that nothing is timed that was not compared.
    """
    assert isinstance(checked, Checked)
    chosen = {n: action for n, action in actions.items() if n in Settings.timed or n not in IMPLEMENTATIONS}
    if Settings.quick:
        return _alternate(chosen, before or {}, 1, 1)
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        return _alternate(chosen, before or {}, rounds, repeat)
    finally:
        gc.enable()
        gc.unfreeze()


def _alternate(
    actions: Mapping[str, Action], before: Mapping[str, Action], rounds: int, repeat: int
) -> dict[str, Spread]:
    cpu: dict[str, list[float]] = {name: [] for name in actions}
    wall: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(rounds + 1):
        for name, action in actions.items():
            if name in before:
                before[name]()
            if not Settings.quick:
                gc.collect()
            start, start_wall = time.thread_time(), time.perf_counter()
            for _ in range(repeat):
                action()
            if turn:  # the first round warms up
                cpu[name].append((time.thread_time() - start) / repeat)
                wall[name].append((time.perf_counter() - start_wall) / repeat)
    return {name: Spread.of(cpu[name], wall[name]) for name in actions}


def amounts(found: Mapping[str, float]) -> dict[str, Spread]:
    """What was measured once, since it is the same each time: bytes, counts."""
    return {name: Spread.of([value]) for name, value in found.items()}


@contextmanager
def saved_bytes(model: torch.nn.Module) -> Iterator[Callable[[], int]]:
    """Bytes of distinct storages kept for backward by what runs inside the block, other than the model's own."""
    kept: dict[int, int] = {}
    own = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(kept.values())
