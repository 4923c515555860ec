"""Where the tensors of an adapter's file are in a model that has the adapter, or has it once a plan is carried out.

Three kinds of tensors are in a file: the adapter's own, on its layers or shared by them; base biases, which
`bias="all"` or `"lora_only"` trains along; and base embeddings, which are saved with adapters on them, or when their
number of rows was changed. Keys are those of a model that has this adapter alone, so that a file does not depend on
what else was there when it was written.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftlite.checkpoint.keys import file_key, shared_key
from peftlite.checkpoint.report import Wanted
from peftlite.checkpoint.spots import Spot, is_whole, joined_path, spots
from peftlite.core.facts import ModelFacts, facts_of
from peftlite.core.found import innermost
from peftlite.core.hosts import is_borrowed
from peftlite.core.layer import AdapterLayer
from peftlite.core.plan import InjectionPlan, Site
from peftlite.core.slots import BufferSlot, fill_in, replace_tensor
from peftlite.core.state import bias_of
from peftlite.core.transaction import keep_values, unnoted, write
from peftlite.core.tree import base_model_of, find_state, is_bias
from peftlite.core.variant import TunerSpec
from peftlite.errors import CheckpointError, PeftliteError, StateError

_FREE = 1 << 24  # numbers that are made up for any model, however small


class Target:
    """One place for a tensor: what fits there, and on which device."""

    wanted: Wanted
    device: torch.device
    of_base: ClassVar[bool] = False
    """Whether it is the base model's, and not the adapter's own."""

    def check(self, new: Tensor) -> None:
        """Refuse a tensor that fits, and that putting there would do harm.

        Raises: StateError.
        """

    def put(self, new: Tensor) -> None:
        """Put a tensor there."""
        raise NotImplementedError(type(self).__name__)


@dataclass(frozen=True)
class Targets:
    """All places for the tensors of one adapter, by file key."""

    places: dict[str, Target] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)
    """Keys that PEFT writes beside the ones that count: second copies of tensors."""
    slots: set[str] = field(default_factory=set)

    @property
    def wanted(self) -> dict[str, Wanted]:
        """What is expected of a file."""
        return {key: target.wanted for key, target in self.places.items()}


def _second_copies(path: str, suffix: str, tuner: TunerSpec) -> Iterator[str]:
    """What else PEFT calls a tensor of a module that is trained whole."""
    return (file_key(joined_path(path, slot), suffix) for slot in (tuner.slots[0].name, tuner.base_slot))


def _wanted(tensor: Tensor, rank: int | None = None, rows: int | None = None, required: bool = True) -> Wanted:
    return Wanted(tuple(tensor.shape), tensor.dtype, required, rank, rows)


def tables_of(facts: ModelFacts) -> dict[int, int | None]:
    """By id, the base modules that have one row per token, and how many those are."""
    return {id(innermost(table)): facts.vocab_size for table in facts.embeddings}


def _or_cpu(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "meta" else device


def _copy(tensor: Tensor, new: Tensor) -> None:
    keep_values(tensor)
    write(tensor, new)


# ---- an adapter that the model has


@dataclass(eq=False)
class LayerTarget(Target):
    """A tensor on an adapter layer: written in place, so that optimisers keep their hold of it.

    One that has no memory yet is replaced.
    """

    layer: AdapterLayer
    name: str
    suffix: str
    tensor: Tensor
    rank: int | None
    rows: int | None

    @property
    def wanted(self) -> Wanted:  # type: ignore[override]
        return _wanted(self.tensor, self.rank, self.rows)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return _or_cpu(self.layer.host.device) if self.tensor.is_meta else self.tensor.device

    @property
    def present(self) -> Tensor:
        """The tensor, or a copy of it if it is offloaded."""
        if not self.tensor.is_meta:
            return self.tensor
        with self.layer.here():
            return self.layer.tensors(self.name)[self.suffix].detach().clone()

    def put(self, new: Tensor) -> None:
        if self.tensor.is_meta:
            self.layer.assign(self.name, self.suffix, new)
        else:
            _copy(self.tensor, new)


@dataclass(frozen=True)
class SharedTarget(Target):
    """A tensor that all layers share."""

    container: BufferSlot
    name: str
    tensor: Tensor
    wanted: Wanted

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return _or_cpu(self.tensor.device)

    def put(self, new: Tensor) -> None:
        if self.tensor.is_meta:
            self.container[self.name] = new
        else:
            _copy(self.tensor, new)


def live_targets(
    model: nn.Module, name: str, config: Any, walked: Iterable[Spot] | None = None, facts: ModelFacts | None = None
) -> Targets:
    """The places in the adapter `name` of a model.

    walked: its spots, if they are known; facts: likewise.
    """
    base, found = base_model_of(model), Targets()
    state = find_state(base)
    for slot, container in state.shared.items() if state is not None else ():
        if name in container:
            tensor, key = container[name], shared_key(slot)
            found.ignored.add(key)
            if container.in_files(name):
                found.places[key] = SharedTarget(container, name, tensor, _wanted(tensor))
    bias, tables = bias_of(config), tables_of(facts or facts_of(base))
    for spot in spots(base, name) if walked is None else walked:
        layer = spot.module
        if isinstance(layer, AdapterLayer):
            tuner = layer.tuner
            found.slots.update([slot.name for slot in tuner.slots])
            if name in layer.leaders and not tuner.followers_in_files:
                continue
            rank = layer.__dict__["r"].get(name) if "r" in tuner.numbers else None
            rows, whole = tables.get(id(layer.get_base_layer())), is_whole(tuner)
            for suffix, tensor in layer.tensors(name).items():
                found.places[file_key(spot.path, suffix)] = LayerTarget(layer, name, suffix, tensor, rank, rows)
                if whole:
                    found.ignored.update(_second_copies(spot.path, suffix, tuner))
        else:
            found.places.update(base_targets(spot, bias, tables))
    return found


# ---- an adapter that a plan would add


@dataclass(eq=False)
class SiteTarget(Target):
    """A tensor of a blueprint: where in the values of a site, or in what all share, it is."""

    values: Any
    slot: str
    attribute: str
    wanted: Wanted
    device: torch.device

    def put(self, new: Tensor) -> None:
        replace_tensor(self.values, self.slot, self.attribute, new)


@dataclass
class Blueprint:
    """What a plan would attach, made on the meta device: loading fills it in before anything is attached."""

    planned: InjectionPlan
    values: list[dict[str, Any]]
    """Slot or number -> value, for each site."""
    shared: dict[str, Tensor]
    """Slot -> what all sites share."""
    device: torch.device | None = None

    @classmethod
    def of(cls, planned: InjectionPlan, device: torch.device | None = None) -> Blueprint:
        """The blueprint of a plan; costs no memory, whatever rank the config asks for.

        Raises: CheckpointError if no tensor can have the sizes that the config asks for.
        """
        try:
            values = [dict(site.variant.init(site.host, planned.placement(site, True))) for site in planned.sites]
            shared = planned.shared(torch.device("meta"))
        except PeftliteError:
            raise
        except (RuntimeError, OverflowError, TypeError) as error:
            reason = str(error).split("\n")[0]
            raise CheckpointError(f"The config asks for what cannot be made: {reason}. Nothing was changed.") from error
        return cls(planned, values, shared, device)

    def targets(self) -> Targets:
        """The places in it, and those in the base model, by the keys that they have once it is attached."""
        base, found = self.planned.model, Targets()
        for slot, tensor in self.shared.items():
            key = shared_key(slot)
            found.ignored.add(key)
            if self.planned.saves_shared:
                place = self.place(self.planned.sites[0])
                found.places[key] = SiteTarget(self.shared, slot, "", _wanted(tensor), place)
        bias, tables = bias_of(self.planned.config), tables_of(facts_of(base))
        indices = {id(site): index for index, site in enumerate(self.planned.sites)}
        for tuner in {id(site.tuner): site.tuner for site in self.planned.sites}.values():
            found.slots.update([slot.name for slot in tuner.slots])
        for spot in spots(base, self.planned.adapter_name, self.planned):
            site = spot.site
            if site is None:
                found.places.update(base_targets(spot, bias, tables))
            else:
                self._add(found, spot.path, indices[id(site)], tables.get(id(innermost(site.module))))
        return found

    def _add(self, found: Targets, path: str, index: int, rows: int | None) -> None:
        site, values = self.planned.sites[index], self.values[index]
        if site.leader is not None and not site.tuner.followers_in_files:
            return
        place, whole = self.place(site), is_whole(site.tuner)
        for slot, suffix, attribute, tensor in in_files(site, values):
            wanted = _wanted(tensor, site.rank, rows)
            found.places[file_key(path, suffix)] = SiteTarget(values, slot, attribute, wanted, place)
            if whole:
                found.ignored.update(_second_copies(path, suffix, site.tuner))

    def place(self, site: Site) -> torch.device:
        """The device that a site's tensors go to."""
        return _or_cpu(self.device or site.host.device)

    def fill(self, staged: Iterable[tuple[Target, Tensor]]) -> None:
        """Put tensors into it, which no model has yet: a note of what was there would keep that."""
        for target, tensor in staged:
            unnoted(target.put, tensor)

    def built(self) -> list[Mapping[str, Any]]:
        """What to attach: every tensor that was put there, and first values for the rest, if there is any.

        Raises: CheckpointError if the rest is larger than the model that it is for.
        """
        rest = [index for index, values in enumerate(self.values) if any(map(is_on_meta, values.values()))]
        self._check(rest)
        for index in rest:  # not all was in the file, or is ever in one
            site = self.planned.sites[index]
            filled = {suffix: t for _, suffix, _, t in in_files(site, self.values[index]) if not t.is_meta}
            placement = self.planned.placement(site)._replace(device=self.place(site))
            self.values[index] = dict(site.variant.init(site.host, placement))
            fill_in(site.tuner.slots, self.values[index], filled)
        shared = {slot: tensor for slot, tensor in self.shared.items() if not tensor.is_meta}
        if shared.keys() != self.shared.keys():
            shared = {**self.planned.shared(self.place(self.planned.sites[0])), **shared}
        return [
            {**values, **(shared if site.tuner.shared else {})}
            for site, values in zip(self.planned.sites, self.values, strict=True)
        ]

    def _check(self, rest: Sequence[int]) -> None:
        places = [place for index in rest for place in in_files(self.planned.sites[index], self.values[index])]
        tensors = [*self.shared.values(), *[tensor for _, _, _, tensor in places]]
        missing = sum(tensor.numel() for tensor in tensors if tensor.is_meta)
        if missing <= _FREE:
            return
        own = sum(parameter.numel() for parameter in self.planned.model.parameters())
        if missing > own + _FREE:
            raise CheckpointError(
                f"The config asks for {missing} numbers that are not in the file, and the model itself has {own}. "
                "Nothing was changed."
            )


