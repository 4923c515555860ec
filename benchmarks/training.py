"""Training a Llama block: the time of a step, the bytes kept for backward, the most that is alive at one time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from benchmarks.calls import TOLERANCE, name_of, options
from benchmarks.harness import Checked, Goal, Row, agree, amounts, error, pair, same, saved_bytes
from benchmarks.live import Live
from benchmarks.models import ALL, Block, both, by_hand, in_float64, merged, running

SEEN = 32  # tokens that are compared with float64


def rows(quick: bool) -> Iterator[Row]:
    small, large = (64, 64) if quick else (1024, 2048)
    for dtype, h, dropout, goal, kept in (
        (torch.bfloat16, small, 0.05, 0.90, 0.30),
        (torch.bfloat16, large, 0.05, 0.90, None),
        (torch.bfloat16, small, 0.0, None, 0.25),
        (torch.float32, small, 0.05, 0.95, 0.35),
    ):
        yield from block(dtype, h, dropout, goal, kept)
        if quick:
            return


def block(dtype: torch.dtype, h: int, dropout: float, goal: float | None, kept: float | None) -> Iterator[Row]:
    """A block of width `h` on 4 x 128 tokens, LoRA of rank 16 on all its linear layers."""
    base = Block(h).to(dtype)
    theirs, ours = both(base, target_modules=ALL, r=16, lora_dropout=dropout)
    hand = by_hand(theirs)
    x = torch.randn(4, 128, h).to(dtype)
    more = options(ours, dtype)
    compared = {"peft": theirs, "peftlite": ours, **more, "truth": in_float64(hand)}
    checked = compare(compared, x[:1, :SEEN], TOLERANCE[dtype])
    models = {"floor": base, "peft": theirs, "peftlite": ours, "by hand": hand, "merged": merged(ours), **more}
    for model in models.values():
        model.train()
    title = f"{name_of(dtype)}, dropout {dropout:g}, width {h}"
    actions = {name: (lambda m=model: step(m, x)) for name, model in models.items()}  # type: ignore[misc]
    found = pair(checked, actions, rounds=7)
    yield Row(f"training step, {title}", "ms", found, () if goal is None else (Goal(goal),), checked)
    if kept is None:
        return
    if dropout:
        yield from seeded(title, models, x, checked)
    own = {name: kept_for_backward(model, x) for name, model in models.items() if name != "merged"}
    floor = own.pop("floor")
    own = {name: size - floor for name, size in own.items()}
    yield Row(f"LoRA's own bytes kept for backward, {title}", "MiB", amounts(own), (Goal(kept),), checked)
    if dtype is torch.bfloat16 and dropout:
        most = amounts({name: most_alive(model, x) for name, model in models.items()})
        yield Row(f"most bytes alive in a step, {title}", "MiB", most, (Goal(0.70),), checked)


def seeded(title: str, models: Mapping[str, nn.Module], x: Tensor, checked: Checked) -> Iterator[Row]:
    """The same with `dropout_mask="seed"`, which keeps no mask."""
    ours = running(models["peftlite"], dropout_mask="seed")
    found = {"floor": models["floor"], "peft": models["peft"], "peftlite": ours}
    actions = {name: (lambda m=model: step(m, x)) for name, model in found.items()}  # type: ignore[misc]
    yield Row(f'training step, `dropout_mask="seed"`, {title}', "ms", pair(checked, actions, rounds=7), (), checked)
    own = {name: kept_for_backward(model, x) for name, model in found.items()}
    floor = own.pop("floor")
    sizes = amounts({name: size - floor for name, size in own.items()})
    measure = f'LoRA\'s own bytes kept for backward, `dropout_mask="seed"`, {title}'
    yield Row(measure, "MiB", sizes, (Goal(0.15),) if x.dtype is torch.bfloat16 else (), checked)


def step(model: nn.Module, x: Tensor) -> None:
    """Forward and backward, to the input too, as in the middle of a deep model; the gradient that comes in is `x`."""
    model.zero_grad()
    model(x.detach().requires_grad_()).backward(x)


def compare(models: Mapping[str, nn.Module], x: Tensor, tolerance: float) -> Checked:
    """Outputs and gradients of all; the error of a gradient is the median over the input and all parameters."""
    outputs, gradients = {}, {}
    for name, model in models.items():
        start = (x.double() if name == "truth" else x).detach().requires_grad_()
        with without_dropout(model):
            outputs[name] = model(start)
            outputs[name].backward(start.detach())
        gradients[name] = [start.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
        model.zero_grad()
    same(outputs["peft"], outputs["peftlite"], tolerance, outputs["truth"])
    truths = outputs.pop("truth"), gradients.pop("truth")
    errors = {name: sorted(map(error, found, truths[1])) for name, found in gradients.items()}
    worst = {name: max(found) for name, found in errors.items()}
    agree(worst["peftlite"] <= max(2 * worst["peft"], 1e-5), f"the errors of their gradients are {worst}")
    medians = {name: found[len(found) // 2] for name, found in errors.items()}
    return Checked({name: error(output, truths[0]) for name, output in outputs.items()}, medians)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Inside the block nothing is dropped, though the model trains."""
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    before = [module.p for module in dropouts]
    for module in dropouts:
        module.p = 0.0
    try:
        yield
    finally:
        for module, p in zip(dropouts, before, strict=True):
            module.p = p


def kept_for_backward(model: nn.Module, x: Tensor) -> int:
    start = x.detach().requires_grad_()
    with saved_bytes(model) as count:
        y = model(start)
    del y
    return count()


def most_alive(model: nn.Module, x: Tensor) -> int:
    step(model, x)
    model.zero_grad()
    with Live() as live:
        step(model, x)
    model.zero_grad()
    return live.most
