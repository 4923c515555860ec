"""Slots: where one adapter's tensors and numbers live on a layer, stored and named as PEFT names them.

A layer stores slot by slot (`layer.lora_A["default"]`), so that printed trees and checkpoints stay compatible; the
maths reads adapter by adapter, through a `View` (`a.lora_A`).
"""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftlite.core.lean import Lean
from peftlite.core.transaction import drop, keep, on_failure, put, unnoted


class Watched(Lean):
    """A container that calls `on_write` when what it has of an adapter is replaced, which programs have bound.

    It is given the adapter's name, or None when all are replaced.
    """

    on_write: Callable[[str | None], None] | None = None

    def _replaced(self, name: str | None = None) -> None:
        if self.on_write is not None:
            self.on_write(name)

    def __setattr__(self, name: str, value: Any) -> None:  # how `load_state_dict(assign=True)` replaces a parameter
        super().__setattr__(name, value)
        if name in self._modules or name in self._parameters:
            self._replaced(name)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "on_write"}


class ModuleSlot(Watched, nn.ModuleDict):
    """An `nn.ModuleDict` that takes any adapter name, also those of its own methods ("train", "type")."""

    @property
    def held(self) -> dict[str, Any]:
        """What it has, by adapter."""
        return self._modules

    def _get_name(self) -> str:
        return "ModuleDict"

    def __setitem__(self, key: str, module: nn.Module) -> None:
        put(self._modules, key, module)
        self._replaced(key)

    def __delitem__(self, key: str) -> None:
        drop(self._modules, key)


class ParameterSlot(Watched, nn.ParameterDict):
    """An `nn.ParameterDict` that takes any adapter name, and so keeps its parameters by key alone."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["_keys"] = {}  # torch's own list of keys, which stays empty

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ParameterSlot:
        moved: ParameterSlot = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._replaced()
        return moved

    @property
    def held(self) -> dict[str, Any]:
        """What it has, by adapter."""
        return self._parameters

    def _get_name(self) -> str:
        return "ParameterDict"

    def __getitem__(self, key: str) -> Any:
        return self._parameters[key]

    def __setitem__(self, key: str, parameter: Any) -> None:
        put(self._parameters, key, parameter)
        self._replaced(key)

    def __delitem__(self, key: str) -> None:
        drop(self._parameters, key)

    def __len__(self) -> int:
        return len(self._parameters)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __reversed__(self) -> Iterator[str]:
        return reversed(list(self._parameters))

    def __contains__(self, key: object) -> bool:
        return key in self._parameters

    def keys(self) -> KeysView[str]:
        return self._parameters.keys()

    def values(self) -> ValuesView[Any]:
        return self._parameters.values()

    def items(self) -> ItemsView[str, Any]:
        return self._parameters.items()

    def get(self, key: str, default: Any = None) -> Any:
        return self._parameters.get(key, default)


class BufferSlot(Lean):
    """Frozen tensors by adapter name; their state-dict keys are `<slot>.<adapter>`."""

    @property
    def held(self) -> dict[str, Any]:
        """What it has, by adapter."""
        return self._buffers

    def _get_name(self) -> str:
        return "BufferDict"

    def __getitem__(self, key: str) -> Any:
        return self._buffers[key]

    def __setitem__(self, key: str, tensor: Tensor) -> None:
        put(self._buffers, key, tensor)

    def __delitem__(self, key: str) -> None:
        drop(self._buffers, key)
        if not self.in_files(key):
            on_failure(partial(self._non_persistent_buffers_set.add, key))
            self._non_persistent_buffers_set.discard(key)

    def leave_out(self, key: str) -> None:
        """Keep an adapter's tensor out of state dicts and files: it can be made again."""
        if self.in_files(key):
            on_failure(partial(self._non_persistent_buffers_set.discard, key))
            self._non_persistent_buffers_set.add(key)

    def in_files(self, key: str) -> bool:
        """Whether state dicts and files have this adapter's tensor."""
        return key not in self._non_persistent_buffers_set

    def __contains__(self, key: object) -> bool:
        return key in self._buffers

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __len__(self) -> int:
        return len(self._buffers)

    def keys(self) -> KeysView[str]:
        return self._buffers.keys()

    def items(self) -> ItemsView[str, Any]:
        return self._buffers.items()

    def extra_repr(self) -> str:
        return "\n".join(
            f"  ({k}): Buffer containing: [{v.type()} of size {'x'.join(map(str, v.shape))}]"
            for k, v in self._buffers.items()
            if v is not None
        )


