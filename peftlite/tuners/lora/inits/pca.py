"""Principal components of rows that come in batches (Ross et al., 2008)."""

from __future__ import annotations

import torch
from torch import Tensor

from peftlite.tuners.lora.inits.weights import lowrank_svd

_SMALL = 1024  # up to this size in either direction, decompose exactly


class IncrementalPCA:
    """The `k` main directions of all rows seen so far, about their mean, in memory for k rows and a batch.

    `components` (k, size) are orthonormal, `values` (k,) the singular values of the centred rows. `agreement` (k,) is
    the cosine of each component to the same one before the last batch.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self.count = 0
        self.mean = self.scatter = self.components = self.values = self.agreement = torch.empty(0)
        self._waiting: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """See more rows (rows, size). Fewer than k wait for more."""
        self._waiting.append(x)
        if sum(map(len, self._waiting)) < self.k:
            return
        x, self._waiting = torch.cat(self._waiting), []
        mean = x.mean(0)
        centred = x - mean
        if self.count == 0:
            self._set(centred, mean, centred.square().sum(0), len(x))
            return
        total = self.count + len(x)
        shift = self.mean - mean
        weight = self.count * len(x) / total
        self._set(
            torch.cat([self.values[:, None] * self.components, centred, weight**0.5 * shift[None]]),
            (self.count * self.mean + len(x) * mean) / total,
            self.scatter + centred.square().sum(0) + weight * shift.square(),
            total,
        )

    @property
    def ready(self) -> bool:
        """Whether there are components, and some from before the last batch."""
        return bool(len(self.agreement))

    @property
    def ratios(self) -> Tensor:
        """The share of the variance that each component explains."""
        return self.values.square() / self.scatter.sum().clamp_min(torch.finfo(self.values.dtype).tiny)

    def _set(self, stacked: Tensor, mean: Tensor, scatter: Tensor, count: int) -> None:
        if max(stacked.shape) <= _SMALL:
            _, S, Vh = torch.linalg.svd(stacked, full_matrices=False)
        else:
            _, S, Vh = lowrank_svd(stacked, self.k, niter=4)
        S, Vh = S[: self.k], Vh[: self.k]
        if self.count:
            known = min(len(self.components), len(Vh))
            self.agreement = (self.components[:known] * Vh[:known]).sum(1).abs()
        self.mean, self.scatter, self.count, self.values, self.components = mean, scatter, count, S, Vh
