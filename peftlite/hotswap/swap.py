"""Swapping one adapter's weights for another's."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from peftlite.checkpoint.files import read_adapter
from peftlite.checkpoint.former import as_now
from peftlite.checkpoint.hub import resolve
from peftlite.checkpoint.keys import PREFIX, file_key, nearest_keys, shown, strip_adapter, unwrapped
from peftlite.checkpoint.spots import spots
from peftlite.checkpoint.state_dict import bare, key_prefix
from peftlite.checkpoint.targets import BaseTarget, Targets, live_targets
from peftlite.checkpoint.tensorfile import MemoryTensors, TensorInfo, TensorSource
from peftlite.config import HubOptions, PeftConfig, config_from_dict
from peftlite.core import lifecycle
from peftlite.core.binding import rebind
from peftlite.core.layer import AdapterLayer
from peftlite.core.transaction import atomic, keep_values, put, write
from peftlite.core.tree import base_model_of
from peftlite.errors import CheckpointError, ConfigError, StateError, warn
from peftlite.hotswap.compatible import check_hotswap_configs_compatible, lora_config
from peftlite.hotswap.place import Place, put_numbers, resize
from peftlite.tuners.lora.config import LoraConfig
from peftlite.tuners.lora.fit import adapted, fitted
from peftlite.tuners.lora.plain import Lora
from peftlite.tuners.lora.stacks import depth, names_of, padded, stack_of, stored, times
from peftlite.tuners.lora.variant import LORA


@atomic
def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: str | torch.device | None = None,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> None:
    """Give a loaded LoRA adapter the weights, scaling and config of another one in a directory or repository.

    Layers that the other one does not have get zeros. Its rank may be smaller in a prepared model, where the rest is
    filled with zeros; else the tensors are replaced where ranks differ. A call that raises changes nothing.

    Args:
        model: any model with the adapter, wrapped, compiled or not.
        model_name_or_path: where the files of the other one are.
        adapter_name: the adapter that gets the weights; it keeps its name.
        torch_device: the weights are copied to where the adapter is, so this changes nothing.
        subfolder: where in the directory or repository.
        revision: which revision of the repository.
        cache_dir: where downloads go.
        token: for private repositories.
        local_files_only: do not go online.
        force_download: download again what is there.

    Raises:
        AdapterFilesNotFoundError, CheckpointError: the files are not there, cannot be trusted, or do not fit.
        ConfigError: the two adapters are of different kinds.
        NoAdapterError, AdapterNameError, StateError: there is no such adapter, or it is merged.
    """
    options = HubOptions(subfolder, revision, cache_dir, token, local_files_only, force_download)
    place = resolve(model_name_or_path, options)
    with read_adapter(place) as files:
        swap(model, adapter_name, config_from_dict(files.config), files.tensors)


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: PeftConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """Give a loaded LoRA adapter these weights, and the scaling that `config` gives them; see `hotswap_adapter`.

    Keys are those of files or of the model, with or without the adapter's name. `parameter_prefix` changes nothing:
    which tensors are LoRA's is known.

    Raises: as `hotswap_adapter`.
    """
    swap(model, adapter_name, config, MemoryTensors(state_dict))


# ---- how
class VisibleSource(TensorSource, Protocol):
    """Tensors that can be looked at, and written elsewhere, without memory for them all."""

    def look(self, key: str) -> Tensor: ...

    def not_finite(self) -> str | None: ...

    def read_into(self, places: Iterable[tuple[str, Tensor]]) -> None: ...


@atomic
def swap(model: nn.Module, name: str, config: PeftConfig, source: VisibleSource) -> None:
    """Plan, read, check, and then carry out."""
    model = bare(model)
    state, layers = lifecycle.adapted(model)
    state.checked(name)
    if any(name in layer.merged_adapters for layer in layers):
        raise StateError(f"Adapter `{name}` is merged: call `unmerge_adapter` first. Nothing was changed.")
    own, held = state.configs[name], Live.of(model, name)
    if not held.known.keys() >= source.infos.keys():
        config, source = for_layers_of_now(model, config, source)
    check_hotswap_configs_compatible(own, config)
    planned = Swap.planned(held, lora_config(own), lora_config(config), source.infos)
    planned.check(source)
    copies, replaced = planned.values(source)
    if planned.outgrown:
        warn(
            f"The new adapter's ranks exceed what {len(planned.outgrown)} layers such as `{planned.outgrown[0]}` were "
            "prepared for: what is compiled will be compiled again. A larger `target_rank` in "
            "`prepare_model_for_compiled_hotswap` avoids that."
        )
    keep_values(*(live for live, _ in copies))
    source.read_into([(new, live) for live, new in copies if isinstance(new, str)])
    for live, new in copies:
        if not isinstance(new, str):
            write(live, new)
    for layer, suffix, tensor in replaced:
        layer.assign(name, suffix, tensor)
        resize(layer, name)
    for layer, r, alpha, scaling in planned.numbers:
        put_numbers(layer, name, r, alpha, scaling)
    put(state.configs, name, planned.config)
    rebind(model, state, layers)  # now, and not in the next call, which may be compiled


def for_layers_of_now(model: nn.Module, config: PeftConfig, source: VisibleSource) -> tuple[PeftConfig, VisibleSource]:
    """A file's config and tensors for the layers that the model has, where those that they are about were fused."""
    now, tensors = as_now(base_model_of(model), config, source, "The other adapter", True)
    return (config, source) if tensors is source else (now, MemoryTensors({k: tensors.read(k) for k in tensors.infos}))


