"""The lifecycle of adapters, as functions over any injected model, wrapped or not.

Each checks everything that can be wrong first, and then acts; one that fails half-way puts back what it changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

from torch import Tensor, nn

from peftlite.core.binding import activate, check_exclusive, plan_banks, plan_programs, rebind, sync
from peftlite.core.call import Call, Programs, current, using
from peftlite.core.layer import AdapterLayer
from peftlite.core.merging import SAME, Undo, check_undo
from peftlite.core.packed import warn_of_rounding
from peftlite.core.rows import RowsCall, check_rows, grouping
from peftlite.core.slots import View
from peftlite.core.state import BASE, AdapterState, bias_of
from peftlite.core.ties import note_shared, untied, warn_of_untying
from peftlite.core.transaction import atomic, on_failure, put, restoring
from peftlite.core.tree import check_one_state, layers, named_layers
from peftlite.errors import MergeError, NoAdapterError, StateError, warn


def state_of(model: nn.Module) -> AdapterState:
    """The state of the adapters of `model`.

    Raises: NoAdapterError if it has none.
    """
    return adapted(model)[0]


def adapted(model: nn.Module) -> tuple[AdapterState, list[AdapterLayer]]:
    """The same, and the layers that were walked over to find it.

    Raises: NoAdapterError.
    """
    found = list(layers(model))
    if not found:
        raise NoAdapterError(
            f"{type(model).__name__} has no adapters: add one with `get_peft_model`, `add_adapter` or "
            "`inject_adapter_in_model`. Nothing was changed."
        )
    check_one_state(model, found)
    return found[0].state, found


def active_adapters(model: nn.Module) -> list[str]:
    """The names of the adapters in use."""
    return list(state_of(model).active)


def adapter_ids(model: nn.Module) -> dict[str, int]:
    """The number of each adapter, which no other adapter of the model ever had; 0 is the base model.

    Raises: NoAdapterError.
    """
    return dict(state_of(model).ids)


# ---- which adapters are in use
@atomic
def set_adapter(model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
    """Use these adapters, and no others, from now on.

    Adapters that are merged and not among them are unmerged. Which adapters may train does not change, except that
    `inference_mode=True` takes the named ones out of training. Overrides set on single layers end.

    Raises: AdapterNameError, StateError, NoAdapterError.
    """
    state, found = adapted(model)
    names = state.checked(adapter_name)
    check_exclusive(model, names)
    if merged := [layer for layer in found if layer.merged_adapters]:
        remerge(merged, lambda layer: [n for n in layer.merged_adapters if n in names])
    if inference_mode:
        state.change(trainable=state.trainable - frozenset(names))
    activate(model, state, names, found)


@atomic
def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Whether these adapters may train: their parameters require gradients while they are active.

    Raises: AdapterNameError, NoAdapterError.
    """
    state = state_of(model)
    names = state.checked(adapter_names)
    state.change(trainable=state.trainable | set(names) if requires_grad else state.trainable - set(names))
    sync(model, state, names)


def enable_adapters(model: nn.Module) -> None:
    """Switch the adapters on again. What was unmerged by switching them off stays unmerged."""
    switch(model, True)


def disable_adapters(model: nn.Module) -> None:
    """Switch all adapters off, for every caller, until `enable_adapters`; merged ones are unmerged first."""
    state = state_of(model)
    if any(bias_of(c) != "none" for n, c in state.configs.items() if n in state.active):
        warn(
            "Adapters with `bias` other than 'none' changed the base model's own biases, so that disabling them "
            "does not give the base model's outputs."
        )
    switch(model, False)


@atomic
def switch(model: nn.Module, enabled: bool) -> None:
    """Enable or disable the adapters of every layer."""
    state = state_of(model)
    if not enabled:
        remerge(model, lambda layer: [])
    state.change(enabled=enabled)
    for layer in layers(model):
        if layer._own_enabled is not None:
            put(layer.__dict__, "_own_enabled", None)
            layer.unbind()
    rebind(model, state)


