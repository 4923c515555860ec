"""Walking over models: the adapter layers of an injected model, and the places of modules and parameters in one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final, NamedTuple

from torch import nn

from peftlite.core.layer import AdapterLayer
from peftlite.core.state import AdapterState
from peftlite.errors import StateError


class Shell(nn.Module):
    """A module that wraps a model for the sake of its methods; the lifecycle looks through it."""

    def inner(self) -> nn.Module:
        """The module inside."""
        raise NotImplementedError(type(self).__name__)


def base_model_of(model: nn.Module) -> nn.Module:
    """The model inside all wrappers, or `model` itself."""
    compiled = model._modules.get("_orig_mod")  # what torch.compile returns
    if compiled is not None:
        return base_model_of(compiled)
    return base_model_of(model.inner()) if isinstance(model, Shell) else model


class Place(NamedTuple):
    """Where a module is: an attribute of its parent. One module may be in several places."""

    path: str
    parent: nn.Module
    child: str
    module: nn.Module


NOTHING: Final[Mapping[int, nn.Module]] = MappingProxyType({})


def children(module: nn.Module, instead: Mapping[int, nn.Module] = NOTHING) -> list[tuple[str, nn.Module]]:
    """The children of a module by name. instead: id of a module -> what to see in its place."""
    found = [(name, child) for name, child in module._modules.items() if child is not None]
    return [(name, instead.get(id(child), child)) for name, child in found] if instead else found


def places(
    model: nn.Module, inside_layers: bool = False, instead: Mapping[int, nn.Module] = NOTHING
) -> Iterator[Place]:
    """Every place below `model`, parents first; of adapter layers, what they wrap only `inside_layers`, slots never."""
    stack = [Place("", model, "", model)]
    while stack:
        place = stack.pop()
        if place.path:
            yield place
        module = place.module
        if isinstance(module, AdapterLayer):
            if inside_layers:
                slot = module.tuner.base_slot
                stack.append(Place(f"{place.path}.{slot}", module, slot, module.wrapped))
            continue
        prefix = f"{place.path}." if place.path else ""
        stack.extend(Place(prefix + name, module, name, child) for name, child in reversed(children(module, instead)))


def layer_places(model: nn.Module) -> list[Place]:
    """The places of adapter layers; a layer in several places comes several times."""
    return [
        place for place in places(base_model_of(model), inside_layers=True) if isinstance(place.module, AdapterLayer)
    ]


def layers(model: nn.Module) -> Iterator[AdapterLayer]:
    """The adapter layers, each once; without walking into their slots, so independent of the number of adapters."""
    seen: set[int] = set()
    stack = [base_model_of(model)]
    while stack:
        module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        below = module._modules
        if not isinstance(module, AdapterLayer):  # most modules have no children, and are not looked at again
            stack += [child for child in below.values() if child is not None and child._modules][::-1]
            continue
        yield module
        wrapped = below[module.tuner.base_slot]
        if wrapped is not None and wrapped._modules:
            stack.append(wrapped)


def named_layers(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
    """(path in the base model, adapter layer), each layer once, under its first path."""
    seen: set[int] = set()
    for place in layer_places(model):
        if isinstance(place.module, AdapterLayer) and id(place.module) not in seen:
            seen.add(id(place.module))
            yield place.path, place.module


def find_state(model: nn.Module) -> AdapterState | None:
    """The state of the adapters of `model`, or None if it has none.

    Raises: StateError if parts of the model were given adapters apart from each other.
    """
    first = next(layers(model), None)
    if first is None:
        return None
    return first.state


def check_one_state(model: nn.Module, found: Sequence[AdapterLayer] | None = None) -> None:
    """Refuse to treat as one a model whose parts were given adapters apart from each other.

    found: the model's layers, if they are known.

    Raises: StateError.
    """
    if len({id(layer.state) for layer in (layers(model) if found is None else found)}) > 1:
        owners: dict[int, str] = {}
        for path, layer in named_layers(model):
            owners.setdefault(id(layer.state), path)
        first, second, *_ = owners.values()
        raise StateError(
            f"`{first}` and `{second}` belong to models that were given adapters apart from each other: call this on "
            "each of those. Nothing was changed."
        )


def base_biases(model: nn.Module, bias: str, adapter_name: str) -> Iterator[nn.Parameter]:
    """The base model's own biases that `bias="all"` trains, or `"lora_only"`: those of the adapter's own layers."""
    if bias == "none":
        return
    replaced: list[str] = []  # modules trained whole: their own biases are out of use
    for place in places(base_model_of(model), inside_layers=True):
        if isinstance(place.module, AdapterLayer):
            if place.module.tuner.base_slot != "base_layer":
                replaced.append(f"{place.path}.")
            continue
        adapted = isinstance(place.parent, AdapterLayer) and adapter_name in place.parent.variants
        if place.path.startswith(tuple(replaced)) or (bias == "lora_only" and not adapted):
            continue
        for name, parameter in place.module._parameters.items():
            if parameter is not None and is_bias(name):
                yield parameter


def is_bias(name: str) -> bool:
    """Whether a parameter's own name says that it is a bias."""
    return name == "bias" or name.endswith("_bias")
