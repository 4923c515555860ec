"""PEFT's form of PiSSA and its like: the base layer holds what the first factors leave of its weight."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from peftlite.core.binding import rebind
from peftlite.core.hosts import widened
from peftlite.core.lifecycle import state_of
from peftlite.core.transaction import atomic, drop, on_failure, put
from peftlite.core.tree import named_layers
from peftlite.errors import StateError
from peftlite.tuners.lora.alora import Invoked
from peftlite.tuners.lora.inits.table import START, started
from peftlite.tuners.lora.plain import Lora
from peftlite.tuners.lora.start import Shifted


@atomic
@torch.no_grad()
def residual_into_base(model: nn.Module, adapter_name: str = "default") -> None:
    """Write W - scaling * B0 A0 into the base layers, for good, and make the adapter plain LoRA on them.

    That is what PEFT does from the start: forward is as fast as plain LoRA's, the factors' copies need no memory, and
    `unload` gives the residual model, to be quantised for example. The model's outputs with the adapter stay the same,
    but for rounding the weights; without it, and with other adapters, they change. Weights that other modules share
    become the layer's own.

    Raises: StateError if nothing is subtracted, if anything is merged, on quantised layers, and for aLoRA; nothing is
        changed then.
    """
    state = state_of(model)
    state.checked(adapter_name)
    found: list[Any] = []
    for path, layer in named_layers(model):
        factors: Any = layer._modules.get("lora_A") or {}
        if adapter_name in factors and started(factors[adapter_name]) is not None:
            check(path, layer, adapter_name)
            found.append(layer)
    if not found:
        raise StateError(f"Of adapter `{adapter_name}` nothing is subtracted: it did not begin away from zero.")
    for layer in found:
        A, B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
        product = B._buffers[START] @ A._buffers[START]
        layer.rewrite(widened(layer.own().weight) - layer.scaling[adapter_name] * product)
        for factor in (A, B):
            drop(factor._buffers, START)
            on_failure(partial(factor._non_persistent_buffers_set.add, START))
            factor._non_persistent_buffers_set.discard(START)
        if type(layer.variants[adapter_name]) is Shifted:
            put(layer.variants, adapter_name, Lora())
        layer.unbind()
    put(state.configs[adapter_name].__dict__, "init_lora_weights", True)
    rebind(model, state)


def check(path: str, layer: Any, name: str) -> None:
    """Refuse what would not be the same afterwards.

    Raises: StateError.
    """
    reasons = (
        (layer.merged, f"adapter `{', '.join(layer.merged_adapters)}` is merged into it: unmerge that first"),
        (layer.host.packed, "it is quantised, and would lose the residual to rounding"),
        (type(layer.variants[name]) is Invoked, "the adapter leaves tokens to the base layer, which would change"),
    )
    for applies, reason in reasons:
        if applies:
            raise StateError(f"The residual cannot be written into `{path}`: {reason}. Nothing was changed.")
