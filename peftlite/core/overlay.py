"""A second model on the same tensors, for those who must leave the first one untouched."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, nn

from peftlite.core.hosts import mark_borrowed
from peftlite.core.tree import base_model_of, find_state
from peftlite.errors import StateError

M = TypeVar("M", bound=nn.Module)


def overlay(model: M) -> M:
    """A structural clone of `model`: its modules are new, its parameters share the original's storage.

    Inject it, train it, merge it like any model: the original never changes. Merging gives the overlay weights of its
    own for as long as something is merged. Buffers, which forward may write (running statistics), are copies.

    Raises: StateError if `model` has adapters, which both would share.

    Example:
        >>> import torch
        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> twin = overlay(base)
        >>> twin[0] is base[0], twin[0].weight.data_ptr() == base[0].weight.data_ptr()
        (False, True)
    """
    if find_state(model) is not None:
        raise StateError(
            f"{type(model).__name__} has adapters, which the overlay would share: call `overlay` on the base model "
            f"({type(base_model_of(model)).__name__}) before adding any. Nothing was changed."
        )
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = borrowed(parameter)
    return copy.deepcopy(model, memo)


def borrowed(parameter: nn.Parameter) -> Tensor:
    """Another Parameter on the same storage; what is more than a plain Parameter (quantised) is shared as it is."""
    if type(parameter) is not nn.Parameter:
        return parameter
    twin = nn.Parameter(parameter.detach(), parameter.requires_grad)
    mark_borrowed(twin)
    return twin
