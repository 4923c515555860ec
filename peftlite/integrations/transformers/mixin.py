"""transformers' own adapter methods (`model.add_adapter(...)`), for peftlite's adapters and without `peft` installed.

What is changed in transformers, and why:

    PeftAdapterMixin.<METHODS>                                the lifecycle (see methods.py), from the first use on
    PeftAdapterMixin._hf_peft_config_loaded, .peft_config     properties: true of a model however it got its adapters
    PreTrainedModel.save_pretrained, .push_to_hub             the files of `save_adapter` (see saving.py)
    PreTrainedModel.resize_token_embeddings                   the original, which notes the old size (see models.py)

A model that carries adapters of real `peft`, and a config of real `peft`, still go to transformers' own methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import nn

from peftlite.integrations.transformers import directories, models, routing
from peftlite.integrations.transformers.owners import CONFIGS, FLAG
from peftlite.registry import later, registry

if TYPE_CHECKING:
    from peftlite.core import tree
    from peftlite.integrations.transformers import methods
else:
    tree = later("peftlite.core.tree")
    methods = later("peftlite.integrations.transformers.methods")

SHARED = (
    "add_adapter",
    "load_adapter",
    "set_adapter",
    "enable_adapters",
    "disable_adapters",
    "active_adapters",
    "delete_adapter",
    "get_adapter_state_dict",
)
"""What transformers has too."""
ADDED = (
    "merge_adapter",
    "unmerge_adapter",
    "merge_and_unload",
    "unload",
    "disable_adapter",
    "scale_adapter",
    "save_adapter",
    "create_or_update_model_card",
    "print_trainable_parameters",
    "get_layer_status",
    "get_model_status",
)
METHODS = (*SHARED, *ADDED)


def patch(modeling_utils: ModuleType) -> None:
    """Put the methods on the classes that every transformers model inherits them from; once per class."""
    mixin: Any = modeling_utils.PeftAdapterMixin
    if not isinstance(vars(mixin).get(FLAG), property):
        _patch_mixin(mixin)
    registry("facts").homes["transformers"] = "peftlite.integrations.transformers.facts"
    models.patch(modeling_utils.PreTrainedModel)
    routing.patch(modeling_utils)
    directories.patch(modeling_utils)


def _patch_mixin(mixin: Any) -> None:
    theirs = {name: getattr(mixin, name) for name in SHARED if name in dir(mixin)}
    for name in METHODS:
        setattr(mixin, name, FirstUse(mixin, name, theirs))
    setattr(mixin, CONFIGS, property(_get_configs, _set_configs, _delete_configs))
    setattr(mixin, FLAG, property(_get_flag, _set_flag))


class FirstUse:
    """A method of the mixin that nobody has asked for yet: when it is, all of them are imported and take their places.

    theirs: transformers' own methods by name.
    """

    def __init__(self, mixin: Any, name: str, theirs: Mapping[str, Callable[..., Any]]) -> None:
        self.mixin = mixin
        self.name = name
        self.theirs = theirs

    def __get__(self, model: Any, cls: Any = None) -> Any:
        for name, method in methods.methods(self.theirs).items():
            setattr(self.mixin, name, method)
        return vars(self.mixin)[self.name].__get__(model, cls)


# ---- what transformers asks a model about its adapters: derived from the adapters that are there
def _get_flag(self: nn.Module) -> bool:
    stored: bool | None = self.__dict__.get(FLAG)
    return tree.find_state(self) is not None if stored is None else stored


def _set_flag(self: nn.Module, value: bool) -> None:
    """Real `peft` says True; a model that saves itself without its adapters says False for a while."""
    self.__dict__.pop(FLAG, None)
    if bool(value) != (tree.find_state(self) is not None):
        self.__dict__[FLAG] = bool(value)


def _get_configs(self: nn.Module) -> Any:
    """The configs by adapter; AttributeError without adapters, as in transformers."""
    state = tree.find_state(self)
    if state is not None:
        return state.configs
    if CONFIGS in self.__dict__:
        return self.__dict__[CONFIGS]
    raise AttributeError(f"{type(self).__name__} has no adapters, and so no `{CONFIGS}`")


def _set_configs(self: nn.Module, value: Any) -> None:
    self.__dict__[CONFIGS] = value


def _delete_configs(self: nn.Module) -> None:
    self.__dict__.pop(CONFIGS, None)
