"""The factors of linear layers that became one parameter, as the factors of that parameter.

A stack (experts, out, in) has one pair of factors, A (experts r, in) with the expert slowest and B (out, r experts)
with the expert fastest. What lies below each other along `out`, such as gate and up, keeps its own rows of A, and its
own block of B:

    [B1 A1; B2 A2] = [B1 0; 0 B2] [A1; A2]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from peftlite.core.former import Former
from peftlite.core.hosts import ParamHost

A, B = "lora_A.weight", "lora_B.weight"


class Piece(NamedTuple):
    """The adapter of one old layer: which source of the parameter, which expert, and its numbers."""

    path: str
    part: int
    expert: int
    r: int
    scaling: float


class Fused(NamedTuple):
    """The adapter of a parameter that several old layers went into: `pieces` of those that had one."""

    former: Former
    host: ParamHost
    pieces: tuple[Piece, ...]
    rslora: bool

    @property
    def experts(self) -> int:
        """The number of matrices in the stack."""
        return int(math.prod(self.host.shape[:-2]))

    @property
    def ranks(self) -> list[int]:
        """For each source, the largest rank of its layers; 0 if none was adapted."""
        return [
            max((p.r for p in self.pieces if p.part == part), default=0) for part in range(len(self.former.sources))
        ]

    @property
    def scaling(self) -> float:
        """What the product is multiplied with; pieces with another scaling have the ratio in their B."""
        return self.pieces[0].scaling

    @property
    def alpha(self) -> float:
        """The alpha that gives this scaling at the joint rank."""
        r = sum(self.ranks)
        return plain_number(self.scaling * (math.sqrt(r) if self.rslora else r))

    def shape(self, suffix: str) -> tuple[int, int]:
        """The shape of a factor."""
        *_, out, into = self.host.shape
        wide = self.experts * sum(self.ranks)
        return (wide, into) if suffix == A else (out, wide)

    def piece_shape(self, piece: Piece, suffix: str) -> tuple[int, int]:
        """The shape of an old layer's factor."""
        *_, out, into = self.host.shape
        return (piece.r, into) if suffix == A else (out // len(self.former.sources), piece.r)

    def build(self, suffix: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """A factor, of the old layers' ones by path."""
        rounds = any(piece.scaling != self.scaling for piece in self.pieces)
        dtype = torch.float64 if rounds else next(iter(tensors.values())).dtype
        *_, out, into = self.host.shape
        ranks, rows = self.ranks, out // len(self.former.sources)
        size = (self.experts, sum(ranks), into) if suffix == A else (out, sum(ranks), self.experts)
        whole = torch.zeros(size, dtype=dtype)
        for piece in self.pieces:
            r0, tensor = sum(ranks[: piece.part]), tensors[piece.path]
            if suffix == A:
                whole[piece.expert, r0 : r0 + piece.r] = tensor
            else:
                at = slice(piece.part * rows, (piece.part + 1) * rows)
                whole[at, r0 : r0 + piece.r, piece.expert] = tensor.to(dtype) * (piece.scaling / self.scaling)
        return whole.flatten(0, 1) if suffix == A else whole.flatten(1)


def plain_number(value: float) -> float:
    """A number of a config, without the rounding errors of its making."""
    near = round(value)
    return near if math.isclose(value, near, rel_tol=1e-12) else value
