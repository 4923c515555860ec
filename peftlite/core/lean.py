"""Adapters' small modules, without the dicts for hooks until someone asks for them.

A model with a thousand adapters has hundreds of thousands of small modules. Of each, torch makes a dozen empty dicts at
once, of 1.7 KiB together: several times what a factor of low rank takes, and most of the time of making one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Any, Final

from torch import Tensor, nn


class _Late:
    """An attribute that is made when it is first read, and is an instance's own from then on."""

    def __init__(self, name: str, make: Callable[[], Any]) -> None:
        self.name = name
        self.make = make

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Any:
        if module is None:
            return self
        return module.__dict__.setdefault(self.name, self.make())  # two threads may ask at once


class Lean(nn.Module):
    """An `nn.Module` like any other, with fewer dicts at first."""

    def __init__(self) -> None:
        self.__dict__.update(_AT_ONCE, _parameters={}, _buffers={}, _modules={})

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "training" and isinstance(value, bool):  # the mode, also where an adapter has this name
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


_FRESH: Final = vars(nn.Module())
_OF_CALLS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_hooks: Final = itemgetter(*_OF_CALLS)
_HELD: Final = ("_parameters", "_buffers", "_modules")
_AT_ONCE: Final = {k: v for k, v in _FRESH.items() if not isinstance(v, (dict, set))}
for _name, _value in _FRESH.items():
    if isinstance(_value, (OrderedDict, set)) and _name not in _HELD:
        setattr(Lean, _name, _Late(_name, type(_value)))


class Linear(Lean, nn.Linear):
    """An `nn.Linear` around existing tensors. weight: (out, in)."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        Lean.__init__(self)
        out, into = weight.shape
        self.__dict__.update(in_features=into, out_features=out)
        self._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        self._parameters["bias"] = None if bias is None else nn.Parameter(bias, requires_grad=False)


class Dropout(Lean, nn.Dropout):
    """An `nn.Dropout`."""

    def __init__(self, p: float) -> None:
        Lean.__init__(self)
        self.__dict__.update(p=p, inplace=False)


class Identity(Lean, nn.Identity):
    """An `nn.Identity`."""


def hooks_of_calls(attributes: Iterable[dict[str, Any]]) -> list[dict[int, Any]]:
    """The hooks that calls of modules with these attributes look for: four dicts each, whichever kind they are of."""
    found: list[dict[int, Any]] = []
    for own in attributes:
        for kind in _OF_CALLS:
            if kind not in own:
                own.setdefault(kind, OrderedDict())
        found += _hooks(own)
    return found


LINEARS: Final = (Linear, nn.Linear)
DROPOUTS: Final = (Dropout, nn.Dropout)
IDENTITIES: Final = (Identity, nn.Identity)


def dropout(p: float) -> nn.Module:
    """What drops inputs with this probability."""
    return Dropout(p) if p else Identity()
