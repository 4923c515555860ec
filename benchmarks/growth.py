"""How costs grow: with the adapters that are loaded, with the rank, with the tokens of a call."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

import peftlite
from benchmarks import resident
from benchmarks.harness import (
    IMPLEMENTATIONS,
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
from benchmarks.models import STACK, Stack, both, by_hand
from benchmarks.training import step, without_dropout

LIBRARIES: dict[str, Any] = {"peft": peft, "peftlite": peftlite}
GOALS = {
    "set_adapter": (Goal(0.02),),
    "get_peft_model_state_dict": (Goal(0.01),),
    "load_adapter + delete_adapter": (Goal(0.02),),
}


def rows(quick: bool) -> Iterator[Row | Curve]:
    counts = (1, 3) if quick else (1, 3, 10, 30, 100, 300, 1000)
    yield from adapters(counts, 3 if quick else 100)
    yield memory(quick)
    h, ranks, tokens = (64, (4, 8), (1, 8)) if quick else (1024, (4, 16, 64, 256), (1, 8, 64, 512, 2048))
    yield over_rank(h, ranks)
    yield over_tokens(h, tokens, training=False)
    yield over_tokens(h, tokens, training=True)


# ---- adapters
def adapters(counts: tuple[int, ...], shown: int) -> Iterator[Row | Curve]:
    """A small model with more and more adapters; with `shown` of them, a row for each call."""
    models = {name: library.get_peft_model(Stack(16), config(library), "n0") for name, library in LIBRARIES.items()}
    found: dict[str, dict[str, dict[int, Spread]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            for name, model in models.items():
                fill(name, model, count)
            checked = same_tensors(models)
            for call, spreads in calls(models, Path(folder), count, checked):
                for name, spread in spreads.items():
                    found.setdefault(call, {}).setdefault(name, {})[count] = spread
                if count == shown:
                    yield Row(f"{call}, {count} adapters loaded", "ms", spreads, GOALS.get(call, ()), checked)
    for call, curves in found.items():
        yield Curve(call, "adapters loaded", "ms", curves)


def config(library: Any) -> Any:
    return library.LoraConfig(r=4, target_modules=STACK)


def fill(name: str, model: Any, count: int) -> None:
    """Adapters up to `count`. PEFT's by the layers' own calls: by `add_adapter` a thousand would take minutes."""
    for k in range(len(model.peft_config), count):
        fresh = config(LIBRARIES[name])
        if name == "peftlite":
            model.add_adapter(f"n{k}", fresh)
            continue
        model.peft_config[f"n{k}"] = fresh
        for layer in model.base_model.model.layers:
            layer.update_layer(f"n{k}", fresh.r, fresh.lora_alpha, config=fresh)
            layer.lora_A[f"n{k}"].requires_grad_(False)
            layer.lora_B[f"n{k}"].requires_grad_(False)


def same_tensors(models: dict[str, Any]) -> Checked:
    kinds = [{k: (t.shape, t.dtype) for k, t in model.state_dict().items()} for model in models.values()]
    return equal(*kinds)


def calls(
    models: dict[str, Any], folder: Path, count: int, checked: Checked
) -> Iterator[tuple[str, dict[str, Spread]]]:
    """(what is called, what it takes); after each the model is as before."""

    def timed(action: Callable[[str, Any], object], before: Callable[[str, Any], object] | None = None) -> Any:
        actions: dict[str, Action] = {n: (lambda n=n, m=m: action(n, m)) for n, m in models.items()}  # type: ignore[misc]
        first: dict[str, Action] = {n: (lambda n=n, m=m: before(n, m)) for n, m in models.items() if before}  # type: ignore[misc]
        return pair(checked, actions, rounds=3 if count > 100 else 7, before=first)

    def forget(name: str, model: Any) -> None:
        if "new" in model.peft_config:
            model.delete_adapter("new")

    def switch(name: str, model: Any) -> None:
        model.set_adapter(next(names[name]))

    names = {name: iter([f"n{k % count}" for k in range(1000)]) for name in IMPLEMENTATIONS}
    kept = folder / "n0"
    models["peftlite"].save_pretrained(folder, selected_adapters=["n0"])

    def save(name: str, model: Any) -> None:
        model.save_pretrained(folder / name, selected_adapters=["n0"])

    def load(name: str, model: Any) -> None:
        model.load_adapter(kept, "new")

    def cycle(name: str, model: Any) -> None:
        load(name, model)
        forget(name, model)

    def read(name: str, model: Any) -> None:
        LIBRARIES[name].get_peft_model_state_dict(model, adapter_name="n0")

    yield "add_adapter", timed(lambda name, model: model.add_adapter("new", config(LIBRARIES[name])), forget)
    for name, model in models.items():
        forget(name, model)
    yield "set_adapter", timed(switch)
    yield "get_peft_model_state_dict", timed(read)
    yield "save_pretrained of one", timed(save)
    yield "load_adapter + delete_adapter", timed(cycle)


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
