"""Adding, switching, loading, saving, deleting adapters, and how that grows with the number of adapters."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

import peftlite
from benchmarks.harness import Action, Row, pair
from benchmarks.models import STACK, Stack, llama_1b

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def rows(quick: bool) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        yield inject(quick)
        yield from files(Path(folder), 1 if quick else 16)
        yield from many(Path(folder), 4 if quick else 100)


def inject(quick: bool) -> Row:
    layers = 2 if quick else 80
    fields: dict[str, Any] = {"r": 16, "target_modules": ALL, "lora_dropout": 0.05}
    made: dict[str, nn.Module] = {}

    def fresh(name: str) -> Action:
        return lambda: made.update({name: llama_1b(layers, "meta")})

    found = pair(
        {
            "peft": lambda: peft.inject_adapter_in_model(peft.LoraConfig(**fields), made["peft"]),
            "ours": lambda: peftlite.inject(made["ours"], peftlite.LoraConfig(**fields)),
        },
        rounds=2 if quick else 7,
        before={"peft": fresh("peft"), "ours": fresh("ours")},
    )
    ms = {name: spread.median * 1e3 for name, spread in found.items()}
    return Row(f"inject on the meta device, {7 * layers} layers", "ms", ms["ours"], ms["peft"], goal=0.15)


def files(folder: Path, layers: int) -> Iterator[Row]:
    fields: dict[str, Any] = {"r": 16, "target_modules": ALL, "task_type": "CAUSAL_LM"}
    theirs = peft.get_peft_model(llama_1b(layers), peft.LoraConfig(**fields))
    ours = peftlite.get_peft_model(llama_1b(layers), peftlite.LoraConfig(**fields))
    title = f"Llama-3.2-1B shapes, {layers} layers"

    def compare(measure: str, goal: float, their_action: Action, our_action: Action, rounds: int = 7) -> Row:
        found = pair({"peft": their_action, "ours": our_action}, rounds=rounds)
        return Row(f"{measure}, {title}", "ms", found["ours"].median * 1e3, found["peft"].median * 1e3, goal=goal)

    saved = folder / "saved"
    yield compare(
        "save_pretrained", 0.8, lambda: theirs.save_pretrained(folder / "p"), lambda: ours.save_pretrained(saved)
    )
    counter = iter(range(1000))

    def load(model: Any) -> Action:
        def action() -> None:
            name = f"n{next(counter)}"
            model.load_adapter(saved, name)
            model.delete_adapter(name)

        return action

    yield compare("load_adapter + delete_adapter", 0.15, load(theirs), load(ours))
    bases = {"peft": llama_1b(layers), "ours": llama_1b(layers)}

    def from_pretrained(library: Any, name: str) -> Action:
        def action() -> None:
            library.PeftModel.from_pretrained(bases[name], saved).unload()

        return action

    yield compare("from_pretrained + unload", 0.2, from_pretrained(peft, "peft"), from_pretrained(peftlite, "ours"))


def many(folder: Path, count: int) -> Iterator[Row]:
    """A small model with `count` adapters loaded."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {"r": 4, "target_modules": STACK}
    theirs = peft.get_peft_model(Stack(64, 4), peft.LoraConfig(**fields), "n0")
    ours = peftlite.get_peft_model(Stack(64, 4), peftlite.LoraConfig(**fields), "n0")
    growth: dict[str, list[float]] = {"peft": [], "ours": []}
    for name, model, library in (("peft", theirs, peft), ("ours", ours, peftlite)):
        for k in range(1, count):
            start = time.thread_time()
            model.add_adapter(f"n{k}", library.LoraConfig(**fields))
            growth[name].append(time.thread_time() - start)
    last = {name: 1e3 * sorted(times[-9:])[len(times[-9:]) // 2] for name, times in growth.items()}
    yield Row(f"add_adapter, the {count}th", "ms", last["ours"], last["peft"], extra={"first": 1e3 * growth["ours"][0]})
    ours.set_adapter("n0")
    ours.save_pretrained(folder / "small", selected_adapters=["n0"])
    small = folder / "small" / "n0"
    names = iter(f"n{k % count}" for k in range(10**6))
    spare = iter(f"m{k}" for k in range(10**6))

    def cycle(model: Any) -> Action:
        def action() -> None:
            name = next(spare)
            model.load_adapter(small, name)
            model.delete_adapter(name)

        return action

    for measure, goal, their_action, our_action in (
        ("set_adapter", 0.02, lambda: theirs.set_adapter(next(names)), lambda: ours.set_adapter(next(names))),
        (
            "get_peft_model_state_dict",
            0.01,
            lambda: peft.get_peft_model_state_dict(theirs, adapter_name="n1"),
            lambda: peftlite.get_peft_model_state_dict(ours, adapter_name="n1"),
        ),
        ("load_adapter + delete_adapter", 0.02, cycle(theirs), cycle(ours)),
    ):
        found = pair({"peft": their_action, "ours": our_action}, rounds=7)
        title = f"{measure}, {count} adapters loaded"
        yield Row(title, "ms", found["ours"].median * 1e3, found["peft"].median * 1e3, goal=goal)
    shutil.rmtree(folder / "small")
