"""Small things that are asked of adapters now and then."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peftlite.checks import check_choice, check_number, wrong
from peftlite.config import PeftConfig
from peftlite.core.binding import rebind
from peftlite.core.lifecycle import merged_adapters, state_of
from peftlite.core.transaction import atomic, on_failure, restoring
from peftlite.core.tree import base_model_of, find_state, layers
from peftlite.errors import PeftliteError, StateError


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Whether a directory or repository has an adapter that can be read."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except PeftliteError:
        return False
    return True


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Inside the `with` block, the scalings of all adapters of `model` are multiplied; afterwards they are as before.

    Raises: ConfigError if `multiplier` is not a finite number, StateError if an adapter is merged or none has a
    scaling, NoAdapterError.
    """
    factor, state = float(check_number("multiplier", multiplier)), state_of(model)
    found: list[tuple[Any, str, Any]] = [
        (layer.scaling, name, scaling)
        for layer in layers(model)
        if "scaling" in layer.tuner.numbers
        for name, scaling in list(layer.scaling.items())
    ]
    if not found:
        raise StateError("The methods of this model's adapters have no scaling. Nothing was changed.")
    merged = merged_adapters(model)
    if merged:
        raise StateError(f"Adapter `{merged[0]}` is merged: call `unmerge_adapter` first. Nothing was changed.")
    before = [scaling.clone() if isinstance(scaling, Tensor) else scaling for _, _, scaling in found]

    def back() -> None:
        for (scalings, name, _), scaling in zip(found, before, strict=True):
            if name in scalings:
                put(scalings, name, scaling)
        rebind(model, state)

    with restoring(back):
        for scalings, name, scaling in found:
            put(scalings, name, scaling * factor)
        rebind(model, state)
        yield


@atomic
def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """For training under autocast: parameters that train become fp32, all others `dtype`. Packed ones stay as they are.

    Raises: ConfigError for what is no dtype of floating point numbers.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise wrong("dtype", dtype, "a dtype of floating point numbers, such as `torch.bfloat16`")
    for parameter in model.parameters():
        if parameter.is_floating_point():
            on_failure(partial(setattr, parameter, "data", parameter.data))
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def put(scalings: Any, name: str, value: Any) -> None:
    """Write a scaling; one that is a tensor in place, since compiled code reads it."""
    if isinstance(scalings[name], Tensor):
        scalings[name].copy_(value)
    else:
        scalings[name] = value


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Inside the `with` block, LoRA's factors are given the layers' inputs in the dtype that those have.

    Else they get them in the factors' own dtype, which is not the one to compute in where hooks change it for each
    call, as layerwise casting does. Of a model without adapters nothing changes.
    """
    state = find_state(model)
    if state is None or not active:
        yield
        return
    with restoring(partial(setattr, state, "cast_inputs", state.cast_inputs)):
        state.cast_inputs = False
        yield


def update_forward_signature(model: nn.Module) -> None:
    """Give a wrapper's `forward` the signature and docstring of its base model's."""
    _take_over(model, "forward")


def update_generate_signature(model: nn.Module) -> None:
    """Give a wrapper's `generate` the signature and docstring of its base model's."""
    _take_over(model, "generate")


def update_signature(model: nn.Module, method: str = "all") -> None:
    """Give a wrapper's methods the signatures of its base model's: "forward", "generate" or "all".

    Raises: ConfigError for another word.
    """
    check_choice("method", method, ["forward", "generate", "all"])
    for name in ("forward", "generate"):
        if method in (name, "all"):
            _take_over(model, name)


def _take_over(model: Any, name: str) -> None:
    call = getattr(type(model), name)
    theirs = getattr(base_model_of(model), name)

    @functools.wraps(theirs)
    def method(*args: Any, **kwargs: Any) -> Any:
        return call(model, *args, **kwargs)

    method.__signature__ = inspect.signature(theirs)  # type: ignore[attr-defined]
    model.__dict__[name] = method
