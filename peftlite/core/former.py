"""How a model's layers were called before its library fused them, or gave them other names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Former(NamedTuple):
    """One parameter of a model, and the layers that it was made of, by their paths.

        model.layers.0.mlp.experts.gate_up_proj
        model.layers.0.block_sparse_moe.experts.*.w1, model.layers.0.block_sparse_moe.experts.*.w3

    With "*", a layer for each matrix of a stack (experts, out, in); several sources lie below each other along `out`.
    """

    target: str
    sources: tuple[str, ...]

    @property
    def stacked(self) -> bool:
        """Whether there was a layer for each matrix of a stack."""
        return "*" in self.sources[0]

    def paths(self, experts: int) -> Iterator[tuple[int, int, str]]:
        """(source, expert, path) of each layer."""
        for part, source in enumerate(self.sources):
            for expert in range(experts if self.stacked else 1):
                yield part, expert, source.replace("*", str(expert))
