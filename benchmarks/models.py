"""The models that are measured, adapted by both implementations with the same weights."""

from __future__ import annotations

import copy
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftlite


def llama_1b(layers: int = 16, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A model of Llama-3.2-1B's shapes (with fewer layers if asked for), its weights small and random."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=1024,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    return model if device == "meta" else model.to_empty(device=device).requires_grad_(False)


class Stack(nn.Module):
    """Linear layers of a transformer block of width `h`, one after the other: (rows, h) -> (rows, h)."""

    def __init__(self, h: int, blocks: int = 1) -> None:
        super().__init__()
        sizes = [(h, h), (h, 4 * h), (4 * h, h)] * blocks
        self.layers = nn.ModuleList(nn.Linear(into, out, bias=False) for into, out in sizes)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


STACK = r"(.*\.)?layers\.\d+"


def both(base: nn.Module, names: tuple[str, ...] = ("default",), **fields: Any) -> tuple[Any, nn.Module]:
    """(PEFT's, ours): the same base, the same adapters, the first of them active."""
    base = base.requires_grad_(False)
    theirs, ours = copy.deepcopy(base), copy.deepcopy(base)
    wrapper = peft.get_peft_model(theirs, peft.LoraConfig(**fields), names[0])  # which gives adapters fp32, as we do
    for name in names[1:]:
        wrapper.add_adapter(name, peft.LoraConfig(**fields))
    for name in names:
        peftlite.inject(ours, peftlite.LoraConfig(**fields), name)
    ours.load_state_dict(
        {key: torch.randn_like(t) * 0.05 if "lora_" in key else t for key, t in theirs.state_dict().items()}
    )
    theirs.load_state_dict(ours.state_dict())
    assert {k: t.dtype for k, t in theirs.state_dict().items()} == {k: t.dtype for k, t in ours.state_dict().items()}
    for layer in theirs.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.set_adapter(names[0])
    peftlite.set_adapter(ours, names[0])
    return theirs, ours
