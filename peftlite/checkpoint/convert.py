"""LoRA whose first factors are subtracted (PiSSA, OLoRA, CorDA, ...) as plain LoRA, which every reader understands.

scaling (B A - B0 A0) = scaling [B, -B0] [A; A0]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peftlite.checkpoint.keys import file_key, shown, split_file_key
from peftlite.checkpoint.spots import spots
from peftlite.checkpoint.tensorfile import TensorSource
from peftlite.config import PeftConfig
from peftlite.core.layer import AdapterLayer
from peftlite.core.lifecycle import state_of
from peftlite.core.tree import base_model_of, layers
from peftlite.errors import CheckpointError, ConfigError
from peftlite.tuners.lora.config import LoraConfig
from peftlite.tuners.lora.inits.table import beginning, started

_A = ("lora_A.weight", "lora_embedding_A")
_B = ("lora_B.weight", "lora_embedding_B")
_NEAR = 1e-3  # how far, relative to the largest number, factors may be apart that were found on two machines


def plain_lora(
    config: PeftConfig, trained: Mapping[str, Tensor], initial: Mapping[str, Tensor]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The config and tensors of a plain LoRA that does to the base model what `trained` does beyond `initial`. Exact.

    DoRA stays DoRA, with the same magnitudes. Both are the tensors of files of one adapter: after training, and as it
    was at first. What is no factor of LoRA, such as modules that are trained whole, is taken from `trained`.

    Raises: ConfigError for other methods and forms, CheckpointError where the files differ in keys or shapes.
    """
    if not isinstance(config, LoraConfig):
        raise ConfigError(
            f"`path_initial_model_for_weight_conversion` is for LoRA, and this is a {type(config).__name__}. "
            "Nothing was written."
        )
    if config.use_bdlora is not None or config.use_qalora:
        raise ConfigError(
            "`use_bdlora` and `use_qalora` have factors of another form, whose difference is none. Nothing was written."
        )
    tensors = dict(trained)
    for key, tensor in trained.items():
        _, suffix = split_file_key(key, (*_A, *_B)) or ("", "")
        if not suffix:
            continue
        first = initial.get(key)
        if first is None or first.shape != tensor.shape:
            found = "no such tensor" if first is None else f"shape {tuple(first.shape)}"
            raise CheckpointError(
                f"{shown(key)} has shape {tuple(tensor.shape)}, and the initial adapter has {found}: it is not what "
                "this adapter was at first. Nothing was written."
            )
        first = first.to(tensor)
        tensors[key] = torch.cat([tensor, first]) if suffix in _A else torch.cat([tensor, -first], 1)
    return doubled(config), tensors


def doubled(config: LoraConfig) -> LoraConfig:
    """A config of twice the rank everywhere, with the same scaling, and nothing special about its beginning."""
    more = math.sqrt(2) if config.use_rslora else 2
    return replace(
        config.copy(),
        r=2 * config.r,
        rank_pattern={name: 2 * r for name, r in config.rank_pattern.items()},
        lora_alpha=more * config.lora_alpha,
        alpha_pattern={name: more * alpha for name, alpha in config.alpha_pattern.items()},
        init_lora_weights=True,
        corda_config=None,
        lora_ga_config=None,
    )


def initial_of(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """What is subtracted from an adapter, by the keys of `tensors`: zeros where nothing is; None if nothing at all."""
    if not any(first_factors(layer, name) for layer in layers(model)):
        return None
    found = {
        file_key(spot.path, f"{slot}.weight"): first
        for spot in spots(base_model_of(model), name)
        if isinstance(spot.module, AdapterLayer)
        for slot, first in first_factors(spot.module, name).items()
    }
    return {key: found[key] if key in found else torch.zeros_like(tensor) for key, tensor in tensors.items()}


def first_factors(layer: AdapterLayer, name: str) -> dict[str, Tensor]:
    """What is subtracted from an adapter on one layer, by slot."""
    found: dict[str, Tensor] = {}
    for slot in ("lora_A", "lora_B"):
        factors: Any = layer._modules.get(slot) or {}
        first = started(factors[name]) if name in factors else None
        if first is not None:
            found[slot] = first
    return found


class Trained:
    """A `TensorSource` of the halves A and B of a file that was written from an adapter with these A0 and B0.

    Raises: CheckpointError, in `read`, if the file has others.
    """

    def __init__(self, source: TensorSource, initial: Mapping[str, Tensor]) -> None:
        self._source = source
        self._initial = {key: first for key, first in initial.items() if split_file_key(key, (*_A, *_B)) is not None}
        self.infos = {
            key: info._replace(shape=tuple(self._initial[key].shape)) if key in self._initial else info
            for key, info in source.infos.items()
        }

    def read(self, key: str) -> Tensor:
        tensor = self._source.read(key)
        first = self._initial.get(key)
        if first is None:
            return tensor
        suffix = (split_file_key(key, (*_A, *_B)) or ("", ""))[1]
        now, then = tensor.chunk(2, 0 if suffix in _A else 1)
        then = then.to(first) if suffix in _A else -then.to(first)
        if float((then - first).abs().max()) > _NEAR * float(first.abs().max()):
            raise CheckpointError(
                f"{shown(key)} was trained from other first factors than this model's adapter has, so that it cannot "
                "go on from there: prepare the model with the same data, or load it under another name. Nothing was "
                "changed."
            )
        return now.contiguous()

    def close(self) -> None:
        self._source.close()


def resumed(model: nn.Module, name: str, config: PeftConfig, source: TensorSource) -> tuple[PeftConfig, TensorSource]:
    """Config and tensors of a file as the adapter `name` of `model` has them, if `portable` wrote it from there."""
    own = state_of(model).configs[name]
    if not isinstance(own, LoraConfig) or not isinstance(config, LoraConfig):
        return config, source
    begin = beginning(own.init_lora_weights)
    if begin is None or not begin.subtracted or config.init_lora_weights is not True:
        return config, source
    own_keys = [key for key in source.infos if split_file_key(key, (*_A, *_B)) is not None]
    initial = initial_of(model, name, {key: torch.empty(0) for key in own_keys})
    halves = {} if initial is None else {key: first for key, first in initial.items() if first.numel()}
    if config.r != 2 * own.r or len(halves) != len(own_keys):
        return config, source
    return own, Trained(source, halves)


def portable(
    model: nn.Module, name: str, config: PeftConfig, tensors: dict[str, Tensor]
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Config and tensors of an adapter's file: as plain LoRA, where nobody could know from them what is subtracted."""
    if not isinstance(config, LoraConfig) or config.kind is not LoraConfig.kind:
        return config, tensors
    begin = beginning(config.init_lora_weights)
    if begin is not None and begin.subtracted and begin.follows:
        return config, tensors
    initial = initial_of(model, name, tensors)
    return (config, tensors) if initial is None else plain_lora(config, tensors, initial)
