"""The rows of the contract: every tuner and variant, every kind of layer, every dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peftlite
from peftlite.core.tree import layers
from tests.quantised import QUANTISED

IN, OUT, BATCH, LENGTH, VOCAB = 12, 10, 3, 5, 20
WIDE = 64  # quantised in blocks


def called(layer: Any, x: Tensor) -> Tensor:
    y: Tensor = layer(x)
    return y


@dataclass(frozen=True)
class Kind:
    """One kind of base layer: how to make one, what to feed it, and how wide its output is."""

    make: Callable[[], nn.Module]
    feed: Callable[[torch.dtype], Tensor]
    width: int = OUT
    quantised: str = ""
    """How the layer is quantised, a key of `QUANTISED`."""
    parameter: str = ""
    """The parameter of the layer to adapt, where that is one and not the layer."""
    call: Callable[[Any, Tensor], Tensor] = called


def vectors(dtype: torch.dtype) -> Tensor:
    return torch.randn(BATCH, LENGTH, IN).to(dtype)


def wide_vectors(dtype: torch.dtype) -> Tensor:
    return torch.randn(BATCH, LENGTH, WIDE).to(dtype)


def ids(dtype: torch.dtype) -> Tensor:
    return torch.randint(0, VOCAB, (BATCH, LENGTH))


def images(dimensions: int) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: torch.randn(BATCH, IN, *([6] * dimensions)).to(dtype)


def attend(layer: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """To its one input, made small: a softmax of large numbers is a choice, that rounding would decide."""
    x = x / 8
    y: Tensor = layer(x, x, x, need_weights=False)[0]
    return y


class Matrix(nn.Module):
    """A bare parameter (out, in), read by the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(OUT, IN) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Experts(nn.Module):
    """Fused experts (experts, in, out), the sum of which is taken."""

    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, IN, OUT) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([(x @ expert).tanh() for expert in self.weight]).sum(0)


