"""Making what is active take effect: one program per layer, and `requires_grad`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import combinations

from torch import nn

from peftlite.core.call import Programs
from peftlite.core.layer import AdapterLayer
from peftlite.core.slots import View
from peftlite.core.state import AdapterState, bias_of
from peftlite.core.transaction import on_failure
from peftlite.core.tree import base_biases, layers, named_layers
from peftlite.core.variant import Bank
from peftlite.errors import AdapterNameError

_MAX_PLANS = 256  # sets of adapters for which every layer's program is kept
_MAX_BANKS = 64


def activate(
    model: nn.Module, state: AdapterState, names: tuple[str, ...], found: Sequence[AdapterLayer] | None = None
) -> None:
    """Make `names` the active adapters of the whole model; overrides set on single layers end.

    found: the model's layers, if they are known.
    """
    touched = {*state.active, *names}
    state.change(active=names)
    found = list(layers(model)) if found is None else found
    for layer in [one for one in found if one._own_active is not None or one._own_enabled is not None]:
        if layer.irregular:
            touched.update(layer.variants)
        layer.clear_overrides()
    sync(model, state, touched, found)
    rebind(model, state, found)


def sync(
    model: nn.Module, state: AdapterState, names: Iterable[str], found: Sequence[AdapterLayer] | None = None
) -> None:
    """Have the state write `requires_grad` for `names`, base biases that they own included.

    found: the model's layers, if they are known.
    """
    known = [name for name in names if name in state.configs]
    biases = [(name, p) for name in known for p in base_biases(model, bias_of(state.configs[name]), name)]
    state.sync(layers(model) if found is None else found, known, biases)


def rebind(model: nn.Module, state: AdapterState, found: Sequence[AdapterLayer] | None = None) -> None:
    """Bind every layer's program for what is active now; layers with an override of their own keep theirs."""
    on_failure(partial(unbind, model, state))
    names = state.active if state.enabled else ()
    found = list(layers(model)) if found is None else found
    programs = plan_programs(found, state, names)
    for layer in found:
        if not layer.irregular:
            layer.bind(programs.get(layer.place) or layer.program(names))


def unbind(model: nn.Module, state: AdapterState) -> None:
    """Forget every layer's program; it is made again on use."""
    state.forget_plans()
    for layer in layers(model):
        layer.unbind()


def plan_programs(found: nn.Module | Sequence[AdapterLayer], state: AdapterState, names: tuple[str, ...]) -> Programs:
    """What each layer runs for these adapters; kept until a layer changes."""
    plan = state.plans.get(names)
    if plan is None:
        found = list(layers(found)) if isinstance(found, nn.Module) else found
        plan = {layer.place: layer.program(names) for layer in found}
        state.keep_plan(state.plans, names, plan, _MAX_PLANS)
    return plan


def plan_banks(model: nn.Module, state: AdapterState, names: tuple[str, ...]) -> dict[int, Bank | None]:
    """Per layer, what runs rows of these adapters together (see `Variant.bank`); kept until a layer changes."""
    banks = state.banks.get(names)
    if banks is None:
        banks = {layer.place: layer.bank(names) for layer in layers(model)}
        state.keep_plan(state.banks, names, banks, _MAX_BANKS)
    return banks


def check_exclusive(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse adapters that cannot be active together because they are about the same thing.

    Raises: AdapterNameError.
    """
    if len(names) < 2:
        return
    for path, layer in named_layers(model):
        rivals = [n for n in names if n in layer.variants and layer.variants[n].exclusive]
        for one, other in combinations(rivals, 2):
            reason = layer.variants[one].clash(View(layer, one), View(layer, other))
            if reason is not None:
                raise AdapterNameError(
                    f"Adapters `{one}` and `{other}` cannot be active together: {reason} for `{path}`. Nothing was "
                    "changed."
                )
