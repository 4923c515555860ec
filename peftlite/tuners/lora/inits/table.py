"""Which `init_lora_weights` means what on a linear layer, and how it is put into fresh factors."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from peftlite.core.hosts import Host, widened
from peftlite.core.variant import Placement
from peftlite.errors import StateError
from peftlite.tuners.lora.inits import weights

START = "start"
Make = Callable[[Tensor, int, float], tuple[Tensor, Tensor]]


def always(host: Host, r: int) -> str | None:
    """Of what has a form at any rank."""
    return None


def even(host: Host, r: int) -> str | None:
    """Of what divides the rank into halves."""
    return f"`init_lora_weights='orthogonal'` needs an even rank, and its rank is {r}" if r % 2 else None


def within(host: Host, r: int) -> str | None:
    """Of what needs a singular vector for each rank."""
    most = min(host.shape)
    return f"`init_lora_weights='mica'` needs a rank of at most {most}, and its rank is {r}" if r > most else None


@dataclass(frozen=True)
class Beginning:
    """How the factors of a linear layer begin: `make(W, r, scaling)` gives A (r, in) and B (out, r) in W's dtype."""

    make: Make
    subtracted: bool
    """Whether B A is not zero, and is subtracted so that a fresh adapter is the identity."""
    follows: bool = True
    """Whether the factors follow from the base weight alone, so that whoever loads an adapter can make them again."""
    cannot: Callable[[Host, int], str | None] = always
    """Why a layer cannot begin so at some rank, or None."""

    def fill(self, made: dict[str, Any], host: Host, at: Placement) -> dict[str, Any]:
        """Put first values into fresh factors, which have the random ones; those on meta only get what is subtracted.

        Raises: StateError if the base layer has no weights to begin from.
        """
        A, B = made["lora_A"], made["lora_B"]
        if at.own is None or (at.device.type == "meta" and not self.subtracted):
            return made
        if host.device.type == "meta":
            raise StateError(
                f"`init_lora_weights` is `{at.config.init_lora_weights!r}`, which begins from the weights of "
                f"`{at.path}`, and they are on the meta device: load them first. Nothing was changed."
            )
        W, r = widened(at.own().weight), A.weight.shape[0]
        first_A, first_B = (factor.to(at.dtype) for factor in self.make(W, r, at.config.scaling_for(at.path)))
        rank = first_A.shape[0]  # less than r where W has less
        if A.weight.device.type != "meta":
            A.weight.data[:rank], B.weight.data[:, :rank] = first_A, first_B
        if self.subtracted:
            A.register_buffer(START, F.pad(first_A, (0, 0, 0, r - rank)).contiguous(), persistent=False)
            B.register_buffer(START, F.pad(first_B, (0, r - rank)).contiguous(), persistent=False)
        return made


BEGINNINGS: dict[str, Beginning] = {
    "pissa": Beginning(weights.pissa, subtracted=True),
    "olora": Beginning(weights.olora, subtracted=True),
    "orthogonal": Beginning(weights.orthogonal, subtracted=False, cannot=even),
    "mica": Beginning(weights.mica, subtracted=False, cannot=within),
}


def beginning(init: object) -> Beginning | None:
    """What `init_lora_weights` asks for, or None for the random beginnings."""
    niter = re.fullmatch(r"pissa_niter_(\d+)", init) if isinstance(init, str) else None
    if niter is not None:
        return Beginning(partial(weights.pissa, niter=int(niter[1])), subtracted=True)
    return BEGINNINGS.get(init) if isinstance(init, str) else None


def started(factor: nn.Module) -> Tensor | None:
    """What a factor began as, where that is subtracted."""
    first: Tensor | None = factor._buffers.get(START)
    return first
