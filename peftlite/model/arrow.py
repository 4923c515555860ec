"""Models whose tokens choose among adapters."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from peftlite.core import lifecycle
from peftlite.core.hosts import LinearHost
from peftlite.core.slots import View
from peftlite.core.targets import entries_for
from peftlite.core.transaction import atomic
from peftlite.core.tree import base_model_of, layers, named_layers, places
from peftlite.errors import ConfigError
from peftlite.model.wrapper import PeftModel
from peftlite.tuners.lora.arrow import Experts
from peftlite.tuners.lora.config import LoraConfig
from peftlite.tuners.lora.options import ArrowConfig

ROUTER = "arrow_router"
Paths = Sequence["str | os.PathLike[str]"]


@atomic
def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: Paths,
    arrow_config: ArrowConfig,
    general_adapter_paths: Paths | None = None,
    **adapter_kwargs: Any,
) -> PeftModel:
    """Load LoRA adapters into `base_model`, wrap it, and let each token choose among them: Arrow, without training.

    The adapters become `task_0`, `task_1`, ...; those of `general_adapter_paths`, whose mean is subtracted if
    `arrow_config.use_gks`, `gks_0`, ...; the one that routes, which is active, `arrow_router`. They may have any ranks
    and scalings, and be on different linear layers. A path may be an id with a folder, "user/repository/folder".

    Args:
        base_model: the bare model.
        task_specific_adapter_paths: directories or ids of the adapters to choose from.
        arrow_config: how tokens choose.
        general_adapter_paths: directories or ids of what is general in them.
        **adapter_kwargs: what `PeftModel.from_pretrained` takes beside these.

    Raises: ConfigError or StateError if these do not go together or an adapter is not plain LoRA on linear layers, and
        what `PeftModel.from_pretrained` raises; nothing is changed then.
    """
    tasks = {f"task_{k}": path for k, path in enumerate(task_specific_adapter_paths)}
    general = {f"gks_{k}": path for k, path in enumerate(general_adapter_paths or ())}
    if not tasks:
        raise ConfigError("`task_specific_adapter_paths` is empty; it needs one adapter at least. Nothing was changed.")
    arrow = replace(arrow_config, task_adapter_names=list(tasks), gks_adapter_names=list(general) or None)
    (name, path), *others = (tasks | general).items()
    model = PeftModel.from_pretrained(base_model, adapter_name=name, **located(path, adapter_kwargs))
    for name, path in others:
        model.load_adapter(adapter_name=name, **located(path, adapter_kwargs))
    model.add_adapter(ROUTER, router_config(model, arrow))
    for layer in layers(model):
        Experts(View(layer, ROUTER))
    model.set_adapter(ROUTER)
    model.eval()
    return model


def located(path: str | os.PathLike[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for an adapter at a directory, in a repository, or in a folder of one."""
    if not isinstance(path, str) or os.path.isdir(path) or os.path.isabs(path) or path.count("/") < 2:
        return {"model_id": path, **options}
    user, repository, folder = path.split("/", 2)
    return {"model_id": f"{user}/{repository}", **options, "subfolder": folder}


def router_config(model: nn.Module, arrow: ArrowConfig) -> LoraConfig:
    """The config of a router for the adapters that `arrow` names, on the layers where they are.

    Raises: ConfigError if one of them is not on linear layers alone.
    """
    base, state = base_model_of(model), lifecycle.state_of(model)
    first = state.configs[(arrow.task_adapter_names or [""])[0]]
    found: set[str] = set()
    for path, layer in named_layers(base):
        if not isinstance(layer.host, LinearHost):
            name = next(iter(layer.variants))
            raise ConfigError(
                f"Adapter `{name}` is on `{path}`, a {type(layer.get_base_layer()).__name__}: Arrow needs adapters on "
                "linear layers alone. Nothing was changed."
            )
        found.add(path)
    return LoraConfig(
        r=getattr(first, "r", 8),
        lora_alpha=getattr(first, "lora_alpha", 8),
        target_modules=entries_for([place.path for place in places(base)], found),
        task_type=first.task_type,
        inference_mode=True,
        arrow_config=arrow,
    )
