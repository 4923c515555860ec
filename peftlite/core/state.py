"""Which adapters a model has, which are active, which may train: one `AdapterState` for all its layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

from torch import nn

from peftlite.config import PeftConfig
from peftlite.core.slots import BufferSlot, Trained
from peftlite.core.transaction import drop, keep, on_failure, put
from peftlite.errors import AdapterNameError, ConfigError, nearest

BASE = "__base__"
Turned = list[tuple[list[nn.Parameter], bool]]
"""Parameters whose `requires_grad` was written, and what it became."""


class Owner(Protocol):
    """What the state needs of a layer in order to set `requires_grad` there."""

    @property
    def _own_active(self) -> tuple[str, ...] | None: ...

    def parameters_of(self, name: str) -> Iterator[nn.Parameter]: ...

    def trained(self, name: str) -> Iterator[dict[str, Any]]: ...


class AdapterState:
    """The only home of configs, ids, active and trainable adapters; the only writer of `requires_grad`.

    An adapter's parameters require gradients when its `trainable` flag is set *and* it is active; nothing else decides.
    """

    def __init__(self, vocab_size: int | None = None) -> None:
        self.configs: dict[str, PeftConfig] = {}
        self.ids: dict[str, int] = {}
        self.active: tuple[str, ...] = ()
        self.trainable: frozenset[str] = frozenset()
        self.enabled = True
        self.cast_inputs = True
        """Whether factors are given the layers' inputs in their own dtype, where that is another."""
        self.mixing: frozenset[str] = frozenset()
        """Adapters that read others, so that what is derived from them changes with any."""
        self.plans: dict[tuple[str, ...], dict[int, Any]] = {}
        """For a set of adapters, what each layer runs, by its place."""
        self.banks: dict[tuple[str, ...], dict[int, Any]] = {}
        """What runs rows of several adapters together, likewise."""
        self.planned: set[str] = set()
        """The adapters that any of those may be for."""
        self.trained: dict[str, tuple[list[Owner], Trained]] = {}
        """Adapter -> where its parameters are, on which layers."""
        self.version = object()
        """Another one whenever something was changed that plans follow from."""
        self.replicas: Any = None
        """The longer stack of layers that the model has for as long as it has adapters (`Replicas`), if it has one."""
        self.places = 0
        """How many layers there ever were; each has a place of its own."""
        self.shared: dict[str, BufferSlot] = {}
        """Slot -> the tensors of adapters that all layers share: the same container in every layer."""
        self.memory: dict[str, Any] = {}
        """Adapter -> what its method remembers of the training so far; not saved."""
        self.vocab_size = vocab_size
        """Of the base model, when it was given its first adapter."""
        self._next_id = 1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "plans": {}, "banks": {}, "planned": set(), "trained": {}}

    # ---- adapters
    def add(self, name: str, config: PeftConfig, trainable: bool) -> None:
        """Register an adapter; it gets an id that no other adapter of this model ever had."""
        put(self.configs, name, config)
        put(self.ids, name, self._next_id)
        self.change(_next_id=self._next_id + 1)
        if trainable:
            self.change(trainable=self.trainable | {name})

    def remove(self, name: str) -> None:
        """Forget an adapter."""
        for of_adapters in (self.configs, self.ids, self.memory):
            drop(of_adapters, name)
        self.change(
            active=tuple(n for n in self.active if n != name),
            trainable=self.trainable - {name},
            mixing=self.mixing - {name},
        )

    def change(self, **values: Any) -> None:
        """Set attributes, to be taken back."""
        keep(self.__dict__, *values)
        self.__dict__.update(values)

    def checked(self, names: str | Iterable[str]) -> tuple[str, ...]:
        """`names` as a tuple without repeats, each the name of an adapter of this model.

        Raises: AdapterNameError for a name that is unknown.
        """
        wanted = (names,) if isinstance(names, str) else tuple(names)
        for name in wanted:
            if not isinstance(name, str) or name not in self.configs:
                raise AdapterNameError(
                    f"There is no adapter `{name}`; nearest: {nearest(str(name), self.configs)}. Nothing was changed."
                )
        return tuple(dict.fromkeys(wanted))

    def new_place(self) -> int:
        """A place that no layer of this model ever had."""
        self.places += 1
        return self.places

    def forget_plans(self, name: str | None = None) -> None:
        """Have all that was derived made again, also by calls that are under way; or what was derived with one adapter.

        With one that is not known yet, nothing was.
        """
        if name is None:
            for derived in (self.plans, self.banks, self.trained):
                derived.clear()
        else:
            self.trained.pop(name, None)  # also of one that is gone, as a call that added it was taken back
            if name not in self.configs and not self.mixing:
                return
            if self.mixing or name in self.planned:
                self._forget_plans_with(name)
        self.version = object()

    def _forget_plans_with(self, name: str) -> None:
        for derived in (self.plans, self.banks):
            for names in list(derived):
                if name in names or not self.mixing.isdisjoint(names):
                    derived.pop(names, None)
        self.planned.discard(name)

    def keep_plan(
        self, derived: dict[tuple[str, ...], dict[int, Any]], names: tuple[str, ...], made: Any, most: int
    ) -> None:
        """Keep what was derived for a set of adapters, of at most so many sets."""
        if len(derived) >= most:
            derived.clear()
        self.planned.update(names)
        derived[names] = made
        self.planned.update(names)  # another thread may have forgotten it in between

    # ---- requires_grad
    def wants_grad(self, name: str, active: Iterable[str] | None = None) -> bool:
        """Whether the parameters of adapter `name` require gradients while `active` (default: the model's) are."""
        return name in self.trainable and name in (self.active if active is None else active)

    def sync(
        self, layers: Iterable[Owner], names: Iterable[str], biases: Iterable[tuple[str, nn.Parameter]] = ()
    ) -> None:
        """Write `requires_grad` for the adapters `names` on `layers`, and for base biases owned by an adapter."""
        found, names, turned = list(layers), list(names), Turned()
        on_failure(partial(_turn_back, turned))
        irregular = any([layer._own_active is not None for layer in found])
        for name in names:
            if not irregular:
                flag(self.parameters_on(found, name), self.wants_grad(name), turned)
                continue
            for layer in found:
                flag(layer.parameters_of(name), self.wants_grad(name, layer._own_active), turned)
        for owner, parameter in biases:
            flag((parameter,), self.wants_grad(owner), turned)

    def parameters_on(self, layers: list[Owner], name: str) -> list[nn.Parameter]:
        """The trainable parameters of an adapter; where they are is kept until something changes there."""
        known = self.trained.get(name)
        if known is not None and known[0] == layers and (found := known[1].parameters()) is not None:
            return found
        trained = Trained.of(name, [held for layer in layers for held in layer.trained(name)])
        self.trained[name] = layers, trained
        return trained.parameters() or []


