"""Making a quantised model ready to train adapters on (QLoRA, https://arxiv.org/abs/2305.14314)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from peftlite.core.binding import sync
from peftlite.core.lifecycle import merged_adapters
from peftlite.core.slots import HALF_DTYPES
from peftlite.core.tree import base_model_of, find_state, places
from peftlite.core.unpacking import packed_host
from peftlite.errors import StateError, UnsupportedFeatureError, warn

M = TypeVar("M", bound=nn.Module)


def prepare_model_for_kbit_training(
    model: M,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> M:
    """Make a quantised model ready to train adapters on, in place, before or after it is given any.

    The base model is frozen (adapters train on as they do), what is not quantised is kept in fp32 from now on, unless a
    kind of quantised layer takes its inputs in one dtype only (torchao, HQQ), and activations are recomputed in the
    backward pass.

    Args:
        model: a model or a wrapper; the same is given back.
        use_gradient_checkpointing: recompute activations, of a model with quantised layers.
        gradient_checkpointing_kwargs: for `torch.utils.checkpoint.checkpoint`.
        auto_clear_cache: give memory that the conversion freed back to the device.

    Raises: StateError if adapters are merged, UnsupportedFeatureError if the model cannot recompute activations;
        nothing is changed then.
    """
    base = base_model_of(model)
    hosts = [host for place in places(base, inside_layers=True) if (host := packed_host(place.module))]
    enable = checkpointing_of(base) if hosts and use_gradient_checkpointing else None
    check_unmerged(base)
    if not hosts:
        warn(f"{type(base).__name__} has no quantised layers: it is frozen and converted to fp32, nothing else.")
    freeze(base)
    for host in hosts:
        host.let_gradients_through()
    if all(host.takes_any_dtype for host in hosts):
        widen(base, {id(host.layer) for host in hosts})
    if enable is not None:
        require_input_grads(base)
        enable(None if gradient_checkpointing_kwargs is None else dict(gradient_checkpointing_kwargs))
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return model


def check_unmerged(base: nn.Module) -> None:
    """Refuse to convert weights that hold adapters, since the ones to be put back would stay as they were.

    Raises: StateError.
    """
    if find_state(base) is not None and (names := merged_adapters(base)):
        raise StateError(f"Adapter `{names[0]}` is merged: call `unmerge_adapter` first. Nothing was changed.")


def freeze(base: nn.Module) -> None:
    """The base model does not train; adapters do as their state says."""
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    state = find_state(base)
    if state is not None:
        sync(base, state, state.configs)


def widen(base: nn.Module, packed: set[int]) -> None:
    """fp32 for every parameter in half precision outside of the layers `packed` (ids)."""
    for module in base.modules():
        if id(module) not in packed:
            for parameter in module._parameters.values():
                if parameter is not None and parameter.dtype in HALF_DTYPES:
                    parameter.data = parameter.data.float()


def checkpointing_of(base: Any) -> Any:
    """What switches recomputation on for a model, given arguments for torch.

    Raises: UnsupportedFeatureError if nothing does.
    """
    if not getattr(base, "supports_gradient_checkpointing", True):
        found = None
    else:
        found = getattr(base, "activation_checkpointing_enable", None)  # in older transformers the other
        found = found or getattr(base, "gradient_checkpointing_enable", None)
    if found is None:
        raise UnsupportedFeatureError(
            f"`use_gradient_checkpointing` is `True`, and {type(base).__name__} has no way to switch that on; "
            "it can be `False`. Nothing was changed."
        )
    return found


def require_input_grads(base: Any) -> None:
    """Have the embeddings' output require gradients: recomputation leaves out what needs none."""
    if (enable := getattr(base, "enable_input_require_grads", None)) is not None:
        enable()
    elif (embeddings := getattr(base, "get_input_embeddings", None)) is not None:
        embeddings().register_forward_hook(_require_grad)


def _require_grad(module: nn.Module, args: Any, output: Tensor) -> None:
    output.requires_grad_(True)
