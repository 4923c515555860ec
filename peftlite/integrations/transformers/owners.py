"""Whose adapters a transformers model has, and whose config a call is about: ours, or those of real `peft`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from torch import nn

from peftlite.config import PeftConfig
from peftlite.errors import StateError
from peftlite.registry import later

if TYPE_CHECKING:
    from peftlite.core import tree
else:
    tree = later("peftlite.core.tree")

FLAG = "_hf_peft_config_loaded"
CONFIGS = "peft_config"


def is_foreign(model: nn.Module) -> bool:
    """Whether real `peft` put adapters into `model` by transformers' own methods."""
    return bool(model.__dict__.get(FLAG))


def is_foreign_config(config: object) -> bool:
    """Whether `config` is one of real `peft`."""
    peft = sys.modules.get("peft")
    kind = getattr(peft, "PeftConfig", None)
    return isinstance(kind, type) and isinstance(config, kind) and not isinstance(config, PeftConfig)


def check_not_foreign(model: nn.Module) -> None:
    """Refuse to treat the adapters of real `peft` as ours.

    Raises: StateError.
    """
    if is_foreign(model):
        names = ", ".join(f"`{name}`" for name in model.__dict__.get(CONFIGS, ()))
        raise StateError(
            f"{type(model).__name__} has adapters of the `peft` package ({names}): use its functions, or a model "
            "without them. Nothing was changed."
        )


def check_not_ours(model: nn.Module) -> None:
    """Refuse to let real `peft` add adapters beside ours.

    Raises: StateError.
    """
    state = tree.find_state(model)
    if state is not None:
        raise StateError(
            f"{type(model).__name__} has adapters of peftlite ({', '.join(f'`{name}`' for name in state.configs)}), "
            "and this is a config of the `peft` package: use `peftlite.LoraConfig`. Nothing was changed."
        )
