"""How costs grow: with the adapters that are loaded, with the rank, with the tokens of a call."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import LlamaForCausalLM

import peftlite
from benchmarks import resident
from benchmarks.harness import (
    Action,
    Checked,
    Curve,
    Goal,
    Row,
    Settings,
    Spread,
    equal,
    pair,
    same,
)
from benchmarks.models import ALL, STACK, Stack, both, by_hand, shapes
from benchmarks.training import step, without_dropout

LIBRARIES: dict[str, Any] = {"peft": peft, "peftlite": peftlite}
GOALS = {
    "set_adapter": (Goal(0.02),),
    "get_peft_model_state_dict": (Goal(0.01),),
    "load_adapter + delete_adapter": (Goal(0.02),),
}


def rows(quick: bool) -> Iterator[Row | Curve]:
    yield from with_many(3 if quick else 100, layers=1 if quick else 4)
    yield memory(quick)
    yield from up_to((1, 3) if quick else (1, 3, 10, 30, 100, 300, 1000))
    h, ranks, tokens = (64, (4, 8), (1, 8)) if quick else (1024, (4, 16, 64, 256), (1, 8, 64, 512, 2048))
    yield over_rank(h, ranks)
    yield over_tokens(h, tokens, training=False)
    yield over_tokens(h, tokens, training=True)


# ---- adapters
def with_many(count: int, layers: int) -> Iterator[Row]:
    """Each call on a small Llama that has `count` adapters."""
    models = adapted(lambda: LlamaForCausalLM(shapes(64, layers)), ALL)
    title = f"{count} adapters on {7 * layers} layers"
    for call, found, checked in calls(models, count):
        yield Row(f"{call}, {title}", "ms", found, GOALS.get(call, ()), checked)


def up_to(counts: tuple[int, ...]) -> Iterator[Curve]:
    """Each call on three layers that have more and more adapters."""
    models = adapted(lambda: Stack(16), STACK)
    curves: dict[str, dict[str, dict[int, Spread]]] = {}
    for count in counts:
        for call, found, _ in calls(models, count):
            for name, spread in found.items():
                curves.setdefault(call, {}).setdefault(name, {})[count] = spread
    for call, found in curves.items():
        yield Curve(f"{call}, 3 layers", "adapters loaded", "ms", found)


def adapted(base: Callable[[], nn.Module], targets: list[str] | str) -> dict[str, Any]:
    fields: dict[str, Any] = {"r": 4, "target_modules": targets}
    return {name: of.get_peft_model(base(), of.LoraConfig(**fields), "n0") for name, of in LIBRARIES.items()}


def fill(name: str, model: Any, count: int) -> None:
    """Adapters up to `count`. PEFT's by the layers' own calls: by `add_adapter` a thousand would take minutes."""
    config = model.peft_config["n0"]
    for k in range(len(model.peft_config), count):
        fresh = copy.deepcopy(config)
        if name == "peftlite":
            model.add_adapter(f"n{k}", fresh)
            continue
        model.peft_config[f"n{k}"] = fresh
        for layer in [module for module in model.modules() if isinstance(module, LoraLayer)]:
            layer.update_layer(f"n{k}", fresh.r, fresh.lora_alpha, config=fresh)
            layer.lora_A[f"n{k}"].requires_grad_(False)
            layer.lora_B[f"n{k}"].requires_grad_(False)


def same_tensors(models: dict[str, Any]) -> Checked:
    kinds = [{k: (t.shape, t.dtype) for k, t in model.state_dict().items()} for model in models.values()]
    return equal(*kinds)


def calls(models: dict[str, Any], count: int) -> Iterator[tuple[str, dict[str, Spread], Checked]]:
    """(what is called, what it takes, compared), with `count` adapters loaded."""
    for name, model in models.items():
        fill(name, model, count)
    checked = same_tensors(models)
    with tempfile.TemporaryDirectory() as place:
        many = Many(models, count, Path(place))
        for call, action, before in (
            ("add_adapter", many.add, many.forget),
            ("set_adapter", many.switch, many.forget),
            ("get_peft_model_state_dict", many.read, many.forget),
            ("save_pretrained of one", many.save, many.forget),
            ("load_adapter", many.load, many.forget),
            ("delete_adapter", many.forget, many.ensure),
            ("load_adapter + delete_adapter", many.cycle, many.forget),
        ):
            actions, first = ({name: partial(act, name) for name in models} for act in (action, before))
            yield call, pair(checked, actions, rounds=3 if count > 100 else 7, before=first), checked


class Many:
    """What is called on models with `count` adapters; one more, "new", comes and goes."""

    def __init__(self, models: dict[str, Any], count: int, folder: Path) -> None:
        self.models, self.folder = models, folder
        self.names = {name: iter([f"n{k % count}" for k in range(1000)]) for name in models}
        models["peftlite"].save_pretrained(folder, selected_adapters=["n0"])

    def add(self, name: str) -> None:
        targets = self.models[name].peft_config["n0"].target_modules
        self.models[name].add_adapter("new", LIBRARIES[name].LoraConfig(r=4, target_modules=targets))

    def switch(self, name: str) -> None:
        self.models[name].set_adapter(next(self.names[name]))

    def read(self, name: str) -> None:
        LIBRARIES[name].get_peft_model_state_dict(self.models[name], adapter_name="n0")

    def save(self, name: str) -> None:
        self.models[name].save_pretrained(self.folder / name, selected_adapters=["n0"])

    def load(self, name: str) -> None:
        self.models[name].load_adapter(self.folder / "n0", "new")

    def forget(self, name: str) -> None:
        if "new" in self.models[name].peft_config:
            self.models[name].delete_adapter("new")

    def ensure(self, name: str) -> None:
        if "new" not in self.models[name].peft_config:
            self.load(name)

    def cycle(self, name: str) -> None:
        self.load(name)
        self.forget(name)


def memory(quick: bool) -> Row:
    """Resident memory per small adapter; the floor is its data."""
    found = {"floor": Spread.of([float(resident.BYTES_PER_ADAPTER)])}
    for name in ("peftlite",) if quick else Settings.timed:
        found[name] = Spread.of([resident.of_an_adapter(name, *((2, 2) if quick else (10, 40)))])
    return Row("resident memory per small adapter, 28 layers", "KiB", found, (Goal(0.6),), note="the floor is its data")


# ---- rank and tokens
def models_of(h: int, r: int, dropout: float) -> dict[str, nn.Module]:
    base = nn.Sequential(nn.Linear(h, h, bias=False)).to(torch.bfloat16)
    theirs, ours = both(base, target_modules=["0"], r=r, lora_dropout=dropout)
    return {"floor": base, "peft": theirs, "peftlite": ours, "by hand": by_hand(theirs)}


def compared(models: dict[str, nn.Module], x: torch.Tensor) -> Checked:
    with torch.no_grad(), without_dropout(models["peft"]), without_dropout(models["peftlite"]):
        return same(models["peft"](x), models["peftlite"](x), 5e-2)


def over_rank(h: int, ranks: tuple[int, ...]) -> Curve:
    found: dict[str, dict[int, Spread]] = {}
    x = torch.randn(512, h).to(torch.bfloat16)
    for r in ranks:
        models = models_of(h, r, dropout=0.05)
        actions: dict[str, Action] = {name: (lambda m=model: step(m, x)) for name, model in models.items()}  # type: ignore[misc]
        for name, spread in pair(compared(models, x), actions, rounds=7).items():
            found.setdefault(name, {})[r] = spread
    return Curve(f"training step of a {h} x {h} layer, 512 tokens, bfloat16", "rank", "ms", found)


def over_tokens(h: int, tokens: tuple[int, ...], training: bool) -> Curve:
    found: dict[str, dict[int, Spread]] = {}
    for count in tokens:
        models = models_of(h, 16, dropout=0.05 if training else 0.0)
        x = torch.randn(count, h).to(torch.bfloat16)
        checked = compared(models, x)

        def act(model: nn.Module, x: torch.Tensor = x) -> None:
            if training:
                step(model, x)
            else:
                model(x)

        actions: dict[str, Action] = {name: (lambda m=model: act(m)) for name, model in models.items()}  # type: ignore[misc]
        with torch.set_grad_enabled(training):
            spreads = pair(checked, actions, rounds=9, repeat=max(1, 64 // count))
        for name, spread in spreads.items():
            found.setdefault(name, {})[count] = spread
    kind = "training step" if training else "call without gradients"
    return Curve(f"{kind} of a {h} x {h} layer, rank 16, bfloat16", "tokens", "ms", found)
