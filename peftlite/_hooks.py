"""Adjusts other libraries right after they are imported, whether that is before or after peftlite.

`import peftlite` must stay cheap, so it imports none of them. It puts a finder first on `sys.meta_path`, which lets
the other finders find a watched module as ever, and runs our adjustment when the module's own code has run. Module,
spec and loader stay the real ones. Modules that are imported already are adjusted at once.
"""

from __future__ import annotations

import importlib
import sys
import threading
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from peftlite.errors import PeftliteWarning

WATCHED = {
    "transformers.pytorch_utils": "peftlite.integrations.transformers.hosts",
    "transformers.modeling_utils": "peftlite.integrations.transformers.mixin",
    "transformers.generation.utils": "peftlite.integrations.transformers.routing",
    "transformers.trainer_utils": "peftlite.integrations.transformers.trainer",
    "transformers.trainer": "peftlite.integrations.transformers.trainer",
    "transformers.integrations.peft": "peftlite.integrations.transformers.directories",
    "transformers.models.auto.auto_factory": "peftlite.integrations.transformers.directories",
    "transformers.pipelines": "peftlite.integrations.transformers.directories",
    "bitsandbytes.nn.modules": "peftlite.integrations.quantised.bitsandbytes",
    "torchao.utils": "peftlite.integrations.quantised.torchao",
    "accelerate.hooks": "peftlite.integrations.accelerate",
    "hqq.core.quantize": "peftlite.integrations.quantised.hqq",
}
"""Foreign module -> the module of ours whose `patch(foreign)` adjusts it; `patch` may run more than once."""

_pending = set(WATCHED)
_searching = threading.local()


def install() -> None:
    """Watch the imports of `WATCHED` from now on, and adjust what is imported already. Again: no effect."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
    for name in WATCHED:
        if name in _pending and name in sys.modules:
            importlib.import_module(name)  # another thread may be importing it: wait
    settle()


def settle() -> None:
    """Adjust the watched modules that came in without the finder, now that they are complete."""
    for name in tuple(_pending):
        module = sys.modules.get(name) if name in _pending else None
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            adjust(name, module)


def adjust(name: str, module: ModuleType) -> None:
    """Run our adjustment of a foreign module; one that fails costs its features, and not the foreign import."""
    _pending.discard(name)
    try:
        importlib.import_module(WATCHED[name]).patch(module)
    except Exception as error:
        version = getattr(sys.modules.get(name.partition(".")[0]), "__version__", "of unknown version")
        warnings.warn(
            f"peftlite could not adjust `{name}` ({version}): {type(error).__name__}: {error}. What it adds there is "
            "missing; functions of peftlite itself work.",
            PeftliteWarning,
            stacklevel=2,
        )


class Finder(MetaPathFinder):
    """Finds what the other finders find, with a loader that adjusts the module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if _pending:
            settle()
        if fullname not in WATCHED or fullname in _names_in_search():
            return None
        _names_in_search().add(fullname)  # a finder that asks all finders would come back here
        try:
            spec = _find_elsewhere(self, fullname, path, target)
        finally:
            _names_in_search().discard(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = AdjustingLoader(spec.loader, fullname)
        return spec


class AdjustingLoader(Loader):
    """The real loader, and then `adjust`."""

    def __init__(self, real: Loader, name: str) -> None:
        self._real = real
        self._name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._real
        if module.__spec__ is not None:
            module.__spec__.loader = self._real
        self._real.exec_module(module)
        adjust(self._name, module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def _names_in_search() -> set[str]:
    names: set[str] = _searching.__dict__.setdefault("names", set())
    return names


def _find_elsewhere(
    this: MetaPathFinder, fullname: str, path: Sequence[str] | None, target: ModuleType | None
) -> ModuleSpec | None:
    for finder in tuple(sys.meta_path):
        find: Any = getattr(finder, "find_spec", None)
        spec: ModuleSpec | None = find(fullname, path, target) if find is not None and finder is not this else None
        if spec is not None:
            return spec
    return None
