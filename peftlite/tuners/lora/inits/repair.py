"""LoftQ for a base that is quantised already: factors that make up for what quantising it lost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from peftlite.core.hosts import LinearHost
from peftlite.core.lifecycle import state_of
from peftlite.core.transaction import atomic, keep_values
from peftlite.core.tree import named_layers
from peftlite.errors import CheckpointError, ConfigError, StateError
from peftlite.tuners.lora.inits.loftq import nearest
from peftlite.tuners.lora.plain import Lora

_INDEX = "model.safetensors.index.json"
_FILE = "model.safetensors"


@atomic
@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Give a fresh adapter on a quantised base first values with scaling * B A near W - Q: of what was quantised, W,
    less what that gave, Q, the best approximation of the adapter's rank. The base stays as it is.

    Args:
        peft_model: the model with the adapter, wrapped or not.
        model_path: the weights before quantising: a safetensors file, or a directory with one or several. By default
            the directory that the base model was loaded from.
        adapter_name: which adapter.
        callback: called with the model and a layer's name after each layer; what it says no to is taken back.

    Raises: StateError if no quantised layer has the adapter, CheckpointError if the files lack a weight.
    """
    state = state_of(peft_model)
    state.checked(adapter_name)
    layers = {
        path: layer
        for path, layer in named_layers(peft_model)
        if isinstance(layer.host, LinearHost) and layer.host.packed and adapter_name in layer.variants
    }
    if not layers:
        raise StateError(f"No quantised layer has adapter `{adapter_name}`. Nothing was changed.")
    for path, layer in layers.items():
        if type(layer.variants[adapter_name]) is not Lora:
            kind = type(layer.variants[adapter_name]).__name__
            raise StateError(f"Adapter `{adapter_name}` is {kind} on `{path}`, not plain LoRA. Nothing was changed.")
        if layer.scaling[adapter_name] <= 0:
            scaling = layer.scaling[adapter_name]
            raise StateError(f"The scaling of `{path}` is `{scaling}`; it must be above 0. Nothing was changed.")
    names = {id(module): name for name, module in peft_model.named_modules()}
    path_or_none = model_path or state.configs[adapter_name].base_model_name_or_path
    with originals(path_or_none) as read:
        for path, layer in layers.items():
            read(f"{path}.weight", layer.host.shape, False)
        for path, layer in layers.items():
            W = read(f"{path}.weight", layer.host.shape, True)
            parameters = (layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight)
            before = [parameter.clone() for parameter in parameters]
            keep_values(*parameters)
            error = W.to(layer.host.device).float() - layer.own().weight.float()
            for parameter, value in zip(
                parameters, nearest(error, len(before[0]), layer.scaling[adapter_name]), strict=True
            ):
                put(parameter, value)
            if callback is not None and not callback(peft_model, names[id(layer)]):
                for parameter, value in zip(parameters, before, strict=True):
                    parameter.copy_(value)


def put(parameter: Tensor, value: Tensor) -> None:
    """Write a factor; what a smaller rank leaves over is zero."""
    parameter.zero_()
    parameter[: value.shape[0], : value.shape[1]] = value


Read = Callable[[str, tuple[int, ...], bool], Tensor]


@contextmanager
def originals(place: str | None) -> Iterator[Read]:
    """What reads weights by name from a file or directory, or (False) only checks that they are there.

    Raises: ConfigError if there are no such files.
    """
    path = Path(place or "")
    files = files_of(path)
    if not place or not files:
        raise ConfigError(
            f"`model_path` is `{place}`, where there is no `{_FILE}`: give it the file or directory of the weights as "
            "they were before quantising. Nothing was changed."
        )
    with ExitStack() as stack:
        keys: dict[str, Any] = {}
        for file in files:
            opened = stack.enter_context(safe_open(file, "pt"))
            keys.update(dict.fromkeys(opened.keys(), opened))

        def read(name: str, shape: tuple[int, ...], wanted: bool) -> Tensor:
            found = keys.get(name)
            size = None if found is None else tuple(found.get_slice(name).get_shape())
            if found is None or size != shape:
                raise CheckpointError(
                    f"`{place}` has {'no' if found is None else f'a tensor of shape {size} as'} `{name}`, which must "
                    f"have shape {shape}. Nothing was changed."
                )
            return found.get_tensor(name) if wanted else torch.empty(0)

        yield read


def files_of(path: Path) -> list[Path]:
    """The safetensors files that a path means."""
    if path.is_file():
        return [path]
    if (path / _INDEX).is_file():
        index: Mapping[str, Any] = json.loads((path / _INDEX).read_text(encoding="utf-8"))
        return [path / name for name in sorted(set(index["weight_map"].values()))]
    return [path / _FILE] if (path / _FILE).is_file() else []
