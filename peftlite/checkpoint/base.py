"""The base model's own tensors, by the keys that they have without adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

from torch import Tensor, nn

from peftlite.checkpoint.keys import WRAPPER_PARTS, nearest_keys, shown
from peftlite.checkpoint.state_dict import bare
from peftlite.core.hosts import is_borrowed
from peftlite.core.layer import AdapterLayer
from peftlite.core.lifecycle import merged_adapters, state_of
from peftlite.core.transaction import atomic, keep_values
from peftlite.core.tree import base_model_of
from peftlite.errors import CheckpointError, StateError

T = TypeVar("T")


class IncompatibleKeys(NamedTuple):
    """What did not fit, as `nn.Module.load_state_dict` says it."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The base model's tensors, by the keys that they had before it was given adapters. No copies are made.

    Raises: NoAdapterError, StateError while adapters are merged.
    """
    base = unmerged_base(model)
    return by_own_name(base, base.state_dict())


@atomic
def set_base_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True
) -> IncompatibleKeys:
    """Write tensors with the keys that `get_base_model_state_dict` gives into the base model; all of them, or none.

    With `strict=False`, keys may be missing or unexpected; they are returned.

    Raises: CheckpointError for keys or shapes that do not fit, NoAdapterError, StateError while adapters are merged,
        for quantised layers that are more than their tensors, or if the base model is an overlay, whose weights are
        another model's.
    """
    base = unmerged_base(model)
    live = base.state_dict(keep_vars=True)
    own, keys = by_own_name(base, live), by_own_name(base, {key: key for key in live})
    found = IncompatibleKeys([key for key in own if key not in state_dict], [k for k in state_dict if k not in own])
    if strict and (found.missing_keys or found.unexpected_keys):
        raise CheckpointError(_misfit(found, own))
    chosen = {key: tensor for key, tensor in state_dict.items() if key in own}
    packed = packed_modules(base, live)
    for key, tensor in chosen.items():
        if id(module_of(base, keys[key])) in packed:
            raise StateError(
                f"{shown(key)} is of a layer whose weight is quantised, which is replaced when a model is loaded, and "
                "not written into. Nothing was changed."
            )
        check_fits(key, tensor, own[key])
    keep_values(*(own[key] for key in chosen))
    base.load_state_dict({keys[key]: tensor for key, tensor in chosen.items()}, strict=False)
    return found


def check_fits(key: str, tensor: Tensor, own: Tensor) -> None:
    """Refuse what cannot be written into one of the base model's tensors.

    Raises: CheckpointError, StateError.
    """
    if tensor.shape != own.shape or tensor.is_floating_point() != own.is_floating_point():
        raise CheckpointError(
            f"{shown(key)} has shape {tuple(tensor.shape)} and {tensor.dtype}, and the base model's has "
            f"{tuple(own.shape)} and {own.dtype}. Nothing was changed."
        )
    if is_borrowed(own):
        raise StateError(
            "The base model is an overlay and shares its weights: load into a model with weights of its own. "
            "Nothing was changed."
        )


def packed_modules(base: nn.Module, live: Iterable[str]) -> set[int]:
    """The modules, by id, that have more in their state dicts than parameters and buffers: of these it is a part."""
    plain = {name for name, _ in base.named_parameters(remove_duplicate=False)}
    plain |= {name for name, _ in base.named_buffers(remove_duplicate=False)}
    return {id(module_of(base, key)) for key in live if key not in plain}


def module_of(base: nn.Module, key: str) -> nn.Module:
    """The module that a key of a state dict is of."""
    module = base
    for part in key.split("."):
        inner = module._modules.get(part)
        if inner is None:
            break
        module = inner
    return module


def unmerged_base(model: nn.Module) -> nn.Module:
    """The base model of a model with adapters.

    Raises: NoAdapterError, StateError while any is merged: its weights are then not its own.
    """
    model = bare(model)
    state_of(model)
    if merged := merged_adapters(model):
        raise StateError(
            f"Adapter `{merged[0]}` is merged into the base model's weights: call `unmerge_adapter` first. "
            "Nothing was changed."
        )
    return base_model_of(model)


def by_own_name(base: nn.Module, values: Mapping[str, T]) -> dict[str, T]:
    """What is the base model's own of values by keys of its state dict, by the keys that it had without adapters."""
    named = ((own_name(base, key), value) for key, value in values.items())
    return {name: value for name, value in named if name is not None}


def own_name(base: nn.Module, key: str) -> str | None:
    """A key of a model's state dict as it was without adapters; None for one of an adapter."""
    module: nn.Module | None = base
    kept = []
    for part in key.split("."):
        while module is not None and (inner := WRAPPER_PARTS & module._modules.keys()) and part not in inner:
            module = module._modules[next(iter(inner))]  # whose name is not in keys
        if isinstance(module, AdapterLayer):
            if part != module.tuner.base_slot:
                return None
        elif part not in WRAPPER_PARTS:
            kept.append(part)
        module = None if module is None else module._modules.get(part)
    return ".".join(kept)


def _misfit(found: IncompatibleKeys, own: Mapping[str, Tensor]) -> str:
    said = []
    if found.missing_keys:
        said.append(f"lacks {len(found.missing_keys)} of its tensors (first: {shown(found.missing_keys[0])})")
    if found.unexpected_keys:
        first = found.unexpected_keys[0]
        near = "".join(f"; nearest: {shown(key)}" for key in nearest_keys(first, own))
        said.append(f"has {len(found.unexpected_keys)} that it does not have (first: {shown(first)}{near})")
    return f"The state dict for the base model {' and '.join(said)}. Nothing was changed."
