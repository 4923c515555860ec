"""LoRA's factors on every kind of layer as stacks of products of plain matrices, and back."""

from __future__ import annotations

from functools import singledispatch

from torch import Tensor

from peftlite.core.hosts import ConvHost, EmbeddingHost, Host, ParamHost
from peftlite.core.slots import View
from peftlite.tuners.lora.factors import groups_of, pair
from peftlite.tuners.lora.lowrank import LowRank
from peftlite.tuners.lora.start import net_pair


@singledispatch
def product_of(host: Host, a: View) -> LowRank:
    """All that the factors of one adapter add to a layer's weight, scaling aside."""
    A, B = net_pair(host, a)
    return LowRank(A.detach()[None], B.detach()[None])


@singledispatch
def stored(host: Host, product: LowRank) -> dict[str, Tensor]:
    """The inverse: the factors' tensors by file suffix."""
    return {"lora_A.weight": product.A[0], "lora_B.weight": product.B[0]}


@singledispatch
def times(host: Host) -> int:
    """How often the rank of one matrix of the stack counts in the rank that configs speak of."""
    return 1


@stored.register
def _(host: EmbeddingHost, product: LowRank) -> dict[str, Tensor]:
    return {"lora_embedding_A": product.A[0], "lora_embedding_B": product.B[0]}


@product_of.register
def _(host: ConvHost, a: View) -> LowRank:
    A, B = pair(host, a)  # (r, in * kernel), (out, r / groups)
    groups = groups_of(host)
    return LowRank(A.detach().view(groups, -1, A.shape[1]), B.detach().view(groups, -1, B.shape[1]))


@stored.register
def _(host: ConvHost, product: LowRank) -> dict[str, Tensor]:
    kernel = host.shape[2:]
    A = product.A.flatten(0, 1)
    B = product.B.flatten(0, 1)
    return {"lora_A.weight": A.view(len(A), -1, *kernel), "lora_B.weight": B.view(*B.shape, *(1 for _ in kernel))}


@times.register
def _(host: ConvHost) -> int:
    return groups_of(host)


@product_of.register
def _(host: ParamHost, a: View) -> LowRank:
    A, B = a.lora_A.weight.detach(), a.lora_B.weight.detach()
    if not host.batch:
        return LowRank(A[None], B[None])
    experts = host.shape[0]  # expert slowest in A (experts r, in), fastest in B (out, r experts)
    return LowRank(A.view(experts, -1, A.shape[1]), B.view(B.shape[0], -1, experts).permute(2, 0, 1))


@stored.register
def _(host: ParamHost, product: LowRank) -> dict[str, Tensor]:
    return {"lora_A.weight": product.A.flatten(0, 1), "lora_B.weight": product.B.permute(1, 2, 0).flatten(1)}
