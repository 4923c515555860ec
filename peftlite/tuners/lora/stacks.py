"""LoRA's factors on every kind of layer as stacks of products of plain matrices, and back."""

from __future__ import annotations

from functools import singledispatch

import torch.nn.functional as F
from torch import Tensor

from peftlite.core.hosts import ConvHost, EmbeddingHost, Host, ParamHost
from peftlite.core.slots import View
from peftlite.tuners.lora.factors import groups_of, pair
from peftlite.tuners.lora.lowrank import LowRank
from peftlite.tuners.lora.start import net_pair

EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
LAYER = ("lora_A.weight", "lora_B.weight")


def product_of(host: Host, a: View) -> LowRank:
    """All that the factors of one adapter add to a layer's weight, scaling aside."""
    A, B = pair(host, a) if isinstance(host, ConvHost) else net_pair(host, a)
    return stack_of(host, A.detach(), B.detach())


@singledispatch
def stack_of(host: Host, A: Tensor, B: Tensor) -> LowRank:
    """The product that stored factors stand for."""
    return LowRank(A[None], B[None])


@singledispatch
def stored(host: Host, product: LowRank) -> dict[str, Tensor]:
    """The inverse: the factors' tensors by file suffix."""
    return {"lora_A.weight": product.A[0], "lora_B.weight": product.B[0]}


@singledispatch
def times(host: Host) -> int:
    """How often the rank of one matrix of the stack counts in the rank that configs speak of."""
    return 1


def depth(host: Host) -> int:
    """How many matrices the stack has."""
    if isinstance(host, ParamHost) and host.batch:
        return host.shape[0]
    return times(host)


def names_of(host: Host) -> tuple[str, str]:
    """The file suffixes of the two factors."""
    return EMBEDDING if isinstance(host, EmbeddingHost) else LAYER


def padded(product: LowRank, rank: int) -> LowRank:
    """The same matrices by factors of a larger rank, whose additional rows and columns are zero."""
    more = rank - product.rank
    return LowRank(F.pad(product.A, (0, 0, 0, more)), F.pad(product.B, (0, more)))


@stored.register
def _(host: EmbeddingHost, product: LowRank) -> dict[str, Tensor]:
    return {"lora_embedding_A": product.A[0], "lora_embedding_B": product.B[0]}


@stack_of.register
def _(host: ConvHost, A: Tensor, B: Tensor) -> LowRank:
    groups = groups_of(host)  # A (r, in, *kernel), B (out, r / groups, ...)
    return LowRank(A.reshape(groups, A.shape[0] // groups, -1), B.reshape(groups, -1, B.shape[1]))


@stored.register
def _(host: ConvHost, product: LowRank) -> dict[str, Tensor]:
    kernel = host.shape[2:]
    A = product.A.flatten(0, 1)
    B = product.B.flatten(0, 1)
    return {"lora_A.weight": A.view(len(A), -1, *kernel), "lora_B.weight": B.view(*B.shape, *(1 for _ in kernel))}


@times.register
def _(host: ConvHost) -> int:
    return groups_of(host)


@stack_of.register
def _(host: ParamHost, A: Tensor, B: Tensor) -> LowRank:
    if not host.batch:
        return LowRank(A[None], B[None])
    experts = host.shape[0]  # expert slowest in A (experts r, in), fastest in B (out, r experts)
    return LowRank(A.view(experts, -1, A.shape[1]), B.view(B.shape[0], -1, experts).permute(2, 0, 1))


@stored.register
def _(host: ParamHost, product: LowRank) -> dict[str, Tensor]:
    if not host.batch:
        return {"lora_A.weight": product.A[0], "lora_B.weight": product.B[0]}
    return {"lora_A.weight": product.A.flatten(0, 1), "lora_B.weight": product.B.permute(1, 2, 0).flatten(1)}
