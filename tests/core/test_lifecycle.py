"""The lifecycle against a small model of what should hold, over all short sequences of calls."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

import peftlite
from peftlite import LoraConfig
from peftlite.core.tree import find_state, layers
from peftlite.errors import AdapterNameError, MergeError, PeftliteError, PeftliteWarning, StateError
from tests.contract.rows import scramble


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.second = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(x)))
        return y


def add(model: nn.Module, name: str, *, inference_mode: bool = False) -> None:
    config = LoraConfig(r=2, target_modules=["first", "second"], inference_mode=inference_mode)
    peftlite.inject_adapter_in_model(config, model, name)
    scramble(model, name)


@dataclass
class Expected:
    """What should hold: which adapters are active, may train, are merged, and whether they have any effect."""

    names: list[str] = field(default_factory=lambda: ["a", "b"])
    active: list[str] = field(default_factory=lambda: ["a"])
    trainable: set[str] = field(default_factory=lambda: {"a"})
    merged: list[str] = field(default_factory=list)
    enabled: bool = True

    def in_effect(self) -> set[str]:
        return set(self.merged) | (set(self.active) if self.enabled else set())


def use(*names: str) -> Callable[[nn.Module, Expected], None]:
    def step(model: nn.Module, expected: Expected) -> None:
        peftlite.set_adapter(model, names)
        expected.active = list(names)
        expected.merged = [n for n in expected.merged if n in names]

    return step


def train(name: str, on: bool) -> Callable[[nn.Module, Expected], None]:
    def step(model: nn.Module, expected: Expected) -> None:
        peftlite.set_requires_grad(model, name, on)
        expected.trainable = expected.trainable | {name} if on else expected.trainable - {name}

    return step


def merge(*names: str) -> Callable[[nn.Module, Expected], None]:
    def step(model: nn.Module, expected: Expected) -> None:
        peftlite.merge_adapter(model, names or None)
        expected.merged += [n for n in (names or expected.active) if n not in expected.merged]

    return step


def unmerge(model: nn.Module, expected: Expected) -> None:
    peftlite.unmerge_adapter(model)
    expected.merged = []


def disable(model: nn.Module, expected: Expected) -> None:
    peftlite.disable_adapters(model)
    expected.enabled, expected.merged = False, []


def enable(model: nn.Module, expected: Expected) -> None:
    peftlite.enable_adapters(model)
    expected.enabled = True


def look_at_the_base(model: nn.Module, expected: Expected) -> None:
    with peftlite.disable_adapter(model):
        pass


def delete_b(model: nn.Module, expected: Expected) -> None:
    peftlite.delete_adapter(model, "b")
    expected.names.remove("b")
    expected.trainable -= {"b"}
    expected.merged = [n for n in expected.merged if n != "b"]
    expected.active = [n for n in expected.active if n != "b"]
    if not expected.active:
        expected.active = ["a"]
        expected.merged = [n for n in expected.merged if n == "a"]


STEPS: dict[str, Callable[[nn.Module, Expected], None]] = {
    "use a": use("a"),
    "use b": use("b"),
    "use both": use("a", "b"),
    "freeze a": train("a", False),
    "train b": train("b", True),
    "merge": merge(),
    "merge b": merge("b"),
    "unmerge": unmerge,
    "disable": disable,
    "enable": enable,
    "look at the base": look_at_the_base,
    "delete b": delete_b,
}


@pytest.fixture(scope="module")
def fresh() -> Net:
    """Adapter `a` trains and is active; `b` was made for inference."""
    torch.manual_seed(0)
    model = Net()
    add(model, "a")
    add(model, "b", inference_mode=True)
    peftlite.set_adapter(model, "a")
    return model


@pytest.fixture(scope="module")
def truth(fresh: Net) -> dict[frozenset[str], Tensor]:
    """Outputs in float64 for every set of adapters in effect."""
    exact = copy.deepcopy(fresh).double()
    x = inputs().double()
    found = {}
    for names in ((), ("a",), ("b",), ("a", "b")):
        with peftlite.use_adapter(exact, *names):
            found[frozenset(names)] = exact(x).detach()
    return found


def inputs() -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(3))


def assert_holds(model: Net, expected: Expected, truth: dict[frozenset[str], Tensor]) -> None:
    state = find_state(model)
    assert state is not None
    assert list(state.configs) == expected.names
    assert list(state.active) == expected.active
    for layer in layers(model):
        assert sorted(layer.merged_adapters) == sorted(expected.merged)
        for name in expected.names:
            wanted = name in expected.active and name in expected.trainable
            assert all(p.requires_grad is wanted for p in layer.parameters_of(name)), name
        assert not any(p.requires_grad for p in layer.base_layer.parameters())
    torch.testing.assert_close(model(inputs()).double(), truth[frozenset(expected.in_effect())], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", STEPS)
def test_every_sequence_of_four_calls_ends_where_it_should(
    fresh: Net, truth: dict[frozenset[str], Tensor], first: str
) -> None:
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    for rest in itertools.product(STEPS, repeat=3):
        model, expected = copy.deepcopy(fresh), Expected()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PeftliteWarning)
            try:
                for step in (first, *rest):
                    STEPS[step](model, expected)
            except PeftliteError:  # refused: then it must have changed nothing
                pass
        try:
            assert_holds(model, expected, truth)
            peftlite.unmerge_adapter(model)
            assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        except AssertionError as error:
            raise AssertionError(f"after {(first, *rest)}: {error}") from error


# ---- failing half-way
def test_a_merge_that_fails_on_a_later_layer_merges_none(fresh: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(fresh)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    second = model.second.host
    for error in (torch.OutOfMemoryError("full"), KeyboardInterrupt(), RuntimeError("else")):

        def fail(*args: object, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(second, "write", fail)
        with pytest.raises(type(error)):
            peftlite.merge_adapter(model, ["a", "b"])
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert not any(layer.merged for layer in layers(model))
        monkeypatch.undo()
    peftlite.merge_adapter(model)


def test_ten_thousand_cycles_leave_every_bit(fresh: Net) -> None:
    model = copy.deepcopy(fresh).to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    peftlite.set_adapter(model, ["a", "b"])
    for cycle in range(10_000):
        peftlite.merge_adapter(model, [("a", "b")[cycle % 2]])
        if cycle % 3:
            peftlite.unmerge_adapter(model)
    peftlite.unmerge_adapter(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_unmerge_after_a_change_of_dtype_gives_the_base_in_that_dtype(fresh: Net) -> None:
    model = copy.deepcopy(fresh)
    expected = copy.deepcopy(fresh).to(torch.bfloat16).state_dict()
    peftlite.merge_adapter(model)
    model.to(torch.bfloat16)
    peftlite.unmerge_adapter(model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


# ---- one layer at a time
def test_an_override_on_one_layer_ends_when_the_model_is_set(fresh: Net) -> None:
    model, x = copy.deepcopy(fresh), inputs()
    expected = model(x)
    model.first.set_adapter("b")
    assert model.first.irregular
    assert not torch.equal(model(x), expected)
    peftlite.set_adapter(model, "a")
    assert not model.first.irregular
    assert torch.equal(model(x), expected)
    model.first.enable_adapters(False)
    assert not torch.equal(model(x), expected)
    peftlite.enable_adapters(model)
    assert torch.equal(model(x), expected)


def test_writing_a_scaling_takes_effect_at_once(fresh: Net) -> None:
    model, x = copy.deepcopy(fresh), inputs()
    expected = model(x)
    model.first.scaling["a"] *= 2
    doubled = model(x)
    assert not torch.equal(doubled, expected)
    model.first.scaling["a"] /= 2
    assert torch.equal(model(x), expected)
    peftlite.scale_adapter(model, "a", 2.0)
    assert model.first.scaling["a"] == model.second.scaling["a"] == 2 * fresh.first.scaling["a"]
    peftlite.merge_adapter(model)
    for change in (lambda: model.first.scaling.__setitem__("a", 1.0), lambda: peftlite.scale_adapter(model, "a", 2.0)):
        with pytest.raises(StateError, match="`a` is merged"):
            change()


def test_writes_through_data_are_seen_by_the_next_call(fresh: Net) -> None:
    model, x = copy.deepcopy(fresh), inputs()
    with torch.no_grad():
        before = model(x)
        model.first.lora_B["a"].weight.data.mul_(3)
        after = model(x)
        assert not torch.equal(after, before)
        model.first.lora_B["a"].weight.data = model.first.lora_B["a"].weight.data / 3
        torch.testing.assert_close(model(x), before)
    model.load_state_dict({k: v.clone() for k, v in fresh.state_dict().items()}, assign=True)
    assert torch.equal(model(x), fresh(x))


def test_merging_while_disabled_is_refused(fresh: Net) -> None:
    model = copy.deepcopy(fresh)
    peftlite.disable_adapters(model)
    with pytest.raises(StateError, match="enable_adapters"):
        peftlite.merge_adapter(model)


def test_what_cannot_be_merged_is_said_before_anything_is() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False))
    peftlite.inject_adapter_in_model(LoraConfig(target_modules=["0", "1"], lora_bias=True), model)
    with pytest.raises(MergeError, match=r"`default`.*`1`.*lora_bias"):
        peftlite.merge_adapter(model)
    assert not any(layer.merged for layer in layers(model))


def test_copies_of_one_module_cannot_be_active_together() -> None:
    model = Net()
    for name in ("a", "b"):
        config = LoraConfig(target_modules=["first"], modules_to_save=["second"])
        peftlite.inject_adapter_in_model(config, model, name)
    with pytest.raises(AdapterNameError, match=r"`a` and `b`.*`second`"):
        peftlite.set_adapter(model, ["a", "b"])
    assert peftlite.active_adapters(model) == ["b"]


def test_disabling_an_adapter_that_trained_biases_says_so() -> None:
    model = Net()
    peftlite.inject_adapter_in_model(LoraConfig(target_modules=["first"], bias="all"), model)
    assert model.second.bias.requires_grad
    with pytest.warns(PeftliteWarning, match="biases"):
        peftlite.disable_adapters(model)
    peftlite.delete_adapter(model, "default")
    assert not any(p.requires_grad for p in model.parameters())


def test_deleting_the_last_adapter_gives_the_base_model_back() -> None:
    torch.manual_seed(0)
    model = Net()
    expected, text = copy.deepcopy(model)(inputs()), str(model)
    for name in ("a", "b"):
        add(model, name)
    peftlite.set_adapter(model, "a")
    peftlite.merge_adapter(model, ["a", "b"])
    peftlite.delete_adapter(model, "b")
    peftlite.delete_adapter(model, "a")
    assert str(model) == text
    torch.testing.assert_close(model(inputs()), expected, rtol=0, atol=1e-6)
    add(model, "again")
    assert peftlite.active_adapters(model) == ["again"]


def test_lora_only_biases_are_those_of_the_adapters_own_layers() -> None:
    model = Net()
    peftlite.inject_adapter_in_model(LoraConfig(target_modules=["second"]), model, "other")
    peftlite.inject_adapter_in_model(LoraConfig(target_modules=["first"], bias="lora_only"), model, "a")
    peftlite.set_adapter(model, "a")
    assert [name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name] == [
        "first.base_layer.bias"
    ]
