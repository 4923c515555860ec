"""Small things that are asked of adapters now and then."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from peftlite.checks import check_choice
from peftlite.config import PeftConfig
from peftlite.core.lifecycle import state_of
from peftlite.core.tree import base_model_of, layers
from peftlite.errors import PeftliteError


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Whether a directory or repository has an adapter that can be read."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except PeftliteError:
        return False
    return True


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Inside the `with` block all adapters act `multiplier` times as strongly; afterwards as before.

    Raises: NoAdapterError, StateError if adapters are merged.
    """
    state_of(model)
    before = [(layer.scaling, dict(layer.scaling)) for layer in layers(model) if "scaling" in layer.__dict__]
    try:
        for scaling, values in before:
            for name, value in values.items():
                scaling[name] = value * multiplier
        yield
    finally:
        for scaling, values in before:
            for name, value in values.items():
                if scaling[name] != value:
                    scaling[name] = value


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Inside the `with` block inputs reach adapters as they are.

    An adapter here casts its input to the dtype that its weights have at that moment, so that weights which hooks cast
    for a call need no such block: there is nothing to switch off, and this is for code that was written for PEFT.
    """
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