class Live(NamedTuple):
    """The tensors that an adapter has now."""

    model: nn.Module
    name: str
    layers: list[AdapterLayer]
    tensors: dict[int, dict[str, Tensor]]
    """By a layer's id: suffix -> live tensor."""
    known: dict[str, tuple[int, str]]
    """Key in files -> a layer's id, suffix."""

    @classmethod
    def of(cls, model: nn.Module, name: str) -> Live:
        """Found by walking over the model."""
        live = cls(model, name, [], {}, {})
        for spot in spots(base_model_of(model), name):
            if isinstance(spot.module, AdapterLayer):
                at = id(spot.module)
                live.layers.append(spot.module)
                live.tensors[at] = tensors = spot.module.tensors(name)
                for suffix in tensors:
                    live.known[file_key(spot.path, suffix)] = at, suffix
        return live


@dataclass
class Step:
    """What one layer gets: new tensors by suffix, under these keys, or (without keys) zeros."""

    layer: AdapterLayer
    live: dict[str, Tensor]
    keys: dict[str, str]
    padded: int | None = None
    """The rank of each matrix to which the new factors are filled up."""
    replaced: bool = False
    """Whether the factors take the place of the live ones, being of another rank."""


Copies = list[tuple[Tensor, Tensor | str]]
Replaced = list[tuple[AdapterLayer, str, Tensor]]


