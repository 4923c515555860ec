"""What the library that a model comes from knows of it; libraries' integrations register theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import nn

from peftlite.config import PeftConfig
from peftlite.core.former import Former
from peftlite.core.replicas import Stack
from peftlite.core.tree import base_model_of
from peftlite.registry import Registry, registry


class ModelFacts(NamedTuple):
    """What the library that a model comes from knows of it."""

    name_or_path: str | None = None
    model_type: str | None = None
    output_head: nn.Module | None = None
    embeddings: tuple[nn.Module, ...] = ()
    """The layers with one row per token: the table of inputs, and the output head."""
    input_table: nn.Module | None = None
    """The table of inputs, without adapters."""
    vocab_size: int | None = None
    first_vocab_size: int | None = None
    """Before it was changed, if it was."""
    default_targets: Callable[[PeftConfig], None] | None = None
    """Fills in those fields of a config that name modules and are None, with what is usual for this type of model."""
    stack: Callable[[], Stack | None] | None = None
    """Its list of layers, if there is one that could be made longer."""
    former: Callable[[Sequence[str]], list[Former]] | None = None
    """Which layers its parameters were before the library fused or renamed them."""
    unloaded: Callable[[bool], None] | None = None
    """Called when adapters have been taken out: what the library notes of the model follows its weights, which may be
    tied no more, or (the argument) no more quantised."""


_FACTS: Registry[Callable[[nn.Module], ModelFacts | None]] = registry("facts")


def register_model_facts(library: str, provider: Callable[[nn.Module], ModelFacts | None]) -> None:
    """Make a library's knowledge of its models known."""
    _FACTS.register(library, provider)


def facts_of(model: nn.Module) -> ModelFacts:
    """What is known of `model`; empty for a plain torch module."""
    base = base_model_of(model)
    return next((facts for provider in _FACTS.values() if (facts := provider(base)) is not None), ModelFacts())
