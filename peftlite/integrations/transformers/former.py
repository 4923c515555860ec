"""Which layers of transformers 4 were fused or renamed in 5, read off the mapping that old weights are loaded with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from peftlite.core.former import Former

_WEIGHT = ".weight"
_FORMS = {(): False, ("MergeModulelist", 0): True, ("MergeModulelist", 0, "Concatenate", 1): True}
"""What is done to the old weights, and whether they become a stack: the forms that low-rank factors follow exactly."""


def former_names(model: nn.Module, names: Iterable[str]) -> list[Former]:
    """How those of the parameters `names` that were fused, or renamed, may have been called before; the same order."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return []  # before version 5
    mapping = Mapping.of(get_model_conversion_mapping(model))  # type: ignore[arg-type]
    return [former for name in names for former in mapping.formers(name)]


@dataclass(frozen=True)
class Mapping:
    """A model's mapping: renamings, each with its reverse, and conversions, of which a weight undergoes one at most."""

    renamings: list[tuple[Any, Any]]
    conversions: list[Any]

    @classmethod
    def of(cls, transforms: Iterable[Any]) -> Mapping:
        """The parts of transformers' list."""
        transforms = list(transforms)
        conversions = [one for one in transforms if getattr(one, "operations", None) is not None]
        renamings = [(one, one.reverse_transform()) for one in transforms if one not in conversions]
        return cls(renamings, conversions)

    def formers(self, name: str) -> Iterator[Former]:
        """What a parameter was before, by all its old names; nothing if low-rank factors cannot follow."""
        fused = next((patterns for one in self.conversions if (patterns := _before(one, name))), [name])
        for sources in [self._renamed(fused), fused] if self.renamings else [fused]:
            known = all(self.now(source.replace("*", "0")) == (name, part) for part, source in enumerate(sources))
            if sources != [name] and known and all(source.endswith(_WEIGHT) for source in sources):
                yield Former(name, tuple(source.removesuffix(_WEIGHT) for source in sources))

    def _renamed(self, names: list[str]) -> list[str]:
        for _, back in reversed(self.renamings):
            names = [back.rename_source_key(name)[0] for name in names]
        return names

    def now(self, old: str) -> tuple[str, int]:
        """(name, place among the sources) that an old weight has now."""
        for renaming, _ in self.renamings:
            old = renaming.rename_source_key(old)[0]
        for one in self.conversions:
            new, pattern = one.rename_source_key(old)
            if pattern is not None:
                return new, one.source_patterns.index(pattern)
        return old, 0


def _before(conversion: Any, name: str) -> list[str]:
    """The old names, with "*" for the number of an expert, of a weight that a conversion makes; [] if it does not."""
    operations = tuple(
        part for one in conversion.operations for part in (type(one).__name__, getattr(one, "dim", None))
    )
    targets = conversion.target_patterns
    if operations not in _FORMS or len(targets) != 1 or not name.endswith(targets[0]):
        return []
    head = name.removesuffix(targets[0])
    sources = [head + pattern.replace("\\.", ".") for pattern in conversion.source_patterns]
    return sources if all(("*" in source) == _FORMS[operations] for source in sources) else []
