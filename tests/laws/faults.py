"""Making a call fail at any of its steps, and telling whether a model is still the one it was."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import peftlite
from peftlite.core import call as calls
from peftlite.core.tree import find_state, named_layers

ROOT = str(Path(peftlite.__file__).parent)
EVERY_STEP = bool(os.environ.get("PEFTLITE_EVERY_STEP"))
"""Whether calls are made to fail at each of their steps, and not at some of each kind only."""
SAMPLE = 36


class Stop(KeyboardInterrupt):
    """What Ctrl-C raises, at a step of our choice."""


class Steps:
    """Counts the lines of peftlite that are carried out, and raises `Stop` before the one numbered `fail_at`."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.fail_at = fail_at
        self.seen: list[tuple[str, int]] = []

    def in_frame(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "call":
            return self.in_frame if frame.f_code.co_filename.startswith(ROOT) else None
        if event == "line":
            self.seen.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.seen) - 1 == self.fail_at:
                raise Stop(f"{frame.f_code.co_filename}:{frame.f_lineno}, step {self.fail_at}")
        return self.in_frame

    @contextmanager
    def counted(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self.in_frame)
        try:
            yield
        finally:
            sys.settrace(before)


def chosen(steps: list[tuple[str, int]]) -> list[int]:
    """Where to fail: everywhere, or at the last execution of some of the lines, evenly over them and the call."""
    if EVERY_STEP:
        return list(range(len(steps)))
    last = sorted({line: number for number, line in enumerate(steps)}.values())
    return last[:: -(-len(last) // SAMPLE)] + last[-3:]


# ---- what a model is
def bits(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tuple(tensor.shape), tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def portrait(model: nn.Module, run: Callable[[nn.Module], Tensor], identity: bool = True) -> dict[str, Any]:
    """All that a call may change: tree, tensors, flags, hooks, who is active, outputs; not what is derived."""
    found: dict[str, Any] = {"tree": str(model), "call": calls.current(), "gradients": torch.is_grad_enabled()}
    for kind in (model.named_parameters, model.named_buffers):
        for name, tensor in kind(remove_duplicate=False):
            found[f"tensor {name}"] = (bits(tensor), tensor.requires_grad, id(tensor) if identity else 0)
    found["keys"] = list(model.state_dict())
    for name, module in model.named_modules(remove_duplicate=False):
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        extras = len(module._forward_hooks_always_called) + len(module._forward_hooks_with_kwargs)
        found[f"module {name}"] = (id(module) if identity else 0, module.training, hooks, extras)
    for name, layer in named_layers(model):
        own = layer.__dict__
        numbers = {number: {n: str(v) for n, v in own[number].items()} for number in layer.tuner.numbers}
        kept = (own["_own_active"], own["_own_enabled"], list(own["merged_adapters"]), own["merge_error"])
        kinds = {name: type(variant).__name__ for name, variant in layer.variants.items()}
        tied = (list(layer.leaders), {name: len(those) for name, those in layer.followers.items()})
        found[f"layer {name}"] = (numbers, kept, own["_saved"] is None, own["shared_weight"], kinds, tied)
    state = find_state(model)
    if state is not None:
        found["configs"] = {name: (id(c) if identity else 0, c.to_json()) for name, c in state.configs.items()}
        found["state"] = (state.ids, state.active, state.trainable, state.enabled, state.cast_inputs, state._next_id)
        found["shared"] = {slot: (list(c), sorted(c._non_persistent_buffers_set)) for slot, c in state.shared.items()}
        found["memory"] = {name: memory_of(remembered) for name, remembered in state.memory.items()}
    with torch.no_grad():
        found["output"] = bits(run(model))
    return found


def memory_of(remembered: Any) -> Any:
    if isinstance(remembered, Tensor):
        return bits(remembered)
    if isinstance(remembered, dict):
        return {str(key): memory_of(value) for key, value in remembered.items()}
    return memory_of(vars(remembered)) if hasattr(remembered, "__dict__") else remembered


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of what differs."""
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]
