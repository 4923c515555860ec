"""LoRA out of any update of a weight: what another method adds to a layer, or what training has changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from peftlite.checks import show
from peftlite.core.hosts import ConvHost, Dense, Host, ParamHost, widened
from peftlite.core.layer import AdapterLayer
from peftlite.core.slots import View
from peftlite.core.variant import Additive
from peftlite.errors import ConfigError
from peftlite.tuners.lora.combine import Update
from peftlite.tuners.lora.factors import groups_of
from peftlite.tuners.lora.lowrank import Decomposed, LowRank, Part, distance, norm
from peftlite.tuners.lora.stacks import stored, times
from peftlite.tuners.lora.weighted import PRODUCTS


@dataclass(frozen=True)
class Change:
    """What happens to a layer's weight, as a stack of matrices or of products, and to its bias."""

    weight: Tensor | LowRank
    bias: Tensor | None = None


@dataclass(frozen=True)
class Extract:
    """The factors for a change, by file suffix, and how near they are to it."""

    tensors: Mapping[str, Tensor]
    part: Part


@singledispatch
def stacked(host: Host, delta: Tensor) -> Tensor:
    """A change of the canonical weight as the stack of matrices (n, out, in) that products are to make up."""
    return delta.flatten(1)[None]


@stacked.register
def _(host: ParamHost, delta: Tensor) -> Tensor:
    return delta if host.batch else delta[None]


@stacked.register
def _(host: ConvHost, delta: Tensor) -> Tensor:
    groups = groups_of(host)
    if groups == 1:
        return delta.flatten(1)[None]
    own = delta.reshape(groups, -1, *delta.shape[1:])  # (groups, out / groups, in / groups, *kernel)
    whole = own.new_zeros(own.shape[0], own.shape[1], groups, *own.shape[2:])  # LoRA's first factor sees all inputs
    for group in range(groups):
        whole[group, :, group] = own[group]
    return whole.flatten(2)


@torch.no_grad()
def change_of(layer: AdapterLayer, name: str) -> Change:
    """What an adapter of any method does to its layer.

    Raises: ConfigError for an effect that is none of the weight.
    """
    variant, a = layer.variants[name], View(layer, name)
    if type(variant) in PRODUCTS:
        update = Update.of(layer, name)
        bias = None if update.bias is None else update.bias * update.scaling
        return Change(LowRank(update.product.A, update.product.B * update.scaling), bias)
    if (reason := why_no_lora(layer, name)) is not None:
        raise ConfigError(f"Adapter `{name}` has no LoRA that does the same: {reason}. Nothing was changed.")
    if isinstance(variant, Additive) and type(variant).merge is Additive.merge:
        return Change(stacked(layer.host, variant.delta(a)), variant.delta_bias(a))
    own = layer.own()
    own = Dense(widened(own.weight), None if own.bias is None else widened(own.bias))
    return difference(layer.host, variant.merge(a, own), own)


def why_no_lora(layer: AdapterLayer, name: str) -> str | None:
    """Why what an adapter does to its layer is no change of the weight, or None if it is."""
    variant = layer.variants[name]
    if type(variant) in PRODUCTS:
        return None
    return variant.why_not_merge(View(layer, name)) if variant.mergeable else "it replaces its module"


def difference(host: Host, new: Dense, old: Dense) -> Change:
    """What makes `new` of `old`; no change of the bias where there is none."""
    bias = None if new.bias is None or old.bias is None else widened(new.bias) - widened(old.bias)
    if bias is not None and not bool(bias.any()):
        bias = None
    return Change(stacked(host, widened(new.weight) - widened(old.weight)), bias)


@torch.no_grad()
def extracted(host: Host, change: Change, rank: float) -> Extract:
    """The best factors of a rank, or, for a share below 1, of the least rank that keeps it (see `checked_rank`)."""
    count, exact = times(host), change.weight
    if isinstance(rank, int) and isinstance(exact, LowRank) and exact.rank * count <= rank:
        return Extract(tensors_of(host, exact, change.bias), Part(exact.rank * count, 0.0, norm(exact)))
    whole = widened(exact.dense()) if isinstance(exact, LowRank) and exact.rank >= exact.most else exact
    found = Decomposed.of(whole)
    near = found.cut(max(1, rank // count) if isinstance(rank, int) else found.rank_for(rank))
    dtype = torch.float32 if isinstance(exact, Tensor) else exact.A.dtype
    near = LowRank(near.A.to(dtype), near.B.to(dtype))
    return Extract(tensors_of(host, near, change.bias), Part(near.rank * count, distance(whole, near), norm(whole)))


def tensors_of(host: Host, product: LowRank, bias: Tensor | None) -> dict[str, Tensor]:
    """Factors by file suffix, with memory of their own."""
    tensors: dict[str, Any] = stored(host, product)
    if bias is not None:
        tensors["lora_B.bias"] = bias
    return {suffix: tensor.clone(memory_format=torch.contiguous_format) for suffix, tensor in tensors.items()}


def checked_rank(rank: float) -> int | float:
    """A rank: an int of at least 1; or the share of the squared singular values to keep: above 0, not above 1.

    Raises: ConfigError.
    """
    if isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1:
        return rank
    if isinstance(rank, float) and 0 < rank <= 1:
        return rank
    raise ConfigError(
        f"`rank` is {show(rank)}; it can be a rank (an int of at least 1), or a share of the squared singular values "
        "to keep (a float above 0 and not above 1). Nothing was changed."
    )
