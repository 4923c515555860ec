"""One LoRA adapter on several layers that share their weight: the leader's factors, as the others see them.

leader     W' = W + s B A         lora_embedding_A (r, num), lora_embedding_B (dim, r) of an embedding
follower   W'^T = W^T + s A^T B^T  lora_A = B^T (r, dim), lora_B = A^T (num, r) of the output head
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from peftlite.core.hosts import EmbeddingHost, Host, LinearHost
from peftlite.core.layer import AdapterLayer
from peftlite.core.slots import View

LINEAR, EMBEDDING = ("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")


class Followed(nn.Module):
    """A factor that is one of another layer's, perhaps transposed: a linear map without parameters of its own."""

    leader: AdapterLayer
    name: str
    slot: str
    turned: bool

    def __init__(self, leader: AdapterLayer, name: str, slot: str, turned: bool) -> None:
        super().__init__()
        self.__dict__.update(leader=leader, name=name, slot=slot, turned=turned)  # the leader is not a child

    @property
    def weight(self) -> Tensor:
        """(out, in), a view of the leader's factor."""
        factor: Any = self.leader.container(self.slot)[self.name]
        if isinstance(factor, nn.Module):
            factor = factor.weight
        return factor.T if self.turned else factor  # type: ignore[no-any-return]

    @property
    def bias(self) -> None:
        """None."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))

    def _get_name(self) -> str:
        return "Linear"

    def extra_repr(self) -> str:
        out, into = self.weight.shape
        return f"in_features={into}, out_features={out}, bias=False"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Nothing: the leader's factor is in the same state dict."""


def why_not_follow(host: Host, leader: Host) -> str | None:
    """Why one LoRA adapter cannot be on both."""
    for one in (host, leader):
        if one.packed or not isinstance(one, LinearHost | EmbeddingHost):
            return f"LoRA has no such form for {one.name}"
    if isinstance(host, EmbeddingHost) and not isinstance(leader, EmbeddingHost):
        return "the embedding has to come first"
    return None


def is_turned(host: Host, leader: Host) -> bool:
    """Whether the two see their common weight transposed to each other."""
    shared: Tensor = leader.parameter
    return host.canonical(shared).stride() != leader.canonical(shared).stride()


def slots_of(host: Host) -> tuple[str, str]:
    """The slots of A and B."""
    return EMBEDDING if isinstance(host, EmbeddingHost) else LINEAR


def source(host: Host, leader: Host, slot: str) -> str:
    """The leader's slot that a follower's slot shows: A and B trade places where one sees the other transposed."""
    position = slots_of(host).index(slot)
    return slots_of(leader)[1 - position if is_turned(host, leader) else position]


def followed(host: Host, leader: View) -> dict[str, Any]:
    """The follower's factors."""
    theirs: Host = leader.layer.host
    if isinstance(host, EmbeddingHost):  # as the leader is: the very same parameters
        return {slot: leader.layer.container(slot)[leader.name] for slot in EMBEDDING}
    turned = is_turned(host, theirs)
    return {slot: Followed(leader.layer, leader.name, source(host, theirs, slot), turned) for slot in LINEAR}
