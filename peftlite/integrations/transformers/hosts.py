"""The kinds of layer that transformers has and torch has not."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from peftlite.core.hosts import LinearHost, register_host


class Conv1DHost(LinearHost):
    """GPT-2's `Conv1D`, a linear layer that stores its weight (in, out)."""

    transposed = True

    @property
    def shape(self) -> tuple[int, ...]:
        return (int(self.layer.nf), int(self.layer.nx))  # type: ignore[arg-type]

    def canonical(self, raw: Tensor) -> Tensor:
        return raw.T


def patch(pytorch_utils: ModuleType) -> None:
    """Make transformers' layers known."""
    register_host(pytorch_utils.Conv1D)(Conv1DHost)
