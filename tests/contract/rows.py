"""The rows of the contract: every tuner and variant, every kind of layer, every dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peftlite
from peftlite import AdaLoraConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, VeraConfig
from peftlite.core.tree import layers
from tests.quantised import QUANTISED

IN, OUT, BATCH, LENGTH, VOCAB = 12, 10, 3, 5, 20
WIDE = 64  # quantised in blocks


@dataclass(frozen=True)
class Kind:
    """One kind of base layer: how to make one, what to feed it, and how wide its output is."""

    make: Callable[[], nn.Module]
    feed: Callable[[torch.dtype], Tensor]
    width: int = OUT
    quantised: str = ""
    """How the layer is quantised, a key of `QUANTISED`."""
    dtypes: tuple[str, ...] = ("fp32", "bf16")


def vectors(dtype: torch.dtype) -> Tensor:
    return torch.randn(BATCH, LENGTH, IN).to(dtype)


def wide_vectors(dtype: torch.dtype) -> Tensor:
    return torch.randn(BATCH, LENGTH, WIDE).to(dtype)


def ids(dtype: torch.dtype) -> Tensor:
    return torch.randint(0, VOCAB, (BATCH, LENGTH))


def images(dimensions: int) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: torch.randn(BATCH, IN, *([6] * dimensions)).to(dtype)


KINDS: dict[str, Kind] = {
    "linear": Kind(lambda: nn.Linear(IN, OUT), vectors),
    "linear-no-bias": Kind(lambda: nn.Linear(IN, OUT, bias=False), vectors),
    "conv1d": Kind(lambda: Conv1D(OUT, IN), vectors),
    "conv1d-torch": Kind(lambda: nn.Conv1d(IN, OUT, 3, padding="same", padding_mode="circular"), images(1), 0),
    "conv2d": Kind(lambda: nn.Conv2d(IN, OUT, 3, stride=2, padding=1, dilation=2), images(2), 0),
    "conv2d-groups": Kind(lambda: nn.Conv2d(IN, OUT, 3, groups=2), images(2), 0),
    "conv3d": Kind(lambda: nn.Conv3d(IN, OUT, (1, 2, 3), bias=False), images(3), 0),
    "embedding": Kind(lambda: nn.Embedding(VOCAB, OUT), ids),
    **{
        kind: Kind(lambda: nn.Linear(WIDE, WIDE // 2), wide_vectors, WIDE // 2, kind, dtypes)
        for kind, dtypes in {
            "linear4bit-nf4": ("fp32", "bf16"),
            "linear4bit-fp4-double": ("bf16",),
            "linear8bit": ("fp32",),
            "torchao-int8": ("bf16",),
            "torchao-int4": ("fp32",),
            "hqq": ("bf16",),
        }.items()
    },
}

Make = Callable[..., peftlite.PeftConfig]


def lora(**fields: Any) -> Make:
    return lambda **more: LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["layer"], **fields, **more})


def of(config: Callable[..., peftlite.PeftConfig], **fields: Any) -> Make:
    """Any other method, on the layer to adapt."""
    return lambda **more: config(**{"target_modules": ["layer"], **fields, **more})


def ia3(*, feedforward: bool) -> Make:
    """Feed-forward modules are among the targets, whichever those are."""

    def make(target_modules: Any = ("layer",), **more: Any) -> peftlite.PeftConfig:
        return IA3Config(target_modules=target_modules, feedforward_modules=["layer"] if feedforward else [], **more)

    return make


TUNERS: dict[str, Make] = {
    "lora": lora(),
    "lora-rslora": lora(use_rslora=True),
    "lora-dropout": lora(lora_dropout=0.3),
    "lora-lora_bias": lora(lora_bias=True),
    "lora-gaussian": lora(init_lora_weights="gaussian"),
    "lora-modules_to_save": lora(modules_to_save=["head"]),
    "lora-dora": lora(use_dora=True),
    "lora-dora-rslora": lora(use_dora=True, use_rslora=True, lora_dropout=0.3),
    "lora-pissa": lora(init_lora_weights="pissa"),
    "lora-olora": lora(init_lora_weights="olora", lora_dropout=0.3),
    "lora-orthogonal": lora(init_lora_weights="orthogonal"),
    "lora-mica": lora(init_lora_weights="mica"),
    "lora-bdlora": lora(use_bdlora={"target_modules_bd_a": ["layer"], "nblocks": 2}),
    "lora-bdlora-B": lora(use_bdlora={"target_modules_bd_b": ["layer"], "nblocks": 2}, lora_dropout=0.3),
    "lora-qalora": lora(use_qalora=True, qalora_group_size=4),
    "lora-dora-pissa": lora(init_lora_weights="pissa_niter_2", use_dora=True),
    "adalora": of(AdaLoraConfig, init_r=4, target_r=2, total_step=10),
    "adalora-dropout": of(AdaLoraConfig, init_r=3, target_r=2, total_step=10, lora_dropout=0.2, lora_alpha=0),
    "ia3": ia3(feedforward=False),
    "ia3-feedforward": ia3(feedforward=True),
    "loha": of(LoHaConfig, r=2),
    "loha-effective": of(LoHaConfig, r=2, use_effective_conv2d=True),
    "lokr": of(LoKrConfig, r=4),
    "lokr-low_rank": of(LoKrConfig, r=1, decompose_both=True, decompose_factor=2),
    "lokr-effective": of(LoKrConfig, r=1, use_effective_conv2d=True),
    "vera": of(VeraConfig, r=6),
    "vera-unsaved": of(VeraConfig, r=6, save_projection=False, vera_dropout=0.1),
}

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

UNSUPPORTED: dict[tuple[str, str], str] = {
    ("lora-lora_bias", "embedding"): "lora_bias",
    **{(tuner, "conv2d-groups"): "use_dora" for tuner in ("lora-dora", "lora-dora-rslora")},
    **{
        (f"lora-{form}", kind): f"use_{form.partition('-')[0]}"
        for form in ("bdlora", "bdlora-B", "qalora")
        for kind in ("conv1d-torch", "conv2d", "conv2d-groups", "conv3d", "embedding")
    },
    **{
        (f"lora-{init}", kind): "init_lora_weights"
        for init in ("pissa", "olora", "orthogonal", "mica", "dora-pissa")
        for kind in ("conv1d-torch", "conv2d", "conv2d-groups", "conv3d")
    },
    **{(tuner, "embedding"): "Embedding" for tuner in TUNERS if not tuner.startswith("lora")},
    **{
        (tuner, kind): "Conv"
        for tuner in ("vera", "vera-unsaved")
        for kind in ("conv1d-torch", "conv2d", "conv2d-groups", "conv3d")
    },
}
"""Combinations that the plan refuses, and what its message names."""

UNMERGEABLE = {
    ("lora-lora_bias", "linear-no-bias"),
    ("lora-lora_bias", "conv3d"),
    *((tuner, "conv2d-groups") for tuner in TUNERS if tuner.startswith("lora")),
}
"""Combinations whose effect cannot be written into the base layer."""


NEARLY_IDENTITY = {"lora-orthogonal"}
"""Fresh adapters whose factors are not zero, and their product is but for rounding."""


@dataclass(frozen=True)
class Case:
    """One row: a tuner on a kind of layer in a dtype."""

    tuner: str
    kind: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.tuner}-{self.kind}-{self.dtype}"

    @property
    def mergeable(self) -> bool:
        return (self.tuner, self.kind) not in UNMERGEABLE

    @property
    def quantised(self) -> bool:
        return bool(KINDS[self.kind].quantised)

    def config(self, **fields: Any) -> peftlite.PeftConfig:
        return TUNERS[self.tuner](**fields)

    def base(self) -> Holder:
        torch.manual_seed(1)
        kind = KINDS[self.kind]
        model = Holder(kind).to(DTYPES[self.dtype]).eval()
        if kind.quantised and isinstance(model.layer, nn.Linear):
            model.layer = QUANTISED[kind.quantised](model.layer)
        return model

    def feed(self, seed: int = 2) -> Tensor:
        torch.manual_seed(seed)
        return KINDS[self.kind].feed(DTYPES[self.dtype])

    def adapted(self, *names: str) -> Holder:
        """A model in which the adapters `names` (default: one) have random weights; the first is active."""
        model = self.base()
        for name in names or ("default",):
            peftlite.inject_adapter_in_model(self.config(), model, name)
            scramble(model, name)
        peftlite.set_adapter(model, (names or ("default",))[0])
        return model

    @property
    def tolerance(self) -> dict[str, float]:
        """How far two ways of computing the same may be apart: some roundings of values of about 1 to 10."""
        eps = torch.finfo(DTYPES[self.dtype]).eps
        return {"rtol": 16 * eps, "atol": 32 * eps}


class Holder(nn.Module):
    """A model with one layer to adapt and a head."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.layer = kind.make()
        self.channels_first = not kind.width
        self.head = nn.Linear(kind.width or OUT, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        if self.channels_first:
            y = y.flatten(2).transpose(1, 2).contiguous()
        z: Tensor = self.head(y)
        return z


@torch.no_grad()
def scramble(model: nn.Module, name: str, seed: int | None = None) -> None:
    """Give an adapter random weights, so that it has an effect."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)) if seed is None else seed)
    for layer in layers(model):
        for parameter in layer.parameters_of(name):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def cases(*, unsupported: bool = False) -> Iterator[Case]:
    for tuner in TUNERS:
        for kind in KINDS:
            if ((tuner, kind) in UNSUPPORTED) is unsupported:
                yield from (Case(tuner, kind, dtype) for dtype in KINDS[kind].dtypes)
