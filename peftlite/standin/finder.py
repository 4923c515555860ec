"""The finder that makes `import peft` give peftlite: first on `sys.meta_path`, for the modules of the table."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from os import PathLike
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from peftlite.errors import nearest
from peftlite.standin import absent, repair, tolerance
from peftlite.standin.table import MODULES, PEFT_VERSION, names_of

ROOT = "peft"
ELSEWHERE = (ROOT, "peft.functional")
"""Where a name is that a module does not list: with these, it is what a program for `peft` expects of it."""
OURS = __name__.partition(".")[0]
"""peftlite's front door: always there, and imported by name only, since it is above."""


def install() -> None:
    """From now on `import peft` and `peft.*` give peftlite's objects in this process. Again: no effect.

    Raises: StandInError if a module was imported before that cannot be given other objects; it names the line to move.
    """
    if any(isinstance(finder, StandIn) for finder in sys.meta_path):
        return
    repair.check()
    repair.say_if_real()
    sys.meta_path.insert(0, StandIn())
    importlib.invalidate_caches()
    importlib.import_module(ROOT)
    repair.repair()


class Module(ModuleType):
    """A module of `peft`: its names are looked up in the table when they are first used."""

    def __getattr__(self, name: str) -> Any:
        full = f"{self.__name__}.{name}"
        if full in MODULES:
            return importlib.import_module(full)
        home, attribute = home_of(self.__name__, name)
        if not home:
            raise AttributeError(lacking(full))
        tolerance.settle()
        value = getattr(importlib.import_module(home), attribute)
        self.__dict__[name] = value
        return value

    def __dir__(self) -> list[str]:
        prefix = f"{self.__name__}."
        below = {key.removeprefix(prefix) for key in MODULES if key.startswith(prefix)}
        return sorted({*self.__dict__, *names_of(self.__name__), *(key for key in below if "." not in key)})


def home_of(module: str, name: str) -> tuple[str, str]:
    """(module of ours, attribute) of a name of `peft`; two empty strings if there is none.

    Every module has every public name of peftlite too: modules of PEFT have what they import, and names move.
    """
    places = (module,) if module == ROOT else (module, *ELSEWHERE)
    listed = (names_of(at).get(name) for at in places)
    home, attribute = next((entry for entry in listed if entry), ("", ""))
    public = name in sys.modules[OURS].__all__
    return (OURS, name) if public and home in ("", absent.__name__) else (home, attribute)


def lacking(full: str) -> str:
    """What to say of a name that is not in the table."""
    module, _, name = full.rpartition(".")
    known = [*names_of(module), *MODULES] if module in MODULES else list(MODULES)
    return (
        f"peftlite stands in for `peft`, and has no `{full}`; nearest: {nearest(name, known)}. "
        "With the real `peft`, leave `peftlite.as_peft` out."
    )


class StandIn(DistributionFinder):
    """Finds `peft`, the modules in it, and the distribution of this name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        top = fullname.partition(".")[0]
        if top != ROOT:
            return None
        if fullname not in MODULES:
            raise ImportError(lacking(fullname), name=fullname)
        package = any(name.startswith(f"{fullname}.") for name in MODULES)
        return ModuleSpec(fullname, StandInLoader(), origin=f"peftlite ({fullname})", is_package=package)

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterable[Distribution]:
        name = None if context is None else context.name
        return [StandInDistribution()] if name is None or name.lower() == ROOT else []


class StandInLoader(Loader):
    """Makes an empty module of the table; `runpy` and `inspect` find no code and no source in it."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Module(spec.name, "peftlite, standing in for `peft`.")

    def exec_module(self, module: ModuleType) -> None:
        names = {name: None for name in names_of(module.__name__)}
        module.__dict__.update(__version__=PEFT_VERSION, __all__=[n for n in names if not n.startswith("_")])
        module.__dict__["__path__"] = []  # so that a name it lacks is asked of the finder, and the answer says more
        module.__dict__["__peftlite__"] = True

    def get_code(self, fullname: str) -> CodeType:
        """The code of the module, of which there is none."""
        return compile("", f"<{fullname}>", "exec")

    def get_source(self, fullname: str) -> str:
        """The source of the module, which is empty."""
        return ""


class StandInDistribution(Distribution):
    """What `importlib.metadata` says of `peft`."""

    def read_text(self, filename: str | PathLike[str]) -> str | None:
        files = {
            "METADATA": f"Metadata-Version: 2.1\nName: {ROOT}\nVersion: {PEFT_VERSION}\n",
            "top_level.txt": f"{ROOT}\n",
        }
        return files.get(str(filename))

    def locate_file(self, path: str | PathLike[str]) -> Path:
        return Path(__file__).parent / path
