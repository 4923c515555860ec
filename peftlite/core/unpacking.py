"""Dense layers in the place of quantised ones, in a whole model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn

from peftlite.core.hosts import host_for
from peftlite.core.layer import AdapterLayer
from peftlite.core.packed import PackedHost
from peftlite.core.slots import is_floating
from peftlite.core.transaction import on_failure, put
from peftlite.core.tree import base_model_of, places


def unpack(model: nn.Module) -> bool:
    """Replace every quantised layer, adapted or not, by a dense one of the dtype that the model works in.

    Nothing may be merged into them. Gives whether there are any.
    """
    base = base_model_of(model)
    found = [(place, host) for place in places(base, inside_layers=True) if (host := packed_host(place.module))]
    dtype = working_dtype(base, {id(host.layer) for _, host in found})
    dense: dict[int, nn.Module] = {}
    for _, host in found:
        if id(host.layer) not in dense:
            dense[id(host.layer)] = host.dense_layer(dtype or host.dtype)
    for place, host in found:
        if isinstance(place.parent, AdapterLayer):
            on_failure(place.parent.forget_merged)  # what was merged into the dense layer
            place.parent.unbind()
        put(place.parent._modules, place.child, dense[id(host.layer)])
    return bool(found)


def packed_host(module: nn.Module) -> PackedHost | None:
    """The host of a quantised layer, or None for any other module."""
    host = host_for(module)
    return host if isinstance(host, PackedHost) else None


def working_dtype(base: nn.Module, packed: Iterable[int]) -> torch.dtype | None:
    """The dtype of most of the numbers that are not quantised: what layers are given, and are to give.

    None if the model has nothing else. packed: ids of the quantised layers.
    """
    ids, numbers = set(packed), Counter[torch.dtype]()
    for place in places(base, inside_layers=True):
        if id(place.module) not in ids and not isinstance(place.module, AdapterLayer):
            for parameter in place.module._parameters.values():
                if parameter is not None and is_floating(parameter):
                    numbers[parameter.dtype] += parameter.numel()
    return max(numbers, key=lambda dtype: numbers[dtype]) if numbers else None
