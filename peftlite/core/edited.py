"""Base layers that read their weights by themselves: what is called is a twin that holds the adapted ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from peftlite.core.hosts import ParamHost, call_swapped, swapped
from peftlite.core.merging import MergingLayer


class Edit:
    """One layer's adapters in its base layer's tensors; bound, so that compiled code knows no adapter by name.

    What another layer edits along with it (`Host.inner`) is part of it. `owner` is unbound when `layer` changes.
    """

    def __init__(self, layer: MergingLayer, names: Sequence[str], owner: MergingLayer | None) -> None:
        self.layer = layer
        self.parts = layer.parts(layer.live(names))
        inside = {child: layer.host.layer._modules[child] for child in layer.host.inner}
        self.inner = {
            child: Edit(module, names, layer) for child, module in inside.items() if isinstance(module, MergingLayer)
        }
        if owner is not None:
            layer.__dict__["_owner"] = owner

    def edits(self) -> dict[str, Any]:
        """What changes in the base layer, as {attribute: value}; differentiable."""
        host = self.layer.host
        found: dict[str, Any] = {child: edit.twin() for child, edit in self.inner.items()}
        if self.parts and isinstance(host, ParamHost):
            found |= host.edits(self.layer.merged_by(self.parts, host.read()))
        return found

    def twin(self) -> nn.Module:
        """The base layer with these adapters in its weight, as a module of its own."""
        host = self.layer.host
        if not self.parts:
            return self.layer.wrapped
        dense = self.layer.merged_by(self.parts, host.read())
        bias = {} if dense.bias is None or host.bias is None else {"bias": dense.bias.to(host.bias.dtype)}
        return swapped(self.layer.wrapped, {host.param: host.canonical(dense.weight).to(host.dtype), **bias})


class Edited:
    """A program: the base layer below `layer`, with these adapters of every adapter layer around it."""

    def __init__(self, layer: MergingLayer, names: Sequence[str]) -> None:
        module: nn.Module = layer
        self.edits: list[Edit] = []
        while isinstance(module, MergingLayer):
            self.edits.append(Edit(module, names, self.edits[-1].layer if self.edits else None))
            module = module.wrapped
        self.base = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        changed: dict[str, Any] = {}
        for edit in self.edits:
            changed = edit.edits() | changed
        return call_swapped(self.base, changed, *args, **kwargs) if changed else self.base(*args, **kwargs)
