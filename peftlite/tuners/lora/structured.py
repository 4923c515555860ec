"""Factors of linear layers that are matrices with a structure: in blocks along the diagonal, or constant on groups."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Structured(nn.Module):
    """A factor whose `weight` holds fewer numbers than the matrix that it stands for."""

    weight: nn.Parameter
    bias: None = None

    def matrix(self) -> Tensor:
        """The matrix, as the weight of a linear layer."""
        raise NotImplementedError(type(self).__name__)


class BlockDiagonalLinear(Structured):
    """x W^T with W of `blocks` equal blocks on its diagonal; `weight` (out, in / blocks) has them below each other."""

    def __init__(self, weight: Tensor, blocks: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.blocks = blocks

    def matrix(self) -> Tensor:
        matrix: Tensor = torch.block_diag(*self.weight.chunk(self.blocks))  # type: ignore[no-untyped-call]
        return matrix

    def forward(self, x: Tensor) -> Tensor:
        parts = x.reshape(*x.shape[:-1], self.blocks, 1, -1)  # (..., blocks, 1, in / blocks)
        blocks = self.weight.view(self.blocks, -1, self.weight.shape[1])  # (blocks, out / blocks, in / blocks)
        return (parts @ blocks.mT).flatten(-3)


class PooledLinear(Structured):
    """A linear layer on the means of groups of `group` neighbours, times their number; `weight` (out, in / group)."""

    def __init__(self, weight: Tensor, group: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.group = group
        self.gain = weight.shape[1] / group  # (in / group) means, each with 1 / group

    def _get_name(self) -> str:
        return "Linear"

    def extra_repr(self) -> str:
        return f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}, bias=False"

    def matrix(self) -> Tensor:
        return self.weight.repeat_interleave(self.group, 1) * self.gain

    def forward(self, x: Tensor) -> Tensor:
        sums = x.reshape(*x.shape[:-1], -1, self.group).sum(-1)  # (..., in / group)
        return F.linear(sums * self.gain, self.weight)
