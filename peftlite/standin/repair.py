"""What imported libraries believed before the stand-in came: that there is no `peft`, or that it is the real one."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import traceback
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from peftlite.errors import PeftliteError, PeftliteWarning

ROOT: Final = "peft"
_NOTED: Final = "_peft_available"
"""Where diffusers, and transformers 4, note once and for all whether there is `peft`."""
FIXED: Final = {"diffusers": ("diffusers.utils.import_utils", _NOTED)}
"""Libraries of which other modules have believed the note already: where it is."""
REPAIRED: Final = ("transformers.trainer", "transformers.trainer_utils")
"""Modules that get those names afterwards."""
OURS: Final = (Path(__file__).parent, Path(__file__).parent.parent)
NAMES: Final = ("PeftModel", "PeftMixedModel")


class StandInError(PeftliteError, ImportError):
    """peftlite cannot stand in for `peft` any more in this process."""


def check() -> None:
    """Refuse to come after what cannot be repaired.

    Raises: StandInError.
    """
    if ROOT in sys.modules:
        raise StandInError(f"The real `peft` is imported already. {_advice('peft')}")
    for library, (module, flag) in FIXED.items():
        if module in sys.modules and not getattr(sys.modules[module], flag):
            raise StandInError(
                f"`{library}` is imported already, and has noted that there is no `peft`. {_advice(library)}"
            )
    for name, module_ in tuple(sys.modules.items()):
        if name.startswith("trl.trainer.") and _believes_absent(module_):
            raise StandInError(f"`{name}` is imported already, without the names of `peft`. {_advice('trl')}")


def _believes_absent(module: ModuleType | None) -> bool:
    """Whether a module asked for `peft` when it was imported, and was told that there is none."""
    names: dict[str, Any] = {} if module is None else vars(module)
    return "is_peft_available" in names and not {"PeftModel", "PeftConfig", "peft"} & names.keys()


def _advice(library: str) -> str:
    place = _asked_at()
    line = f"the line `import peftlite.as_peft` ({place})" if place else "the line `import peftlite.as_peft`"
    return f"Move {line} above the first import of `{library}`. Nothing was changed."


def _asked_at() -> str | None:
    """File and line of the program that asked for the stand-in."""
    for frame in reversed(traceback.extract_stack()):
        if "importlib" not in frame.filename and Path(frame.filename).parent not in OURS:
            return f"{frame.filename}, line {frame.lineno}"
    return None


def say_if_real() -> None:
    """Warn if the real `peft` is installed too: in this process it is out of reach."""
    try:
        version = importlib.metadata.version(ROOT)
    except importlib.metadata.PackageNotFoundError:
        return
    warnings.warn(
        f"The real `peft` {version} is installed; as asked, `import peft` gives peftlite in this process.",
        PeftliteWarning,
        stacklevel=5,
    )


def repair() -> None:
    """Have transformers ask again whether there is `peft`, and give its Trainer the classes that it looks for."""
    utils = sys.modules.get("transformers.utils.import_utils")
    for function in () if utils is None else tuple(vars(utils).values()):
        name = getattr(function, "__name__", "")
        if hasattr(function, "cache_clear") and ("peft" in name or name.startswith("_is_package")):
            function.cache_clear()
    if utils is not None and _NOTED in vars(utils):
        setattr(utils, _NOTED, True)
    for module in REPAIRED:
        if module not in sys.modules:
            continue
        names = vars(sys.modules[module])
        for name in NAMES:
            names.setdefault(name, getattr(importlib.import_module(ROOT), name))