SlotContainer = ModuleSlot | ParameterSlot | BufferSlot
SlotValue = nn.Module | Tensor


class Slot(NamedTuple):
    """One named place of a tuner's tensors.

    `file_name` is what a tensor's key in adapter files begins with (the slot's own name unless said otherwise, "" for
    none); `bare` says that a module's `weight` is written without its `.weight`. What is `derived` is made again from
    the config when a file is read. A `shared` slot has one tensor per adapter for all layers, in the model's state.
    """

    name: str
    kind: type[ModuleSlot] | type[ParameterSlot] | type[BufferSlot] = ParameterSlot
    trainable: bool = True
    file_name: str | None = None
    bare: bool = False
    derived: bool = False
    shared: bool = False

    def suffixes(self, value: SlotValue) -> list[tuple[str, str, Tensor]]:
        """(file suffix, attribute inside the value or "", tensor) of what `value` has in a layer's part of a file."""
        if self.derived or self.shared:
            return []
        prefix = self.name if self.file_name is None else self.file_name
        if isinstance(value, Tensor):
            return [(prefix, "", value)]
        begin = f"{prefix}." if prefix else ""
        return [(prefix if self.bare else begin + key, key, tensor) for key, tensor in state_of_module(value)]


def state_of_module(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """What `module.state_dict(keep_vars=True)` has, without its cost for the usual module that has parameters only."""
    own = module.__dict__
    plain = type(module)._save_to_state_dict is nn.Module._save_to_state_dict
    hooked = own.get("_state_dict_hooks") or own.get("_state_dict_pre_hooks")
    if own["_modules"] or own["_buffers"] or hooked or not plain:
        found: Iterable[tuple[str, Tensor]] = module.state_dict(keep_vars=True).items()
        return found
    return [(name, tensor) for name, tensor in own["_parameters"].items() if tensor is not None]


def set_mode(module: nn.Module, training: bool) -> None:
    """`module.train(training)`, without its cost for the usual module that has no others in it."""
    if module._modules or type(module).train is not nn.Module.train:
        module.train(training)
    else:
        module.__dict__["training"] = training


class Numbers(dict[str, Any]):
    """Per-adapter numbers such as `layer.scaling`. Programs have them bound, so every write tells the layer first."""

    def __init__(self, values: Mapping[str, Any] | Iterable[tuple[str, Any]] = ()) -> None:
        super().__init__(values)
        self.on_write: Callable[[str], None] | None = None

    def __setitem__(self, key: str, value: Any) -> None:
        if self.on_write is not None and key in self:
            self.on_write(key)
        keep(self, key)
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        if self.on_write is not None:
            self.on_write(key)
        drop(self, key)

    def __reduce__(self) -> tuple[Any, ...]:
        return Numbers, (dict(self),)


class View:
    """What one adapter owns on one layer: `a.lora_A` is `layer.lora_A[name]`.

    A lens, made when a program is bound: modules and numbers are looked up then, parameters (which assign-loading
    replaces) each time, but for compiled code, where a name would be a guard and so cost a graph per adapter.
    """

    bound: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, layer: Any, name: str) -> None:
        there, own = layer.__dict__, self.__dict__
        bound: dict[str, Any] = {}
        own["layer"], own["name"], own["config"] = layer, name, there["state"].configs.get(name)
        modules, tuner = there["_modules"], there["tuner"]
        for slot in there["used"]:
            container = modules[slot.name]
            modular = slot.kind is ModuleSlot
            value = (container.__dict__["_modules"] if modular else container.held).get(name)
            if value is not None:
                (own if modular else bound)[slot.name] = value
        for number in tuner.numbers:
            if number not in tuner.shown:
                own[number] = there[number].get(name)
        if bound:
            own["bound"] = bound

    def __getattr__(self, slot: str) -> Any:
        if slot.startswith("__"):
            raise AttributeError(slot)
        if torch.compiler.is_compiling():
            return self.bound[slot]
        layer = self.layer
        return layer.__dict__[slot].get(self.name) if slot in layer.tuner.shown else layer._modules[slot][self.name]


