"""Saving, loading and swapping the adapter of a model of Llama-3.2-1B's shapes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import Tensor, nn

import peftlite
from benchmarks import resident
from benchmarks.harness import Action, Checked, Goal, Row, Settings, Spread, agree, equal, pair
from benchmarks.models import ALL, given_numbers, llama_1b

FIELDS: dict[str, Any] = {"r": 16, "target_modules": ALL, "task_type": "CAUSAL_LM"}
WEIGHTS = "adapter_model.safetensors"


def rows(quick: bool) -> Iterator[Row]:
    layers = 1 if quick else 16
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder, "peftlite")
        yield from on_disk(saved, layers)
        yield from resident_rows(saved, layers, ("peftlite",) if quick else Settings.timed)
    yield switching(2 if quick else 15, layers)


def on_disk(saved: Path, layers: int) -> Iterator[Row]:
    models: dict[str, Any] = {
        "peft": peft.get_peft_model(llama_1b(layers), peft.LoraConfig(**FIELDS)),
        "peftlite": peftlite.get_peft_model(llama_1b(layers), peftlite.LoraConfig(**FIELDS)),
    }
    models["peft"].load_state_dict(given_numbers(models["peft"]))
    models["peftlite"].load_state_dict(models["peft"].state_dict())
    other = saved.with_name("peft")
    save: dict[str, Action] = {
        "peft": lambda: models["peft"].save_pretrained(other),
        "peftlite": lambda: models["peftlite"].save_pretrained(saved),
    }
    for action in save.values():
        action()
    checked = equal((other / WEIGHTS).read_bytes(), (saved / WEIGHTS).read_bytes())
    size = (saved / WEIGHTS).stat().st_size
    title = f"{7 * layers} layers, {size / 2**20:.0f} MiB"
    yield Row(f"save_pretrained, {title}", "ms", pair(checked, save, 7), (Goal(0.8),), checked)

    floor: Action = lambda: (saved / WEIGHTS).read_bytes()  # noqa: E731
    bases = {name: llama_1b(layers) for name in ("peft", "peftlite")}
    made: dict[str, Any] = {}
    for measure, loaded, (actions, before), goals in (
        ("load_adapter, the 2nd", models, loading(models, saved), (Goal(0.15),)),
        ("from_pretrained", made, from_pretrained(bases, made, saved), (Goal(0.2),)),
        ("from_pretrained, mmap", made, from_pretrained(bases, made, saved, mmap=True), ()),
        ("hotswap_adapter", models, hotswap(models, saved), (Goal(0.5),)),
    ):
        for name, action in actions.items():
            before.get(name, lambda: None)()
            action()
        checked = same_adapters(loaded, load_file(saved / WEIGHTS))
        found = pair(checked, {"floor": floor, **actions}, 7, before=before)
        yield Row(f"{measure}, {title}", "ms", found, goals, checked, "the floor is reading the file's bytes")


def loading(models: dict[str, Any], saved: Path) -> tuple[dict[str, Action], dict[str, Action]]:
    def load(model: Any) -> Action:
        return lambda: model.load_adapter(saved, "other")

    def forget(model: Any) -> Action:
        return lambda: model.delete_adapter("other") if "other" in model.peft_config else None

    return {n: load(m) for n, m in models.items()}, {n: forget(m) for n, m in models.items()}


def from_pretrained(
    bases: Mapping[str, nn.Module], made: dict[str, Any], saved: Path, **ours: bool
) -> tuple[dict[str, Action], dict[str, Action]]:
    def load(name: str, library: Any) -> Action:
        options = ours if library is peftlite else {}
        return lambda: made.update({name: library.PeftModel.from_pretrained(bases[name], saved, **options)})

    def forget(name: str) -> Action:
        return lambda: made.pop(name).unload() if name in made else None

    actions = {name: load(name, library) for name, library in (("peft", peft), ("peftlite", peftlite))}
    return actions, {name: forget(name) for name in actions}


def hotswap(models: dict[str, Any], saved: Path) -> tuple[dict[str, Action], dict[str, Action]]:
    return {
        "peft": lambda: hotswap_adapter(models["peft"], str(saved), "default"),
        "peftlite": lambda: peftlite.hotswap_adapter(models["peftlite"], saved, "default"),
    }, {}


def same_adapters(models: Mapping[str, nn.Module], values: Mapping[str, Tensor]) -> Checked:
    """Both models have these values, in each of their adapters."""
    for name, model in models.items():
        for key, tensor in model.state_dict().items():
            if "lora_" in key:
                head, _, tail = key.rpartition(".weight")[0].rpartition(".")
                agree(torch.equal(tensor, values[f"{head}.weight"]), f"{name} has other values in {key} ({tail})")
    return Checked()


def resident_rows(saved: Path, layers: int, names: tuple[str, ...]) -> Iterator[Row]:
    """Memory of a process that loads the adapter, at its most, beyond what it had before."""
    size = float((saved / WEIGHTS).stat().st_size)
    found = {"floor": Spread.of([size])}
    for name in names:
        found[name] = Spread.of([resident.of_loading(name, saved, layers)])
    title = "resident memory of from_pretrained at its most, beyond the model's"
    yield Row(title, "MiB", dict(found), (Goal(1.05, "floor"),), note="the floor is the size of the file")
    for name in names:
        options = ", mmap=True" if name == "peftlite" else ""
        found[name] = Spread.of([resident.of_its_own(name, saved, layers, options)])
    title = "resident memory after from_pretrained, mmap, that processes cannot share, beyond the model's"
    yield Row(title, "MiB", found, note="the floor is the size of the file")


def switching(count: int, layers: int) -> Row:
    """Among adapters on the meta device, since what they hold does not matter."""
    base = llama_1b(layers, "meta")
    fields = {**FIELDS, "r": 2}
    models: dict[str, Any] = {
        "peft": peft.get_peft_model(base, peft.LoraConfig(**fields), "n0"),
        "peftlite": peftlite.get_peft_model(llama_1b(layers, "meta"), peftlite.LoraConfig(**fields), "n0"),
    }
    for k in range(1, count):
        models["peft"].add_adapter(f"n{k}", peft.LoraConfig(**fields))
        models["peftlite"].add_adapter(f"n{k}", peftlite.LoraConfig(**fields))

    def switch(model: Any) -> Action:
        names = iter([f"n{k % count}" for k in range(10_000)])
        return lambda: model.set_adapter(next(names))

    for model in models.values():
        model.set_adapter(f"n{count - 1}")
    trained = {name: [k for k, p in model.named_parameters() if p.requires_grad] for name, model in models.items()}
    checked = equal(trained["peft"], trained["peftlite"])
    found = pair(checked, {name: switch(model) for name, model in models.items()}, rounds=2 * count)
    return Row(f"set_adapter, {count} adapters on {7 * layers} layers", "ms", found, (Goal(0.05),), checked)
