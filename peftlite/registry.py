"""What is imported when it is first used: modules of ours, and what they register under a name.

    hub = later("peftlite.checkpoint.hub")      stands for the module; `hub.resolve` imports it
    TUNERS = registry("tuners")                 `TUNERS["LORA"]` imports what registers it; its names are all there are

Both are for time only. An import that is put off counts as one for the order of the rooms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Later:
    """Stands for a module until something of it is used."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._module: Any = None

    def __getattr__(self, name: str) -> Any:
        if self._module is None:  # once: dynamo traces this, and no import
            self._module = import_module(self._name)
        return getattr(self._module, name)

    def __repr__(self) -> str:
        return f"<{self._name}, imported when it is used>"


def later(name: str) -> Any:
    """What stands for the module of this name; type checkers are told of the module by an import beside it."""
    return Later(name)


class Registry(Mapping[str, T], Generic[T]):
    """Things by name, in the order of their homes: the modules that register them, imported when they are asked for."""

    def __init__(self) -> None:
        self.homes: dict[str, str] = {}
        self._found: dict[str, T] = {}

    def register(self, name: str, thing: T) -> None:
        """Called by the module that is a thing's home; a thing may also come without having been announced."""
        self.homes.setdefault(name, "")
        self._found[name] = thing

    def __getitem__(self, name: str) -> T:
        if name not in self._found:
            import_module(self.homes[name])
        return self._found[name]

    def __contains__(self, name: object) -> bool:
        return name in self.homes

    def __iter__(self) -> Iterator[str]:
        return iter(self.homes)

    def __len__(self) -> int:
        return len(self.homes)


_REGISTRIES: dict[str, Registry[Any]] = {}


def registry(name: str) -> Registry[Any]:
    """The registry of this name: one room announces the homes, a lower one asks for the things."""
    return _REGISTRIES.setdefault(name, Registry())
