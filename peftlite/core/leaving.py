"""The ends of an adapter's life: it is merged for good, taken out, or deleted."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from peftlite.core.binding import check_exclusive, rebind, sync
from peftlite.core.facts import facts_of
from peftlite.core.inputs import forget
from peftlite.core.layer import AdapterLayer
from peftlite.core.lifecycle import adapted, merge_layers, remerge, set_adapter, state_of
from peftlite.core.merging import Undo, check_undo
from peftlite.core.outputs import detach
from peftlite.core.slots import View
from peftlite.core.state import AdapterState
from peftlite.core.ties import warn_of_untying
from peftlite.core.transaction import atomic, put
from peftlite.core.tree import base_model_of, layer_places
from peftlite.core.unpacking import unpack
from peftlite.errors import warn


@atomic
def merge_and_unload(
    model: nn.Module,
    progressbar: bool = False,
    safe_merge: bool = False,
    adapter_names: Sequence[str] | None = None,
    *,
    dequantize: bool = False,
    undo: Undo = None,
) -> nn.Module:
    """Merge adapters (default: the active ones) for good and give back the base model, without adapter layers.

    Modules trained whole (`modules_to_save`) take the place of the originals. Quantised layers are quantised anew, with
    a warning that says how much they lose by it; with `dequantize` all quantised layers of the model become dense
    ones, in the dtype of the rest of the model.

    No copy of the base weights is kept, but of the one layer at work. So if something unforeseen ends a call half-way
    (memory is full, Ctrl-C), the layers before that stay merged; outputs are right, and the call can be repeated. With
    `undo="device"` or `"cpu"` the base's own bytes are kept there until all is done, and such a call changes nothing.

    Raises: MergeError, AdapterNameError, ConfigError for another `undo`, StateError if another adapter was merged with
        `undo=None`, NoAdapterError.
    """
    check_undo(undo)
    state = state_of(model)
    names = state.active if adapter_names is None else state.checked(adapter_names)
    check_exclusive(model, names)
    remerge(
        model, lambda layer: [n for n in layer.merged_adapters if n in names and not (dequantize and layer.host.packed)]
    )
    dequantised = dequantize and unpack(model)
    apart = merge_layers(model, names, safe_merge, undo)
    if facts_of(model).unloaded is None:  # else it is said there
        warn_of_untying(apart, for_good=True)
    return take_out(model, names, dequantised)


@atomic
def unload(model: nn.Module) -> nn.Module:
    """Give back the base model as it was, without adapter layers and without any adapter's effect.

    Raises: NoAdapterError.
    """
    state_of(model)
    remerge(model, lambda layer: [])
    return take_out(model, ())


def take_out(model: nn.Module, names: Sequence[str], dequantised: bool = False) -> nn.Module:
    """Replace every adapter layer by its base layer, with what is merged, or by the module that stands in for it."""
    base, state = base_model_of(model), state_of(model)
    kept: dict[int, nn.Module] = {}
    for place in reversed(layer_places(base)):  # a layer inside another goes first
        if isinstance(place.module, AdapterLayer):
            remains = kept.setdefault(id(place.module), outcome(place.module, names))
            put(place.parent._modules, place.child, remains)
    leave(base, state, bool(names))
    unloaded = facts_of(base).unloaded
    if unloaded is not None:
        unloaded(dequantised)
    return base


def leave(base: nn.Module, state: AdapterState, merged: bool = False) -> None:
    """Undo what a model has for the sake of its adapters, now that no layer has any.

    merged: what they did stays in the weights, and so in every layer of a stack that was made longer for them.
    """
    detach(base)
    forget(base)
    if state.replicas is not None:
        if merged:
            state.replicas.part()
        else:
            state.replicas.detach()


def outcome(layer: AdapterLayer, names: Sequence[str]) -> nn.Module:
    """What remains of a layer when adapters go: its base layer, or what an active adapter put in its place."""
    for name in names:
        if name in layer.variants and not layer.variants[name].mergeable:
            stand_in: nn.Module = layer.variants[name].replacement(View(layer, name))
            return stand_in
    return layer.keep_merged()


@atomic
def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter from every layer; a layer left without any becomes its base layer again.

    If it was the only active one, the first of the others becomes active.

    Raises: AdapterNameError, NoAdapterError.
    """
    state, found = adapted(model)
    state.checked(adapter_name)
    base = base_model_of(model)
    remerge(found, lambda layer: [n for n in layer.merged_adapters if n != adapter_name])
    state.change(trainable=state.trainable - {adapter_name})
    sync(base, state, (adapter_name,), found)
    for layer in found:
        if adapter_name in layer.variants:
            layer.remove(adapter_name)
    state.remove(adapter_name)
    if not all(layer.variants for layer in found):
        for place in reversed(layer_places(base)):
            if isinstance(place.module, AdapterLayer) and not place.module.variants:
                put(place.parent._modules, place.child, place.module.wrapped)
    if not state.configs:
        leave(base, state)
        return
    if not state.active:
        following = next(iter(state.configs))
        warn(f"Adapter `{adapter_name}` was active and is deleted; `{following}` is active now.")
        set_adapter(base, following)
    rebind(base, state)
