"""torchao: an ordinary `nn.Linear` (and printed so) whose weight is a tensor of torchao's."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlite.core.hosts import LinearHost, register_host_for
from peftlite.core.packed import PackedHost, cannot_quantise


class TorchaoHost(PackedHost, LinearHost):
    """The weight replaces itself: what is held is the parameter."""

    label = "Linear"

    @property
    def name(self) -> str:
        return "TorchaoLoraLinear"  # as PEFT prints it

    def expand(self, packed: Any) -> Tensor:
        own = type(packed.data).dequantize is not Tensor.dequantize
        return packed.data.dequantize() if own else through_identity(packed.data)

    def pack(self, weight: Tensor, like: Any) -> Any:
        old = like.data
        make = MAKERS.get(type(old).__name__)
        if make is None:
            raise cannot_quantise(old)
        return nn.Parameter(make(weight.to(old.dtype), old), requires_grad=False)

    def moved(self, packed: Any) -> Any:
        return packed if packed.device == self.device else nn.Parameter(packed.data.to(self.device), False)


def through_identity(packed: Tensor) -> Tensor:
    """The weight (out, in) as the layer's own product computes it: W I^T."""
    eye = torch.eye(packed.shape[1], dtype=packed.dtype, device=packed.device)
    return F.linear(eye, packed).T


# ---- quantising anew as it was done: symmetric if no block has a zero point, in the same blocks
def int8(weight: Tensor, old: Any) -> Any:
    """`Int8WeightOnlyConfig` and its like."""
    kinds: Any = import_module("torchao.quantization.granularity")
    block = tuple(old.block_size)
    if block == tuple(weight.shape):
        granularity = kinds.PerTensor()
    else:
        granularity = kinds.PerRow() if block[-1] == weight.shape[-1] else kinds.PerGroup(block[-1])
    return type(old).from_hp(
        weight,
        granularity,
        mapping_type=mapping(old.zero_point),
        act_quant_kwargs=old.act_quant_kwargs,
        act_quant_scale=old.act_quant_scale,
        act_quant_zero_point=old.act_quant_zero_point,
        act_pre_scale=old.act_pre_scale,
        reduce_range=old.reduce_range,
    )


def intx(weight: Tensor, old: Any) -> Any:
    """`IntxWeightOnlyConfig`: 1 to 8 bits, one byte each."""
    return type(old).from_hp(
        weight,
        old.block_size,
        old.target_dtype,
        mapping_type=mapping(old.zero_point),
        activation_quantization=old.activation_quantization,
    )


def int4(weight: Tensor, old: Any) -> Any:
    """`Int4WeightOnlyConfig` in its packing formats."""
    return type(old).from_hp(weight, list(old.block_size))


def mapping(zero_point: Tensor | None) -> Any:
    """How torchao calls the way that a weight with these zero points was quantised."""
    kinds: Any = import_module("torchao.quantization.quant_primitives").MappingType
    symmetric = zero_point is None or not bool(zero_point.any())
    return kinds.SYMMETRIC if symmetric else kinds.ASYMMETRIC


MAKERS: Final[dict[str, Callable[[Tensor, Any], Any]]] = {
    "Int8Tensor": int8,
    "IntxUnpackedToInt8Tensor": intx,
    "Int4Tensor": int4,
    "Int4OpaqueTensor": int4,
    "Int4TilePackedTo4dTensor": int4,
    "Int4PlainInt32Tensor": int4,
}


def patch(utils: ModuleType) -> None:
    """Make linear layers with weights of torchao's known."""
    names: Any = utils
    kind: type[Tensor] = names.TorchAOBaseTensor

    def has_torchao_weight(layer: nn.Module) -> bool:
        return isinstance(layer, nn.Linear) and isinstance(layer._parameters.get("weight"), kind)

    register_host_for(has_torchao_weight)(TorchaoHost)