def check_adapter_name(name: str, taken: Sequence[str] | Iterable[str] = ()) -> None:
    """Refuse names that cannot be keys of a checkpoint, or that the model already has.

    Raises: AdapterNameError.
    """
    if not isinstance(name, str) or not name.isprintable() or set(name) & set("./\\") or name in ("", BASE):
        raise AdapterNameError(
            f"An adapter cannot be called `{ascii(name)[1:-1] if isinstance(name, str) else name}`: a name is a "
            f"non-empty string that can be printed, without `.`, `/` and `\\`, and `{BASE}` stands for the base model. "
            "Nothing was changed."
        )
    if name in taken:
        raise AdapterNameError(
            f"There already is an adapter `{name}`; give the new one another name, or call `delete_adapter` first. "
            "Nothing was changed."
        )


def freeze(model: nn.Module) -> None:
    """The base model stops training: what happens once, before the first adapter is added."""
    turned: Turned = []
    on_failure(partial(_turn_back, turned))
    flag(model.parameters(), False, turned)


def flag(parameters: Iterable[nn.Parameter], wanted: bool, turned: Turned) -> None:
    """Write `requires_grad`, and note those where it was another, to be taken back."""
    others = [parameter for parameter in parameters if parameter.requires_grad is not wanted]
    turned.append((others, wanted))
    for parameter in others:
        parameter.requires_grad = wanted


def _turn_back(turned: Turned) -> None:
    for parameters, wanted in reversed(turned):
        for parameter in parameters:
            parameter.requires_grad = not wanted


def check_bias_owner(state: AdapterState, config: PeftConfig) -> None:
    """Refuse a second adapter that would own the base model's biases.

    Raises: ConfigError.
    """
    if bias_of(config) == "none":
        return
    for name, other in state.configs.items():
        if bias_of(other) != "none":
            raise ConfigError(
                f"`bias={bias_of(config)!r}`: adapter `{name}` already trains the base model's biases, and only one "
                "adapter of a model can; use `bias='none'`. Nothing was changed."
            )


def bias_of(config: PeftConfig) -> str:
    """Which biases of the base model train along: "none", "all", or "lora_only", which other methods call otherwise."""
    bias = str(getattr(config, "bias", "none"))
    return bias if bias in ("none", "all") else "lora_only"
