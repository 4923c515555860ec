"""One LoRA layer without gradients: the formula, whatever was written to its parameters since the last call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import peftlite
from peftlite.tuners.lora import blocks, bound

SIZE = 6
WIDER = 24  # of which one sequence goes as a batch


def adapted(dtype: torch.dtype, bias: bool = True, size: int = SIZE) -> Any:
    """A square layer with square factors, so that they can be transposed in place."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(size, size, bias)).to(dtype)
    peftlite.inject(model, peftlite.LoraConfig(r=size, lora_alpha=3, target_modules=["0"]))
    nn.init.normal_(model[0].lora_B["default"].weight)  # type: ignore[union-attr,index]
    return model[0].eval()


def formula(layer: Any, x: Tensor) -> Tensor:
    base, A, B = (layer.base_layer, *(f["default"].weight for f in (layer.lora_A, layer.lora_B)))
    y = F.linear(x, base.weight, base.bias)
    return (y + F.linear(F.linear(x.to(A.dtype), A), B) * layer.scaling["default"]).to(y.dtype)


def near(found: Tensor, expected: Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found, expected, rtol=4 * eps, atol=16 * eps)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(6,), (4, 6), (0, 6), (2, 3, 6), (0, 3, 6), (1, 2, 3, 6)], ids=str)
def test_inputs_of_every_shape(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    layer, x = adapted(dtype, bias), torch.randn(shape).to(dtype)
    near(layer(x), formula(layer, x))
    if len(shape) > 2:
        turned = x.transpose(0, 1)
        near(layer(turned), formula(layer, turned))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [SIZE, WIDER, 96])
@pytest.mark.parametrize("rows", [1, 2, 5, 33, 200])
def test_one_sequence_gives_the_bits_of_its_vectors(rows: int, size: int, dtype: torch.dtype) -> None:
    """Also with gradients, where reentrant checkpoints call again; and a fresh adapter those of the base layer."""
    layer, x = adapted(dtype, size=size), torch.randn(1, rows, size).to(dtype)
    layer.lora_A.to(dtype), layer.lora_B.to(dtype)
    assert torch.equal(layer(x)[0], layer(x[0]))
    with torch.enable_grad():
        assert torch.equal(layer(x), layer(x.clone().requires_grad_()))
    layer.lora_B["default"].weight.zero_()
    assert torch.equal(layer(x), layer.base_layer(x))
    with pytest.raises(RuntimeError, match=r"size|shape"):
        layer(x[..., 1:])


@pytest.mark.parametrize("size", [SIZE, WIDER])
@pytest.mark.parametrize("shape", [(4,), (1, 4), (2, 4), (1, 2, 4)], ids=str)
def test_a_bias_trains_alone(shape: tuple[int, ...], size: int) -> None:
    layer, x = adapted(torch.float32, size=size), torch.randn(*shape, size)
    layer.requires_grad_(False)
    layer.base_layer.bias.requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert torch.equal(layer.base_layer.bias.grad, torch.full((size,), float(x.numel() // size)))
    near(y.detach(), formula(layer, x).detach())


def assigned(layer: Any) -> None:
    layer.load_state_dict({k: v * 2 if "lora_" in k else v for k, v in layer.state_dict().items()}, assign=True)


def narrowed(layer: Any) -> None:
    A, B = factors(layer)
    A.data, B.data = A.data[:2], B.data[:, :2]


def turned(layer: Any) -> None:
    A, B = factors(layer)
    A.data, B.data = A.data.t(), B.data.t()


def in_float64(layer: Any) -> None:
    layer.lora_A.double(), layer.lora_B.double()
    factors(layer)[0].data.add_(1)


def factors(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


WRITES: dict[str, Callable[[Any], object]] = {
    "in place": lambda layer: [factor.add_(1) for factor in factors(layer)],
    "through data": lambda layer: [factor.data.mul_(3) for factor in factors(layer)],
    "of data": lambda layer: [setattr(factor, "data", torch.randn_like(factor)) for factor in factors(layer)],
    "of fewer ranks": narrowed,
    "transposed": turned,
    "assigned": assigned,
    "in another dtype": in_float64,
    "the base's": lambda layer: layer.base_layer.weight.data.mul_(2),
    "of the base's data": lambda layer: setattr(
        layer.base_layer.weight, "data", torch.randn_like(layer.base_layer.weight)
    ),
    "the base's transposed": lambda layer: setattr(layer.base_layer.weight, "data", layer.base_layer.weight.data.t()),
    "another base weight": lambda layer: setattr(
        layer.base_layer, "weight", nn.Parameter(torch.randn_like(layer.base_layer.weight))
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("write", WRITES.values(), ids=list(WRITES))
@pytest.mark.parametrize("shape", [(4, SIZE), (1, 4, WIDER)], ids=str)
def test_writes_of_every_kind_are_seen(write: Callable[[Any], object], shape: tuple[int, ...]) -> None:
    layer, x = adapted(torch.float32, size=shape[-1]), torch.randn(shape)
    before = layer(x)
    write(layer)
    assert not torch.allclose(layer(x), before)
    near(layer(x), formula(layer, x))


@torch.no_grad()
@pytest.mark.parametrize("light", [False, True], ids=["at once", "small ones with the next call"])
def test_old_base_weights_are_let_go_of(light: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not light:
        monkeypatch.setattr(bound, "_LIGHT", SIZE * SIZE - 1)
    layer, x = adapted(torch.float32), torch.randn(4, SIZE)
    layer(x)
    held = StorageWeakRef(layer.base_layer.weight.untyped_storage())
    layer.base_layer.weight.data = torch.randn(SIZE, SIZE)
    assert held.expired() is not light
    layer(x)
    assert held.expired()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_traced_code_has_the_parameters_as_parameters(dtype: torch.dtype) -> None:
    layer, x = adapted(dtype), torch.randn(1, 4, SIZE).to(dtype)
    layer(x)
    traced = torch.jit.trace(layer, x)
    near(traced(x), layer(x))
    for model in (layer, traced):
        for parameter in model.parameters():
            parameter.data = parameter.data.clone().mul_(3)
    many = torch.randn(2, 5, SIZE).to(dtype)
    near(traced(many), layer(many))


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_an_adapter_in_less_precision_does_not_round_the_base(
    large: bool, grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(blocks, "LARGE", 2 * SIZE)
        monkeypatch.setattr(blocks, "SMALL", 0)
    layer, x = adapted(torch.float32), torch.randn(40, SIZE, requires_grad=grad)
    layer.bfloat16().base_layer.float()
    nn.init.zeros_(layer.lora_B["default"].weight)
    with torch.set_grad_enabled(grad):
        assert torch.equal(layer(x), layer.base_layer(x))
        if grad:
            (found,) = torch.autograd.grad(layer(x).sum(), x)
            (expected,) = torch.autograd.grad(layer.base_layer(x).sum(), x)
            assert torch.equal(found, expected)
