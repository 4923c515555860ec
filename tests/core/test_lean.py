"""Adapters' modules have fewer dicts than torch's at first, and are torch's in every other way."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import peftlite
from peftlite.core.lean import Dropout, Identity, Lean, Linear
from peftlite.core.slots import BufferSlot, ModuleSlot, ParameterSlot

W, b = torch.randn(3, 4), torch.randn(3)
KINDS: dict[str, Any] = {
    "linear": (lambda: Linear(W, b), nn.Linear(4, 3)),
    "no bias": (lambda: Linear(W), nn.Linear(4, 3, bias=False)),
    "dropout": (lambda: Dropout(0.25), nn.Dropout(0.25)),
    "identity": (Identity, nn.Identity()),
    "modules": (ModuleSlot, nn.ModuleDict()),
    "parameters": (ParameterSlot, nn.ParameterDict()),
    "buffers": (BufferSlot, nn.Module()),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[Lean, nn.Module]:
    make, like = KINDS[request.param]
    return make(), like


def test_the_dicts_are_there_when_asked_for_and_one_s_own(kind: tuple[Lean, nn.Module]) -> None:
    lean, like = kind
    other = copy.deepcopy(lean)
    late = {name for name, value in vars(like).items() if isinstance(value, (OrderedDict, set))}
    assert len(late) > 8
    assert not late & set(vars(lean))
    for name, value in vars(like).items():
        found = getattr(lean, name)
        assert type(found) is type(value)
        if name in late:
            assert found == value
            assert found is getattr(lean, name)
            assert found is not getattr(other, name)
    assert set(vars(lean)) >= set(vars(like))


def test_hooks_of_all_kinds_are_called_and_stay_through_copies(kind: tuple[Lean, nn.Module]) -> None:
    module = kind[0]
    if not isinstance(module, (Linear, Dropout, Identity)):
        return
    called: list[str] = []
    for register in ("forward_pre", "forward", "full_backward_pre", "full_backward"):
        hook = lambda *args, name=register: called.append(name)  # noqa: E731
        getattr(module, f"register_{register}_hook")(hook)
    module.register_state_dict_post_hook(lambda *args: called.append("state_dict"))
    module.register_load_state_dict_post_hook(lambda *args: called.append("load_state_dict"))
    module(torch.randn(2, 4, requires_grad=True)).sum().backward()
    module.load_state_dict(module.state_dict())
    expected = ["forward_pre", "forward", "full_backward_pre", "full_backward", "state_dict", "load_state_dict"]
    assert called == expected
    called.clear()
    copy.copy(module)(torch.randn(2, 4))
    assert called == ["forward_pre", "forward"]


def test_copies_and_pickles_are_as_lean(kind: tuple[Lean, nn.Module]) -> None:
    module, _ = kind
    buffer, before = io.BytesIO(), set(vars(module))
    torch.save(module, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False)):
        assert set(vars(other)) == before
        assert repr(other) == repr(module)
        assert other.state_dict().keys() == module.state_dict().keys()
        assert not other.train(False).training


def test_they_count_as_torch_s_own() -> None:
    config = peftlite.LoraConfig(r=2, target_modules=["0"], lora_dropout=0.1)
    model = peftlite.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    layer: Any = model.base_model.model[0]
    assert isinstance(layer.lora_A["default"], nn.Linear)
    assert isinstance(layer.lora_dropout["default"], nn.Dropout)
    assert (layer.lora_A["default"].in_features, layer.lora_A["default"].out_features) == (4, 2)
    assert "(default): Linear(in_features=4, out_features=2, bias=False)" in repr(model)


def test_adapters_get_no_dicts_for_hooks_from_being_used_or_not() -> None:
    config = {"r": 2, "target_modules": ["0"]}
    model = peftlite.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peftlite.LoraConfig(**config), "a")
    model.add_adapter("b", peftlite.LoraConfig(**config))
    peftlite.get_peft_model_state_dict(model, adapter_name="b")
    model(torch.randn(2, 4, requires_grad=True)).sum().backward()
    model.eval().to(torch.float64)(torch.randn(2, 4, dtype=torch.float64))
    layer: Any = model.base_model.model[0]
    for part in (slot[name] for slot in (layer.lora_A, layer.lora_B, layer.lora_dropout) for name in "ab"):
        assert not [name for name in vars(part) if name.endswith(("hooks", "_set"))]


def bound() -> Any:
    config = peftlite.LoraConfig(r=2, target_modules=["0"], lora_dropout=0.1)
    return peftlite.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config).eval().base_model.model[0]


MADE: dict[str, Callable[[nn.Module], object]] = {
    "not yet": lambda module: None,
    "by a call": lambda module: module(torch.randn(2, getattr(module, "in_features", 4))),
}


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("slot", ["lora_A", "lora_B", "lora_dropout"])
@pytest.mark.parametrize("register", ["forward_pre", "forward", "full_backward_pre", "full_backward"])
def test_a_hook_is_called_that_came_after_the_program(made: str, slot: str, register: str) -> None:
    layer, called = bound(), []
    part = getattr(layer, slot)["default"]
    program, slow = layer._program, []
    program.slow = lambda *args, slow_call=program.slow: (slow.append(1), slow_call(*args))[1]
    x = torch.randn(2, 4, requires_grad=True)
    MADE[made](part)
    layer(x)
    assert not slow
    handle = getattr(part, f"register_{register}_hook")(lambda *args: called.append(1))
    layer(x).sum().backward()
    assert called
    assert slow == [1]
    handle.remove()
    layer(x).sum().backward()
    assert slow == called == [1]


def doubling(layer: Any, part: nn.Module, how: str) -> Callable[[], None]:
    """Have `part` give twice what it gives; returns how to take it back."""
    if how == "forward":
        part.forward = lambda x, run=part.forward: run(x) * 2  # type: ignore[method-assign]
        return lambda: delattr(part, "forward")
    if how == "hook":
        return part.register_forward_hook(lambda module, args, y: y * 2).remove
    if how == "dict of hooks":
        part._forward_hooks = OrderedDict({0: lambda module, args, y: y * 2})
        return part._forward_hooks.clear
    of_part = lambda module, args, y: y * 2 if module is part else None  # noqa: E731
    return nn.modules.module.register_module_forward_hook(of_part).remove


PARTS = ("lora_A", "lora_B", "lora_dropout")
COMES = [(slot, how, False) for slot in (*PARTS, "base_layer") for how in ("forward", "hook", "of all modules")]
COMES += [(slot, "forward", True) for slot in (*PARTS, "base_layer")]  # of hooks torch.compile guards none
COMES += [(slot, "dict of hooks", False) for slot in PARTS]


@pytest.mark.parametrize(("slot", "how", "compiled"), COMES)
def test_what_is_in_the_way_of_the_formula_is_seen_when_it_comes_and_goes(slot: str, how: str, compiled: bool) -> None:
    torch._dynamo.reset()
    layer, x = bound(), torch.randn(2, 4)
    nn.init.normal_(layer.lora_B["default"].weight)
    part = layer.base_layer if slot == "base_layer" else getattr(layer, slot)["default"]
    run = torch.compile(layer, backend="eager") if compiled else layer
    with torch.no_grad():
        base, whole = layer.base_layer(x), run(x)
        back = doubling(layer, part, how)
        expected = whole + base if slot == "base_layer" else 2 * whole - base
        try:
            torch.testing.assert_close(run(x), expected)
        finally:
            back()
        torch.testing.assert_close(run(x), whole)


@pytest.mark.parametrize("slot", [*PARTS, "base_layer"])
def test_a_hook_that_was_there_is_compiled(slot: str) -> None:
    torch._dynamo.reset()
    layer, x = bound(), torch.randn(2, 4)
    nn.init.normal_(layer.lora_B["default"].weight)
    doubling(layer, layer.base_layer if slot == "base_layer" else getattr(layer, slot)["default"], "hook")
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend="eager")(x), layer(x))


def test_what_other_modules_get_or_other_calls_see_is_no_reason_to_compile_again() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    layer, x = bound(), torch.randn(2, 4)
    run = torch.compile(layer, backend=counter, fullgraph=True)
    with torch.no_grad():
        run(x)
        layer(x)
        run(x)
        Dropout(0.5).register_forward_hook(lambda *args: None)
        layer(x)
        run(x)
    assert counter.frame_count == 1
