"""LoRA that begins away from zero, and yet as the identity: what its factors were at first is subtracted.

PEFT writes W - scaling B0 A0 into the base layer instead, so that a disabled adapter, a second one, or `unload` find
other weights than the model came with. Here the base layer stays as it is. The first factors lie beside the live ones,
as buffers that no state dict and no file has: they follow from the base weight, and are made again when one is loaded.
"""

from __future__ import annotations

from functools import singledispatch
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftlite.core.hosts import ALL_ROWS, Host, LinearHost, ParamHost
from peftlite.core.slots import View
from peftlite.core.variant import Placement, Program
from peftlite.tuners.lora.factors import entering, in_base_dtype, low_rank, outer, pair, product
from peftlite.tuners.lora.inits.table import started
from peftlite.tuners.lora.plain import Lora


@singledispatch
def start_of(host: Host, a: View) -> tuple[Tensor, Tensor] | None:
    """(A0, B0), what the factors were at first, where that is subtracted."""
    return None


@start_of.register(LinearHost)
@start_of.register(ParamHost)
def _(host: Host, a: View) -> tuple[Tensor, Tensor] | None:
    A, B = started(a.lora_A), started(a.lora_B)
    return None if A is None or B is None else (A, B)


def net_pair(host: Host, a: View) -> tuple[Tensor, Tensor]:
    """Matrices whose product is all of the update, scaling aside: [A; A0] and [B, -B0], or A and B without a start."""
    A, B = pair(host, a)
    start = start_of(host, a)
    if start is None:
        return A, B
    return torch.cat([A, start[0]]), torch.cat([B, -start[1]], 1)


class Shifted(Lora):
    """W' = W + scaling (B A - B0 A0), where A0 and B0 are what the factors were at first (zero: plain LoRA)."""

    def init(self, host: Host, at: Placement) -> dict[str, Any]:
        start_of.dispatch(type(host))  # as in `known_to_forward`
        return super().init(host, at)

    def low_rank(self, a: View, x: Tensor, entered: Tensor) -> Tensor:
        """The update applied to x, without scaling; `entered` is x after dropout, which the first factors never see."""
        host: Host = a.layer.host
        y = low_rank(host, a, entered)
        start = start_of(host, a)
        if start is None:
            return y
        A, B = (factor.to(host.dtype) for factor in start) if in_base_dtype(a) else start
        return y - F.linear(F.linear(x.to(A.dtype), A), B)

    def delta(self, a: View, rows: slice = ALL_ROWS) -> Tensor:
        host: Host = a.layer.host
        scaling: float = a.scaling
        start = start_of(host, a)
        if start is None:
            return outer(host, a, rows) * scaling
        changed = product(host, *pair(host, a), rows) - product(host, *start, rows)  # at first zero, bit for bit
        return changed * scaling

    def delta_forward(self, a: View, x: Tensor) -> Tensor:
        scaling: float = a.scaling
        return self.low_rank(a, x, entering(a.layer.host, a, x)) * scaling

    def bind(self, a: View, slow: Program) -> Program | None:
        return super().bind(a, slow) if start_of(a.layer.host, a) is None else None


class Mica(Lora):
    """MiCA: LoRA of which only A trains; B are directions in which the base layer's output varies least."""

    frozen = frozenset({"lora_B", "lora_embedding_B"})

    def size(self, host: Host, config: Any, path: str) -> tuple[int | None, int]:
        r, parameters = super().size(host, config, path)
        return r, parameters - config.rank_for(path) * host.shape[0]
