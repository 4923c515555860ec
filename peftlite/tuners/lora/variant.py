"""Low-rank adaptation: the formula, its factors on each kind of layer, and the tuner."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from peftlite.config import PeftType
from peftlite.core.hosts import ALL_ROWS, EmbeddingHost, Host, LinearHost, widened
from peftlite.core.slots import ModuleSlot, Slot, View, build_linear
from peftlite.core.variant import Additive, Placement, TunerSpec, Variant, register
from peftlite.tuners.lora.config import LoraConfig


class Lora(Additive):
    """LoRA (https://arxiv.org/abs/2106.09685): W' = W + scaling * B A, scaling = alpha / r (rsLoRA: alpha / sqrt(r)).

    Slots: lora_A (r, in), lora_B (out, r); embeddings have lora_embedding_A (r, num), lora_embedding_B (dim, r). One
    factor starts at zero, so that a fresh adapter is the identity. The product is computed in the factors' dtype.
    """

    by_rows = True

    def check(self, host: Host, config: Any, path: str) -> str | None:
        return cannot_adapt(host, config)

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
        out, into = host.shape[0], torch.Size(host.shape[1:]).numel()
        return r, r * (out + into) + (out if config.lora_bias else 0)

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
        if bias_of_B(a.layer.host, a) is not None and a.layer.host.bias is None:
            return "it has a `lora_bias`, and the base layer has no bias to merge it into"
        return None


# ---- the factors on each kind of layer
@singledispatch
def cannot_adapt(host: Host, config: LoraConfig) -> str | None:
    """Why LoRA cannot adapt a kind of layer, or None."""
    return f"LoRA has no form for {host.label}"


@singledispatch
def factors(host: Host, r: int, at: Placement) -> dict[str, Any]:
    """Fresh factors by slot name."""
    raise NotImplementedError(host.label)


@singledispatch
def outer(host: Host, a: View, rows: slice) -> Tensor:
    """B A in the canonical layout, without scaling, for some rows of it."""
    raise NotImplementedError(host.label)


@singledispatch
def low_rank(host: Host, a: View, x: Tensor) -> Tensor:
    """B A applied to x, without scaling."""
    raise NotImplementedError(host.label)


@singledispatch
def bias_of_B(host: Host, a: View) -> Tensor | None:  # noqa: N802 - the factor's name
    """The bias of the second factor, where it has one."""
    return None


@cannot_adapt.register
def _(host: LinearHost, config: LoraConfig) -> str | None:
    return None


@factors.register
def _(host: LinearHost, r: int, at: Placement) -> dict[str, Any]:
    out, into = host.shape
    config: LoraConfig = at.config
    A = uniform((r, into), into, at)
    B = uniform((out, r), r, at) if config.init_lora_weights is False else zeros((out, r), at)
    if config.init_lora_weights == "gaussian":
        A.normal_(std=1 / r)
    bias = None
    if config.lora_bias:
        bias = uniform((out,), r, at) if config.init_lora_weights is False else zeros((out,), at)
    return {"lora_A": build_linear(into, r, A), "lora_B": build_linear(r, out, B, bias)}


@outer.register
def _(host: LinearHost, a: View, rows: slice) -> Tensor:
    A: Tensor = a.lora_A.weight
    B: Tensor = a.lora_B.weight
    return widened(B if rows == ALL_ROWS else B[rows]) @ widened(A)  # (out, r) @ (r, in) -> (out, in)


@low_rank.register
def _(host: LinearHost, a: View, x: Tensor) -> Tensor:
    return a.lora_B(a.lora_A(a.lora_dropout(x.to(a.lora_A.weight.dtype))))  # type: ignore[no-any-return]


@bias_of_B.register
def _(host: LinearHost, a: View) -> Tensor | None:
    return a.lora_B.bias  # type: ignore[no-any-return]


@cannot_adapt.register
def _(host: EmbeddingHost, config: LoraConfig) -> str | None:
    return "`lora_bias` has no meaning for an embedding" if config.lora_bias else None


@factors.register
def _(host: EmbeddingHost, r: int, at: Placement) -> dict[str, Any]:
    dim, num = host.shape
    random_A = at.config.init_lora_weights is False
    A = torch.empty((r, num), dtype=at.dtype, device=at.device).normal_() if random_A else zeros((r, num), at)
    B = torch.empty((dim, r), dtype=at.dtype, device=at.device).normal_()
    return {"lora_embedding_A": nn.Parameter(A, False), "lora_embedding_B": nn.Parameter(B, False)}


@outer.register
def _(host: EmbeddingHost, a: View, rows: slice) -> Tensor:
    A: Tensor = a.lora_embedding_A
    B: Tensor = a.lora_embedding_B
    return widened(B if rows == ALL_ROWS else B[rows]) @ widened(A)  # (dim, r) @ (r, num) -> (dim, num)


@low_rank.register
def _(host: EmbeddingHost, a: View, x: Tensor) -> Tensor:
    B: Tensor = a.lora_embedding_B
    return host.apply(x, a.lora_embedding_A) @ B.T


def uniform(shape: tuple[int, ...], fan_in: int, at: Placement) -> Tensor:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the initialisation of `nn.Linear`."""
    bound = 1 / math.sqrt(fan_in)
    return torch.empty(shape, dtype=at.dtype, device=at.device).uniform_(-bound, bound)


def zeros(shape: tuple[int, ...], at: Placement) -> Tensor:
    """Zeros where the adapter goes."""
    return torch.zeros(shape, dtype=at.dtype, device=at.device)


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
        label=lambda host: f"lora.{host.label}",
        numbers=("r", "lora_alpha", "scaling"),
        resolve=resolve,
    )
)
