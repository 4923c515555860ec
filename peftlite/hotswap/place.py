"""One layer that a LoRA adapter is on: its factors, whatever its kind, and its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftlite.core.layer import AdapterLayer
from peftlite.core.slots import View
from peftlite.core.transaction import keep, keep_values
from peftlite.errors import ConfigError
from peftlite.tuners.lora.dora import Dora
from peftlite.tuners.lora.lowrank import LowRank
from peftlite.tuners.lora.plain import Lora
from peftlite.tuners.lora.stacks import names_of, padded, stack_of, stored, times
from peftlite.tuners.lora.start import Mica, Shifted, start_of

SIZES = ("out_features", "in_features", "out_channels", "in_channels")


@dataclass(frozen=True)
class Place:
    """One layer that an adapter is on."""

    path: str
    layer: AdapterLayer
    name: str

    @property
    def prepared(self) -> bool:
        """Whether its tensors and its scaling are to be written in place."""
        return isinstance(self.layer.scaling[self.name], Tensor)

    @property
    def can_be_padded(self) -> bool:
        """Whether rows and columns of zeros change nothing."""
        return type(self.layer.variants[self.name]) in (Lora, Shifted, Mica, Dora) and not self.started

    @property
    def started(self) -> bool:
        """Whether first factors are subtracted there, that follow from rank and scaling."""
        return start_of(self.layer.host, View(self.layer, self.name)) is not None

    def factors(self) -> LowRank:
        """Its factors, as they are stored."""
        live = self.layer.tensors(self.name)
        down, up = names_of(self.layer.host)
        return stack_of(self.layer.host, live[down].detach(), live[up].detach())

    def widened(self, rank: int) -> dict[str, Tensor]:
        """The factors padded to a rank, by file suffix; none if they have it.

        Raises: ConfigError.
        """
        host, factors = self.layer.host, self.factors()
        count = times(host)
        if rank == factors.rank * count:
            return {}
        if rank < factors.rank * count or rank % count:
            least = max(factors.rank * count, -(-rank // count) * count)
            raise ConfigError(
                f"`target_rank` is `{rank}`, and adapter `{self.name}` needs at least {least} on `{self.path}`. "
                "Nothing was changed."
            )
        if not self.can_be_padded:
            kind = type(self.layer.variants[self.name])
            raise ConfigError(
                f"Adapter `{self.name}` is {kind.__name__} on `{self.path}`, whose rank cannot be changed. Nothing was "
                "changed."
            )
        wide = stored(host, padded(factors, rank // count))
        return {suffix: tensor.contiguous() for suffix, tensor in wide.items()}


def put_numbers(layer: AdapterLayer, name: str, r: int, alpha: float, scaling: float) -> None:
    """Note an adapter's numbers; a scaling that is a tensor is written in place, so that compiled code sees it."""
    held = layer.scaling[name]
    if isinstance(held, Tensor):
        keep_values(held)
        held.fill_(scaling)
    elif held != scaling:
        layer.scaling[name] = scaling
    for numbers, value in ((layer.r, r), (layer.lora_alpha, alpha)):
        if numbers[name] != value:
            numbers[name] = value


def scaling_as_tensor(layer: AdapterLayer, name: str) -> None:
    """Let an adapter's scaling be a tensor, so that its value is data to compiled code."""
    if not isinstance(layer.scaling[name], Tensor):
        device = next(iter(layer.tensors(name).values())).device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        layer.scaling[name] = torch.tensor(layer.scaling[name], device=device, dtype=dtype)


def resize(layer: AdapterLayer, name: str) -> None:
    """Let the modules of an adapter's factors say the sizes that they have."""
    for slot in ("lora_A", "lora_B"):
        module: Any = layer.container(slot)._modules.get(name)
        if module is not None:
            keep(module.__dict__, *(key for key in SIZES if key in module.__dict__))
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
