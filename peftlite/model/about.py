"""The side of `PeftModel` that tells what there is: its adapters, how many parameters train, what is in use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from peftlite.base_tuner import BaseTuner
from peftlite.config import PeftConfig, PeftType
from peftlite.core.tree import base_model_of, layers
from peftlite.errors import StateError
from peftlite.registry import later
from peftlite.wrapping import Wrapper

if TYPE_CHECKING:
    from peftlite.core import status
else:
    status = later("peftlite.core.status")


class Reporting(Wrapper):
    """The outer wrapper, as what answers questions."""

    inside = "base_model"
    base_model: BaseTuner

    @property
    def active_adapter(self) -> str | None:
        """The first of the adapters in use."""
        return next(iter(self.active_adapters), None)

    @property
    def active_peft_config(self) -> PeftConfig:
        """The config of the first adapter in use."""
        name = self.active_adapter
        if name is None:
            raise StateError("No adapter is active: call `set_adapter` first.")
        return self.peft_config[name]

    @property
    def peft_type(self) -> PeftType:
        """The kind of all its adapters."""
        return self.base_model.kind

    @property
    def modules_to_save(self) -> set[str] | None:
        """The names of the modules that any adapter trains whole."""
        return {
            name for config in self.peft_config.values() for name in getattr(config, "modules_to_save", None) or ()
        } or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The dtype that the base model says it has."""
        return getattr(self.get_base_model(), "dtype", None)

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether a call made here and now would use any adapter."""
        return any(enabled and active for enabled, active in map(status.in_use, layers(self)))

    def get_base_model(self) -> nn.Module:
        """The model inside the wrappers. It has its adapters: `unwrap` is the same, `unload` takes them out."""
        return base_model_of(self)

    def unwrap(self) -> nn.Module:
        """The model with its adapters in place, without wrappers; nothing is copied. `peftlite.wrap` undoes it."""
        return base_model_of(self)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(parameters that require gradients, all parameters)."""
        return status.count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, of how many."""
        status.print_trainable_parameters(self)

    def get_layer_status(self) -> list[status.TunerLayerStatus]:
        """One report for each adapter layer."""
        return status.get_layer_status(self)

    def get_model_status(self) -> status.TunerModelStatus:
        """One report for the whole model."""
        return status.get_model_status(self)
