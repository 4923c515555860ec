"""The side of an adapter layer that state dicts and files face: which tensors it has, and under which keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peftlite.core.merging import MergingLayer
from peftlite.core.slots import Slot, SlotContainer
from peftlite.core.tied import TiedLayer
from peftlite.core.written import differ
from peftlite.errors import StateError


class StoredLayer(TiedLayer):
    """An adapter layer as what its tensors are read from and written to by key."""

    used: tuple[Slot, ...]
    """The slots in which any adapter ever had something here."""

    def container(self, slot: str) -> SlotContainer:
        """One slot's container of all adapters."""
        found: Any = self._modules[slot]
        return found  # type: ignore[no-any-return]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """File suffix -> live tensor of one adapter, such as {"lora_A.weight": ..., "lora_B.weight": ...}."""
        found: dict[str, Tensor] = {}
        modules: Any = self._modules
        for slot in self.used:
            held = modules[slot.name].held
            if name in held:
                for suffix, _, tensor in slot.suffixes(held[name]):
                    found[suffix] = tensor
        return found

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """File suffix -> key in this layer's state dict, of one adapter."""
        found = {}
        for slot in self.used:
            container = self.container(slot.name)
            for suffix, attribute, _ in slot.suffixes(container[adapter_name]) if adapter_name in container else ():
                found[suffix] = f"{slot.name}.{adapter_name}.{attribute}".rstrip(".")
        return found

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if self.merged_adapters:
            self._check_loadable(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_loadable(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Refuse a state dict with other values for what is merged here: to unmerge would lose them, or none see them.

        Raises: StateError.
        """
        ours = self.base_tensors(prefix)
        for name in self.merged_adapters:
            tensors, places = self.tensors(name), self.adapter_state_dict_load_map(name)
            ours |= {f"{prefix}{places[suffix]}": tensor for suffix, tensor in tensors.items()}
        if (
            key := next((key for key in ours if key in state_dict and differ(ours[key], state_dict[key])), None)
        ) is None:
            return
        names = ", ".join(f"`{name}`" for name in self.merged_adapters)
        raise StateError(
            f"`{key}` of a state dict has other values than the model, where {names} is merged: they may be the base "
            "layer's own, or have adapters in them. Unmerge, load, and merge again. Nothing was changed in this layer."
        )

    def base_tensors(self, prefix: str) -> dict[str, Tensor]:
        """Key in a state dict -> tensor, of what adapters are merged into."""
        module: Any = self
        while isinstance(module, MergingLayer):
            prefix, module = f"{prefix}{module.tuner.base_slot}.", module.wrapped
        own = module._parameters
        return {f"{prefix}{name}": own[name] for name in self.host.written if name in own}
