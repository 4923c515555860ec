"""Which `init_lora_weights` means what on a linear layer, and how it is put into fresh factors."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from peftlite.core.hosts import Host, widened
from peftlite.core.slots import NEW_WEIGHT
from peftlite.core.variant import Placement
from peftlite.errors import StateError
from peftlite.registry import later
from peftlite.tuners.lora.inits import loftq, weights

if TYPE_CHECKING:
    from peftlite.tuners.lora.inits import covariance, gradients
else:
    covariance = later("peftlite.tuners.lora.inits.covariance")
    gradients = later("peftlite.tuners.lora.inits.gradients")

START = "start"


class Job(NamedTuple):
    """A linear layer whose factors begin: its weight W (out, in), and what its config means for it."""

    W: Tensor
    r: int
    scaling: float
    layer: nn.Module
    path: str
    config: Any


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


class Beginning(NamedTuple):
    """How the factors of a linear layer begin: `make(job)` gives A (r, in) and B (out, r) in W's dtype."""

    make: Callable[[Job], tuple[Tensor, ...]]
    subtracted: bool = False
    """Whether B A is not zero, and is subtracted so that a fresh adapter is the identity."""
    follows: bool = True
    """Whether the factors follow from the base weight alone, so that whoever loads an adapter can make them again."""
    cannot: Callable[[Host, int], str | None] = always
    """Why a layer cannot begin so at some rank, or None."""
    rewrites: bool = False
    """Whether `make` gives before these what the base layer's weight becomes for good."""
    divides: bool = False
    """Whether the factors are what they are to be together, divided by the scaling, or its root."""

    def refuses(self, host: Host, config: Any, path: str) -> str | None:
        """Why a layer cannot begin so under a config, or None."""
        alpha = config.alpha_for(path)
        if self.divides and alpha <= 0:
            return f"`init_lora_weights={config.init_lora_weights!r}` needs an alpha above 0, and its alpha is {alpha}"
        return self.cannot(host, config.rank_for(path))

    def fill(self, made: dict[str, Any], host: Host, at: Placement) -> dict[str, Any]:
        """Put first values into fresh factors, which have the random ones; those on meta only get what is subtracted.

        Raises: StateError if the base layer has no weights to begin from.
        """
        A, B = made["lora_A"], made["lora_B"]
        on_meta = at.device.type == "meta"
        if at.own is None or (on_meta and not (self.subtracted or self.rewrites)):
            return made
        if host.device.type == "meta":
            raise StateError(
                f"`init_lora_weights` is `{at.config.init_lora_weights!r}`, which begins from the weights of "
                f"`{at.path}`, and they are on the meta device: load them first. Nothing was changed."
            )
        r: int = A.weight.shape[0]
        job = Job(widened(at.own().weight), r, at.config.scaling_for(at.path), host.layer, at.path, at.config)
        *new, first_A, first_B = self.make(job)
        first_A, first_B = first_A.to(at.dtype), first_B.to(at.dtype)
        if new:
            made[NEW_WEIGHT] = new[0]
        rank = first_A.shape[0]  # less than r where W has less
        if not on_meta:
            A.weight.data[:rank], B.weight.data[:, :rank] = first_A, first_B
        if self.subtracted:
            A.register_buffer(START, F.pad(first_A, (0, 0, 0, r - rank)).contiguous(), persistent=False)
            B.register_buffer(START, F.pad(first_B, (0, r - rank)).contiguous(), persistent=False)
        return made


Weighted = Callable[[Tensor, int, float], tuple[Tensor, Tensor]]


def by_weight(function: Weighted) -> Callable[[Job], tuple[Tensor, Tensor]]:
    """A beginning that follows from the weight."""
    return lambda job: function(job.W, job.r, job.scaling)


BEGINNINGS: dict[str, Beginning] = {
    "pissa": Beginning(by_weight(weights.pissa), subtracted=True, divides=True),
    "olora": Beginning(by_weight(weights.olora), subtracted=True),
    "orthogonal": Beginning(by_weight(weights.orthogonal), cannot=even),
    "mica": Beginning(by_weight(weights.mica), cannot=within),
    "corda": Beginning(
        lambda job: covariance.recall(job.layer, job.path, job.config.corda_config, job.r).factors(job.r, job.scaling),
        subtracted=True,
        follows=False,
        divides=True,
    ),
    "lora_ga": Beginning(
        lambda job: gradients.recall(job.layer, job.path, job.r).factors(
            job.W, job.r, job.scaling, job.config.lora_ga_config
        ),
        subtracted=True,
        follows=False,
        divides=True,
    ),
    "loftq": Beginning(
        lambda job: loftq.approximate(job.W, job.r, job.scaling, **job.config.loftq_config),
        rewrites=True,
        divides=True,
        cannot=loftq.cannot,
    ),
}


def beginning(init: object) -> Beginning | None:
    """What `init_lora_weights` asks for, or None for the random beginnings."""
    niter = re.fullmatch(r"pissa_niter_(\d{1,3})", init) if isinstance(init, str) else None
    if niter is not None:
        return Beginning(by_weight(partial(weights.pissa, niter=int(niter[1]))), subtracted=True, divides=True)
    return BEGINNINGS.get(init) if isinstance(init, str) else None


def started(factor: nn.Module) -> Tensor | None:
    """What a factor began as, where that is subtracted."""
    first: Tensor | None = factor._buffers.get(START)
    return first
