"""What an adapter adds to a call without gradients: on one small layer, and at real sizes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.harness import Checked, Goal, Row, error, pair, same
from benchmarks.models import STACK, Stack, both, by_hand, in_float64, merged, running

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
NO_WORSE = Goal(1.05)  # differences under 5 % are noise


def rows(quick: bool) -> Iterator[Row]:
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((4, 64), (1, 4, 64)):
            yield small(dtype, shape, 10 if quick else 1000)
    h, large = (64, 64) if quick else (1024, 2048)
    yield real("prefill", torch.bfloat16, h, (4, 128), (Goal(1.04, "floor"),))
    yield real("prefill", torch.float32, h, (4, 128), (NO_WORSE,))
    for dtype in (torch.float32, torch.bfloat16):
        yield real("decode", dtype, large, (1, 1), (NO_WORSE,))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compare(theirs: nn.Module, ours: nn.Module, dtype: torch.dtype, x: torch.Tensor) -> Checked:
    truth = in_float64(by_hand(theirs))(x.double())
    checked = same(theirs(x), ours(x), TOLERANCE[dtype], truth)
    more = {name: error(model(x), truth) for name, model in options(ours, dtype).items()}
    return Checked({**checked.outputs, **more})


def options(ours: nn.Module, dtype: torch.dtype) -> dict[str, nn.Module]:
    """What has a column of its own beside the defaults."""
    return {"base dtype": running(ours, compute_dtype="base")} if dtype is torch.bfloat16 else {}


@torch.no_grad()
def small(dtype: torch.dtype, shape: tuple[int, ...], repeat: int) -> Row:
    theirs, ours = both(nn.Sequential(nn.Linear(64, 64)).to(dtype), target_modules=["0"], r=16)
    x = torch.randn(shape).to(dtype)
    checked = compare(theirs, ours, dtype, x)
    layers = {"floor": theirs[0].base_layer, "peft": theirs[0], "peftlite": ours[0]}  # not indexed while it is timed
    layers |= {name: model[0] for name, model in options(ours, dtype).items()}  # type: ignore[index]
    actions = {name: (lambda m=layer: m(x)) for name, layer in layers.items()}  # type: ignore[misc]
    found = pair(checked, actions, repeat=repeat)
    title = f"one layer, 64 x 64, {name_of(dtype)} {list(shape)}"
    if dtype is torch.bfloat16:
        return Row(f"{title}, whole call", "us", found, (Goal(0.6),), checked)
    floor = found.pop("floor")
    added = {name: spread.minus(floor) for name, spread in found.items()}
    return Row(f"{title}, added to nn.Linear", "us", added, (Goal(0.2),), checked)


@torch.no_grad()
def real(kind: str, dtype: torch.dtype, h: int, size: tuple[int, int], goals: tuple[Goal, ...]) -> Row:
    base = Stack(h).to(dtype)
    theirs, ours = both(base, target_modules=STACK, r=16)
    x = torch.randn(*size, h).to(dtype)
    checked = compare(theirs, ours, dtype, x[:1, :32])
    models = {"floor": base, "peft": theirs, "peftlite": ours, "by hand": by_hand(theirs), "merged": merged(ours)}
    models |= options(ours, dtype)
    rounds = 21 if kind == "decode" else 9
    found = pair(checked, {name: (lambda m=model: m(x)) for name, model in models.items()}, rounds)  # type: ignore[misc]
    return Row(f"{kind} {size[0]} x {size[1]}, {name_of(dtype)}, width {h}", "ms", found, goals, checked)
