"""Modules of torch that compute with the weights of their children and do not call these: adapters would be left out.

`nn.TransformerEncoderLayer` does so in eval mode, where no weight of its own asks for gradients; a frozen base model's
do not. It does not where a child has a hook, as that would be left out too.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peftlite.core.hosts import AttentionHost
from peftlite.core.layer import AdapterLayer
from peftlite.errors import UnsupportedFeatureError


def have_called(layer: AdapterLayer, parent: nn.Module) -> None:
    """Let a new adapter layer be called by its parent; adapted attention sees to that itself."""
    if isinstance(parent, nn.TransformerEncoderLayer) and not isinstance(layer.host, AttentionHost):
        layer.register_forward_pre_hook(seen)


def seen(layer: nn.Module, args: tuple[Any, ...]) -> None:
    """The hook.

    Raises: UnsupportedFeatureError for what `nn.TransformerEncoder` makes of padded inputs for its fused path alone.
    """
    if args and isinstance(args[0], Tensor) and args[0].is_nested:
        raise UnsupportedFeatureError(
            "`nn.TransformerEncoder` made a nested tensor of padded inputs, which adapted layers do not take: set its "
            "`use_nested_tensor = False`, or build it with `enable_nested_tensor=False`. Nothing was changed."
        )
