"""The models that are measured, adapted by both implementations with the same weights."""

from __future__ import annotations

import copy
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

import peftlite

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STACK = r"(.*\.)?layers\.\d+"


def llama_1b(layers: int = 16, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A model of Llama-3.2-1B's shapes (with fewer layers if asked for), its weights whatever memory had."""
    with torch.device("meta"):
        model = LlamaForCausalLM(shapes(2048, layers)).to(dtype)
    return model if device == "meta" else model.to_empty(device=device).requires_grad_(False)


def shapes(h: int, layers: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=h,
        intermediate_size=4 * h,
        num_hidden_layers=layers,
        num_attention_heads=max(1, h // 64),
        num_key_value_heads=max(1, h // 256),
        vocab_size=1024,
    )


class Block(nn.Module):
    """One block of a Llama of width `h`, where q, k and v share their input: (batch, tokens, h) -> the same."""

    def __init__(self, h: int) -> None:
        super().__init__()
        self.llama = LlamaModel(shapes(h, 1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.llama(inputs_embeds=x, use_cache=False)[0]
        return y


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


def both(base: nn.Module, **fields: Any) -> tuple[Any, Any]:
    """(PEFT's, ours): the same base and the same adapter "default" in place."""
    base = base.requires_grad_(False)
    theirs, ours = copy.deepcopy(base), copy.deepcopy(base)
    peft.get_peft_model(theirs, peft.LoraConfig(**fields))  # which gives adapters fp32, as we do
    peftlite.inject(ours, peftlite.LoraConfig(**fields))
    ours.load_state_dict(given_numbers(theirs))
    theirs.load_state_dict(ours.state_dict())
    assert {k: t.dtype for k, t in theirs.state_dict().items()} == {k: t.dtype for k, t in ours.state_dict().items()}
    return theirs, ours


def given_numbers(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors, with random ones for the adapters', whose B is zero at first."""
    return {key: torch.randn_like(t) * 0.05 if "lora_" in key else t for key, t in model.state_dict().items()}


class ByHand(nn.Module):
    """LoRA as anyone would write it: y = W x + s B(A(dropout(x)))."""

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.base, self.s = theirs.base_layer, theirs.scaling["default"]
        self.A, self.B = (nn.Parameter(part["default"].weight.detach()) for part in (theirs.lora_A, theirs.lora_B))
        self.dropout = theirs.lora_dropout["default"]

    def forward(self, x: Tensor) -> Tensor:
        low: Tensor = self.dropout(x).to(self.A.dtype)
        y: Tensor = self.base(x)
        return (y + low @ self.A.T @ self.B.T * self.s).to(y.dtype)


def by_hand(theirs: nn.Module) -> nn.Module:
    """A copy of PEFT's model with `ByHand` in the place of its layers, whose parameters come in the same order."""
    model = copy.deepcopy(theirs)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            model.set_submodule(name, ByHand(layer))
    return model


def in_float64(hand: nn.Module) -> nn.Module:
    """A copy that computes in float64 throughout: Llama's norms would do it in float32."""
    model = copy.deepcopy(hand)
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            norm = nn.RMSNorm(module.weight.shape, module.variance_epsilon)
            norm.weight = module.weight
            model.set_submodule(name, norm)
    return model.double()


def running(ours: nn.Module, **runtime: str) -> nn.Module:
    """A copy whose adapters run as a `LoraRuntimeConfig` with these fields says."""
    model = copy.deepcopy(ours)
    peftlite.set_runtime_config(model, peftlite.LoraRuntimeConfig(**runtime))  # type: ignore[arg-type]
    return model


def merged(ours: nn.Module) -> nn.Module:
    """A copy with the adapter merged for good."""
    model = peftlite.merge_and_unload(copy.deepcopy(ours))
    return model.requires_grad_(False)
