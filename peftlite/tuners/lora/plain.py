"""Low-rank adaptation: the formula."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from peftlite.core.hosts import ALL_ROWS, EmbeddingHost, Host
from peftlite.core.lean import dropout
from peftlite.core.slots import View
from peftlite.core.variant import Additive, Bank, Placement, Program
from peftlite.tuners.lora import tied
from peftlite.tuners.lora.banked import LoraBank, banks
from peftlite.tuners.lora.bound import BoundLinear, suits
from peftlite.tuners.lora.config import LoraConfig
from peftlite.tuners.lora.factors import (
    bias_of_B,
    cannot_adapt,
    entering,
    entries,
    factors,
    in_base_dtype,
    known_to_forward,
    low_rank,
    not_expressible,
    outer,
    plus_outer,
)
from peftlite.tuners.lora.several import BoundLoras


class Lora(Additive):
    """LoRA (https://arxiv.org/abs/2106.09685): W' = W + scaling * B A, scaling = alpha / r (rsLoRA: alpha / sqrt(r)).

    Slots: lora_A (r, in), lora_B (out, r); embeddings have lora_embedding_A (r, num), lora_embedding_B (dim, r). One
    factor starts at zero, so that a fresh adapter is the identity. The product is computed in the factors' dtype.
    """

    by_rows = True

    def check(self, host: Host, config: Any, path: str) -> str | None:
        return cannot_adapt(host, config, path)

    def init(self, host: Host, at: Placement) -> dict[str, Any]:
        config: LoraConfig = at.config
        site = config.for_site(at.path)
        known_to_forward(host)
        return {
            **factors(host, site.r, at),
            "lora_dropout": dropout(site.dropout),
            "r": site.r,
            "lora_alpha": site.alpha,
            "scaling": site.scaling,
        }

    def why_not_follow(self, host: Host, leader: Host, config: Any, paths: tuple[str, str]) -> str | None:
        if type(self) is not Lora or config.lora_bias:
            return f"{'`lora_bias`' if type(self) is Lora else type(self).__name__} has no such form"
        return tied.why_not_follow(host, leader)

    def follow(self, host: Host, leader: View) -> dict[str, Any]:
        own = {name: getattr(leader, name) for name in ("r", "lora_alpha", "scaling")}
        return {**tied.followed(host, leader), "lora_dropout": copy.deepcopy(leader.lora_dropout), **own}

    def led(self, host: Host, leader: Host, suffix: str) -> tuple[str, bool] | None:
        slot = tied.source(host, leader, suffix.removesuffix(".weight"))
        return slot + ("" if isinstance(leader, EmbeddingHost) else ".weight"), tied.is_turned(host, leader)

    def size(self, host: Host, config: Any, path: str) -> tuple[int | None, int]:
        r: int = config.for_site(path).r
        return r, entries(host, r) + (host.shape[0] if config.lora_bias else 0)

    def delta(self, a: View, rows: slice = ALL_ROWS) -> Tensor:
        scaling: float = a.scaling
        return outer(a.layer.host, a, rows) * scaling

    def added(self, a: View, weight: Tensor, rows: slice) -> Tensor:
        return plus_outer(a.layer.host, a, weight, rows) if type(self) is Lora else super().added(a, weight, rows)

    def delta_forward(self, a: View, x: Tensor) -> Tensor:
        host: Host = a.layer.host
        scaling: float = a.scaling
        return low_rank(host, a, entering(host, a, x)) * scaling

    def delta_bias(self, a: View) -> Tensor | None:
        bias = bias_of_B(a.layer.host, a)
        return None if bias is None else bias * a.scaling

    def bind(self, a: View, slow: Program) -> Program | None:
        return BoundLinear(a, slow) if type(self) is Lora and suits(a) else None

    def bind_several(self, views: Sequence[View], slow: Program) -> Program | None:
        alike = type(self) is Lora and all(map(suits, views)) and not any(map(in_base_dtype, views))
        return BoundLoras(views, slow) if alike else None

    def bank(self, layer: Any, views: Sequence[View | None]) -> Bank | None:
        present = [a for a in views if a is not None]
        alike = type(self) is Lora and all(map(banks, present)) and len(set(map(in_base_dtype, present))) < 2
        return LoraBank(layer, views) if alike else None

    def why_not_merge(self, a: View) -> str | None:
        host: Host = a.layer.host
        if bias_of_B(host, a) is not None and host.bias is None:
            return "it has a `lora_bias`, and the base layer has no bias to merge it into"
        return not_expressible(host)
