"""Methods that are not one plain LoRA: DoRA, (IA)^3, rsLoRA and two LoRA adapters at once, called and trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import peft
import torch
from torch import Tensor, nn

import peftlite
from benchmarks.calls import TOLERANCE, name_of
from benchmarks.harness import Checked, Row, agree, pair, same
from benchmarks.models import STACK, Stack, given_numbers
from benchmarks.training import step, without_dropout


def lora(library: Any, targets: Any, dropout: float, **more: Any) -> Any:
    return library.LoraConfig(r=16, target_modules=targets, lora_dropout=dropout, **more)


def ia3(library: Any, targets: Any, dropout: float) -> Any:
    return library.IA3Config(target_modules=targets, feedforward_modules=[])


Make = Callable[[Any, Any, float], Any]
METHODS: dict[str, tuple[Make, int]] = {
    "DoRA": (lambda library, targets, dropout: lora(library, targets, dropout, use_dora=True), 1),
    "(IA)^3": (ia3, 1),
    "rsLoRA": (lambda library, targets, dropout: lora(library, targets, dropout, use_rslora=True), 1),
    "two LoRA adapters": (lora, 2),
}


def rows(quick: bool) -> Iterator[Row]:
    h, large = (64, 64) if quick else (1024, 2048)
    both = (torch.bfloat16, torch.float32)
    for method in METHODS:
        for dtype in both:
            yield small(method, dtype, 10 if quick else 300)
        for dtype in both:
            yield real(method, "prefill", dtype, h, (4, 128))
        yield real(method, "decode", torch.bfloat16, large, (1, 1))
        for dtype, dropout in ((torch.bfloat16, 0.05), (torch.bfloat16, 0.0), (torch.float32, 0.0)):
            if dropout == 0 or METHODS[method][0] is not ia3:
                yield training(method, dtype, dropout, h)


def adapted(base: nn.Module, method: str, targets: Any, dropout: float = 0.0) -> tuple[Any, Any]:
    """(PEFT's, ours), in place and with the same numbers; with two adapters, both active."""
    make, count = METHODS[method]
    base = base.requires_grad_(False)
    theirs, ours = copy.deepcopy(base), copy.deepcopy(base)
    wrapper = peft.get_peft_model(theirs, make(peft, targets, dropout), "0")
    peftlite.inject(ours, make(peftlite, targets, dropout), "0")
    names = [str(index) for index in range(count)]
    for name in names[1:]:
        wrapper.add_adapter(name, make(peft, targets, dropout))
        peftlite.inject(ours, make(peftlite, targets, dropout), name)
    wrapper.base_model.set_adapter(names)
    peftlite.set_adapter(ours, names)
    ours.load_state_dict(theirs.state_dict())  # whose lengths of rows are what both begin with
    ours.load_state_dict(given_numbers(ours) | {k: t for k, t in theirs.state_dict().items() if "magnitude" in k})
    theirs.load_state_dict(ours.state_dict())
    return theirs, ours


@torch.no_grad()
def small(method: str, dtype: torch.dtype, repeat: int) -> Row:
    theirs, ours = adapted(nn.Sequential(nn.Linear(64, 64)).to(dtype), method, ["0"])
    x = torch.randn(1, 4, 64).to(dtype)
    checked = same(theirs(x), ours(x), TOLERANCE[dtype])
    layers = {"floor": theirs[0].base_layer, "peft": theirs[0], "peftlite": ours[0]}  # not indexed while it is timed
    actions = {name: (lambda m=layer: m(x)) for name, layer in layers.items()}  # type: ignore[misc]
    found = pair(checked, actions, repeat=repeat)
    return Row(f"{method}, one layer, 64 x 64, {name_of(dtype)}, whole call", "us", found, checked=checked)


@torch.no_grad()
def real(method: str, kind: str, dtype: torch.dtype, h: int, size: tuple[int, int]) -> Row:
    base = Stack(h).to(dtype)
    theirs, ours = adapted(base, method, STACK)
    x = torch.randn(*size, h).to(dtype)
    checked = same(theirs(x), ours(x), TOLERANCE[dtype])
    models = {"floor": base, "peft": theirs, "peftlite": ours}
    actions = {name: (lambda m=model: m(x)) for name, model in models.items()}  # type: ignore[misc]
    found = pair(checked, actions, 21 if kind == "decode" else 7)
    return Row(f"{method}, {kind} {size[0]} x {size[1]}, {name_of(dtype)}, width {h}", "ms", found, checked=checked)


def training(method: str, dtype: torch.dtype, dropout: float, h: int) -> Row:
    base = Stack(h).to(dtype)
    theirs, ours = adapted(base, method, STACK, dropout)
    x = torch.randn(4, 128, h).to(dtype)
    checked = compare(theirs, ours, x, TOLERANCE[dtype])
    models = {"floor": base, "peft": theirs.train(), "peftlite": ours.train()}
    actions = {name: (lambda m=model: step(m, x)) for name, model in models.items()}  # type: ignore[misc]
    title = f"{method}, training step, {name_of(dtype)}, dropout {dropout:g}, width {h}"
    return Row(title, "ms", pair(checked, actions, 7), checked=checked)


def compare(theirs: nn.Module, ours: nn.Module, x: Tensor, tolerance: float) -> Checked:
    """Outputs and all gradients of both, without dropout."""
    outputs, gradients = [], []
    for model in (theirs, ours):
        start = x.detach().requires_grad_()
        with without_dropout(model):
            outputs.append(model(start))
            outputs[-1].backward(x)
        gradients.append([start.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
        model.zero_grad()
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        assert other is not None
        size = one.double().norm()
        agree((other.double() - one.double()).norm() <= tolerance * size, "gradients differ")
    return same(*outputs, tolerance)
