"""Looking at what goes through the layers that a config targets, while a model runs; nothing of the model changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftlite.core.hosts import Host, LinearHost
from peftlite.core.inject import plan
from peftlite.core.tree import base_model_of
from peftlite.errors import ConfigError, StateError

Watcher = Callable[[Tensor, Tensor], None]
"""Called with the input (..., in) and the output (..., out) of a layer."""


def linear_targets(model: nn.Module, config: Any, init: str) -> dict[str, Host]:
    """The linear layers that `config` targets in a bare model, by path.

    Raises: ConfigError if the config does not ask for this beginning, and what `plan` raises.
    """
    if config.init_lora_weights != init:
        raise ConfigError(
            f"`init_lora_weights` is `{config.init_lora_weights!r}`, and this prepares for `{init}`. "
            "Nothing was changed."
        )
    planned = plan(model, config, "_")
    return {site.path: site.host for site in planned.sites if isinstance(site.host, LinearHost) and site.tuner.numbers}


@contextmanager
def watched(watchers: dict[nn.Module, Watcher]) -> Iterator[None]:
    """Inside the block, call each watcher after each call of its module."""
    with ExitStack() as stack:
        for module, watcher in watchers.items():
            handle = module.register_forward_hook(_hook(watcher), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _hook(watcher: Watcher) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        watcher(args[0] if args else next(iter(kwargs.values())), output)

    return hook


def by_path(model: nn.Module, paths: list[str]) -> dict[str, nn.Module]:
    """The modules at these paths of a model's base."""
    base = base_model_of(model)
    return {path: base.get_submodule(path) for path in paths}


def rows(x: Tensor) -> Tensor:
    """A layer's input or output as rows (tokens, size), in fp32 and without gradients."""
    return x.detach().flatten(0, -2).float()


def check_called(seen: dict[str, Any], paths: list[str], what: str) -> None:
    """Refuse to go on when some layer saw nothing.

    Raises: StateError.
    """
    silent = [path for path in paths if path not in seen]
    if silent:
        raise StateError(
            f"{what} did not reach {', '.join(f'`{path}`' for path in silent[:3])}"
            f"{' ...' if len(silent) > 3 else ''}: nothing is known of what goes through there. Nothing was changed."
        )


def read_cache(file: str | None) -> dict[str, Tensor] | None:
    """The tensors of a cache file, if there is one."""
    return load_file(file) if file is not None and Path(file).exists() else None


def write_cache(file: str | None, tensors: dict[str, Tensor]) -> None:
    """Write a cache file, if one is asked for."""
    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, file)


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """Inside the block no parameter collects a gradient; afterwards flags and gradients are what they were."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag, gradient in before:
            parameter.requires_grad_(flag)
            parameter.grad = gradient
