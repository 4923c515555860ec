"""Functions of PEFT that peftlite has under another name, or with other arguments."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from peftlite import entry
from peftlite.config import PeftConfig
from peftlite.core import leaving, lifecycle
from peftlite.core.slots import HALF_DTYPES
from peftlite.core.targets import TargetSpec, select
from peftlite.core.tree import base_model_of, layers
from peftlite.errors import PeftliteWarning, UnsupportedFeatureError
from peftlite.kinds import BaseTunerLayer

M = TypeVar("M", bound=nn.Module)


# ---- adapters
def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: M,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> M:
    """As `peftlite.inject_adapter_in_model`; the adapter has the base model's dtype, and the model a `peft_config`."""
    entry.inject_adapter_in_model(
        peft_config, model, adapter_name, low_cpu_mem_usage, state_dict, autocast_adapter_dtype=False, unmatched="warn"
    )
    dtypes = {p.dtype for layer in layers(model) for p in layer.parameters_of(adapter_name)} & set(HALF_DTYPES)
    if dtypes:
        warnings.warn(
            f"Adapter `{adapter_name}` is in {str(dtypes.pop()).removeprefix('torch.')}, the base model's dtype, as "
            "PEFT makes it here. `peftlite.inject_adapter_in_model` keeps adapters in fp32, which train better.",
            PeftliteWarning,
            stacklevel=2,
        )
    base: Any = base_model_of(model)
    if not isinstance(getattr(type(base), "peft_config", None), property):
        base.peft_config = lifecycle.state_of(base).configs
    return model


def set_adapter(
    model: nn.Module,
    adapter_name: str | Sequence[str],
    inference_mode: bool = False,
    layer_cls: type = BaseTunerLayer,
) -> None:
    """`peftlite.set_adapter`; all layers are of one class, so `layer_cls` says nothing."""
    lifecycle.set_adapter(model, adapter_name, inference_mode)


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str = "", layer_cls: type = BaseTunerLayer
) -> list[str] | None:
    """`peftlite.delete_adapter`; the names of the adapters in use then. `prefix` and `layer_cls` say nothing."""
    leaving.delete_adapter(model, adapter_name)
    return next((layer.active_adapters for layer in layers(model)), None)


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Put an adapter's parameters that are in half precision into fp32."""
    lifecycle.state_of(model).checked(adapter_name)
    for layer in layers(model) if autocast_adapter_dtype else ():
        for parameter in layer.parameters_of(adapter_name):
            if parameter.dtype in HALF_DTYPES:
                parameter.data = parameter.data.float()


def check_target_module_exists(config: PeftConfig, key: str) -> bool:
    """Whether a config's `target_modules` mean the module at this path."""
    return bool(select([key], TargetSpec.from_config(config)).targets)


def build_peft_weight_mapping(
    weight_conversions: Sequence[Any] | None, adapter_name: str, peft_config: PeftConfig | None = None
) -> list[Any]:
    """Never called by transformers, whose `load_adapter` asks for it: that of peftlite converts what it reads itself.

    Raises: UnsupportedFeatureError, if there are conversions.
    """
    if weight_conversions:
        raise UnsupportedFeatureError(
            f"`build_peft_weight_mapping` of {len(weight_conversions)} conversions, for the adapter `{adapter_name}`: "
            "`peftlite.load_adapter` and `model.load_adapter` convert files from before a model's layers were fused or "
            "renamed themselves. Nothing was changed."
        )
    return []


# ---- modules and tensors
def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def _freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    lifecycle.set_requires_grad(model, adapter_name, False)


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """`weight`, transposed if it is stored (in, out)."""
    return weight.T if fan_in_fan_out else weight


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """(device, address, size) of a tensor's memory: equal for tensors that share it."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def fsdp_auto_wrap_policy(model: nn.Module) -> Any:
    """FSDP's policy for models with adapters: blocks of the model, and layers whose own weights train, by themselves.

    The blocks are what the model calls `_no_split_modules`, or `FSDP_TRANSFORMER_CLS_TO_WRAP` in the environment.
    """
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    names = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    wanted = set(names.split(",")) - {""} or set(getattr(base_model_of(model), "_no_split_modules", None) or ())
    blocks = {type(module) for module in model.modules() if type(module).__name__ in wanted}

    def trains(module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return not list(module.children()) and isinstance(weight, Tensor) and weight.requires_grad

    return functools.partial(
        _or_policy,
        policies=[
            functools.partial(lambda_auto_wrap_policy, lambda_fn=trains),
            functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=blocks),
        ],
    )


def init_empty_weights(include_buffers: bool | None = None) -> AbstractContextManager[Any]:
    """Accelerate's context in which modules are made without memory."""
    accelerate: Any = importlib.import_module("accelerate")
    context: AbstractContextManager[Any] = accelerate.init_empty_weights(include_buffers=include_buffers)
    return context


# ---- what is installed
def _installed(package: str) -> Callable[[], bool]:
    """A function that says whether a package is installed."""

    def is_available() -> bool:
        return importlib.util.find_spec(package) is not None

    return is_available


is_aqlm_available = _installed("aqlm")
is_bnb_available = is_bnb_4bit_available = _installed("bitsandbytes")  # of any version that we read
is_diffusers_available = _installed("diffusers")
is_eetq_available = _installed("eetq")
is_gptqmodel_available = _installed("gptqmodel")
is_hqq_available = _installed("hqq")
is_inc_available = _installed("neural_compressor")
is_optimum_available = _installed("optimum")
is_torchao_available = _installed("torchao")
