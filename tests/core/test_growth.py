"""What a call does must not grow with the number of adapters that a model has: counted in calls, not in time."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftlite
from peftlite.core.layer import AdapterLayer
from peftlite.core.tree import layers, places
from peftlite.errors import AdapterNameError


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(16, 8), nn.Linear(8, 4)

    def train(self, mode: bool = True) -> Mlp:  # as models of transformers have one of their own
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lin1(self.lin0(x))
        return y


FEW, MANY = 3, 40
LORA: dict[str, Any] = {"r": 2, "target_modules": ["lin0", "lin1"], "lora_dropout": 0.1}


def calls(action: Callable[[], object]) -> int:
    """How many functions, of Python and of C, are called by an action."""
    count = 0

    def note(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    gc.collect()
    gc.disable()
    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(before)
        gc.enable()
    return count


def crowd(count: int) -> peftlite.PeftModel:
    model = peftlite.get_peft_model(Mlp(), peftlite.LoraConfig(**LORA), "n0")
    for k in range(1, count):
        model.add_adapter(f"n{k}", peftlite.LoraConfig(**LORA))
    return model.eval()


def rows(model: nn.Module) -> object:
    with peftlite.use_adapter_per_row(model, ["n0", "n1"]):
        return model(torch.zeros(2, 16))


def forward(model: nn.Module) -> object:
    with peftlite.use_adapter(model, "n1"):
        return model(torch.zeros(2, 16))


ACTIONS: dict[str, Callable[[Any, Path], object]] = {
    "add_adapter": lambda model, file: model.add_adapter("new", peftlite.LoraConfig(**LORA)),
    "set_adapter": lambda model, file: model.set_adapter("n1"),
    "load_adapter": lambda model, file: model.load_adapter(file, "new"),
    "delete_adapter": lambda model, file: model.delete_adapter("n2"),
    "get_peft_model_state_dict": lambda model, file: peftlite.get_peft_model_state_dict(model, adapter_name="n1"),
    "save_pretrained": lambda model, file: model.save_pretrained(file.parent / "out", selected_adapters=["n1"]),
    "use_adapter": lambda model, file: forward(model),
    "use_adapter_per_row": lambda model, file: rows(model),
    "disable_adapter_layers": lambda model, file: model.disable_adapter_layers(),
}


@pytest.mark.parametrize("name", ACTIONS)
def test_the_work_does_not_grow_with_the_number_of_adapters(name: str, tmp_path: Path) -> None:
    crowd(2).save_pretrained(tmp_path / "file", selected_adapters=["n0"])
    found: list[int] = []
    for count in (FEW, FEW, MANY):  # the first fills caches
        (folder := tmp_path / f"{len(found)}").mkdir()
        (tmp_path / "file" / "n0").rename(folder / "n0")
        model = crowd(count)
        ACTIONS[name](model, folder / "n0")
        model = crowd(count)
        found.append(calls(lambda m=model, f=folder / "n0": ACTIONS[name](m, f)))
        (folder / "n0").rename(tmp_path / "file" / "n0")
    assert found[2] <= found[1] + (MANY - FEW), f"{name}: {found[1]} calls with {FEW} adapters, {found[2]} with {MANY}"


def test_programs_that_others_have_are_not_looked_through_when_an_adapter_goes() -> None:
    model = crowd(MANY)
    found: list[int] = []
    for used in ([], [f"n{k}" for k in range(MANY)]):
        for name in [*used, "n0"]:
            model.set_adapter(name)
        model.add_adapter("new", peftlite.LoraConfig(**LORA))
        found.append(calls(lambda: model.delete_adapter("new")))
    assert found[1] <= found[0] + 5, f"{found[0]} calls, and {found[1]} with {MANY} adapters that were in use"


def test_a_plan_walks_the_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    walks = []

    def counted(model: nn.Module, *options: Any) -> Any:
        walks.append(model)
        return places(model, *options)

    monkeypatch.setattr("peftlite.core.found.places", counted)
    peftlite.plan(Mlp(), peftlite.LoraConfig(**LORA))
    assert len(walks) == 1


@pytest.mark.parametrize("how", ["item", "attribute", "update"])
def test_a_module_put_in_the_place_of_another_is_what_runs(how: str) -> None:
    model, x = crowd(3), torch.randn(2, 16)
    layer = model.base_model.model.lin0
    found = []
    for number in (1.0, 2.0):
        B = nn.Linear(2, 8, bias=False)
        nn.init.constant_(B.weight, number)
        if how == "item":
            layer.lora_B["n1"] = B
        elif how == "attribute":
            layer.lora_B.n1 = B
        else:
            layer.lora_B.update({"n1": B})
        model.set_adapter("n1")
        with peftlite.use_adapter_per_row(model, ["n1", "n0"]):
            by_row = model(x)[:1]
        assert torch.allclose(model(x)[:1], by_row, atol=1e-6)
        found.append(layer(x) - layer.base_layer(x))
    assert torch.allclose(found[0] * 2, found[1], atol=1e-6)
    assert found[0].abs().max() > 0.01


def test_eval_mode_reaches_modules_in_use_that_were_put_into_training_alone(tmp_path: Path) -> None:
    model = crowd(3)
    model.save_pretrained(tmp_path, selected_adapters=["n0"])
    lone = model.get_submodule("base_model.model.lin0.lora_dropout.n0").train()
    model.load_adapter(tmp_path / "n0", "new")
    assert not lone.training
    assert not any(module.training for module in model.modules())
    model.train()
    model.load_adapter(tmp_path / "n0", "another")
    assert not any(module.training for module in model.modules())


class Watched(nn.Dropout):
    """Tells whether anybody asks for its mode."""

    asked = 0

    def __getattribute__(self, name: str) -> Any:
        if name == "training":
            Watched.asked += 1
        return super().__getattribute__(name)


def test_adapters_that_are_not_in_use_are_not_visited_by_a_load(tmp_path: Path) -> None:
    model = crowd(3)
    model.save_pretrained(tmp_path, selected_adapters=["n0"])
    model.base_model.model.lin0.lora_dropout["n1"] = Watched().eval()
    Watched.asked = 0
    model.load_adapter(tmp_path / "n0", "new")
    model.delete_adapter("new")
    assert not Watched.asked


def test_eval_mode_is_asked_of_modules_that_have_a_way_of_their_own(tmp_path: Path) -> None:
    class Own(nn.Linear):
        asked: list[bool] = []  # noqa: RUF012

        def train(self, mode: bool = True) -> Own:
            self.asked.append(mode)
            return super().train(mode)

    base = Mlp()
    base.own = Own(4, 4)
    model = peftlite.get_peft_model(base, peftlite.LoraConfig(**LORA))
    model.save_pretrained(tmp_path)
    Own.asked.clear()
    model.load_adapter(tmp_path, "new")
    assert Own.asked == [False]
    assert not any(module.training for module in model.modules())


def test_switching_walks_the_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, walks = crowd(3), []

    def counted(model: nn.Module) -> Any:
        walks.append(model)
        return layers(model)

    for place in ("lifecycle", "binding", "tree"):
        monkeypatch.setattr(f"peftlite.core.{place}.layers", counted)
    model.set_adapter("n1")
    assert len(walks) == 1


def test_switching_back_makes_no_program_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, made, found = crowd(3), torch.randn(2, 16), [], {}
    for parameter in model.parameters():
        parameter.data.normal_()
    for name in ("n1", "n2"):
        model.set_adapter(name)
        found[name] = model(x)

    def counted(self: AdapterLayer, names: Any) -> Any:
        made.append(names)
        return program(self, names)

    program = AdapterLayer.program
    monkeypatch.setattr(AdapterLayer, "program", counted)
    model.set_adapter("n1")
    assert torch.equal(model(x), found["n1"])
    with peftlite.use_adapter(model, "n2"):
        assert torch.equal(model(x), found["n2"])
    assert not made
    model.base_model.model.lin0.scaling["n1"] = 3.0
    model.set_adapter("n1")
    assert made


def test_programs_of_other_adapters_are_kept_when_one_comes_or_goes(tmp_path: Path) -> None:
    model, x = crowd(3), torch.randn(2, 16)
    for parameter in model.parameters():
        parameter.data.normal_()
    model.save_pretrained(tmp_path, selected_adapters=["n0"])
    expected = {name: forward_with(model, name, x) for name in ("n0", "n1", "n2")}
    model.set_adapter("n1")
    layer = model.base_model.model.lin0
    bound = layer._program
    model.load_adapter(tmp_path / "n0", "new")
    model.delete_adapter("n2")
    assert layer._program is bound
    assert torch.equal(model(x), expected["n1"])
    with peftlite.use_adapter(model, "n1"):
        model.delete_adapter("new")
        assert torch.equal(model(x), expected["n1"])
    with peftlite.use_adapter(model, "n0"):
        model.add_adapter("new", peftlite.LoraConfig(**LORA, init_lora_weights=False))
        assert torch.equal(model(x), expected["n0"])
        assert not torch.equal(forward_with(model, "new", x), expected["n1"])
    model.delete_adapter("new")
    model.load_adapter(tmp_path / "n0", "new")
    assert torch.equal(forward_with(model, "new", x), expected["n0"])
    model.set_adapter(["n1", "new"])
    with peftlite.use_adapter(model, "new"):
        model.delete_adapter("new")
        with pytest.raises(AdapterNameError, match="`new`"):
            model(x)
    assert torch.equal(model(x), expected["n1"])


def forward_with(model: nn.Module, name: str, x: Tensor) -> Tensor:
    with peftlite.use_adapter(model, name):
        y: Tensor = model(x)
    return y