def use_adapter(model: nn.Module, *adapter_names: str) -> AbstractContextManager[Call]:
    """Inside the `with` block, calls of `model` by this thread (or task) use these adapters; none: the base model.

    Nothing is written to the model. Recomputation under gradient checkpointing sees the adapters of the call it
    repeats.

    Raises: AdapterNameError, StateError if adapters are merged into the weights, NoAdapterError.
    """
    state = state_of(model)
    names = state.checked(adapter_names)
    check_unmerged(model)
    check_exclusive(model, names)
    return using(Call(state, names, plan_programs(model, state, names), current()))


def use_adapter_per_row(model: nn.Module, adapter_names: Sequence[str | None] | Tensor) -> AbstractContextManager[Call]:
    """Inside the `with` block, row i of every batch uses `adapter_names[i]`; `"__base__"` or None is the base model.

    A tensor of integers (rows,) has ids instead of names, as `adapter_ids` gives them, with 0 for the base model.
    Batches may train: each adapter gets the gradients of its own rows. What `use_adapter` says of threads and
    recomputation holds here too.

    Raises: AdapterNameError, StateError if adapters are merged or there is no row, NoAdapterError. In forward,
    StateError where a layer's input does not have one entry (or k entries) per row.
    """
    state = state_of(model)
    rows = check_rows(state, adapter_names)
    check_unmerged(model)

    def plan(name: str) -> Programs:
        return plan_programs(model, state, () if name == BASE else (name,))

    return using(RowsCall(state, rows, plan_banks(model, state, grouping(rows).groups), plan, current()))


