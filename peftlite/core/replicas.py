"""Layers of a model repeated on the weights that there are, each with adapters of its own (`layer_replication`).

    ranges [0, 3), [1, 4): layers 0 1 2 1 2 3

All layers of the longer stack are new modules that hold the parameters and buffers of the old ones. Those are kept as
they are, and come back when the last adapter goes; only `merge_and_unload` leaves the longer stack, on weights of its
own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from torch import nn

from peftlite.checks import show
from peftlite.core.transaction import on_failure, put
from peftlite.errors import ConfigError, StateError

Ranges = Sequence[Sequence[int]]
MAX_LAYERS: Final = 10_000


class Stack(NamedTuple):
    """The layers of a model that run one after the other, and what says how many there are."""

    owner: nn.Module
    name: str
    """The attribute of `owner` that is the list of layers."""
    path: str
    settings: Any
    said: Callable[[Any, Sequence[int]], dict[str, Any]]
    """(settings, numbers of the layers to have) -> the attributes that settings then must have."""
    number: str
    """The attribute by which a part of a layer knows the layer's number."""
    common: type
    """What layers hold and have no copies of."""

    @property
    def layers(self) -> nn.ModuleList:
        """The layers that there are now."""
        found: Any = self.owner._modules[self.name]
        return found  # type: ignore[no-any-return]


class Replicas(NamedTuple):
    """A longer stack, and the one whose place it takes."""

    stack: Stack
    ranges: tuple[tuple[int, int], ...]
    layers: nn.ModuleList
    original: nn.ModuleList
    before: Mapping[str, Any]
    """What the settings said."""

    @classmethod
    def of(cls, stack: Stack, ranges: Ranges) -> Replicas:
        """What these ranges make of a stack, which is left alone.

        Raises: ConfigError for layers that there are not.
        """
        count = len(stack.layers)
        beyond = next(([start, end] for start, end in ranges if end > count), None)
        if beyond is not None:
            raise ConfigError(
                f"`layer_replication` has `{beyond}`, and `{stack.path}` has {count} layers: the end of a range can be "
                f"at most `{count}`. Nothing was changed."
            )
        total = sum(end - start for start, end in ranges)
        if total > MAX_LAYERS:
            raise ConfigError(
                f"`layer_replication` asks for `{total}` layers, and `{stack.path}` has {count}: more than "
                f"{MAX_LAYERS} are not made. Nothing was changed."
            )
        order = [layer for start, end in ranges for layer in range(start, end)]
        copies = [
            numbered(copy_of(stack.layers[layer], stack.common), stack.number, at) for at, layer in enumerate(order)
        ]
        longer = copy.copy(stack.layers)
        longer._modules = {str(at): layer for at, layer in enumerate(copies)}
        before = {key: getattr(stack.settings, key) for key in stack.said(stack.settings, order)}
        return cls(stack, tuple((start, end) for start, end in ranges), longer, stack.layers, before)

    @property
    def order(self) -> list[int]:
        """The number of the layer that each was made of."""
        return [layer for start, end in self.ranges for layer in range(start, end)]

    @property
    def instead(self) -> dict[int, nn.Module]:
        """For those who walk a model as if it had the longer stack: id of a module -> what is in its place."""
        return {id(self.original): self.layers}

    def attach(self) -> None:
        """Let the model have the longer stack."""
        after = self.stack.said(self.stack.settings, self.order)
        put(self.stack.owner._modules, self.stack.name, self.layers)
        set_all(self.stack.settings, after)

    def detach(self) -> None:
        """Let it have its own stack again, once no layer has adapters."""
        numbers, found = self.order, list(self.layers)
        for number, layer in enumerate(self.original):
            if number in numbers:
                follow(layer, found[numbers.index(number)])
            elif found:
                stay_near(layer, found[0])
        put(self.original.__dict__, "training", self.layers.training)
        put(self.stack.owner._modules, self.stack.name, self.original)
        set_all(self.stack.settings, self.before)

    def part(self) -> None:
        """Give every layer of the longer stack parameters of its own."""
        taken: set[int] = set()
        for layer in self.layers:
            own: dict[int, nn.Parameter] = {}
            for module in layer.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        if id(parameter) not in own:
                            own[id(parameter)] = copy.deepcopy(parameter) if id(parameter) in taken else parameter
                        put(module._parameters, name, own[id(parameter)])
            taken |= own.keys()

    def replica(self, path: str) -> str | None:
        """Which layer of the longer stack a path is in; None outside of it."""
        prefix = f"{self.stack.path}."
        return path.removeprefix(prefix).partition(".")[0] if path.startswith(prefix) else None

    def apart(self, path: str, other: str) -> bool:
        """Whether two modules are in different layers of it, so that it is by this alone if they share weights."""
        one, two = self.replica(path), self.replica(other)
        return one is not None and two is not None and one != two