def in_files(site: Site, values: Mapping[str, Any]) -> list[tuple[str, str, str, Tensor]]:
    """(slot, file suffix, attribute, tensor) of what files have of a site's values."""
    slots = [slot for slot in site.tuner.slots if slot.name in values]
    return [(slot.name, *place) for slot in slots for place in slot.suffixes(values[slot.name])]


def is_on_meta(value: Any) -> bool:
    """Whether a value holds a tensor without memory."""
    if isinstance(value, Tensor):
        return value.is_meta
    if not isinstance(value, nn.Module):
        return False
    held = [tensors for tensors in (value._parameters, value._buffers, value._modules) if tensors]
    return any(is_on_meta(inner) for holder in held for inner in holder.values())


# ---- tensors of the base model


@dataclass(frozen=True)
class BaseTarget(Target):
    """A tensor of the base model that has a place in the adapter's file."""

    of_base = True

    module: nn.Module
    name: str
    layer: AdapterLayer | None
    wanted: Wanted

    @property
    def live(self) -> Tensor:
        """The tensor that the module has now, with what is merged into it."""
        tensor: Any = self.module._parameters.get(self.name)
        found: Any = self.module._buffers.get(self.name) if tensor is None else tensor
        return found  # type: ignore[no-any-return]

    @property
    def own(self) -> Tensor:
        """The tensor without what is merged into it.

        Raises: StateError if that is gone.
        """
        if self.layer is not None and self.name in (self.layer.host.param, "bias"):
            self.layer.check_kept(())
        saved: Any = None if self.layer is None else self.layer._saved
        if self.layer is None or saved is None:
            return self.live
        kept = {self.layer.host.param: saved.weight, "bias": saved.bias}.get(self.name)
        return self.live if kept is None else kept

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return _or_cpu(self.live.device)

    def _has(self, new: Tensor) -> bool:
        return self.live.is_meta or torch.equal(self.own, new)

    def check(self, new: Tensor) -> None:
        if self._has(new):
            return
        if self.layer is not None and self.layer.merged:
            raise StateError(
                "Adapters are merged into weights of the base model that the file brings other values for: call "
                "`unmerge_adapter` first. Nothing was changed."
            )
        if is_borrowed(self.live):
            raise StateError(
                "The file brings other values for weights of the base model, which is an overlay and shares them: load "
                "the adapter into a model with weights of its own. Nothing was changed."
            )

    def put(self, new: Tensor) -> None:
        if not self._has(new):
            _copy(self.live, new)


def base_targets(spot: Spot, bias: str, tables: Mapping[int, int | None]) -> Iterator[tuple[str, BaseTarget]]:
    """By file key: the module's biases that the config trains, which are required, and those that a file may have."""
    if bias == "none" and id(spot.module) not in tables:
        return
    rows = tables.get(id(spot.module))
    replaced = spot.around is not None and is_whole(spot.around.tuner)
    saved = id(spot.module) in tables and not replaced
    for name, tensor in own_tensors(spot.module):
        trained = is_bias(name) and (bias == "all" or (bias == "lora_only" and spot.adapted))
        if trained or saved:
            wanted = _wanted(tensor, rows=rows, required=trained)
            yield file_key(spot.path, name), BaseTarget(spot.module, name, spot.around, wanted)


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers that a module holds itself and has in its state dict."""
    passing: Collection[str] = module._non_persistent_buffers_set
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None and name not in passing:
            yield name, tensor
