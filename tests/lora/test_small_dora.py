"""DoRA on small linear layers, by the changed weight: the numbers of `Dora.forward`, in fewer steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftlite
from peftlite.core.layer import AdapterLayer
from peftlite.core.slots import View
from peftlite.tuners.lora.dora import DORA
from peftlite.tuners.lora.small import BoundDora
from tests.tuners.pairs import apart

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def adapted(dtype: torch.dtype = torch.float32, bias: bool = True, into: int = 24, **fields: Any) -> Any:
    """A layer (into, 16) with the adapter "default", whose B is not zero."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(into, 16, bias=bias)).to(dtype).requires_grad_(False)
    config = peftlite.LoraConfig(r=4, target_modules=["0"], use_dora=True, **fields)
    layer = peftlite.inject_adapter_in_model(config, model)[0]
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(std=0.2)
        layer.lora_magnitude_vector["default"].weight.mul_(1.3)
    return layer


def slow(layer: AdapterLayer, x: Tensor) -> Tensor:
    """By the modules' own calls."""
    y: Tensor = DORA.forward(View(layer, "default"), layer.wrapped, x)
    return y


def takes_the_program(layer: AdapterLayer, x: Tensor) -> bool:
    program: Any = layer.program(["default"])
    if not isinstance(program, BoundDora):
        return False
    called: list[Tensor] = []
    before = program.slow
    program.slow = lambda *args: (called.append(args[0]), before(*args))[1]
    program(x)
    return not called


def gradients(layer: AdapterLayer, x: Tensor, y: Tensor) -> list[Tensor]:
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return list(torch.autograd.grad(y, wanted, torch.ones_like(y).cumsum(-1)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24)])
def test_outputs_and_gradients_are_those_of_the_formula(shape: tuple[int, ...], dtype: torch.dtype, bias: bool) -> None:
    layer = adapted(dtype, bias)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    assert takes_the_program(layer, x)
    mine, theirs = layer(x), slow(layer, x)
    assert mine.dtype is theirs.dtype is dtype
    tolerance = 2 * torch.finfo(dtype).eps if dtype is not torch.float32 else 2e-6
    assert apart(mine.float(), theirs.float()) <= tolerance
    found = list(zip(gradients(layer, x, mine), gradients(layer, x, theirs), strict=True))
    assert len(found) == 4
    assert all(apart(one.float(), other.float()) <= 4 * tolerance for one, other in found)
    with torch.no_grad():
        assert torch.equal(layer(x), mine)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_nearer_to_float64_than_a_few_roundings(dtype: torch.dtype) -> None:
    layer, x = adapted(dtype), torch.randn(5, 24, dtype=dtype)
    a, W = View(layer, "default"), layer.base_layer.weight.double()
    changed = W + a.scaling * a.lora_B.weight.double() @ a.lora_A.weight.double()
    g = a.lora_magnitude_vector.weight.double() / changed.norm(dim=1)
    truth = x.double() @ (g[:, None] * changed).T + layer.base_layer.bias.double()
    assert apart(layer(x).double(), truth) <= (4e-7 if dtype is torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fresh_adapter_changes_no_bit(dtype: torch.dtype, bias: bool) -> None:
    model = nn.Sequential(nn.Linear(24, 16, bias=bias)).to(dtype)
    x = torch.randn(7, 24, dtype=dtype)
    before = model(x)
    peftlite.inject_adapter_in_model(peftlite.LoraConfig(r=4, target_modules=["0"], use_dora=True), model)
    assert takes_the_program(model[0], x)  # type: ignore[arg-type]
    assert torch.equal(model(x), before)


def test_writes_that_leave_no_trace_are_seen() -> None:
    layer, x = adapted(), torch.randn(5, 24)
    layer(x)
    for part in (
        layer.base_layer,
        *(layer._modules[s]["default"] for s in ("lora_A", "lora_B", "lora_magnitude_vector")),
    ):
        before = layer(x)
        part.weight.data.mul_(1.5)
        assert not torch.equal(layer(x), before)
        assert apart(layer(x), slow(layer, x)) <= 2e-6


def test_the_base_is_its_own_while_another_adapter_is_merged() -> None:
    layer, x = adapted(), torch.randn(5, 24)
    model = nn.Sequential(layer)
    peftlite.inject_adapter_in_model(
        peftlite.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), model, "two"
    )
    peftlite.set_adapter(model, ["two", "default"])
    expected = model(x)
    layer.merge(adapter_names=["two"])
    assert apart(model(x), expected) <= 2e-6
    layer.unmerge()
    peftlite.set_adapter(model, "default")
    assert takes_the_program(layer, x)


@pytest.mark.parametrize("slot", ["base_layer", "lora_A", "lora_B", "lora_magnitude_vector", "lora_dropout"])
def test_hooks_on_every_part_are_called(slot: str) -> None:
    layer, x = adapted(lora_dropout=0.1).eval(), torch.randn(5, 24)
    layer(x)
    part = layer._modules[slot]
    part = part if slot == "base_layer" else part["default"]
    seen: list[object] = []
    part.register_forward_hook(lambda *args: seen.append(args))
    layer(x)
    assert len(seen) == 1


def test_what_is_not_the_plain_case_is_left_to_the_modules() -> None:
    x = torch.randn(5, 24)
    assert takes_the_program(adapted(), x)
    assert not takes_the_program(adapted(lora_dropout=0.5).train(), x)
    assert takes_the_program(adapted(lora_dropout=0.5).eval(), x)
    assert not takes_the_program(adapted(), torch.randn(500, 24))
    assert not takes_the_program(adapted(into=4097), torch.randn(5, 4097))
    assert not takes_the_program(adapted(torch.float64), x.double())
    assert not takes_the_program(adapted(init_lora_weights="pissa"), x)
    with torch.autocast("cpu", torch.bfloat16):
        layer = adapted()
        assert not takes_the_program(layer, x)
        assert torch.equal(layer(x), slow(layer, x))
    assert torch.equal(torch.func.vmap(layer)(x[:, None]), torch.func.vmap(lambda one: slow(layer, one))(x[:, None]))
