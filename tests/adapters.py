"""Small adapters to save and load, and what must stay as it was when that fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import peftlite
from peftlite.checkpoint.files import read_config, write_adapter
from peftlite.checkpoint.keys import PREFIX, SAFETENSORS_WEIGHTS_NAME
from peftlite.core.tree import find_state, named_layers
from tests.models import batch, tiny

A = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
B = f"{PREFIX}model.layers.1.self_attn.q_proj.lora_B.weight"
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """Everything that a failed load must leave alone: tensors and their bits, flags, modules, adapters."""
    state = find_state(model)
    return (
        {name: (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()},
        {name: bytes_of(tensor) for name, tensor in model.state_dict().items() if not tensor.is_meta},
        [id(module) for module in model.modules()],
        None if state is None else (sorted(state.configs), state.active, state.trainable, state.enabled),
    )


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def randomised(model: Any, seed: int = 1) -> Any:
    """`model`, all tensors of its adapters at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in named_layers(model):
            for name in layer.variants:
                for tensor in layer.tensors(name).values():
                    tensor.normal_(generator=generator)
    return model


def with_adapter(model: str = "llama", name: str = "default", **fields: Any) -> Any:
    """A tiny model with a LoRA adapter, in place, at random; equal arguments give equal values."""
    base = tiny(model)
    peftlite.inject(base, peftlite.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **fields}), name)
    return randomised(base)


def rewrite(directory: Path, change: Change | None = None, **config: Any) -> Path:
    """Change an adapter's tensors and fields of its config."""
    tensors = load_file(directory / SAFETENSORS_WEIGHTS_NAME)
    changed = tensors if change is None else change(tensors)
    write_adapter(directory, json.dumps(read_config(directory) | config), changed)
    return directory


def logits(model: Any, name: str = "llama") -> Tensor:
    with torch.no_grad():
        return model(**batch(name)).logits  # type: ignore[no-any-return]
