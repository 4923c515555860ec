"""Which layers of a transformers model run one after the other, and where its config counts them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from torch import nn

from peftlite.core.replicas import Stack

BY_LAYER: Final = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type")
"""Fields of configs that have an entry for each layer."""
COUNT: Final = "num_hidden_layers"


def stack_of(model: Any) -> Stack | None:
    """The one list of as many layers as the config says; None for models that have none, or several."""
    from transformers import PretrainedConfig

    config = model.config.get_text_config()
    count = getattr(config, COUNT, None)
    scaled = getattr(config, "scale_attn_by_inverse_layer_idx", False)  # their numbers are part of the mathematics
    if not isinstance(count, int) or model.config.is_encoder_decoder or scaled:
        return None
    found = list(lists_of(model, count))
    if len(found) != 1:
        return None
    path, owner, name = found[0]
    return Stack(owner, name, path, config, said_of, "layer_idx", PretrainedConfig)


def lists_of(module: nn.Module, count: int, prefix: str = "") -> Iterator[tuple[str, nn.Module, str]]:
    """(path, owner, attribute) of the outermost lists of so many modules."""
    for name, child in module._modules.items():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            yield prefix + name, module, name
        elif child is not None:
            yield from lists_of(child, count, f"{prefix}{name}.")


def said_of(config: Any, order: Sequence[int]) -> dict[str, Any]:
    """What a config says of these layers of a model."""
    count = getattr(config, COUNT)
    lists = {key: value for key in BY_LAYER if isinstance(value := getattr(config, key, None), list)}
    by_layer = {key: [value[layer] for layer in order] for key, value in lists.items() if len(value) == count}
    return {COUNT: len(order), **by_layer}
