"""What a whole model was called with, for methods in which that decides how a layer acts; the same in both shapes.

The base model gets two hooks for as long as it has such adapters. They put the call's arguments into the `Call` under
which its layers run, so that nothing is written to the model, and threads and recomputation find their own.
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol

from torch import Tensor, nn

from peftlite.core.call import Call, Stay, current
from peftlite.core.state import AdapterState
from peftlite.core.transaction import keep_all
from peftlite.core.tree import base_model_of, find_state
from peftlite.core.variant import tuner_for

_PARAMETERS: dict[type[nn.Module], tuple[str, ...]] = {}


class Finding(Protocol):
    """What a variant found out from a call's inputs, once for all layers."""

    def after(self, inputs: dict[str, Any], output: Any) -> None:
        """Called with the model's output."""


class Observed(Call):
    """The arguments of one call of the whole model; which adapters layers use stays as it was."""

    def __init__(self, state: AdapterState, inputs: dict[str, Any], outer: Call | None) -> None:
        below = outer.of(state) if outer is not None else None
        super().__init__(state, state.active if below is None and state.enabled else (), {}, outer)
        self.below = below
        if below is not None:
            self.names = below.names
        self.inputs = inputs
        self.known: dict[Any, Finding] = {}
        self.stay = Stay(self)

    @property
    def adapters(self) -> tuple[str, ...]:
        return self.names if self.below is None else self.below.adapters

    def rows_of(self, name: str) -> Tensor | None:
        return None if self.below is None else self.below.rows_of(name)

    def run(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return layer.bound(*args, **kwargs) if self.below is None else self.below.run(layer, args, kwargs)


def observed(state: AdapterState) -> Observed | None:
    """The call of the whole model that the code now running is part of."""
    call = current()
    while call is not None and not (isinstance(call, Observed) and call.state is state):
        call = call.outer
    return call


# ---- the hooks
def observe(model: nn.Module, config: Any) -> None:
    """Have calls of the base model observed, if adapters of this config want to know."""
    base = base_model_of(model)
    if tuner_for(config).variant_for(config).observes is not None and _open not in base._forward_pre_hooks.values():
        parameters(type(base))  # now, since compiled code cannot ask for a signature
        keep_hooks(base)
        base.register_forward_pre_hook(_open, with_kwargs=True)
        base.register_forward_hook(_close, with_kwargs=True, always_call=True)


def forget(model: nn.Module) -> None:
    """Undo `observe`."""
    base = base_model_of(model)
    keep_hooks(base)
    for hooks, extras, ours in (
        (base._forward_pre_hooks, (base._forward_pre_hooks_with_kwargs,), _open),
        (base._forward_hooks, (base._forward_hooks_with_kwargs, base._forward_hooks_always_called), _close),
    ):
        for key in [key for key, hook in hooks.items() if hook is ours]:
            del hooks[key]
            for extra in extras:
                extra.pop(key, None)


def keep_hooks(base: nn.Module) -> None:
    """Note which hooks there are."""
    keep_all(base._forward_pre_hooks)
    keep_all(base._forward_pre_hooks_with_kwargs)
    keep_all(base._forward_hooks)
    keep_all(base._forward_hooks_with_kwargs)
    keep_all(base._forward_hooks_always_called)


def _open(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    state = find_state(module)
    if state is None:
        return None
    if any(observes(state, name) is not None for name in in_use(state)):
        inputs = {**dict(zip(parameters(type(module)), args, strict=False)), **kwargs}
        stale = current()
        if isinstance(stale, Observed) and stale.state is state:
            stale.stay.end()  # Ctrl-C ended the last call: torch runs no hooks then
        Observed(state, inputs, current()).stay.begin()
    own = {argument for name in state.configs for argument in observes(state, name) or ()}
    return args, {name: value for name, value in kwargs.items() if name not in own}


def _close(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    call = current()
    if not isinstance(call, Observed) or call.state is not find_state(module):
        return
    call.stay.end()
    if output is not None:  # None: an exception passes through
        for found in call.known.values():
            found.after(call.inputs, output)


def in_use(state: AdapterState) -> tuple[str, ...]:
    """The adapters that a call made here and now uses."""
    call = current()
    call = call.of(state) if call is not None else None
    return (state.active if state.enabled else ()) if call is None else call.adapters


def observes(state: AdapterState, name: str) -> frozenset[str] | None:
    """`Variant.observes` of an adapter."""
    config = state.configs[name]
    return tuner_for(config).variant_for(config).observes


def parameters(kind: type[nn.Module]) -> tuple[str, ...]:
    """The names of the positional parameters of a kind of module's forward."""
    if kind not in _PARAMETERS:
        _PARAMETERS[kind] = tuple(inspect.signature(kind.forward).parameters)[1:]
    return _PARAMETERS[kind]
