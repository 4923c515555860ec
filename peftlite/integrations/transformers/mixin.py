"""transformers' own adapter methods (`model.add_adapter(...)`), for peftlite's adapters and without `peft` installed.

What is changed in transformers, and why:

    PeftAdapterMixin.<SHARED>, .add_adapter, .load_adapter    ours for our adapters and configs, else the originals
    PeftAdapterMixin.<ADDED>                                  the rest of the lifecycle
    PeftAdapterMixin._hf_peft_config_loaded, .peft_config     properties: true of a model however it got its adapters
    PreTrainedModel.save_pretrained, .push_to_hub             the files of `save_adapter` (see saving.py)
    PreTrainedModel.resize_token_embeddings                   the original, which also notes the old size (see facts.py)

A model that carries adapters of real `peft`, and a config of real `peft`, still go to transformers' own methods.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from torch import nn

import peftlite.tuners  # noqa: F401 - makes known what it has
from peftlite.checkpoint.adapters import save_adapter
from peftlite.config import PeftConfig
from peftlite.core import lifecycle, status
from peftlite.core.inject import inject
from peftlite.core.transaction import atomic
from peftlite.core.tree import find_state
from peftlite.errors import ConfigError
from peftlite.integrations.transformers import directories, facts, loading, routing, saving
from peftlite.integrations.transformers.owners import (
    CONFIGS,
    FLAG,
    check_not_foreign,
    check_not_ours,
    is_foreign,
    is_foreign_config,
)

Method = Callable[..., Any]


# ---- the methods that transformers has too
@atomic
def add_adapter(model: nn.Module, adapter_config: PeftConfig, adapter_name: str | None = None) -> None:
    """Add a new adapter, in place, and make it the active one.

    Raises: what `peftlite.plan` raises, and StateError if the model has adapters of real `peft`; the model is then as
    it was.
    """
    name = adapter_name or "default"
    check_not_foreign(model)
    inject(model, adapter_config, name)
    lifecycle.set_adapter(model, name)


def set_adapter(model: nn.Module, adapter_name: str | Sequence[str]) -> None:
    """Use these adapters, and no others, from now on; see `peftlite.set_adapter`."""
    lifecycle.set_adapter(model, adapter_name)


@atomic
def delete_adapter(model: nn.Module, adapter_names: str | Sequence[str]) -> None:
    """Remove adapters; see `peftlite.delete_adapter`.

    Raises: AdapterNameError if any is unknown; none is removed then.
    """
    state = lifecycle.state_of(model)
    for name in sorted(state.checked(adapter_names), key=state.active.__contains__):  # the active ones last
        lifecycle.delete_adapter(model, name)


SHARED: dict[str, Method] = {
    "set_adapter": set_adapter,
    "enable_adapters": lifecycle.enable_adapters,
    "disable_adapters": lifecycle.disable_adapters,
    "active_adapters": lifecycle.active_adapters,
    "delete_adapter": delete_adapter,
    "get_adapter_state_dict": saving.get_adapter_state_dict,
}
"""What transformers has too: our functions, for models with our adapters."""

ADDED: dict[str, Method] = {
    "merge_adapter": lifecycle.merge_adapter,
    "unmerge_adapter": lifecycle.unmerge_adapter,
    "merge_and_unload": lifecycle.merge_and_unload,
    "unload": lifecycle.unload,
    "disable_adapter": lifecycle.disable_adapter,
    "scale_adapter": lifecycle.scale_adapter,
    "save_adapter": save_adapter,
    "create_or_update_model_card": saving.create_or_update_model_card,
    "print_trainable_parameters": status.print_trainable_parameters,
    "get_layer_status": status.get_layer_status,
    "get_model_status": status.get_model_status,
}
"""What transformers does not have."""


# ---- the patch
def patch(modeling_utils: ModuleType) -> None:
    """Put the methods on the classes that every transformers model inherits them from; once per class."""
    mixin: Any = modeling_utils.PeftAdapterMixin
    if not isinstance(vars(mixin).get(FLAG), property):
        _patch_mixin(mixin)
    saving.patch(modeling_utils.PreTrainedModel)
    facts.patch(modeling_utils.PreTrainedModel)
    routing.patch(modeling_utils)
    directories.patch(modeling_utils)


def _patch_mixin(mixin: Any) -> None:
    for name, ours in SHARED.items():
        setattr(mixin, name, _either(ours, getattr(mixin, name, None)))
    for name, ours in ADDED.items():
        setattr(mixin, name, _either(ours, None))
    mixin.add_adapter = _by_config(add_adapter, mixin.add_adapter)
    mixin.load_adapter = loading.loading(mixin.load_adapter)
    setattr(mixin, CONFIGS, property(_get_configs, _set_configs, _delete_configs))
    setattr(mixin, FLAG, property(_get_flag, _set_flag))


def _either(ours: Method, theirs: Method | None) -> Method:
    @functools.wraps(ours)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if theirs is not None and is_foreign(self):
            return theirs(self, *args, **kwargs)
        check_not_foreign(self)
        return ours(self, *args, **kwargs)

    return method


def _by_config(ours: Method, theirs: Method) -> Method:
    @functools.wraps(ours)
    def method(self: nn.Module, adapter_config: Any, adapter_name: str | None = None) -> Any:
        if isinstance(adapter_config, PeftConfig):
            return ours(self, adapter_config, adapter_name)
        if not is_foreign_config(adapter_config):
            raise ConfigError(
                f"`adapter_config` is `{type(adapter_config).__name__}`, and must be a config such as "
                "`peftlite.LoraConfig`. Nothing was changed."
            )
        check_not_ours(self)
        return theirs(self, adapter_config, adapter_name)

    return method


# ---- what transformers asks a model about its adapters: derived from the adapters that are there
def _get_flag(self: nn.Module) -> bool:
    stored: bool | None = self.__dict__.get(FLAG)
    return find_state(self) is not None if stored is None else stored


def _set_flag(self: nn.Module, value: bool) -> None:
    """Real `peft` says True; a model that saves itself without its adapters says False for a while."""
    self.__dict__.pop(FLAG, None)
    if bool(value) != (find_state(self) is not None):
        self.__dict__[FLAG] = bool(value)


def _get_configs(self: nn.Module) -> Any:
    """The configs by adapter; AttributeError without adapters, as in transformers."""
    state = find_state(self)
    if state is not None:
        return state.configs
    if CONFIGS in self.__dict__:
        return self.__dict__[CONFIGS]
    raise AttributeError(f"{type(self).__name__} has no adapters, and so no `{CONFIGS}`")


def _set_configs(self: nn.Module, value: Any) -> None:
    self.__dict__[CONFIGS] = value


def _delete_configs(self: nn.Module) -> None:
    self.__dict__.pop(CONFIGS, None)
