"""The same adapted model twice, by peftlite and by real PEFT: the same base weights, the same adapter weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from torch import Tensor, nn

from peftlite import LoraConfig, get_peft_model
from tests.models import batch, tiny


@dataclass
class Twins:
    """Two wrapped models that should not differ."""

    name: str
    ours: Any
    theirs: Any
    inputs: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.inputs = batch(self.name)

    def add(self, adapter_name: str, **fields: Any) -> None:
        self.ours.add_adapter(adapter_name, LoraConfig(**fields))
        self.theirs.add_adapter(adapter_name, peft.LoraConfig(**fields))
        self.fill()

    def fill(self) -> None:
        """Give all adapters equal weights, none of them zero."""
        fill(self.ours)
        self.theirs.load_state_dict(self.ours.state_dict())

    def eval(self) -> None:
        self.ours.eval()
        self.theirs.eval()

    def outputs(self) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return tuple(model(**self.inputs).logits for model in (self.ours, self.theirs))  # type: ignore[return-value]

    def check_outputs(self) -> None:
        ours, theirs = self.outputs()
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)

    def check_trainable(self) -> None:
        ours, theirs = trainable(self.ours), trainable(self.theirs)
        assert ours == theirs
        assert self.ours.get_nb_trainable_parameters() == self.theirs.get_nb_trainable_parameters()


def trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def fill(model: nn.Module) -> None:
    """Random weights for everything that belongs to an adapter."""
    slots = ("lora_", "modules_to_save")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part.startswith(slots) for part in name.split(".")):
                parameter.copy_(torch.randn_like(parameter) * 0.2)


def twins(name: str, *, dtype: torch.dtype = torch.float32, **fields: Any) -> Twins:
    """`tiny(name)` with one adapter, `default`, in eval mode."""
    ours = get_peft_model(tiny(name, dtype=dtype), LoraConfig(**fields))
    theirs = peft.get_peft_model(tiny(name, dtype=dtype), peft.LoraConfig(**fields))
    both = Twins(name, ours, theirs)
    both.fill()
    both.eval()
    return both