def replicas_for(config: Any, present: Replicas | None, bare: bool, stack: Stack | None, model: str) -> Replicas | None:
    """What a config asks for beyond what the model has; completes the config by what it has.

    present, bare: what other adapters made of the stack; whether there are none.

    Raises: ConfigError, StateError.
    """
    wanted = getattr(config, "layer_replication", None)
    if present is not None:
        given = list(present.ranges)
        if "layer_replication" not in config.__dict__ or (wanted and wanted != given):
            raise ConfigError(
                f"The layers of {model} are repeated as {show(given)} for the adapters that it has, and a "
                f"{type(config).__name__} {'has no such field' if wanted is None else f'asks for {show(wanted)}'}. "
                "Nothing was changed."
            )
        config.layer_replication = given
        return None
    if not wanted:
        return None
    if not bare:
        raise StateError(
            f"`layer_replication` is {show(wanted)}, and {model} has adapters on the layers as they are: call `unload` "
            "or delete them first. Nothing was changed."
        )
    if stack is None:
        raise ConfigError(
            f"`layer_replication` is {show(wanted)}, and which layers of {model} could be repeated is not known: that "
            "takes a transformers model whose layers are one list. Nothing was changed."
        )
    return Replicas.of(stack, wanted)


def copy_of(layer: nn.Module, common: type) -> nn.Module:
    """A layer of new modules that hold the same tensors."""
    memo: dict[int, object] = {}
    for module in layer.modules():
        held = (*module._parameters.values(), *module._buffers.values())
        others = (value for value in module.__dict__.values() if isinstance(value, common))
        memo.update((id(one), one) for one in (*held, *others) if one is not None)
    return copy.deepcopy(layer, memo)


def numbered(layer: nn.Module, attribute: str, number: int) -> nn.Module:
    """The layer, its parts knowing it by this number."""
    for module in layer.modules():
        if isinstance(module.__dict__.get(attribute), int):
            module.__dict__[attribute] = number
    return layer


def set_all(settings: Any, values: Mapping[str, Any]) -> None:
    """Set attributes, to be taken back."""
    for key, value in values.items():
        on_failure(partial(setattr, settings, key, getattr(settings, key)))
        setattr(settings, key, value)


def pairs(layer: nn.Module, copied: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The parts of two layers of the same structure."""
    return zip(layer.modules(), copied.modules(), strict=True)


def follow(layer: nn.Module, copied: nn.Module) -> None:
    """Let a layer hold the tensors that its copy holds: they may have been moved, or replaced."""
    for mine, theirs in pairs(layer, copied):
        for name, parameter in theirs._parameters.items():
            put(mine._parameters, name, parameter)
        for name, buffer in theirs._buffers.items():
            put(mine._buffers, name, buffer)
        put(mine.__dict__, "training", theirs.training)


def stay_near(layer: nn.Module, other: nn.Module) -> None:
    """Move a layer that was in no stack meanwhile to where another one is."""
    mine, theirs = (next(iter(one.parameters()), None) for one in (layer, other))
    if mine is not None and theirs is not None and mine.device != theirs.device:
        on_failure(partial(layer.to, mine.device))
        layer.to(theirs.device)
    for module in layer.modules():
        put(module.__dict__, "training", other.training)