def check_unmerged(model: nn.Module) -> None:
    """Refuse to choose adapters per call while some are in the weights that every call shares.

    Raises: StateError.
    """
    merged = merged_adapters(model)
    if merged:
        raise StateError(
            f"`{merged[0]}` is merged into the base model's weights, which every call shares: call `unmerge_adapter` "
            "first. Nothing was changed."
        )


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Run the calls inside the block on the base model, and leave everything as it was.

    It is about this thread's calls only, unless adapters are merged: then they are unmerged for all, and merged again.
    """
    state = state_of(model)
    if not merged_adapters(model):
        with use_adapter(model):
            yield
        return
    before = {id(layer): list(layer.merged_adapters) for layer in layers(model)}
    enabled = state.enabled

    def back() -> None:
        switch(model, enabled)
        remerge(model, lambda layer: before.get(id(layer), []))

    with restoring(back):
        switch(model, False)
        yield


# ---- merging
@atomic
def merge_adapter(
    model: nn.Module,
    adapter_names: Sequence[str] | None = None,
    safe_merge: bool = False,
    *,
    undo: Undo = "device",
) -> None:
    """Merge adapters (default: the active ones) into the base weights; forward is then as fast as the base model's.

    The base layers' own bytes are kept, so that `unmerge_adapter` gives every bit back, in any order. A call that fails
    half-way leaves the weights as they were.

    Args:
        model: a wrapper, or a model with adapters in place.
        adapter_names: which adapters.
        safe_merge: compute the merged weights of all layers first, and write none if any number is not finite.
        undo: where the base layers' own bytes are kept: "device", beside the merged ones; "cpu", in CPU memory, from
            where unmerging copies them; None, nowhere. Then what is merged stays merged, and active, until
            `merge_and_unload`: unmerging, disabling, deleting it, or setting other adapters is an error. Adapters that
            are merged on top later are taken out again exactly, but DoRA, which needs the base's own weight, can
            neither be merged nor used on top. A call that fails half-way leaves the layers before that merged; outputs
            are right, and the call can be repeated. Packed weights of quantised layers, and weights that other modules
            use too, stay where they are with "cpu".

    Raises: MergeError, ConfigError for another `undo`, AdapterNameError, StateError if adapters are disabled,
        NoAdapterError.
    """
    check_undo(undo)
    state = state_of(model)
    if not state.enabled:
        raise StateError("The adapters are disabled: call `enable_adapters` before merging. Nothing was changed.")
    names = state.active if adapter_names is None else state.checked(adapter_names)
    if idle := [f"`{name}`" for name in names if not any(layer.mergeable((name,)) for layer in layers(model))]:
        warn(
            f"There is nothing to merge of {', '.join(idle)}: whole modules train, and are as fast as the base "
            "model's. `merge_and_unload()` puts them in the places of those."
        )
    warn_of_untying(merge_layers(model, names, safe_merge, undo), for_good=undo is None)


def merge_layers(model: nn.Module, names: Sequence[str], safe_merge: bool, undo: Undo) -> dict[str, list[str]]:
    """Merge `names` into every layer that has them, after checking that all can be.

    Gives the paths of layers that no longer share their weight with others, and those of the others.
    """
    check_mergeable(model, names)
    if safe_merge:
        for layer in layers(model):
            layer.check_merge(layer.mergeable(names))
    uses = note_shared(model)
    changed = remerge(
        model,
        lambda layer: [*layer.merged_adapters, *(n for n in layer.mergeable(names) if n not in layer.merged_adapters)],
        undo,
    )
    errors = {path: layer.merge_error for path, layer in named_layers(model) if layer in changed}
    warn_of_rounding({path: error for path, error in errors.items() if error is not None})
    return untied(model, changed, uses)


@atomic
def unmerge_adapter(model: nn.Module, adapter_names: Sequence[str] | None = None) -> None:
    """Take adapters (default: all) out of the base weights again, bit for bit, in any order.

    Raises: AdapterNameError, StateError if one was merged with `undo=None`, NoAdapterError.
    """
    state = state_of(model)
    names = None if adapter_names is None else state.checked(adapter_names)
    remerge(model, lambda layer: [n for n in layer.merged_adapters if names is not None and n not in names])


@atomic
def remerge(
    model: nn.Module | Sequence[AdapterLayer],
    wanted: Callable[[AdapterLayer], list[str]],
    undo: Undo | Literal["same"] = SAME,
) -> set[AdapterLayer]:
    """Make every layer hold the merged adapters that `wanted` says, all or (but with None for `undo`) none.

    Gives the layers that changed.
    """
    found = layers(model) if isinstance(model, nn.Module) else model
    steps = [step for layer in found if (step := (layer, list(layer.merged_adapters), wanted(layer)))[1] or step[2]]
    steps.sort(key=lambda step: bool(step[0].leaders))  # leaders first
    for layer, _, after in steps:
        layer.check_kept(after)
        layer.check_unwritten(after)
    for layer, _, _ in reversed(steps):
        on_failure(layer.back())  # leaders first, again, whose weights the others take over
    for layer, _, after in steps:
        layer.set_merged(after, undo)
    return {layer for layer, before, after in steps if before != after}


def merged_adapters(model: nn.Module) -> list[str]:
    """The adapters that are merged into any layer."""
    return list(dict.fromkeys(name for layer in layers(model) for name in layer.merged_adapters))


def check_mergeable(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse what cannot be written into the base weights, before anything is.

    Raises: MergeError.
    """
    for path, layer in named_layers(model):
        for name in layer.mergeable(names):
            reason = layer.variants[name].why_not_merge(View(layer, name))
            if reason is not None:
                raise MergeError(f"Adapter `{name}` cannot be merged into `{path}`: {reason}. Nothing was changed.")


@atomic
def scale_adapter(model: nn.Module, adapter_name: str, factor: float) -> None:
    """Multiply one adapter's scaling by `factor` on every layer.

    Raises: AdapterNameError, StateError if it is merged or its method has no scaling, NoAdapterError.
    """
    state = state_of(model)
    state.checked(adapter_name)
    if adapter_name in merged_adapters(model):
        raise StateError(f"Adapter `{adapter_name}` is merged: call `unmerge_adapter` first. Nothing was changed.")
    scaled = [layer for layer in layers(model) if adapter_name in layer.__dict__.get("scaling", ())]
    if not scaled:
        raise StateError(f"The method of adapter `{adapter_name}` has no scaling. Nothing was changed.")
    for layer in scaled:
        layer.scaling[adapter_name] = layer.scaling[adapter_name] * factor
