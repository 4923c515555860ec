"""Everything peftlite raises or warns about on purpose.

    PeftliteError
    +-- ConfigError (ValueError)             a config field has a value that cannot be used
    |   +-- UnsupportedFeatureError          a field asks for a feature that this version does not have
    +-- TargetNotFoundError (ValueError)     an entry of a target list matches no module
    +-- UnsupportedLayerError (ValueError)   a tuner cannot adapt this kind of layer
    +-- AdapterNameError (ValueError)        an adapter name is unknown, taken or not allowed
    +-- StateError (RuntimeError)            the model is not in a state in which the call makes sense
    |   +-- NoAdapterError                   the model has no adapters
    +-- CheckpointError (ValueError)         adapter files or state dicts that do not fit or cannot be trusted
    |   +-- AdapterFilesNotFoundError (OSError)
    +-- MergeError (ValueError)              merging would write values that are not finite, or cannot be expressed

    PeftliteWarning (UserWarning)

Each message says what was asked, the offending value in backticks, the nearest valid choice, and that nothing was
changed.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable


class PeftliteError(Exception):
    """Base of every error that peftlite raises on purpose."""


class ConfigError(PeftliteError, ValueError):
    """A config field has a value that cannot be used."""


class UnsupportedFeatureError(ConfigError):
    """A config field asks for a feature that this version does not have."""


class TargetNotFoundError(PeftliteError, ValueError):
    """An entry of `target_modules`, `modules_to_save`, ... matches no module of the model."""


class UnsupportedLayerError(PeftliteError, ValueError):
    """A tuner cannot adapt this kind of layer."""


class AdapterNameError(PeftliteError, ValueError):
    """An adapter name is unknown, already taken, or not allowed."""


class StateError(PeftliteError, RuntimeError):
    """The model is not in a state in which the call makes sense."""


class NoAdapterError(StateError):
    """The model has no adapters."""


class CheckpointError(PeftliteError, ValueError):
    """Adapter files or a state dict that do not fit the model, or cannot be trusted."""


class AdapterFilesNotFoundError(CheckpointError, OSError):
    """A directory or hub repository has no adapter files."""


class MergeError(PeftliteError, ValueError):
    """Merging would write non-finite weights, or cannot be expressed in the base layer."""


class PeftliteWarning(UserWarning):
    """Something that was asked for had another effect than it seems, or none."""


def nearest(value: str, choices: Iterable[str], n: int = 3) -> str:
    """The choices most like `value`, in backticks, for error messages; all of them when few and none is near."""
    pool, value = list(dict.fromkeys(choices)), value[:1000]
    found = difflib.get_close_matches(value, pool, n=n, cutoff=0.5) or (pool if len(pool) <= 8 else pool[:n])
    return ", ".join(f"`{clipped(c)}`" for c in found) or "none"


def clipped(text: str, most: int = 200) -> str:
    """A text of any length, from anywhere, fit for an error message."""
    return text if len(text) <= most else f"{text[:most]}..."


def warn(text: str) -> None:
    """A PeftliteWarning at the line that called peftlite, through whatever it went since."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "peftlite":
        frame, level = frame.f_back, level + 1
    warnings.warn(text, PeftliteWarning, stacklevel=level)
