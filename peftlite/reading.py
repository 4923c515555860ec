"""Files from anywhere: opened only if they are files, and JSON read within bounds."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, cast

from peftlite.errors import CheckpointError

MAX_JSON = 4 << 20
"""Bytes of a file of JSON."""
MAX_DEPTH = 16
"""Levels of lists and objects in it."""


def open_regular(path: Path) -> BinaryIO:
    """Open a file that is a file: a pipe or a device would block, or never end.

    Raises: OSError as the file system does, CheckpointError.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise CheckpointError(f"`{path}` is not a regular file. Nothing was changed.")
    return cast(BinaryIO, open(handle, "rb", buffering=0))


def read_object(file: BinaryIO, name: str) -> dict[str, Any]:
    """The JSON object in a file, `name` in errors.

    Raises: CheckpointError if it is too large, nested too deeply, ambiguous, or none.
    """
    raw = file.read(MAX_JSON + 1)
    if len(raw) > MAX_JSON:
        raise CheckpointError(f"`{name}` is larger than {MAX_JSON} bytes. Nothing was changed.")
    try:
        found = json.loads(
            raw.decode("utf-8-sig"),
            parse_constant=_refuse_constant,
            parse_float=_finite,
            object_pairs_hook=without_repeats,
        )
        json.dumps(found, ensure_ascii=False).encode("utf-8")  # half a character, escaped, could never be shown
        deep = _depth_exceeds(found, MAX_DEPTH)
    except RecursionError:
        deep = True
    except ValueError as error:
        raise CheckpointError(f"`{name}` is not a JSON file: {error}. Nothing was changed.") from None
    if deep:
        raise CheckpointError(f"`{name}` is nested more than {MAX_DEPTH} levels deep. Nothing was changed.")
    if not isinstance(found, dict):
        raise CheckpointError(f"`{name}` holds a {type(found).__name__}, not an object. Nothing was changed.")
    return found


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The table of these pairs.

    Raises: ValueError if a name occurs twice: readers would not agree on its value.
    """
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _refuse_constant(name: str) -> float:
    raise ValueError(f"`{name}` is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_constant(text[:20])


def _depth_exceeds(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)
