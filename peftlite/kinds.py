"""PEFT's classes of layers, of which peftlite has one: each is what `isinstance` asks of an `AdapterLayer`."""

from __future__ import annotations

from typing import Any

from peftlite.core.hosts import Host, ParamHost
from peftlite.core.layer import AdapterLayer
from peftlite.core.variant import COMPANIONS


class Kind(type):
    """A class without instances of its own: an adapter layer is one, if its tuner and its host are of this kind."""

    tuners: frozenset[str] = frozenset()
    """The tuners that count; all of those that adapt layers, if none is named."""
    companions: bool = False
    """Whether it is about modules that are trained whole."""
    host: str | None = None
    """What its base layer must be, as the printed label says it."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, AdapterLayer) and cls._matches(instance)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return type.__subclasscheck__(cls, subclass) or issubclass(subclass, AdapterLayer)

    def _matches(cls, layer: AdapterLayer) -> bool:
        if (layer.tuner in [companion.tuner for companion in COMPANIONS.values()]) is not cls.companions:
            return False
        if cls.tuners and layer.tuner.peft_type not in cls.tuners:
            return False
        return cls.host is None or _kind_of(layer.host) == cls.host

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"`{cls.__name__}` of peftlite is there for `isinstance` only, since all layers with adapters are of one "
            "class: add adapters with `get_peft_model` or `inject_adapter_in_model`."
        )

    def __getattr__(cls, name: str) -> Any:
        return getattr(AdapterLayer, name)

    def __setattr__(cls, name: str, value: object) -> None:
        raise TypeError(f"`{cls.__name__}.{name}` cannot be replaced: no layer of peftlite has this class.")


def _kind_of(host: Host) -> str:
    return "ParamWrapper" if isinstance(host, ParamHost) else host.name


class BaseTunerLayer(metaclass=Kind):
    """Any layer with adapters."""


class LoraLayer(BaseTunerLayer):
    """A layer with adapters of LoRA's family."""

    tuners = frozenset({"LORA", "ADALORA"})


class AdaLoraLayer(LoraLayer):
    """A layer with AdaLoRA adapters."""

    tuners = frozenset({"ADALORA"})


class LoHaLayer(BaseTunerLayer):
    """A layer with LoHa adapters."""

    tuners = frozenset({"LOHA"})


class LoKrLayer(BaseTunerLayer):
    """A layer with LoKr adapters."""

    tuners = frozenset({"LOKR"})


class IA3Layer(BaseTunerLayer):
    """A layer with (IA)^3 adapters."""

    tuners = frozenset({"IA3"})


class VeraLayer(BaseTunerLayer):
    """A layer with VeRA adapters."""

    tuners = frozenset({"VERA"})


class LNTuningLayer(BaseTunerLayer):
    """A layer with adapters of LayerNorm tuning."""

    tuners = frozenset({"LN_TUNING"})


class TrainableTokensLayer(BaseTunerLayer):
    """An embedding of which some rows train."""

    tuners = frozenset({"TRAINABLE_TOKENS"})


class LycorisLayer(BaseTunerLayer):
    """A layer with LoHa or LoKr adapters."""

    tuners = frozenset({"LOHA", "LOKR"})


class AuxiliaryTrainingWrapper(metaclass=Kind):
    """A module that comes along with adapters."""

    companions = True


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """A module that adapters train whole."""

    tuners = frozenset({"MODULES_TO_SAVE"})


class TrainableTokensWrapper(AuxiliaryTrainingWrapper):
    """An embedding of which some rows train, beside adapters of another method."""

    tuners = frozenset({"TOKEN_ADAPTER"})


def _on(layer: Kind, tuner: str, hosts: str) -> dict[str, Kind]:
    """The kinds of one tuner's layers on some kinds of base layer, by name: `LoraLinear`."""
    made = {}
    for host in hosts.split():
        name = f"{layer.__name__.removesuffix('Layer')}{host}"
        doc = f"A {host} with adapters of {tuner}."
        members = {"tuners": frozenset({tuner}), "host": host, "__doc__": doc, "__module__": __name__}
        made[name] = Kind(name, (layer,), members)
    return made


globals().update(
    **_on(
        LoraLayer,
        "LORA",
        "Linear Embedding Conv1d Conv2d Conv3d MultiheadAttention ParamWrapper Linear4bit Linear8bitLt",
    ),
    **_on(AdaLoraLayer, "ADALORA", "Linear"),
    **_on(IA3Layer, "IA3", "Linear Conv2d Conv3d"),
    **_on(LoHaLayer, "LOHA", "Linear Conv1d Conv2d"),
    **_on(LoKrLayer, "LOKR", "Linear Conv1d Conv2d"),
    **_on(VeraLayer, "VERA", "Linear"),
)
