"""The one wrapper layer: every tuner's adapters on every kind of base layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peftlite.core.call import current
from peftlite.core.edited import Edited
from peftlite.core.residency import is_away
from peftlite.core.slots import (
    NEW_WEIGHT,
    BufferSlot,
    Numbers,
    View,
    Watched,
    parameters_in,
    replace_tensor,
    set_mode,
)
from peftlite.core.state import BASE, AdapterState
from peftlite.core.stored import StoredLayer
from peftlite.core.transaction import atomic, drop, keep, put, put_in_all
from peftlite.core.variant import Additive, Bank, Program, TunerSpec, Variant
from peftlite.errors import StateError

_DERIVED = ("_program", "_host", "_owner", "_stamp")


class AdapterLayer(StoredLayer):
    """A base layer and its adapters: `base_layer`, then one container per slot, keyed by adapter name.

    What is active is bound to `_program` when it is set; forward runs that program, or the one that the current `Call`
    has for this layer. The adapters' maths lives in their variants, the base layer's in its host.
    """

    def __init__(self, base_layer: nn.Module, tuner: TunerSpec, state: AdapterState, param: str | None = None) -> None:
        super().__init__()
        self._modules[tuner.base_slot] = base_layer
        for slot in tuner.slots:
            if slot.shared and slot.name not in state.shared:
                put(state.shared, slot.name, BufferSlot())
            container = state.shared[slot.name] if slot.shared else slot.kind()
            self._modules[slot.name] = container
            if not slot.shared:
                container.__dict__["training"] = base_layer.training
        own = self.__dict__
        for number in tuner.numbers:
            own[number] = Numbers()
        own.update(
            tuner=tuner,
            state=state,
            param=param,
            place=state.new_place(),
            used=(),
            variants={},
            merged_adapters=[],
            shared_weight=False,
            merge_error=None,
            leaders={},
            followers={},
            training=base_layer.training,
            _saved=None,
            _fixed=(),
            _undo="device",
            _own_active=None,
            _own_enabled=None,
        )
        self._link()

    def _get_name(self) -> str:
        return self.tuner.label(self.host)

    def extra_repr(self) -> str:
        return "" if self.param is None else f"parameter_name={self.param!r},"

    # ---- what it is
    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """The names of the containers of trainable tensors."""
        return tuple(slot.name for slot in self.tuner.slots if slot.trainable)

    @property
    def other_param_names(self) -> tuple[str, ...]:
        """The names of everything else that is kept per adapter."""
        return (*self.tuner.numbers, *(slot.name for slot in self.tuner.slots if not slot.trainable))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules")
            tuner = self.__dict__.get("tuner")
            if modules is None or tuner is None or name == tuner.base_slot:
                raise
            host, stand_in = self.host, self.stand_in()
            if stand_in is not None:
                return getattr(stand_in, name)
            return host.attribute(name, host.weight_only and bool(self.live(self.active_names)))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == self.tuner.base_slot:
            self.unbind()

    # ---- adapters
    def add(self, name: str, variant: Variant, values: Mapping[str, Any]) -> None:
        """Attach an adapter whose tensors and numbers `variant.init` made; whether they train, the state says."""
        if variant.mixes and name not in self.state.mixing:
            self.state.change(mixing=self.state.mixing | {name})
        if name in self.variants and self.tuner.numbers:
            self._number_written(name)
        own, modules = self.__dict__, self._modules
        keys = [key for key in values if key != NEW_WEIGHT]
        places = [self.container(key).held if key in modules else own[key] for key in keys]
        put_in_all([self.variants, *places], name, [variant, *[values[key] for key in keys]])
        for slot in self.tuner.slots:
            value = values.get(slot.name)
            if isinstance(value, nn.Module):
                set_mode(value, self.training)
            elif slot.derived and value is not None and isinstance(container := self.container(slot.name), BufferSlot):
                container.leave_out(name)
        used = tuple([slot for slot in self.tuner.slots if slot.name in values or slot in self.used])
        if len(used) > len(self.used):
            put(own, "used", used)
        if NEW_WEIGHT in values:
            self.rewrite(values[NEW_WEIGHT])
        self.unbind(name)

    def remove(self, name: str) -> None:
        """Detach an adapter; if it is merged, it is unmerged first."""
        if name in self.merged_adapters:
            self.set_merged([n for n in self.merged_adapters if n != name])
        self.untie(name)
        drop(self.variants, name)
        for slot in self.used:
            container = self.container(slot.name)
            if name in container:
                del container[name]
        for number in self.tuner.numbers:
            drop(self.__dict__[number], name)
        self.unbind(name)
        if self._own_active is not None and name in self._own_active:
            put(self.__dict__, "_own_active", tuple(n for n in self._own_active if n != name))
            self.unbind()

    def parameters_of(self, name: str) -> Iterator[nn.Parameter]:
        """The trainable parameters of one adapter on this layer."""
        return iter([parameter for held in self.trained(name) for parameter in parameters_in(held[name])])

    def trained(self, name: str) -> Iterator[dict[str, Any]]:
        """What slots hold, by adapter, where one adapter has something that trains."""
        modules: Any = self._modules
        for slot in self.used:
            held = modules[slot.name].held
            if slot.trainable and name in held and slot.name not in self.variants[name].frozen:
                yield held
        if name in self.leaders:
            yield from self.leaders[name].trained(name)

    def follow(self, name: str, variant: Variant, leader: AdapterLayer) -> None:
        """Attach an adapter that another layer on the same weight has."""
        put(self.leaders, name, leader)
        put(leader.followers, name, [*leader.followers.get(name, ()), self])
        self.add(name, variant, variant.follow(self.host, View(leader, name)))

    @atomic
    def assign(self, name: str, suffix: str, tensor: Tensor) -> None:
        """Put `tensor` in the place of the one that `tensors(name)[suffix]` is."""
        with self.here():
            self._assign(name, suffix, tensor)

    def _assign(self, name: str, suffix: str, tensor: Tensor) -> None:
        leader = self.leaders.get(name)
        if leader is not None and (there := self.variants[name].led(self.host, leader.host, suffix)) is not None:
            leader.assign(name, there[0], tensor.T.contiguous() if there[1] else tensor)
            return
        for slot in self.used:
            container = self.container(slot.name)
            if name not in container:
                continue
            for found, attribute, _ in slot.suffixes(container[name]):
                if found == suffix:
                    replace_tensor(container, name, attribute, tensor)
        self.unbind()
        for follower in self.followers.get(name, ()):
            follower.add(name, self.variants[name], self.variants[name].follow(follower.host, View(self, name)))

    # ---- forward
    @property
    def active_names(self) -> list[str]:
        """The adapters that forward uses when no Call says otherwise."""
        return self.active_adapters if self.enabled else []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = current()
        if call is not None and (call := call.of(self.state)) is not None:
            return call.run(self, args, kwargs)
        return (self._program or self._bind())(*args, **kwargs)

    def stand_in(self) -> nn.Module | None:
        """The module that an adapter in use, for all rows, has put in the base layer's place: what shows attributes."""
        if self.tuner.base_slot == "base_layer":
            return None
        call = current()
        chosen = None if call is None else call.of(self.state)
        live = self.live(self.active_names if chosen is None else chosen.names)
        if len(live) != 1 or (chosen is not None and chosen.rows_of(live[0]) is not None):
            return None
        return self.variants[live[0]].replacement(View(self, live[0]))

    def bound(self, *args: Any, **kwargs: Any) -> Any:
        """What forward does when no Call says otherwise."""
        return (self._program or self._bind())(*args, **kwargs)

    def program(self, names: Sequence[str]) -> Program:
        """The base layer with these adapters, as one callable; what depends only on `names` is decided here."""
        if self.host.weight_only:
            return partial(self._near, Edited(self, names))
        live = self.live(names)
        if not live:
            return self.wrapped
        if len(live) == 1:
            view, variant = View(self, live[0]), self.variants[live[0]]
            slow = partial(self._near, partial(variant.forward, view, self.wrapped))
            return variant.bind(view, slow) or slow
        views = [View(self, name) for name in live]
        variants = [self.variants[name] for name in live]
        call: Program = self.wrapped
        for view, variant in zip(views, variants, strict=True):
            call = partial(variant.forward, view, call)
        slow = partial(self._near, call)
        alike = len({type(variant) for variant in variants}) == 1
        return (variants[0].bind_several(views, slow) if alike else None) or slow

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What an adapter adds to the base layer's weight, in its layout and the adapter's dtype; differentiable.

        Of DoRA, what is added before it is normed.

        Raises: AdapterNameError, StateError if the adapter is not on this layer, or its effect is no such sum.
        """
        self.state.checked(adapter)
        variant, view = self.variants.get(adapter), View(self, adapter)
        if variant is None:
            raise StateError(f"Adapter `{adapter}` is not on this layer. Nothing was changed.")
        reason = variant.why_not_merge(view)
        if reason is not None or not isinstance(variant, Additive):
            raise StateError(
                f"What adapter `{adapter}` (`{self.tuner.peft_type}`) does is no sum with the weight"
                f"{'' if reason is None else f': {reason}'}. Nothing was changed."
            )
        with self.here():
            delta = self.host.canonical(variant.delta(view))
        return delta.to(next(self.parameters_of(adapter)).dtype)

    def bank(self, names: Sequence[str]) -> Bank | None:
        """What runs rows of these adapters together, if possible; of the base layer, where it has none of a name."""
        found = {name: self.variants[name] for name in names if name in self.variants}
        kinds = {type(variant): variant for variant in found.values()}
        if len(kinds) > 1 or self.host.weight_only or self.merged_adapters:
            return None
        if not kinds:
            return partial(_base_alone, self)
        return next(iter(kinds.values())).bank(self, [View(self, name) if name in found else None for name in names])

    def program_in_call(self, names: Sequence[str]) -> Program:
        """The program for a call that chose these adapters before the model was changed.

        Raises: as `check_in_call`.
        """
        self.check_in_call(names)
        return self.program(names)

    def bank_in_call(self, names: Sequence[str]) -> Bank | None:
        """The bank for such a call.

        Raises: as `check_in_call`.
        """
        self.check_in_call([name for name in names if name != BASE])
        return self.bank(names)

    def check_in_call(self, names: Sequence[str]) -> None:
        """Refuse to go on with adapters that were chosen before the model was changed, if it cannot be right any more.

        Raises: AdapterNameError, StateError, if one was deleted or any was merged.
        """
        self.state.checked(names)
        if self.merged_adapters:
            raise StateError(
                f"`{self.merged_adapters[0]}` was merged into the base model's weights, which every call shares, while "
                "this call had chosen its own adapters: leave that block first. Nothing was changed."
            )

    def _near(self, call: Program, *args: Any, **kwargs: Any) -> Any:
        """`call`, with the weights of the base layer and the adapters here if they were elsewhere."""
        if torch.compiler.is_compiling() or not is_away(self.get_base_layer()):
            return call(*args, **kwargs)
        with self.here():
            return call(*args, **kwargs)

    def _bind(self) -> Program:
        program = self.program(self.active_names)
        self.bind(program)
        return program

    def bind(self, program: Program) -> None:
        """What forward runs from now on."""
        self.__dict__["_program"] = program  # not setattr: a program may be the base layer itself

    def _number_written(self, name: str) -> None:
        if name in self.merged_adapters:
            raise StateError(f"Adapter `{name}` is merged: unmerge it before its numbers change. Nothing was changed.")
        self.unbind(name)

    # ---- explicit overrides on this layer alone
    @atomic
    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Use these adapters on this layer, whatever the model uses, until `set_adapter` is called on the model."""
        names = self.state.checked(adapter_names)
        self.set_merged([n for n in self.merged_adapters if n in names])
        put(self.__dict__, "_own_active", names)
        if inference_mode:
            self.state.change(trainable=self.state.trainable - frozenset(names))
        self.state.sync((self,), self.variants)
        self.unbind()

    @atomic
    def enable_adapters(self, enabled: bool) -> None:
        """Switch adapters on or off on this layer alone; switching off unmerges."""
        if not enabled:
            self.set_merged(())
        put(self.__dict__, "_own_enabled", bool(enabled))
        self.unbind()

    def clear_overrides(self) -> None:
        """Follow the model again."""
        if self._own_active is not None or self._own_enabled is not None:
            keep(self.__dict__, "_own_active", "_own_enabled")
            self.__dict__.update(_own_active=None, _own_enabled=None)
            self.unbind()

    @property
    def irregular(self) -> bool:
        """Whether this layer differs from its model in what is active or enabled."""
        own = self._own_active is not None and tuple(self._own_active) != self.state.active
        return own or (self._own_enabled is not None and self._own_enabled != self.state.enabled)

    # ---- copies bind for themselves
    def _link(self) -> None:
        for number in self.tuner.numbers:
            self.__dict__[number].on_write = self._number_written
        for module in self._modules.values():
            if isinstance(module, Watched):
                module.__dict__["on_write"] = self.unbind
        self.__dict__.update(_host=None, _owner=None, _stamp=None)
        self.unbind()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in _DERIVED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._link()

    def _replicate_for_data_parallel(self) -> Any:
        replica: Any = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        call = current()
        chosen = call.of(self.state) if call is not None else None
        names = self.active_names
        replica.__dict__.update(_program=None, _host=None, _owner=None)
        replica.__dict__["forward"] = partial(_replica_forward, replica, names if chosen is None else chosen.names)
        return replica


def _base_alone(layer: AdapterLayer, x: Tensor, order: object) -> Tensor:
    y: Tensor = layer.wrapped(x)
    return y


def _replica_forward(replica: AdapterLayer, names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
    """A data-parallel replica runs in another thread: the adapters of the call were settled when it was made."""
    return replica.program(names)(*args, **kwargs)