@dataclass
class Swap:
    """What is going to be done, from what is known before the values are read."""

    config: LoraConfig
    steps: list[Step] = field(default_factory=list)
    numbers: list[tuple[AdapterLayer, int, float, float]] = field(default_factory=list)
    """(layer, rank, alpha, scaling)."""
    outgrown: list[str] = field(default_factory=list)
    """Layers that were prepared for smaller ranks."""
    unmoved: list[tuple[str, BaseTarget]] = field(default_factory=list)
    """Keys of the base model's own tensors, which must not differ."""

    @classmethod
    def planned(cls, live: Live, own: LoraConfig, new: LoraConfig, infos: Mapping[str, TensorInfo]) -> Swap:
        """The plan.

        Raises: CheckpointError for tensors that do not fit, ConfigError.
        """
        found, model, name = cls(own), live.model, live.name
        given = found.places(live, infos)
        numbers: dict[str, tuple[int, float]] = {}
        layers = {path: layer for path, layer in adapted(model) if name in layer.variants}
        for path, layer in layers.items():
            step = Step(layer, live.tensors[id(layer)], given.get(id(layer), {}))
            found.steps.append(step)
            if layer.tuner is not LORA:
                check_fits(path, step, infos, {})
                continue
            place = Place(path, layer, name)
            numbers[path] = found.plan(place, step, infos, new)
            if type(layer.variants[name]) is not Lora:
                check_start(place, own, new, numbers[path])
        found.config = fitted(replace(own.copy(), use_rslora=new.use_rslora), numbers)
        for path, (r, _) in numbers.items():
            found.numbers.append((layers[path], r, found.config.alpha_for(path), found.config.scaling_for(path)))
        return found

    def places(self, live: Live, infos: Mapping[str, TensorInfo]) -> dict[int, dict[str, str]]:
        """By a layer's id: suffix -> key of the tensor for it.

        Raises: CheckpointError for a tensor that has no place.
        """
        given: dict[int, dict[str, str]] = {}
        more: Targets | None = None
        for key, old in file_keys(live, infos).items():
            if key in live.known:
                at, suffix = live.known[key]
                given.setdefault(at, {})[suffix] = old
                continue
            more = live_targets(live.model, live.name, self.config) if more is None else more
            place = more.places.get(key)
            if isinstance(place, BaseTarget):
                self.unmoved.append((old, place))
            elif key not in more.ignored:
                near = "".join(f"; nearest: {shown(other)}" for other in nearest_keys(key, live.known))
                raise CheckpointError(f"The adapter has no place for {shown(key)}{near}. Nothing was changed.")
        return given

    def plan(self, place: Place, step: Step, infos: Mapping[str, TensorInfo], new: LoraConfig) -> tuple[int, float]:
        """Complete a layer's step; gives the rank and scaling that the layer then has.

        Raises: CheckpointError.
        """
        path, layer, host = place.path, place.layer, place.layer.host
        if not step.keys and type(layer.variants[place.name]) is Lora:
            return layer.r[place.name], float(layer.scaling[place.name])
        down, up = names_of(host)
        A, B = step.live[down].shape, step.live[up].shape
        held, each = A[0] // depth(host), new.rank_for(path) // times(host)
        wanted = {down: (A[0] // held * each, *A[1:]), up: (B[0], B[1] // held * each, *B[2:])}
        check_fits(path, step, infos, wanted)
        if each < held and place.prepared and place.can_be_padded:
            step.padded, each = held, held
        elif each != held:
            step.replaced = True
            self.outgrown += [path] if place.prepared else []
        return each * times(host), new.scaling_for(path)

    def check(self, source: VisibleSource) -> None:
        """Look at all numbers, before any is written.

        Raises: CheckpointError for numbers that are not finite, or other values for the base model.
        """
        if key := source.not_finite():
            raise CheckpointError(f"{shown(key)} has numbers that are not finite. Nothing was changed.")
        for key, target in self.unmoved:
            seen = source.look(key)
            if target.own.shape != seen.shape or not torch.equal(target.own, seen.to(target.own)):
                raise CheckpointError(
                    f"{shown(key)} brings other values for the base model: they cannot be hotswapped. Nothing was "
                    "changed."
                )

    def values(self, source: VisibleSource) -> tuple[Copies, Replaced]:
        """(live tensor, new values or their key) and (layer, suffix, new tensor)."""
        copies: Copies = []
        replaced: Replaced = []
        for step in self.steps:
            if not step.keys:
                copies += [(live, torch.zeros_like(live)) for live in step.live.values()]
                continue
            new: dict[str, Tensor | str] = dict(step.keys)
            if step.padded is not None or step.replaced:
                host, factors = step.layer.host, names_of(step.layer.host)
                read = {suffix: source.read(step.keys[suffix]) for suffix in factors}
                if step.padded is not None:
                    new |= stored(host, padded(stack_of(host, *read.values()), step.padded))
                else:
                    like = step.live[factors[0]]
                    replaced += [(step.layer, s, tensor.to(like).contiguous()) for s, tensor in read.items()]
                    new = {suffix: key for suffix, key in new.items() if suffix not in factors}
            copies += [(step.live[suffix], value) for suffix, value in new.items()]
        return copies, replaced


def file_keys(live: Live, keys: Iterable[str]) -> dict[str, str]:
    """File key -> the key that a tensor came with, which may be any of the usual ones."""
    given, known = {key: key for key in keys}, live.known
    if given.keys() <= known.keys():
        return given
    prefix = key_prefix(live.model)
    slots = {slot.name for layer in live.layers for slot in layer.tuner.slots}
    forms = [given]
    plain = {unwrapped(key): key for key in keys}
    nameless = {strip_adapter(key, live.name, slots) or key: old for key, old in plain.items()}
    for form in (plain, nameless):
        forms += [form, {PREFIX + key.removeprefix(prefix): old for key, old in form.items()}]
    return max(forms, key=lambda form: sum(key in known for key in form))


def check_fits(path: str, step: Step, infos: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a part of a layer's tensors, or one of another shape (by default that of the live one) or kind.

    Raises: CheckpointError.
    """
    missing = [suffix for suffix in step.live if suffix not in step.keys]
    if missing:
        raise CheckpointError(
            f"`{path}` needs {', '.join(f'`{suffix}`' for suffix in step.live)}, and of those "
            f"{', '.join(f'`{suffix}`' for suffix in missing)} is missing. Nothing was changed."
        )
    if any(tensor.is_meta for tensor in step.live.values()):
        raise CheckpointError(f"`{path}` has tensors without memory yet: load an adapter first. Nothing was changed.")
    for suffix, key in step.keys.items():
        wanted, found = tuple(shapes.get(suffix, step.live[suffix].shape)), infos[key]
        if found.shape != wanted or not found.dtype.is_floating_point:
            raise CheckpointError(
                f"`{suffix}` of `{path}` is {found.shape} of {found.dtype}; by the config it must be {wanted} of real "
                "numbers. Nothing was changed."
            )


def check_start(place: Place, own: LoraConfig, new: LoraConfig, numbers: tuple[int, float]) -> None:
    """Refuse other first factors, where those are subtracted.

    Raises: ConfigError.
    """
    now = (place.layer.r[place.name], float(place.layer.scaling[place.name]))
    if place.started and (now != numbers or own.init_lora_weights != new.init_lora_weights):
        raise ConfigError(
            f"`{place.path}` begins from `init_lora_weights={own.init_lora_weights!r}` with rank and scaling {now}, "
            f"and the other adapter from `{new.init_lora_weights!r}` with {numbers}: they cannot be hotswapped. "
            "Nothing was changed."
        )
