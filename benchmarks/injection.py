"""Giving large models adapters: on the CPU and on the meta device, where only the modules cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
from torch import nn

import peftlite
from benchmarks.harness import Action, Checked, Goal, Row, equal, pair
from benchmarks.models import ALL, llama_1b

FIELDS: dict[str, Any] = {"r": 16, "target_modules": ALL, "lora_dropout": 0.05}


def rows(quick: bool) -> Iterator[Row]:
    layers = 1 if quick else 16
    for device in ("cpu", "meta"):
        yield get_peft_model(device, layers)
    yield inject(2 if quick else 80)


def get_peft_model(device: str, layers: int) -> Row:
    """Of a Llama-3.2-1B shape; the floor is making the linear layers of all adapters."""
    base = llama_1b(layers, device)
    sizes = [(m.in_features, m.out_features) for n, m in base.named_modules() if n.rpartition(".")[2] in ALL]
    made: dict[str, Any] = {}

    def fresh(name: str) -> Action:
        return lambda: made.update({name: llama_1b(layers, device)})

    def linears() -> None:
        for into, out in sizes:
            nn.Linear(into, FIELDS["r"], bias=False, device=device)
            nn.Linear(FIELDS["r"], out, bias=False, device=device)

    actions: dict[str, Action] = {
        "floor": linears,
        "peft": lambda: peft.get_peft_model(made["peft"], peft.LoraConfig(**FIELDS)),
        "peftlite": lambda: peftlite.get_peft_model(made["peftlite"], peftlite.LoraConfig(**FIELDS)),
    }
    before = {name: fresh(name) for name in ("peft", "peftlite")}
    checked = same_modules(actions, before, made)
    found = pair(checked, actions, rounds=7, before=before)
    title = f"get_peft_model, Llama-3.2-1B shapes on {device}, {len(sizes)} layers"
    goals = (Goal(0.25), Goal(1.2, "floor")) if device == "cpu" else (Goal(0.25),)
    return Row(title, "ms", found, goals, checked)


def inject(layers: int) -> Row:
    made: dict[str, Any] = {}

    def fresh(name: str) -> Action:
        return lambda: made.update({name: llama_1b(layers, "meta")})

    actions: dict[str, Action] = {
        "peft": lambda: peft.inject_adapter_in_model(peft.LoraConfig(**FIELDS), made["peft"]),
        "peftlite": lambda: peftlite.inject_adapter_in_model(peftlite.LoraConfig(**FIELDS), made["peftlite"]),
    }
    before = {name: fresh(name) for name in actions}
    checked = same_modules(actions, before, made)
    found = pair(checked, actions, rounds=5, before=before)
    return Row(f"inject_adapter_in_model on the meta device, {7 * layers} layers", "ms", found, (Goal(0.15),), checked)


def same_modules(actions: dict[str, Action], before: dict[str, Action], made: dict[str, Any]) -> Checked:
    """Both give the model the same tensors, by name and shape, and trains the same ones."""
    found = {}
    for name, fresh in before.items():
        fresh()
        actions[name]()
        found[name] = {k: (t.shape, t.requires_grad) for k, t in made[name].named_parameters()}
    return equal(found["peft"], found["peftlite"])
