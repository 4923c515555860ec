"""transformers' Trainer."""

from __future__ import annotations

from types import ModuleType


def patch(module: ModuleType) -> None:
    """Make `module` (`trainer_utils` or `trainer`) know peftlite's models."""
