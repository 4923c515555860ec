"""Adapters on `nn.MultiheadAttention`, whose `out_proj` PEFT applies twice: in its outputs, and so in its training.

The files are alike. Ours say in their metadata that the adapter was meant once; of others it is said that they may have
been meant twice, and `double_out_proj` makes that of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from peftlite.core.hosts import AttentionHost
from peftlite.core.layer import AdapterLayer
from peftlite.core.lifecycle import merged_adapters, state_of
from peftlite.core.tree import layers, named_layers
from peftlite.errors import ConfigError, StateError, warn

MARK = {"peftlite.out_proj": "once"}


def double_out_proj(model: nn.Module, adapter_name: str = "default") -> None:
    """Make an adapter what PEFT made of it: its effect on the `out_proj` of every `nn.MultiheadAttention`, doubled.

    For adapters that were trained with PEFT, which has that effect twice; call it once, after loading. Saved again,
    the adapter has it doubled.

    Raises: NoAdapterError, AdapterNameError, StateError if it is merged, ConfigError if it is on no such layer.
    """
    state_of(model).checked(adapter_name)
    if adapter_name in merged_adapters(model):
        raise StateError(f"Adapter `{adapter_name}` is merged: call `unmerge_adapter` first. Nothing was changed.")
    found = list(projections(model, adapter_name))
    if not found:
        raise ConfigError(f"Adapter `{adapter_name}` is on no `nn.MultiheadAttention`. Nothing was changed.")
    for _, layer in found:
        with torch.no_grad():
            layer.tensors(adapter_name)["lora_B.weight"].mul_(2)


def projections(model: nn.Module, name: str) -> Iterator[tuple[str, AdapterLayer]]:
    """(path of the attention layer, adapter layer of its `out_proj`) where adapter `name` is on both."""
    if not any(isinstance(layer.host, AttentionHost) for layer in layers(model)):
        return
    for path, layer in named_layers(model):
        if isinstance(layer.host, AttentionHost) and name in layer.variants:
            inside: Any = layer.get_base_layer()._modules["out_proj"]
            if isinstance(inside, AdapterLayer) and name in inside.variants:
                yield path, inside


def metadata_of(model: nn.Module, name: str) -> dict[str, str]:
    """What the file of an adapter says of its attention layers."""
    return dict(MARK) if any(projections(model, name)) else {}


def warn_of_doubling(model: nn.Module, name: str, metadata: Mapping[str, str]) -> None:
    """Say that a loaded adapter may have been trained with the effect on `out_proj` doubled."""
    paths = [path for path, _ in projections(model, name)]
    if paths and not MARK.items() <= metadata.items():
        listed = ", ".join(f"`{path}`" for path in paths[:3]) + (", ..." if len(paths) > 3 else "")
        warn(
            f"Adapter `{name}` is on layers of `nn.MultiheadAttention` ({listed}). If PEFT trained it, which "
            f"applies its `out_proj` twice, call `peftlite.double_out_proj(model, {name!r})` now, so that outputs are "
            "the same here."
        )
