"""Low-rank adaptation: the formula, its factors on each kind of layer, and the tuner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from peftlite.config import PeftType
from peftlite.core.hosts import ALL_ROWS, Host
from peftlite.core.slots import ModuleSlot, Slot, View
from peftlite.core.variant import Additive, Placement, TunerSpec, Variant, register
from peftlite.tuners.lora.config import LoraConfig
from peftlite.tuners.lora.factors import (
    bias_of_B,
    cannot_adapt,
    entries,
    factors,
    low_rank,
    not_expressible,
    outer,
)


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
        return {
            **factors(host, site.r, at),
            "lora_dropout": nn.Dropout(site.dropout) if site.dropout else nn.Identity(),
            "r": site.r,
            "lora_alpha": site.alpha,
            "scaling": site.scaling,
        }

    def size(self, host: Host, config: Any, path: str) -> tuple[int | None, int]:
        r: int = config.for_site(path).r
        return r, entries(host, r) + (host.shape[0] if config.lora_bias else 0)

    def delta(self, a: View, rows: slice = ALL_ROWS) -> Tensor:
        scaling: float = a.scaling
        return outer(a.layer.host, a, rows) * scaling

    def delta_forward(self, a: View, x: Tensor) -> Tensor:
        scaling: float = a.scaling
        return low_rank(a.layer.host, a, x) * scaling

    def delta_bias(self, a: View) -> Tensor | None:
        bias = bias_of_B(a.layer.host, a)
        return None if bias is None else bias * a.scaling

    def why_not_merge(self, a: View) -> str | None:
        host: Host = a.layer.host
        if bias_of_B(host, a) is not None and host.bias is None:
            return "it has a `lora_bias`, and the base layer has no bias to merge it into"
        return not_expressible(host)


# ---- the tuner
SLOTS = (
    Slot("lora_dropout", ModuleSlot, trainable=False),
    Slot("lora_A", ModuleSlot),
    Slot("lora_B", ModuleSlot),
    Slot("lora_embedding_A"),
    Slot("lora_embedding_B"),
    Slot("lora_magnitude_vector", ModuleSlot, bare=True),
)

_LORA = Lora()


def variant_for(config: LoraConfig) -> Variant:
    """The variant that a config asks for."""
    return _LORA


def resolve(config: LoraConfig, hosts: Sequence[tuple[str, Host]]) -> None:
    """Note in the model's own config how the adapted weights are stored, as readers of the file expect it."""
    config.fan_in_fan_out = any(host.transposed for _, host in hosts)


LORA = register(
    TunerSpec(
        peft_type=PeftType.LORA.value,
        slots=SLOTS,
        variant_for=variant_for,
        label=lambda host: f"lora.{host.name}",
        numbers=("r", "lora_alpha", "scaling"),
        resolve=resolve,
    )
)
