"""How LoRA adapters run on this machine, chosen after they were made or loaded."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from peftlite.core.binding import unbind
from peftlite.core.lifecycle import state_of
from peftlite.errors import ConfigError
from peftlite.tuners.lora.config import LoraConfig
from peftlite.tuners.lora.values import LoraRuntimeConfig


def set_runtime_config(
    model: nn.Module, runtime_config: LoraRuntimeConfig, adapter_names: str | Iterable[str] | None = None
) -> None:
    """Have LoRA adapters of `model` (default: all of them) run as `runtime_config` says, from the next call on.

    It stands in their configs then, and is in no file.

    Raises: NoAdapterError, AdapterNameError, ConfigError if one is no LoRA adapter or its method does not have what is
    asked for (UnsupportedFeatureError); nothing is changed then.

    Example:
        >>> import torch, peftlite
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8)).bfloat16()
        >>> model = peftlite.inject_adapter_in_model(peftlite.LoraConfig(target_modules=["0"]), model)
        >>> peftlite.set_runtime_config(model, peftlite.LoraRuntimeConfig(compute_dtype="base"))
    """
    state = state_of(model)
    configs: list[LoraConfig] = []
    for name in state.configs if adapter_names is None else state.checked(adapter_names):
        config = state.configs[name]
        if isinstance(config, LoraConfig):
            configs.append(config)
        elif adapter_names is not None:
            kind = type(config).__name__
            raise ConfigError(f"Adapter `{name}` has a {kind}, which has no `runtime_config`. Nothing was changed.")
    if not configs:
        raise ConfigError("None of the model's adapters is LoRA, which has a `runtime_config`. Nothing was changed.")
    checked = [config.check_runtime(runtime_config) for config in configs]
    for config, value in zip(configs, checked, strict=True):
        config.runtime_config = value
    unbind(model, state)