KINDS: dict[str, Kind] = {
    "linear": Kind(lambda: nn.Linear(IN, OUT), vectors),
    "linear-no-bias": Kind(lambda: nn.Linear(IN, OUT, bias=False), vectors),
    "conv1d": Kind(lambda: Conv1D(OUT, IN), vectors),
    "conv1d-torch": Kind(lambda: nn.Conv1d(IN, OUT, 3, padding="same", padding_mode="circular"), images(1), 0),
    "conv2d": Kind(lambda: nn.Conv2d(IN, OUT, 3, stride=2, padding=1, dilation=2), images(2), 0),
    "conv2d-groups": Kind(lambda: nn.Conv2d(IN, OUT, 3, groups=2), images(2), 0),
    "conv3d": Kind(lambda: nn.Conv3d(IN, OUT, (1, 2, 3), bias=False), images(3), 0),
    "embedding": Kind(lambda: nn.Embedding(VOCAB, OUT), ids),
    "attention": Kind(lambda: nn.MultiheadAttention(IN, 2, batch_first=True), vectors, IN, call=attend),
    "parameter": Kind(Matrix, vectors, parameter="weight"),
    "experts": Kind(Experts, vectors, parameter="weight"),
    **{
        kind: Kind(lambda: nn.Linear(WIDE, WIDE // 2), wide_vectors, WIDE // 2, kind)
        for kind in ("linear4bit-nf4", "linear4bit-fp4-double", "linear8bit", "torchao-int8", "torchao-int4", "hqq")
    },
}
TAME_KINDS: dict[str, Kind] = {
    "conv1d-zeros": Kind(lambda: nn.Conv1d(IN, OUT, 3, padding=1), images(1), 0),
    "conv2d-strided": Kind(lambda: nn.Conv2d(IN, OUT, 3, stride=2, padding=1), images(2), 0),
    "conv2d-1x1": Kind(lambda: nn.Conv2d(IN, OUT, 1), images(2), 0),
}
"""Convolutions with nothing that PEFT forgets; no page and no law has them, comparisons do."""
CONVOLUTIONS = ("conv1d-torch", "conv2d", "conv2d-groups", "conv3d")
READ_BY_MODULE = ("attention", "parameter", "experts")


@dataclass(frozen=True)
class Method:
    """A tuner and variant: the name of its config class, and the fields to set."""

    config: str
    fields: Mapping[str, Any]

    def __call__(self, library: Any = peftlite, **more: Any) -> Any:
        return getattr(library, self.config)(**{"target_modules": ["layer"], **self.fields, **more})


def lora(**fields: Any) -> Method:
    return Method("LoraConfig", {"r": 4, "lora_alpha": 8, **fields})


def of(config: str, **fields: Any) -> Method:
    return Method(config, fields)


TUNERS: dict[str, Method] = {
    "lora": lora(),
    "lora-rslora": lora(use_rslora=True),
    "lora-dropout": lora(lora_dropout=0.3),
    "lora-lora_bias": lora(lora_bias=True),
    "lora-base_dtype": lora(runtime_config=peftlite.LoraRuntimeConfig(compute_dtype="base", dropout_mask="seed")),
    "lora-false": lora(init_lora_weights=False),
    "lora-gaussian": lora(init_lora_weights="gaussian"),
    "lora-modules_to_save": lora(modules_to_save=["head"]),
    "lora-dora": lora(use_dora=True),
    "lora-dora-rslora": lora(use_dora=True, use_rslora=True, lora_dropout=0.3),
    "lora-pissa": lora(init_lora_weights="pissa"),
    "lora-olora": lora(init_lora_weights="olora", lora_dropout=0.3),
    "lora-orthogonal": lora(init_lora_weights="orthogonal"),
    "lora-mica": lora(init_lora_weights="mica"),
    "lora-eva": lora(init_lora_weights="eva"),
    "lora-corda": lora(init_lora_weights="corda"),
    "lora-lora_ga": lora(init_lora_weights="lora_ga"),
    "lora-bdlora": lora(use_bdlora={"target_modules_bd_a": ["layer"], "nblocks": 2}),
    "lora-bdlora-B": lora(use_bdlora={"target_modules_bd_b": ["layer"], "nblocks": 2}, lora_dropout=0.3),
    "lora-qalora": lora(use_qalora=True, qalora_group_size=4),
    "lora-dora-pissa": lora(init_lora_weights="pissa_niter_2", use_dora=True),
    "adalora": of("AdaLoraConfig", init_r=4, target_r=2, total_step=10),
    "adalora-dropout": of("AdaLoraConfig", init_r=3, target_r=2, total_step=10, lora_dropout=0.2, lora_alpha=0),
    "ia3": of("IA3Config", feedforward_modules=[]),
    "ia3-feedforward": of("IA3Config", feedforward_modules=["layer"]),
    "loha": of("LoHaConfig", r=2),
    "loha-effective": of("LoHaConfig", r=2, use_effective_conv2d=True),
    "lokr": of("LoKrConfig", r=4),
    "lokr-low_rank": of("LoKrConfig", r=1, decompose_both=True, decompose_factor=2),
    "lokr-effective": of("LoKrConfig", r=1, use_effective_conv2d=True),
    "trainable_tokens": of("TrainableTokensConfig", token_indices=[7, 3, 4, 9]),
    "vera": of("VeraConfig", r=6),
    "vera-unsaved": of("VeraConfig", r=6, save_projection=False, vera_dropout=0.1),
}

PREPARED = {"lora-corda": peftlite.preprocess_corda, "lora-lora_ga": peftlite.preprocess_loraga}
"""Tuners whose adapters begin with what is seen in the base model, and what looks."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

UNSUPPORTED: dict[tuple[str, str], str] = {
    ("lora-lora_bias", "embedding"): "lora_bias",
    **{
        (tuner, kind): "use_dora"
        for tuner in ("lora-dora", "lora-dora-rslora")
        for kind in ("conv2d-groups", *READ_BY_MODULE)
    },
    **{
        (f"lora-{form}", kind): f"use_{form.partition('-')[0]}"
        for form in ("bdlora", "bdlora-B", "qalora")
        for kind in (*CONVOLUTIONS, *READ_BY_MODULE, "embedding")
    },
    **{
        (f"lora-{init}", kind): "init_lora_weights"
        for init in ("pissa", "olora", "orthogonal", "mica")
        for kind in (*CONVOLUTIONS, "experts")
    },
    **{("lora-dora-pissa", kind): "init_lora_weights" for kind in (*CONVOLUTIONS, "experts")},
    **{(tuner, kind): "init_lora_weights" for tuner in PREPARED for kind in (*CONVOLUTIONS, *READ_BY_MODULE)},
    **{("lora-dora-pissa", kind): "use_dora" for kind in ("attention", "parameter")},
    **{("lora-olora", kind): "lora_dropout" for kind in ("attention", "parameter")},
    **{(f"lora-{form}", kind): "lora_" for form in ("dropout", "lora_bias", "dora-rslora") for kind in READ_BY_MODULE},
    **{
        (tuner, kind): "Embedding"
        for tuner in TUNERS
        for kind in ("embedding",)
        if not tuner.startswith(("lora", "train"))
    },
    **{(tuner, kind): "Conv" for tuner in ("vera", "vera-unsaved", "trainable_tokens") for kind in CONVOLUTIONS},
    **{("trainable_tokens", kind): "trainable tokens" for kind, layer in KINDS.items() if layer.quantised},
    **{
        (tuner, kind): {"attention": "MultiheadAttention", "parameter": "Matrix", "experts": "Experts"}[kind]
        for tuner in TUNERS
        for kind in READ_BY_MODULE
        if not tuner.startswith("lora")
    },
}
"""Combinations that the plan refuses, and what its message names."""

UNMERGEABLE = {
    ("lora-lora_bias", "linear-no-bias"),
    ("lora-lora_bias", "conv3d"),
    *((tuner, "conv2d-groups") for tuner in TUNERS if tuner.startswith("lora")),
}
"""Combinations whose effect cannot be written into the base layer."""


NO_IDENTITY = {"lora-false"}
"""Fresh adapters that begin at random, as their config says."""
NEARLY_IDENTITY = {"lora-orthogonal", "trainable_tokens"}
"""Fresh adapters whose factors are not zero, and their product is but for rounding; or rows that are computed apart."""
ROUNDED = {"lora-base_dtype"}
"""Low-rank products in the base's dtype: each way to the same rounds otherwise, and a file does not say how it ran."""
RIVALS = {"lora-modules_to_save", "trainable_tokens"}
"""Adapters of which two cannot be active together: each has a module, or a row of a table, of its own."""


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
    def layer(self) -> Kind:
        return KINDS.get(self.kind) or TAME_KINDS[self.kind]

    @property
    def quantised(self) -> bool:
        return bool(self.layer.quantised)

    def config(self, library: Any = peftlite, **fields: Any) -> Any:
        method, parameter = TUNERS[self.tuner], self.layer.parameter
        if parameter and method.config == "LoraConfig":
            fields = {"target_modules": [], "target_parameters": [f"layer.{parameter}"], **fields}
        return method(library, **fields)

    def base(self) -> Holder:
        torch.manual_seed(1)
        kind = self.layer
        model = Holder(kind).to(DTYPES[self.dtype]).eval()
        if kind.quantised and isinstance(model.layer, nn.Linear):
            model.layer = QUANTISED[kind.quantised](model.layer)
        if self.tuner in PREPARED and self.kind != "embedding" and (self.tuner, self.kind) not in UNSUPPORTED:
            PREPARED[self.tuner](model, self.config(), lambda: self.step(model))
        return model

    def step(self, model: nn.Module) -> None:
        y = model(self.feed(5)).float().square().sum()
        if y.requires_grad:
            y.backward()

    def feed(self, seed: int = 2) -> Tensor:
        torch.manual_seed(seed)
        return self.layer.feed(DTYPES[self.dtype])

    def adapted(self, *names: str) -> Holder:
        """A model in which the adapters `names` (default: one) have random weights; the first is active."""
        model = self.base()
        for name in names or ("default",):
            peftlite.inject_adapter_in_model(self.config(), model, name)
            scramble(model, name)
        peftlite.set_adapter(model, (names or ("default",))[0])
        return model

    def assert_same(self, one: Tensor, other: Tensor) -> None:
        """Bit for bit, but for attention, which torch computes in another way where no gradients are recorded."""
        if self.kind == "attention" or self.tuner in ROUNDED:
            torch.testing.assert_close(one, other, **self.tolerance)
        else:
            assert torch.equal(one, other)

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
        self.call = kind.call
        self.head = nn.Linear(kind.width or OUT, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.call(self.layer, x)
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


def cases(*, unsupported: bool = False, each_dtype: bool = True) -> Iterator[Case]:
    """All cells of the table; of each, all dtypes or (in turn, so that every row and column has all) one."""
    for row, tuner in enumerate(TUNERS):
        for column, kind in enumerate(KINDS):
            if ((tuner, kind) in UNSUPPORTED) is unsupported:
                one = (row + column) % len(DTYPES)
                names = list(DTYPES) if each_dtype else list(DTYPES)[one : one + 1]
                yield from (Case(tuner, kind, dtype) for dtype in names)
