"""Other libraries are adjusted right after their import, by a finder that leaves no trace in them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peftlite import _hooks
from peftlite.errors import PeftliteWarning

NAME = "peftlite_foreign"


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """Our side of an adjustment: marks the foreign module, and counts."""
    module: Any = types.ModuleType("peftlite_adjustment")
    module.seen = []

    def patch(foreign: Any) -> None:
        module.seen.append(foreign)
        foreign.adjusted = foreign.value + 1

    module.patch = patch
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(_hooks, "WATCHED", {NAME: module.__name__})
    monkeypatch.setattr(_hooks, "_pending", {NAME})
    yield module
    sys.modules.pop(NAME, None)


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The foreign library's source."""
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / f"{NAME}.py"
    path.write_text("value = 1\n")
    return path


def test_after_the_import(ours: Any, foreign: Path) -> None:
    module = importlib.import_module(NAME)
    assert ours.seen == [module]
    assert module.adjusted == 2
    assert module.__spec__ is not None
    assert type(module.__loader__) is type(module.__spec__.loader) is importlib.machinery.SourceFileLoader
    assert module.__spec__.origin == str(foreign)
    assert importlib.util.find_spec(NAME) is module.__spec__
    importlib.import_module(NAME)
    assert len(ours.seen) == 1


def test_at_once_when_it_is_imported_already(ours: Any, foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, _hooks.Finder)])
    module = importlib.import_module(NAME)
    assert not ours.seen
    _hooks.install()
    _hooks.install()
    assert ours.seen == [module]
    assert sum(isinstance(finder, _hooks.Finder) for finder in sys.meta_path) == 1


def test_again_when_it_is_reloaded(ours: Any, foreign: Path) -> None:
    module = importlib.import_module(NAME)
    foreign.write_text("value = 20  # changed\n")
    assert importlib.reload(module) is module
    assert module.adjusted == 21


def test_later_when_it_is_half_imported(ours: Any, foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what imports peftlite."""
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, _hooks.Finder)])
    foreign.write_text("from peftlite import _hooks\n_hooks.install()\nvalue = 1\n")
    module = importlib.import_module(NAME)
    assert not ours.seen
    importlib.util.find_spec("peftlite_anything_else")
    assert ours.seen == [module]


def test_an_adjustment_that_fails_costs_a_warning(ours: Any, foreign: Path) -> None:
    foreign.write_text("__version__ = '99'\n")  # without `value`
    with pytest.warns(PeftliteWarning, match=rf"could not adjust `{NAME}` \(99\): AttributeError: .*value"):
        importlib.import_module(NAME)


def test_a_foreign_module_that_fails_is_left_to_fail(ours: Any, foreign: Path) -> None:
    foreign.write_text("raise RuntimeError('broken')\n")
    with pytest.raises(RuntimeError, match="broken"):
        importlib.import_module(NAME)
    assert not ours.seen


def test_every_thread_sees_it_adjusted(ours: Any, foreign: Path) -> None:
    found = []
    ready = threading.Barrier(8)

    def use() -> None:
        ready.wait()
        found.append(importlib.import_module(NAME).adjusted)

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [2] * 8
    assert len(ours.seen) == 1


def test_finders_that_ask_all_finders(ours: Any, foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As other hooks do: they look a module up again from inside a look-up."""

    class Asking:
        busy = False

        def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
            if name != NAME or self.busy:
                return None
            self.busy = True
            try:
                return importlib.util.find_spec(name)
            finally:
                self.busy = False

    for place in (0, len(sys.meta_path)):
        finders: list[Any] = list(sys.meta_path)
        finders.insert(place, Asking())
        monkeypatch.setattr(sys, "meta_path", finders)
        sys.modules.pop(NAME, None)
        assert importlib.import_module(NAME).adjusted == 2
