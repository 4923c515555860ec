"""What every LoRA config has a value of: how to run here, and how its fields are checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from peftlite.checks import check_bool, check_choice, check_int, show, wrong
from peftlite.errors import ConfigError, nearest, warn

O = TypeVar("O")  # noqa: E741 - a class of options.py, or the one below

COMPUTE_DTYPES = ("adapter", "base")
DROPOUT_MASKS = ("bits", "seed")


@dataclass(frozen=True)
class LoraRuntimeConfig:
    """How to run on this machine; never part of a file. `set_runtime_config` changes it later.

    `compute_dtype`: "adapter" computes the low-rank products in the factors' own dtype; "base" in the base layer's,
    which in half precision is faster and less exact. `dropout_mask`: what backward is left of a dropout mask, "bits",
    one for each element, or "seed", from which it is drawn again. `ephemeral_gpu_offload` has no effect, with a
    warning: DoRA's norms take no product that a GPU would be needed for.
    """

    ephemeral_gpu_offload: bool = False
    compute_dtype: str = "adapter"
    dropout_mask: str = "bits"

    def __post_init__(self) -> None:
        check_choice("compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        check_choice("dropout_mask", self.dropout_mask, DROPOUT_MASKS)
        if check_bool("ephemeral_gpu_offload", self.ephemeral_gpu_offload):
            warn("`ephemeral_gpu_offload=True` has no effect: DoRA's norms are cheap on a CPU. Leave it out.")


def check_tokens(field: str, value: object) -> list[int] | None:
    """Token ids in their order; None for none.

    Raises: ConfigError.
    """
    if value is None:
        return None
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        raise wrong(field, value, "a list of token ids or None")
    return [check_int(field, token, 0) for token in value] or None


def check_ranges(name: str, value: object) -> list[tuple[int, int]] | None:
    """Ranges [start, end) of layers, none of them empty; None for no ranges.

    Raises: ConfigError.
    """
    if value is None or (isinstance(value, (list, tuple)) and not value):
        return None
    spans = list(value) if isinstance(value, Iterable) and not isinstance(value, (str, Mapping)) else []
    pairs = [tuple(span) for span in spans if isinstance(span, (list, tuple)) and len(span) == 2]
    if not spans or len(pairs) < len(spans):
        raise wrong(name, value, "a list of ranges [start, end) of layers, such as [[0, 4], [2, 5]]")
    ranges = [(check_int(name, start, 0), check_int(name, end, 1)) for start, end in pairs]
    empty = next((span for span in ranges if span[0] >= span[1]), None)
    if empty is not None:
        raise wrong(name, value, f"a list of ranges that are not empty, which `{list(empty)}` is")
    return ranges


def plain(value: Any) -> Any:
    """The value of a field as files have it."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def given(field: str, value: object, kind: type[O]) -> O | None:
    """The value of a field of `kind`: one, a mapping of its fields, or None.

    Raises: ConfigError.
    """
    if value is None or isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise wrong(field, value, f"a `{kind.__name__}`, a dict or None")
    if not value:
        return None
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in value:
        if key not in known:
            raise ConfigError(
                f"`{field}` has {show(key)}, which {kind.__name__} does not; nearest: {nearest(str(key), known)}. "
                "Nothing was changed."
            )
    return kind(**value)
