"""What a model's adapters are doing now: a report for each adapter layer, one for the model, and parameter counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import nn

from peftlite.core.call import current
from peftlite.core.layer import AdapterLayer
from peftlite.core.lifecycle import state_of
from peftlite.core.tree import Shell, base_model_of, named_layers

Irregular = Literal["irregular"]
IRREGULAR: Irregular = "irregular"
T = TypeVar("T")


@dataclass
class TunerLayerStatus:
    """One adapter layer. `"irregular"`: the parameters of one adapter differ in `requires_grad`."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


@dataclass
class TunerModelStatus:
    """All adapter layers together. `"irregular"`: they differ, so see `get_layer_status`."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None = None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """One report for each adapter layer; inside `use_adapter` and `disable_adapter`, what calls there would use.

    Names are paths in the base model, or, where `model` is a wrapper, in the tuner's wrapper (`model....`).

    Raises: NoAdapterError, StateError.
    """
    state_of(model)
    prefix = "model." if shells(model) else ""
    return [_layer_status(prefix + path, layer) for path, layer in named_layers(model)]


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """One report for the whole model.

    An adapter counts as merged when every layer that has it has merged it, modules trained whole included.

    Raises: NoAdapterError, StateError.
    """
    state = state_of(model)
    reports = get_layer_status(model)
    wrappers = shells(model)
    trainable, total = count_parameters(model)
    return TunerModelStatus(
        base_model_type=type(base_model_of(model)).__name__,
        adapter_model_type=type(wrappers[-1]).__name__ if wrappers else "None",
        peft_types={name: str(getattr(c.peft_type, "value", c.peft_type)) for name, c in state.configs.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(reports),
        enabled=_same(report.enabled for report in reports),
        active_adapters=_same(report.active_adapters for report in reports),
        merged_adapters=_merged(reports),
        requires_grad={
            name: _same(r.requires_grad[name] for r in reports if name in r.requires_grad) for name in state.configs
        },
        available_adapters=sorted(state.configs),
        devices={
            name: sorted({device for r in reports for device in r.devices.get(name, ())}) for name in state.configs
        },
        quantization_backend=_same(report.quantization_backend for report in reports),
    )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(parameters that require gradients, all parameters), each once however many modules share it."""
    trainable = total = 0
    for parameter in model.parameters():
        total += parameter.numel()
        trainable += parameter.numel() if parameter.requires_grad else 0
    return trainable, total


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many parameters train, of how many."""
    trainable, total = count_parameters(model)
    share = 100 * trainable / max(total, 1)
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")


def in_use(layer: AdapterLayer) -> tuple[bool, list[str]]:
    """(whether adapters are enabled, the active ones), for a call of `layer` made here and now."""
    call = current()
    if call is None or (call := call.of(layer.state)) is None:
        return layer.enabled, layer.active_adapters
    names = list(call.adapters)
    return bool(names), names or layer.active_adapters


def shells(model: nn.Module) -> list[Shell]:
    """The wrappers around the base model, the outermost first."""
    compiled = model._modules.get("_orig_mod")  # what torch.compile returns
    if compiled is not None:
        return shells(compiled)
    return [model, *shells(model.inner())] if isinstance(model, Shell) else []


def _layer_status(name: str, layer: AdapterLayer) -> TunerLayerStatus:
    enabled, active = in_use(layer)
    return TunerLayerStatus(
        name=name,
        module_type=layer._get_name(),
        enabled=enabled,
        active_adapters=active,
        merged_adapters=list(layer.merged_adapters),
        requires_grad={adapter: _same(_flags(layer, adapter)) for adapter in layer.variants},
        available_adapters=sorted(layer.variants),
        devices={a: sorted({t.device.type for t in layer.tensors(a).values()}) for a in layer.variants},
    )


def _flags(layer: AdapterLayer, name: str) -> Iterator[bool]:
    return (parameter.requires_grad for parameter in layer.parameters_of(name))


def _same(values: Iterable[T]) -> T | Irregular:
    """The one value that all have."""
    first, *others = values
    return first if all(other == first for other in others) else IRREGULAR


def _merged(reports: list[TunerLayerStatus]) -> list[str] | Irregular:
    merged = sorted({name for report in reports for name in report.merged_adapters})
    for report in reports:
        if any(name in report.available_adapters and name not in report.merged_adapters for name in merged):
            return IRREGULAR
    return merged
