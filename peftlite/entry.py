"""From a model to a wrapper, and adapters without one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from peftlite.config import PeftConfig
from peftlite.core.transaction import atomic
from peftlite.errors import CheckpointError, StateError, UnsupportedFeatureError
from peftlite.registry import later

if TYPE_CHECKING:
    from peftlite import model as wrappers
    from peftlite.checkpoint import keys
    from peftlite.core import inject as injection
    from peftlite.core import lifecycle, targets, variant
else:
    wrappers = later("peftlite.model")
    keys = later("peftlite.checkpoint.keys")
    injection = later("peftlite.core.inject")
    lifecycle = later("peftlite.core.lifecycle")
    targets = later("peftlite.core.targets")
    variant = later("peftlite.core.variant")

M = TypeVar("M", bound=nn.Module)


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
    *,
    unmatched: targets.UnmatchedPolicy = "error",
) -> wrappers.PeftModel:
    """Add an adapter to `model`, in place, and wrap it in the class that belongs to the config's task.

    The config is copied; `revision`, of the base model, goes into the copy. `unmatched="warn"` or `"ignore"` accepts
    entries of the config that match nothing, of a list shared between models.

    Raises:
        StateError: `model` is a wrapper or has adapters.
        AdapterNameError, ConfigError, TargetNotFoundError, UnsupportedLayerError: as `peftlite.plan`; the model is
            then as it was.
    """
    if mixed:
        raise UnsupportedFeatureError("`mixed` is `True`; it can only be `False`. Nothing was changed.")
    injection.check_config(peft_config)
    if revision is not None:
        peft_config = peft_config.copy()
        peft_config.revision = revision
    return wrappers.model_class_for(peft_config)(
        model,
        peft_config,
        adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
        unmatched=unmatched,
    )


def wrap(model: nn.Module) -> wrappers.PeftModel:
    """The wrapper of a model that has adapters in place: nothing is copied; `PeftModel.unwrap` is the way back.

    A model that is wrapped is given back as it is.

    Raises: NoAdapterError, StateError if its adapters are of several kinds.
    """
    if isinstance(model, wrappers.PeftModel):
        return model
    configs = lifecycle.state_of(model).configs
    kinds = sorted({str(getattr(config.peft_type, "value", config.peft_type)) for config in configs.values()})
    if len(kinds) > 1:
        raise StateError(
            f"A wrapper is for adapters of one kind, and this model has {', '.join(f'`{kind}`' for kind in kinds)}. "
            "Nothing was changed."
        )
    return wrappers.model_class_for(next(iter(configs.values()))).around(model)


@atomic
def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: M,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
    *,
    autocast_adapter_dtype: bool = True,
    unmatched: targets.UnmatchedPolicy = "error",
) -> M:
    """Add an adapter to any torch module, in place, make it the active one, and give the module back.

    `state_dict`, an adapter's weights, says by its keys which modules get one, in place of the config's
    `target_modules`; it is not loaded.

    Raises: what `peftlite.plan` raises; the model is then as it was.
    """
    config = peft_config if state_dict is None else targets_from(state_dict, peft_config)
    injection.inject(
        model,
        config,
        adapter_name,
        low_cpu_mem_usage=low_cpu_mem_usage,
        autocast_adapter_dtype=autocast_adapter_dtype,
        unmatched=unmatched,
    )
    if lifecycle.active_adapters(model) != [adapter_name]:
        lifecycle.set_adapter(model, adapter_name)
    return model


def targets_from(state_dict: Mapping[str, Tensor], config: PeftConfig) -> PeftConfig:
    """A copy of `config` that targets the modules which have weights in `state_dict`, by their whole paths.

    Raises: CheckpointError if there are none.
    """
    slots = {slot.name for slot in variant.tuner_for(config).slots if not slot.shared}
    paths = set()
    for key in state_dict:
        parts = keys.without_prefix(key).split(".")
        at = next((i for i, part in enumerate(parts) if part in slots), 0)
        if at:
            paths.add(".".join(parts[:at]))
    if not paths:
        raise CheckpointError(
            f"`state_dict` has no weights of a `{variant.tuner_for(config).peft_type}` adapter; its keys are "
            f"{', '.join(map(keys.shown, list(state_dict)[:3])) or 'none'}. Nothing was changed."
        )
    selecting: dict[str, Any] = {"target_modules": sorted(paths), "exclude_modules": None, "layers_to_transform": None}
    has = {field.name for field in dataclasses.fields(config)}
    return dataclasses.replace(config.copy(), **{name: v for name, v in selecting.items() if name in has})
