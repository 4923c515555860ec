"""A model before and after a call that must not change it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftlite.core.tree import find_state, layers


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a failed call must leave alone."""
    state = find_state(model)
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "parameters": {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)},
        "values": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "merged": [list(layer.merged_adapters) for layer in layers(model)],
        "state": state and (dict(state.configs), state.active, state.trainable, state.enabled),
    }


def check_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    values = after.pop("values"), before.pop("values")
    assert list(values[0]) == list(values[1])
    assert all(torch.equal(values[0][name], values[1][name]) for name in values[0])
    assert after == before
