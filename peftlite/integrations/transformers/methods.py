"""The methods that transformers' models have for adapters: ours for our adapters and configs, else the originals."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from peftlite.checkpoint.adapters import save_adapter
from peftlite.config import PeftConfig
from peftlite.core import leaving, lifecycle, status
from peftlite.core.inject import inject
from peftlite.core.transaction import atomic
from peftlite.errors import ConfigError
from peftlite.integrations.transformers import loading, saving
from peftlite.integrations.transformers.owners import check_not_foreign, check_not_ours, is_foreign, is_foreign_config

Method = Callable[..., Any]


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
        leaving.delete_adapter(model, name)


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
    "merge_and_unload": leaving.merge_and_unload,
    "unload": leaving.unload,
    "disable_adapter": lifecycle.disable_adapter,
    "scale_adapter": lifecycle.scale_adapter,
    "save_adapter": save_adapter,
    "create_or_update_model_card": saving.create_or_update_model_card,
    "print_trainable_parameters": status.print_trainable_parameters,
    "get_layer_status": status.get_layer_status,
    "get_model_status": status.get_model_status,
}
"""What transformers does not have."""


def methods(theirs: Mapping[str, Method]) -> dict[str, Method]:
    """What transformers' mixin gets by name, given what it has."""
    return {
        **{name: _either(ours, theirs.get(name)) for name, ours in SHARED.items()},
        **{name: _either(ours, None) for name, ours in ADDED.items()},
        "add_adapter": _by_config(add_adapter, theirs["add_adapter"]),
        "load_adapter": loading.loading(theirs["load_adapter"]),
    }


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
