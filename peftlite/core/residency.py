"""Layers whose weights are elsewhere until they are called: bringing them in, and what was changed back.

Libraries that offload weights register how. Calls of a module bring its own weights in by themselves; what reads them
without a call (a merge, a method that needs the base weight) asks here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

from torch import nn


class Residency(Protocol):
    """What a library that offloads weights registers."""

    def is_away(self, module: nn.Module) -> bool:
        """Whether the module's own weights are elsewhere now. Asked in every forward that is not a fast one."""

    def near(self, module: nn.Module) -> AbstractContextManager[None]:
        """Inside the block, the weights of `module` and all below it are where they compute.

        Parameters that were replaced meanwhile are written back to where they came from; values written into those
        that came need not be.
        """

    def shared(self, module: nn.Module) -> Iterable[object]:
        """What a copy of `module` is not to have copies of."""

    def release(self, twin: nn.Module) -> None:
        """Let a copy of a module, made while its weights were near, keep them."""


_KNOWN: list[Residency] = []


def register_residency(residency: Residency) -> None:
    """Make a library's way of offloading known."""
    _KNOWN.append(residency)


def is_away(module: nn.Module) -> bool:
    """Whether the module's own weights are elsewhere now."""
    return any(known.is_away(module) for known in _KNOWN)


@contextmanager
def near(module: nn.Module) -> Iterator[None]:
    """Inside the block, the weights of `module` and all below it are where they compute."""
    with ExitStack() as stack:
        for known in _KNOWN:
            stack.enter_context(known.near(module))
        yield


def near_copy(module: nn.Module) -> nn.Module:
    """A copy of `module` whose weights are near for good."""
    with near(module):
        memo = {id(one): one for known in _KNOWN for one in known.shared(module)}
        twin = copy.deepcopy(module, memo)
    for known in _KNOWN:
        known.release(twin)
    return twin
