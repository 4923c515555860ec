"""What trains follows from what is active and what may train, after any four calls, and from nothing else.

Adapter `a` has a copy of the head and owns the biases of the base model; `b` is plain; `c` is for inference and has a
copy of the head too. Calls are taken back after each sequence, as calls that fail are.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import peftlite
from peftlite import LoraConfig
from peftlite.core.transaction import atomic
from peftlite.errors import PeftliteError, PeftliteWarning


class Net(nn.Module):
    """A layer to adapt, one that is left alone, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.other = nn.Linear(2, 2)
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.other(self.layer(x)))
        return y


CONFIGS: dict[str, dict[str, Any]] = {
    "a": {"modules_to_save": ["head"], "bias": "all"},
    "b": {},
    "c": {"modules_to_save": ["head"], "inference_mode": True},
}


def config(name: str) -> LoraConfig:
    return LoraConfig(r=1, target_modules=["layer"], **CONFIGS[name])


def made(shape: str) -> nn.Module:
    torch.manual_seed(0)
    if shape == "wrapped":
        wrapped = peftlite.get_peft_model(Net(), config("a"), adapter_name="a")
        wrapped.add_adapter("b", config("b"))
        wrapped.add_adapter("c", config("c"))
        return wrapped
    model = Net()
    for name in CONFIGS:
        peftlite.inject(model, config(name), name)
    peftlite.set_adapter(model, "a")
    return model


@dataclass(frozen=True)
class Expected:
    """What should hold: adapters in their order, who is active, who may train."""

    names: tuple[str, ...] = ("a", "b", "c")
    active: tuple[str, ...] = ("a",)
    trainable: frozenset[str] = frozenset("ab")

    def trains(self) -> set[str]:
        """The names of the parameters that require gradients."""
        found = set()
        for name in set(self.active) & self.trainable:
            found |= {f"layer.lora_{side}.{name}.weight" for side in "AB"}
            if "modules_to_save" in CONFIGS[name]:
                found |= {f"head.modules_to_save.{name}.{part}" for part in ("weight", "bias")}
            if "bias" in CONFIGS[name]:
                found |= {"layer.base_layer.bias", "other.bias"}
        return found


Step = Callable[[Any, Expected], Expected]


def use(*names: str) -> Step:
    def step(model: Any, now: Expected) -> Expected:
        peftlite.set_adapter(model, names)
        return replace(now, active=names)

    return step


def train(name: str, on: bool) -> Step:
    def step(model: Any, now: Expected) -> Expected:
        peftlite.set_requires_grad(model, name, on)
        return replace(now, trainable=now.trainable | {name} if on else now.trainable - {name})

    return step


def delete(name: str) -> Step:
    def step(model: Any, now: Expected) -> Expected:
        peftlite.delete_adapter(model, name)
        names = tuple(n for n in now.names if n != name)
        active = tuple(n for n in now.active if n != name)
        return Expected(names, active or names[:1], now.trainable - {name})

    return step


def looking(*others: str) -> Step:
    def step(model: Any, now: Expected) -> Expected:
        with peftlite.use_adapter(model, *others):
            pass
        with peftlite.disable_adapter(model):
            pass
        return now

    return step


def nothing(call: Callable[[Any], object]) -> Step:
    def step(model: Any, now: Expected) -> Expected:
        call(model)
        return now

    return step


STEPS: dict[str, Step] = {
    "use a": use("a"),
    "use b and c": use("b", "c"),
    "use a and c": use("a", "c"),
    "freeze a": train("a", False),
    "train c": train("c", True),
    "merge": nothing(lambda model: peftlite.merge_adapter(model, ["b"])),
    "disable": nothing(peftlite.disable_adapters),
    "enable": nothing(peftlite.enable_adapters),
    "look elsewhere": looking("b"),
    "delete a": delete("a"),
}


class BackError(Exception):
    """Takes a sequence back."""


def visit(model: nn.Module, now: Expected, path: tuple[str, ...], depth: int) -> int:
    """Every sequence of at most `depth` more calls; gives how many there were."""
    count = 0
    for name, step in STEPS.items():

        @atomic
        def go(name: str = name, step: Step = step) -> None:
            nonlocal count
            try:
                then = step(model, now)
            except PeftliteError:  # refused: then it must have changed nothing
                then = now
            check(model, then, (*path, name))
            count += 1 + (visit(model, then, (*path, name), depth - 1) if depth > 1 else 0)
            raise BackError

        with pytest.raises(BackError):
            go()
    check(model, now, path)
    return count


def check(model: nn.Module, expected: Expected, path: tuple[str, ...]) -> None:
    found = {name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad}
    assert found == expected.trains(), path


@pytest.mark.parametrize("shape", ["in place", "wrapped"])
def test_what_trains_after_every_sequence_of_four_calls(shape: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftliteWarning)
        assert visit(made(shape), Expected(), (), 4) == sum(len(STEPS) ** n for n in (1, 2, 3, 4))


def moved(model: Any) -> None:
    model.layer.to_empty(device="meta")
    model.layer.to_empty(device="cpu")


def taken_back(model: Any) -> None:
    """As late as may be: `requires_grad` of the new adapter was written."""

    def fail(*args: Any) -> None:
        raise BackError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peftlite.core.inject.rebind", fail)
        with pytest.raises(BackError):
            peftlite.inject(model, config("b"), "new")
    peftlite.inject(model, config("b"), "new")


CHANGES: dict[str, Callable[[Any], object]] = {
    "loaded": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
    "moved": moved,
    "another module": lambda model: model.layer.lora_A.update({"b": nn.Linear(2, 1, bias=False)}),
    "another parameter": lambda model: setattr(model.layer.lora_A["b"], "weight", nn.Parameter(torch.ones(1, 2))),
    "parametrised": lambda model: parametrizations.weight_norm(model.layer.lora_A["b"]) and None,
    "on more layers": lambda model: peftlite.inject(model, LoraConfig(r=1, target_modules=["other"]), "d"),
    "taken back": taken_back,
    "copied": lambda model: copy.deepcopy(model),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_trains_is_what_is_there_now(change: str) -> None:
    """Where parameters are is remembered from switch to switch; another may be there meanwhile."""
    model = made("in place")
    for name in ("b", "a", "b", "a"):
        peftlite.set_adapter(model, name)
    result = CHANGES[change](model)
    model = result if isinstance(result, nn.Module) else model
    for active in (("b",), ("a",), ("d", "new", "b"), ("a",)):
        names = [name for name in active if name in peftlite.adapter_ids(model)]
        peftlite.set_adapter(model, names)
        lora = {name: p.requires_grad for name, p in model.named_parameters() if "lora_" in name}
        assert lora == {name: name.split("lora_")[1].split(".")[1] in names for name in lora}
        assert any(lora.values())
