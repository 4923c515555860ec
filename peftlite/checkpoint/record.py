"""`peftlite.json`: what an adapter was made on, and whether that is what it is loaded into.

A file of its own, which PEFT leaves alone. It counts only beside the weights that it was written with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from peftlite.checkpoint.keys import RECORD_NAME, shown
from peftlite.checkpoint.report import LoadReport
from peftlite.checkpoint.spots import is_companion, joined_path
from peftlite.core.facts import facts_of
from peftlite.core.found import host_at, innermost
from peftlite.core.layer import AdapterLayer
from peftlite.core.plan import InjectionPlan
from peftlite.core.tree import NOTHING, base_model_of, children, layers
from peftlite.errors import CheckpointError, warn

VERSION = 1

Adapted = dict[int, set["str | None"]]
"""id of a base module -> the parameters of it that an adapter is on; None for the module as a whole."""


@dataclass(frozen=True)
class Record:
    """What an adapter was made on."""

    architecture: str
    """The class of the base model."""
    base_layers: str
    """A hash of the shapes of all layers of the kinds that the adapter is on."""
    vocab_size: int | None

    def fields(self) -> dict[str, Any]:
        """What the file says, but for which weights it belongs to."""
        return {**asdict(self), "version": VERSION}


# ---- of a model


def record_of(model: nn.Module, name: str) -> Record:
    """What the adapter `name` of a model is on."""
    adapted: Adapted = {}
    for layer in layers(model):
        if name in layer.variants and not is_companion(layer.tuner):
            adapted.setdefault(id(layer.get_base_layer()), set()).add(layer.param)
    return _record(base_model_of(model), adapted)


def record_for(planned: InjectionPlan) -> Record:
    """What the adapter of a plan would be on."""
    adapted: Adapted = {}
    for site in planned.sites:
        if not is_companion(site.tuner):
            adapted.setdefault(id(innermost(site.module)), set()).add(site.param)
    return _record(planned.model, adapted, planned.instead)


def _record(base: nn.Module, adapted: Adapted, instead: Mapping[int, nn.Module] = NOTHING) -> Record:
    shapes = json.dumps(sorted(_shapes(base, adapted, instead)), separators=(",", ":"))
    digest = hashlib.sha256(shapes.encode()).hexdigest()
    return Record(type(base).__name__, digest, facts_of(base).vocab_size)


def _shapes(base: nn.Module, adapted: Adapted, instead: Mapping[int, nn.Module]) -> Iterator[tuple[int, ...]]:
    """The canonical shapes of the layers of the same kinds: those whose paths differ in numbers alone."""
    modules = list(_kinds(base, instead))
    kinds: dict[str, set[str | None]] = {}
    for kind, module in modules:
        if id(module) in adapted:
            kinds.setdefault(kind, set()).update(adapted[id(module)])
    for kind, module in modules:
        for param in kinds.get(kind, ()):
            if param is None or param in module._parameters:
                host = host_at(module, param)
                if host is not None:
                    yield host.shape


def _kinds(base: nn.Module, instead: Mapping[int, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """(path with `*` for numbers, module), each module of the base model once, under its first path."""
    seen: set[int] = set()
    stack = [("", base)]
    while stack:
        kind, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, AdapterLayer):
            stack.append((kind, module.wrapped))
            continue
        yield kind, module
        below = reversed(children(module, instead))
        stack += [(joined_path(kind, "*" if name.isdecimal() else name), child) for name, child in below]


# ---- of a file


def read_record(found: Mapping[str, Any], table: int | None) -> Record | None:
    """The record in a file, if it is about the weights with this table of tensors.

    Raises: CheckpointError if it is none.
    """
    if not found or found.get("version") != VERSION or table is None or found.get("tensors") != table:
        return None
    architecture, base_layers, size = (found.get(key) for key in ("architecture", "base_layers", "vocab_size"))
    fits = isinstance(architecture, str) and isinstance(base_layers, str)
    if not fits or not (size is None or type(size) is int):
        raise CheckpointError(f"`{RECORD_NAME}` does not say what the adapter was made on. Nothing was changed.")
    return Record(str(architecture), str(base_layers), size)


@dataclass(frozen=True)
class Origin:
    """What a file says that its adapter was made on, beside what it is loaded into."""

    there: Record
    here: Record

    def add_to(self, report: LoadReport) -> None:
        """Tell a report what speaks against the base model."""
        if not report.missing_keys and not report.unexpected_keys:  # else the adapter is on other layers to begin with
            report.other_layers = self.there.base_layers != self.here.base_layers
        report.made_on = self.difference

    @property
    def difference(self) -> str | None:
        """In words, what is different; None if nothing is that can be named."""
        return difference(self.there, self.here.architecture, self.here.vocab_size)

    def warn_of_tokens(self) -> None:
        """Say that the adapter knew more tokens than the model has."""
        there, here = self.there.vocab_size, self.here.vocab_size
        if there is not None and here is not None and there > here:
            warn(
                f"The adapter was made with a vocabulary of {there} tokens, and the model has {here}. If the others "
                f"are needed, call `model.resize_token_embeddings({there})`; their embeddings are not in the file."
            )


def difference(there: Record, architecture: str, vocab_size: int | None) -> str | None:
    """How the model that an adapter was made on differs from another, in words."""
    if there.architecture != architecture:
        return f"it was made on {shown(there.architecture)}, and this is {shown(architecture)}"
    if there.vocab_size != vocab_size:
        return f"it was made with a vocabulary of {there.vocab_size} tokens, and this model has {vocab_size}"
    return None
