"""Checks of config values: each gives the value in its plain form, or raises an error that says what would do."""

from __future__ import annotations

import math
import numbers
import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from enum import Enum
from typing import Any

from peftlite.errors import ConfigError, clipped, nearest
from peftlite.patterns import MAX_PATTERNS, bounded, is_plain

MAX_ENTRIES = 200_000
"""Of a field: no model has so many modules."""


def show(value: object) -> str:
    """The value as it stands in an error message."""
    text = repr(value.value if isinstance(value, Enum) else value)
    return f"`{clipped(text)}`"


def wrong(field: str, value: object, wanted: str) -> ConfigError:
    """The error for a field whose value cannot be used."""
    return ConfigError(f"`{field}` must be {wanted}, not {show(value)}. Nothing was changed.")


def check_bool(field: str, value: object) -> bool:
    """True or False; nothing that merely counts as one."""
    if not isinstance(value, bool):
        raise wrong(field, value, "True or False")
    return value


def check_text(field: str, value: object) -> str | None:
    """A string or None."""
    if value is not None and not isinstance(value, str):
        raise wrong(field, value, "a string or None")
    return value


def check_int(field: str, value: object, least: int) -> int:
    """An int of any integer type, not below `least`, of at most 63 bits."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not least <= operator.index(value) < 2**63:
        raise wrong(field, value, f"an int of at least {least}")
    return operator.index(value)


def check_number(field: str, value: object) -> int | float:
    """A finite number, as int or float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not _is_finite(value):
        raise wrong(field, value, "a finite number")
    return operator.index(value) if isinstance(value, numbers.Integral) else float(value)


def _is_finite(value: numbers.Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def check_choice(field: str, value: object, choices: Collection[str]) -> str:
    """One of the choices; an enum member counts as its value."""
    text = value.value if isinstance(value, Enum) else value
    if not isinstance(text, str) or text not in choices:
        near = nearest(str(text), choices)
        listed = ", ".join(f"`{c}`" for c in choices)
        raise ConfigError(f"`{field}` is {show(value)}; nearest: {near}. It can be {listed}. Nothing was changed.")
    return text


def check_regex(field: str, value: str, compile_: Callable[[str], object] = bounded) -> str:
    """A string that is a regular expression, whose matching ends."""
    if is_plain(value):
        return value
    try:
        compile_(value)
    except re.error as error:
        raise wrong(field, value, f"a valid regular expression ({error})") from error
    return value


def check_count(field: str, patterns: Iterable[object]) -> None:
    """No more patterns than can be held against every module; names are looked up, and do not count.

    Raises: ConfigError.
    """
    count = sum(isinstance(pattern, str) and not is_plain(pattern) for pattern in patterns)
    if count > MAX_PATTERNS:
        raise ConfigError(
            f"`{field}` has {count} patterns that are more than names; it can have {MAX_PATTERNS}. Nothing was changed."
        )


def _check_length(field: str, value: Collection[object]) -> None:
    if len(value) > MAX_ENTRIES:
        raise ConfigError(f"`{field}` has {len(value)} entries; it can have {MAX_ENTRIES}. Nothing was changed.")


def check_names(field: str, value: object, *, sort: bool = True) -> list[str] | None:
    """A collection of non-empty strings as a list without repeats, or None; sorted, or else in the order it has."""
    if value is None:
        return None
    if isinstance(value, str):
        raise wrong(field, value, f"a list of names (did you mean {show([value])}?)")
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        raise wrong(field, value, "a list of names or None")
    names = list(value)
    _check_length(field, names)
    if not all(isinstance(name, str) and name for name in names):
        raise wrong(field, value, "a list of non-empty strings")
    keep = not sort and isinstance(value, Sequence)
    return list(dict.fromkeys(names if keep else sorted(names)))


def check_names_or_regex(field: str, value: object) -> list[str] | str | None:
    """Names as a sorted list, a string as the regular expression that it is, or None."""
    return check_regex(field, value) if isinstance(value, str) else check_names(field, value)


def check_indices(field: str, value: object) -> list[int] | int | None:
    """A non-negative int, several of them as a sorted list, or None."""
    if value is None:
        return None
    if isinstance(value, numbers.Integral):
        return check_int(field, value, 0)
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        raise wrong(field, value, "an int, a list of ints or None")
    indices = list(value)
    _check_length(field, indices)
    return sorted({check_int(field, item, 0) for item in indices})


def check_pattern(field: str, value: object, check: Callable[[str, object], Any]) -> dict[str, Any]:
    """A mapping from regular expressions to values that `check` accepts, in its order; None is an empty one."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise wrong(field, value, "a dict from patterns of names to values")
    _check_length(field, value)
    check_count(field, value)
    for key in value:
        if not isinstance(key, str) or not key:
            raise wrong(field, value, "a dict whose keys are non-empty strings")
        check_regex(field, key)
    return {key: check(f"{field}[{key!r}]", item) for key, item in value.items()}
