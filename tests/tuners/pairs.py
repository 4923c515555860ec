"""One layer, adapted by peftlite and by real PEFT with the same weights, and everything that must not differ."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peftlite
from peftlite.core.tree import layers

IN, OUT = 12, 10

KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(IN, OUT), (3, 5, IN)),
    "linear-no-bias": (lambda: nn.Linear(IN, OUT, bias=False), (3, 5, IN)),
    "Conv1D": (lambda: Conv1D(OUT, IN), (3, 5, IN)),
    "conv1d": (lambda: nn.Conv1d(IN, OUT, 3, padding=1), (3, IN, 7)),
    "conv2d": (lambda: nn.Conv2d(IN, OUT, 3, stride=2, padding=1, dilation=2), (3, IN, 6, 6)),
    "conv2d-strided": (
        lambda: nn.Conv2d(IN, OUT, 3, stride=2, padding=1),
        (3, IN, 6, 6),
    ),  # PEFT's LoRA forgets dilation
    "conv2d-1x1": (lambda: nn.Conv2d(IN, OUT, 1), (3, IN, 6, 6)),
    "conv2d-groups": (lambda: nn.Conv2d(IN, OUT, 3, groups=2), (3, IN, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(IN, OUT, (1, 2, 3), bias=False), (3, IN, 4, 4, 4)),
}


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer = KINDS[kind][0]()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))


@dataclass
class Pair:
    """`Net(kind)` with a `config` adapter, twice, in eval mode; adapter weights are random and equal."""

    config: str
    kind: str
    fields: dict[str, Any]

    @classmethod
    def row(cls, config: str, kind: str, **fields: Any) -> Pair:
        """A row of a table: nothing is built yet."""
        return cls(config, kind, fields)

    def __str__(self) -> str:
        return "-".join([self.kind, *(f"{name}={value}" for name, value in self.fields.items())])

    def build(self) -> None:
        self.ours, self.theirs = (self.adapted(library) for library in (peftlite, peft))
        with torch.no_grad():
            for layer in layers(self.ours):
                for parameter in layer.parameters_of("default"):
                    parameter.copy_(torch.randn_like(parameter))
        self.theirs.load_state_dict(self.ours.state_dict())
        self.x = torch.randn(KINDS[self.kind][1])

    def adapted(self, library: Any) -> Any:
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fan_in_fan_out", UserWarning)  # PEFT's, about Conv1D
            return library.get_peft_model(Net(self.kind), self.make(library)).eval()

    def make(self, library: Any) -> Any:
        return getattr(library, self.config)(**{"target_modules": ["layer"], **self.fields})

    @property
    def models(self) -> tuple[Any, Any]:
        return self.ours, self.theirs

    def gradients(self, model: Any) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        x = self.x.clone().requires_grad_()
        model(x).square().sum().backward()
        assert x.grad is not None
        return x.grad, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    # ---- what must not differ
    def check_names(self) -> None:
        ours, theirs = self.models
        assert repr(ours) == repr(theirs)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert [n for n, p in ours.named_parameters() if p.requires_grad] == [
            n for n, p in theirs.named_parameters() if p.requires_grad
        ]
        assert ours.peft_config["default"].to_dict().keys() == theirs.peft_config["default"].to_dict().keys()

    def check_numbers(self, tolerance: float = 1e-6) -> None:
        ours, theirs = self.models
        assert apart(ours(self.x), theirs(self.x)) <= tolerance
        (x_ours, by_ours), (x_theirs, by_theirs) = self.gradients(ours), self.gradients(theirs)
        assert apart(x_ours, x_theirs) <= tolerance
        assert by_ours.keys() == by_theirs.keys()
        for name in by_theirs:
            assert apart(by_ours[name], by_theirs[name]) <= tolerance, name

    def check_merged(self, tolerance: float = 1e-6) -> None:
        """The models are merged afterwards."""
        for model in self.models:
            model.merge_adapter()
        ours, theirs = (dict(model.base_model.model.layer.base_layer.named_parameters()) for model in self.models)
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert apart(ours[name], theirs[name]) <= tolerance, name

    def check_files(self, folder: Path) -> None:
        ours, theirs = folder / "ours", folder / "theirs"
        expected = self.ours(self.x)
        self.ours.save_pretrained(ours)
        self.theirs.save_pretrained(theirs)
        mine, other = (load_file(path / "adapter_model.safetensors") for path in (ours, theirs))
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[key], other[key]) for key in other)
        read = peft.PeftModel.from_pretrained(self.base(), ours).eval()
        assert apart(read(self.x), expected) <= 1e-6
        for load in (peftlite.PeftModel.from_pretrained, self.in_place):
            assert torch.equal(load(self.base(), theirs).eval()(self.x), expected)

    def base(self) -> nn.Module:
        torch.manual_seed(1)
        return Net(self.kind)

    @staticmethod
    def in_place(model: nn.Module, folder: Path) -> nn.Module:
        peftlite.load_adapter(model, folder)
        return model
