"""What a method is: a variant is one adapter's mathematics, stateless; a tuner is what a method registers.

The law that every variant keeps, tested for each on every host: `host.apply(x, merge(W)) + bias == forward(x)` in eval
mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftlite.config import PeftConfig
from peftlite.core.hosts import ALL_ROWS, Dense, Host
from peftlite.core.slots import Slot, View
from peftlite.errors import ConfigError, nearest
from peftlite.registry import Registry, registry

Program = Callable[..., Any]
Bank = Callable[[Tensor, Any], Tensor | None]
"""(input, `Order` of its entries) -> output; None where the groups have to go one by one, each through its program."""


class Placement(NamedTuple):
    """Where a new adapter goes: its config, the path of its layer, and the device and dtype of its tensors."""

    config: Any
    path: str
    device: torch.device
    dtype: torch.dtype
    own: Callable[[], Dense] | None = None
    """Reads the base layer's own weight, whatever is merged; None where no values are wanted, only what there is."""


class Variant:
    """One adapter's mathematics. Subclasses are stateless, so that one instance serves every layer."""

    by_rows = False
    """Whether `merge` can be asked for some rows of the weight at a time (a row depends on that row only)."""
    mergeable = True
    """Whether `merge` exists; an adapter that replaces its module is taken over by `unload` instead."""
    exclusive = False
    """Whether two adapters of this kind on one layer may be unable to be active together (see `clash`)."""
    observes: frozenset[str] | None = None
    """Arguments of the whole model's calls that are this variant's own, of one that looks at these calls (`inputs`)."""
    mixes = False
    """Whether it reads other adapters of its layer."""
    frozen: frozenset[str] = frozenset()
    """Slots that do not train, of those that do for other variants of the same tuner."""

    def check(self, host: Host, config: Any, path: str) -> str | None:
        """Why this variant cannot adapt `host`, or None if it can. Called in the plan, before anything is touched."""
        return None

    def init(self, host: Host, at: Placement) -> dict[str, Any]:
        """Slot or number name -> first value. The fresh adapter is the identity unless its config says otherwise."""
        raise NotImplementedError(type(self).__name__)

    def size(self, host: Host, config: Any, path: str) -> tuple[int | None, int]:
        """(rank or None, number of trainable parameters) of an adapter of this kind, without making one."""
        raise NotImplementedError(type(self).__name__)

    def forward(self, a: View, call: Program, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Middleware around `call`: may edit the input, the output, or replace the call."""
        raise NotImplementedError(type(self).__name__)

    def merge(self, a: View, dense: Dense, rows: slice = ALL_ROWS) -> Dense:
        """The adapted weight and bias; pure and differentiable. `dense` holds the rows asked for."""
        raise NotImplementedError(type(self).__name__)

    def clash(self, a: View, b: View) -> str | None:
        """Why two adapters of an `exclusive` kind on one layer cannot be active together, or None if they can."""
        return "each has a module of its own"

    def why_not_follow(self, host: Host, leader: Host, config: Any, paths: tuple[str, str]) -> str | None:
        """Why an adapter on `leader` cannot be one on `host` too, which shares its weight, or None if it can.

        paths: those of the follower and of the leader.
        """
        return "its method does not say how"

    def follow(self, host: Host, leader: View) -> dict[str, Any]:
        """What `init` gives, for an adapter that another layer has, on the same weight: the same tensors."""
        raise NotImplementedError(type(self).__name__)

    def led(self, host: Host, leader: Host, suffix: str) -> tuple[str, bool] | None:
        """Which of the leader's tensors one of those is, and whether transposed; None for one of the layer's own."""
        raise NotImplementedError(type(self).__name__)

    def why_not_merge(self, a: View) -> str | None:
        """Why this adapter's effect cannot be written into its base layer, or None if it can."""
        return None

    def replacement(self, a: View) -> nn.Module:
        """The module that stays in the base layer's place when adapters go, of a variant that is not mergeable."""
        raise NotImplementedError(type(self).__name__)

    def bind(self, a: View, slow: Program) -> Program | None:
        """A callable equal to `slow` (this adapter around the base layer), only faster; or None."""
        return None

    def bind_several(self, views: Sequence[View], slow: Program) -> Program | None:
        """The same for several adapters of this kind, active together on one layer; or None."""
        return None

    def bank(self, layer: Any, views: Sequence[View | None]) -> Bank | None:
        """What runs rows of different adapters of this kind on one layer together, equal to one by one; or None.

        `views` has one for each group of rows, None where that group uses the base layer alone.
        """
        return None


class Additive(Variant):
    """W' = W + delta(a): one formula gives forward and merge; `delta_forward` is for when delta is wasteful."""

    def delta(self, a: View, rows: slice = ALL_ROWS) -> Tensor:
        """The update of the canonical weight, in the adapter's dtype."""
        raise NotImplementedError(type(self).__name__)

    def delta_forward(self, a: View, x: Tensor) -> Tensor:
        """What the update adds to the output for input `x`."""
        delta = self.delta(a)
        return a.layer.host.apply(x.to(delta.dtype) if x.is_floating_point() else x, delta)  # type: ignore[no-any-return]

    def delta_bias(self, a: View) -> Tensor | None:
        """What the adapter adds to the bias `(out,)`, if anything."""
        return None

    def forward(self, a: View, call: Program, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = call(x, *args, **kwargs)
        return (y + self.delta_forward(a, x)).to(y.dtype)

    def merge(self, a: View, dense: Dense, rows: slice = ALL_ROWS) -> Dense:
        weight = self.added(a, dense.weight, rows)
        bias, more = dense.bias, self.delta_bias(a)
        if more is not None and bias is not None:
            bias = bias + a.layer.host.take_bias(more, rows)
        return Dense(weight, bias)

    def added(self, a: View, weight: Tensor, rows: slice) -> Tensor:
        """W + delta(a), for these rows; `weight` holds them alone, in at least fp32."""
        return weight + self.delta(a, rows)


class Shared(NamedTuple):
    """Tensors that an adapter has once for all its layers, in the tuner's shared slots."""

    make: Callable[[Any, Sequence[Host], Placement], dict[str, Tensor]]
    """(config, hosts of all layers, where to) -> slot name -> tensor."""
    saved: Callable[[Any], bool]
    """Whether a config wants them in files; else they are made again when a file is read."""


class FileForm(NamedTuple):
    """How a layer's tensors stand in files, where that is not as they are."""

    write: Callable[[Any, str, str, Tensor], Tensor]
    """(what is in `AdapterState.memory`, path, file suffix, tensor) -> the file's tensor."""
    read: Callable[[Any, str, str, Tensor], Tensor]
    """(the file's config, path, file suffix, the file's tensor) -> tensor, where shapes differ."""
    adopt: Callable[[Any, str, Any], None]
    """(AdapterState, name, the file's config): what an adapter takes over with the tensors of a file."""


@dataclass(frozen=True, eq=False)
class TunerSpec:
    """What one method registers: slots, printed label, and which variant a given config asks for."""

    peft_type: str
    slots: tuple[Slot, ...]
    variant_for: Callable[[Any], Variant]
    label: Callable[[Host], str]
    numbers: tuple[str, ...] = ()
    shown: frozenset[str] = frozenset()
    """Those of the numbers that no formula reads."""
    base_slot: str = "base_layer"
    base_file: str | None = None
    """What files call the base layer's place, where that is not `base_slot`."""
    any_module: bool = False
    """Whether it can be put around modules of kinds that no host knows."""
    few_rows: bool = False
    """Whether it is about a few rows of a table: then all modules that share the table see them, and files have no more
    of the table than these."""
    followers_in_files: bool = True
    """Whether files have the tensors again for every layer that follows another."""
    resolve: Callable[[Any, Sequence[tuple[str, Host]]], None] | None = None
    """Completes the model's own copy of a config from the layers that it turned out to adapt."""
    shared: Shared | None = None
    file_form: FileForm | None = None
    after_forward: Callable[[nn.Module, Any, str, Any], Any] | None = None
    """(base model, its AdapterState, an adapter in use, the model's output) -> the output.

    Called while gradients are recorded.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return tuner_for, (self.peft_type,)


class Companion(NamedTuple):
    """A tuner that comes along with others: a field of any config names its modules (`modules_to_save`)."""

    tuner: TunerSpec
    field: str
    targets: Callable[[Any], Sequence[str]]
    """The names; `INPUTS` stands for the model's table of inputs."""
    optional: Callable[[Any], Sequence[str]] = lambda config: ()
    """Names that are taken where they exist and are no error where they do not, such as the head of a task."""
    whole: bool = True
    """Whether it replaces modules, so that nothing below them gets an adapter."""


INPUTS = ""
TUNERS: Registry[TunerSpec] = registry("tuners")
COMPANIONS: Registry[Companion] = registry("companions")


def register(tuner: TunerSpec) -> TunerSpec:
    """Make a tuner known by its `peft_type`."""
    TUNERS.register(tuner.peft_type, tuner)
    return tuner


def register_companion(companion: Companion) -> Companion:
    """Make a companion tuner known."""
    TUNERS.register(companion.tuner.peft_type, companion.tuner)
    COMPANIONS.register(companion.tuner.peft_type, companion)
    return companion


def tuner_for(config: PeftConfig | str) -> TunerSpec:
    """The tuner of a config, or of a `peft_type`.

    Raises: ConfigError for a method that no tuner implements.
    """
    kind = config if isinstance(config, str) else config.peft_type
    key = getattr(kind, "value", kind)
    if key not in TUNERS:
        known = ", ".join(f"`{name}`" for name in TUNERS)
        raise ConfigError(
            f"`peft_type={key!r}` has no tuner; nearest: {nearest(str(key), TUNERS)}; known: {known}. "
            "Nothing was changed."
        )
    return TUNERS[str(key)]
