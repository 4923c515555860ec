"""HQQ: half-quadratic quantisation, 1 to 8 bits."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from peftlite.core.hosts import LinearHost, register_host, swapped
from peftlite.core.packed import PackedHost

PackedHqq = tuple[Any, dict[str, Any]]  # W_q and what it takes to expand it


class HqqHost(PackedHost, LinearHost):
    """`HQQLinear`, a module of its own kind: the packed weight is `W_q`, scales and zero points are in `meta`."""

    label = "Linear"

    def __init__(self, layer: nn.Module, param: str = "W_q") -> None:
        super().__init__(layer, "W_q")

    @property
    def name(self) -> str:
        return "HqqLoraLinear"  # as PEFT prints it

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.compute_dtype  # type: ignore[return-value]

    def held(self) -> PackedHqq:
        layer: Any = self.layer
        return layer.W_q, layer.meta

    def hold(self, packed: PackedHqq) -> None:
        layer: Any = self.layer
        layer.W_q, layer.meta = packed

    def expand(self, packed: PackedHqq) -> Tensor:
        weight: Tensor = self.twin(packed).dequantize()
        return weight

    def pack(self, weight: Tensor, like: PackedHqq) -> PackedHqq:
        twin = self.twin(like)
        del twin._parameters["W_q"]  # `quantize` assigns what is no Parameter yet
        twin.quantize(weight, **twin.quant_config)
        return twin.W_q, twin.meta

    def twin(self, packed: PackedHqq) -> Any:
        """Another layer with this weight: HQQ's own functions write into the layer that they are called on."""
        codes, meta = packed
        twin: Any = swapped(self.layer, {"W_q": codes})
        twin.meta = dict(meta)
        return twin

    def moved(self, packed: PackedHqq) -> PackedHqq:
        codes, meta = packed
        if codes.device == self.device:
            return packed
        return nn.Parameter(codes.to(self.device), requires_grad=False), {
            key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in meta.items()
        }


def patch(quantize: ModuleType) -> None:
    """Make HQQ's layers known."""
    names: Any = quantize
    register_host(names.HQQLinear)(HqqHost)