def parameters_in(value: SlotValue | None) -> Iterable[nn.Parameter]:
    """The parameters of one slot value (a module, a parameter, or nothing)."""
    if isinstance(value, nn.Module):
        return value.parameters() if value._modules else [p for p in value._parameters.values() if p is not None]
    return (value,) if isinstance(value, nn.Parameter) else ()


class Trained(NamedTuple):
    """Where one adapter's trainable parameters are: the dicts that hold them, in which `.to()` and loading put others.

    That a slot has another module now is what `Watched` says; it is collected again then.
    """

    name: str
    of_modules: list[dict[str, Any]]
    """The parameters of modules without others in them."""
    below: list[dict[str, Any]]
    """What these have of others: nothing, until a parametrisation moves parameters there."""
    of_slots: list[dict[str, Any]]
    """By adapter."""
    larger: list[nn.Module]
    """All other modules."""

    @classmethod
    def of(cls, name: str, slots: Iterable[dict[str, Any]]) -> Trained:
        """Of what slots hold, by adapter."""
        found = cls(name, [], [], [], [])
        for held in slots:
            value = held[name]
            if isinstance(value, nn.Module) and value._modules:
                found.larger.append(value)
            elif isinstance(value, nn.Module):
                found.of_modules.append(value._parameters)
                found.below.append(value._modules)
            elif isinstance(value, nn.Parameter):
                found.of_slots.append(held)
        return found

    def parameters(self) -> list[nn.Parameter] | None:
        """What is there now; None if these are not all any more."""
        if any(self.below):
            return None
        found = [p for held in self.of_modules for p in held.values() if p is not None]
        found += [held[self.name] for held in self.of_slots if self.name in held]
        found += [p for module in self.larger for p in module.parameters()]
        return found


def replace_tensor(container: SlotContainer, name: str, attribute: str, tensor: Tensor) -> None:
    """Put `tensor` in the place of the one that `container[name]` holds (under `attribute`, when it holds a module)."""
    if not attribute:
        old = container[name]
        new: Any = nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor
        container[name] = new
        return
    path, _, leaf = attribute.rpartition(".")
    owner: nn.Module = container[name]
    module = owner.get_submodule(path)
    held = module._parameters.get(leaf)
    if held is not None:
        put(module._parameters, leaf, nn.Parameter(tensor, held.requires_grad))
    else:
        put(module._buffers, leaf, tensor)


def fill_in(slots: Iterable[Slot], values: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Replace the tensors that the slots' `values`, which no model has yet, hold by those with the same file suffix."""
    container: Any = values
    for slot in slots:
        if slot.name in values:
            for suffix, attribute, _ in slot.suffixes(values[slot.name]):
                if suffix in tensors:  # a note of what was there would keep it
                    unnoted(replace_tensor, container, slot.name, attribute, tensors[suffix])


def is_floating(tensor: Tensor) -> bool:
    """Whether gradients can be asked of `tensor`."""
    return tensor.is_floating_point() or tensor.is_complex()


NEW_WEIGHT = "new_weight"
"""Among the values that a variant begins with: what the base layer's weight (canonical) becomes for good."""
HALF_DTYPES = (torch.float16, torch.bfloat16)
