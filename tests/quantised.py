"""Quantised layers made from plain ones, on the CPU: bitsandbytes, torchao and HQQ are needed, not optional."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from torch import Tensor, nn
from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

from peftlite.core.hosts import host_for
from peftlite.core.packed import PackedHost

Quantise = Callable[[nn.Linear], nn.Module]


def four_bit(quant_type: str, double: bool) -> Quantise:
    """bitsandbytes, computing in the dtype that the weights had."""

    def quantise(linear: nn.Linear) -> nn.Module:
        layer: Any = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=linear.weight.dtype,
            compress_statistics=double,
            quant_type=quant_type,
        )
        layer.support_avx512bf16_for_cpu = False  # the same numbers on every CPU; repacking has tests of its own
        return filled(layer.to(linear.weight.dtype), linear)

    return quantise


def eight_bit(linear: nn.Linear) -> nn.Module:
    layer = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=linear.bias is not None, has_fp16_weights=False
    )
    return filled(layer, linear)


def filled(layer: nn.Module, linear: nn.Linear) -> nn.Module:
    """`layer` with the weights of `linear`, quantised by moving it, as bitsandbytes does."""
    for name, parameter in linear.named_parameters():
        layer.get_parameter(name).data = parameter.detach().clone()
    layer.to("cpu")
    return layer.train(linear.training)


def by_torchao(config: Any) -> Quantise:
    def quantise(linear: nn.Linear) -> nn.Module:
        holder = nn.Sequential(copy.deepcopy(linear))
        quantize_(holder, config, filter_fn=lambda module, name: name == "0")
        holder[0].__dict__.pop("extra_repr", None)  # made of what cannot be pickled
        return holder[0]

    return quantise


def by_hqq(linear: nn.Linear) -> nn.Module:
    layer = HQQLinear(
        copy.deepcopy(linear).requires_grad_(False),
        BaseQuantizeConfig(nbits=4, group_size=32),
        compute_dtype=linear.weight.dtype,
        device="cpu",
    )
    return layer.train(linear.training)


QUANTISED: dict[str, Quantise] = {
    "linear4bit-nf4": four_bit("nf4", double=False),
    "linear4bit-nf4-double": four_bit("nf4", double=True),
    "linear4bit-fp4": four_bit("fp4", double=False),
    "linear4bit-fp4-double": four_bit("fp4", double=True),
    "linear8bit": eight_bit,
    "torchao-int8": by_torchao(Int8WeightOnlyConfig()),
    "torchao-int8-grouped": by_torchao(Int8WeightOnlyConfig(granularity=PerGroup(32))),
    "torchao-int4": by_torchao(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))),
    "torchao-int4-packed": by_torchao(PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False)),
    "hqq": by_hqq,
}


def quantise_linears(model: nn.Module, kind: str, leave: tuple[str, ...] = ("lm_head", "head")) -> nn.Module:
    """Replace every `nn.Linear` of the model by its quantised form, but for those called `leave`."""
    for path, module in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if type(module) is nn.Linear and name not in leave:
            setattr(model.get_submodule(parent), name, QUANTISED[kind](module))
    return model


def shake(model: nn.Module, scale: float = 0.1) -> None:
    """Random weights for the adapters, the same for every model with adapters in the same places."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def held_by(value: Any, seen: set[int] | None = None) -> list[Tensor]:
    """Copies of all tensors that a layer's packed weight consists of."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, (nn.Module, type)):
        return []
    seen.add(id(value))
    parts: list[Any] = []
    if isinstance(value, (tuple, list)):
        parts = list(value)
    elif isinstance(value, dict):
        parts = list(value.values())
    elif hasattr(value, "__dict__"):
        parts = list(vars(value).values())
    if type(value) is Tensor or type(value) is nn.Parameter or type(value).__name__ in ("Params4bit", "Int8Params"):
        parts = [*parts, value.data] if type(value) is not Tensor else []
    own = [value.clone()] if type(value) is Tensor else []
    return own + [tensor for part in parts for tensor in held_by(part, seen)]


def bytes_of(model: nn.Module) -> list[Tensor]:
    found = []
    for module in model.modules():
        host = host_for(module)
        if isinstance(host, PackedHost):
            found += held_by(host.held()) + ([] if host.bias is None else [host.bias.detach().clone()])
    assert found
    return found


def same(ones: list[Tensor], others: list[Tensor]) -> bool:
    return len(ones) == len(others) and all(map(torch.equal, ones, others))


def distance(one: Tensor, other: Tensor) -> float:
    one, other = one.detach().float(), other.detach().float()
    return float((one - other).norm() / other.norm())
