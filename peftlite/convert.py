"""LoRA adapters made of something else: of adapters of other methods, or of a model that was trained whole."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from peftlite.checkpoint.files import write_adapter
from peftlite.checkpoint.keys import PREFIX, file_key, without_prefix
from peftlite.checkpoint.record import Record, record_for, record_of
from peftlite.checkpoint.spots import is_companion, spots
from peftlite.checkpoint.state_dict import adapter_tensors, key_prefix
from peftlite.checkpoint.targets import BaseTarget, LayerTarget, live_targets
from peftlite.config import PeftConfig
from peftlite.core.found import host_at
from peftlite.core.hosts import EmbeddingHost, Host, ParamHost
from peftlite.core.inject import plan
from peftlite.core.layer import AdapterLayer
from peftlite.core.lifecycle import state_of
from peftlite.core.plan import Site
from peftlite.core.state import bias_of
from peftlite.core.tree import base_model_of, find_state
from peftlite.errors import ConfigError, StateError, warn
from peftlite.tuners.lora.config import LoraConfig
from peftlite.tuners.lora.extract import Change, Extract, change_of, checked_rank, difference, extracted, why_no_lora
from peftlite.tuners.lora.fit import adapted, addressed, fitted, plain_of
from peftlite.tuners.lora.lowrank import Approximation
from peftlite.tuners.lora.variant import LORA, variant_for

BIAS = "lora_B.bias"
T = TypeVar("T")


@dataclass(frozen=True)
class Converted:
    """A LoRA adapter that is in no model: `config, state_dict = converted`, as PEFT returns it.

    `approximation` says how near it is to what it was made of; `left_out` names what else was different there; `record`
    is what it was made on.
    """

    config: LoraConfig
    state_dict: dict[str, Tensor]
    approximation: Approximation
    left_out: tuple[str, ...] = ()
    record: Record | None = None

    @property
    def relative_error(self) -> float:
        """|exact update - LoRA's| / |exact update|, over all layers."""
        return self.approximation.relative_error

    def __iter__(self) -> Iterator[Any]:
        return iter((self.config, self.state_dict))

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write the adapter's files, as of any LoRA adapter.

        Raises: CheckpointError.
        """
        tensors = {PREFIX + without_prefix(key): tensor for key, tensor in self.state_dict.items()}
        made_on = None if self.record is None else self.record.fields()
        write_adapter(save_directory, self.config.to_json(), tensors, record=made_on)


# ---- from adapters of other methods
def convert_to_lora(
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> Converted:
    """A LoRA adapter that does what an adapter of any method does, as well as its rank allows. Changes nothing.

    Of each layer it is the truncated singular value decomposition of what the adapter adds to the weight; of methods
    that change the bias too, with `lora_bias`. Modules that are trained whole are taken over.

    Args:
        model: any model with adapters, wrapped or not.
        rank: the rank of every layer (an int); or the share of the squared singular values that each layer is to keep
            (a float above 0 and not above 1), with as small a rank as that takes.
        adapter_name: which adapter.
        progressbar: show how far it is, where `tqdm` is installed.
        compile_kwargs: there is nothing to compile, so this changes nothing.

    Returns: config and state dict, whose keys begin as those of `model` do; and how near they are to the original.

    Raises: ConfigError for an adapter whose effect is no change of weights, AdapterNameError, NoAdapterError.

    Example:
        >>> import peftlite
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> _ = peftlite.inject(model, peftlite.LoHaConfig(r=2, target_modules=["0"], init_weights=False))
        >>> config, state_dict = converted = peftlite.convert_to_lora(model, rank=4)
        >>> config.r, sorted(state_dict), converted.relative_error < 1e-3
        (4, ['0.lora_A.weight', '0.lora_B.weight'], True)
    """
    limit, base = checked_rank(rank), base_model_of(model)
    config = config_of(model, adapter_name)
    if bias_of(config) != "none":
        raise ConfigError(
            f"Adapter `{adapter_name}` has `bias={bias_of(config)!r}`, which trains the base model's own biases: what "
            "it does is more than a LoRA can. Nothing was changed."
        )
    layers = own_layers(base, adapter_name)
    hosts = {path: layer.host for path, layer in layers.items()}
    made = {
        path: extracted(layer.host, change_of(layer, adapter_name), limit)
        for path, layer in tracked(list(layers.items()), progressbar)
    }
    lora = config_for(plain_of(config, inference_mode=False), base, hosts, made)
    tensors = kept_tensors(model, adapter_name) | factor_tensors(base, adapter_name, layers, made)
    prefix = key_prefix(model)
    approximation = Approximation.of({path: extract.part for path, extract in made.items()})
    named = {prefix + without_prefix(key): tensor for key, tensor in tensors.items()}
    return Converted(lora, named, approximation, record=record_of(model, adapter_name))


def supports_lora_conversion(model: nn.Module, adapter_name: str = "default") -> bool:
    """Whether `convert_to_lora` can make a LoRA of an adapter, as long as that needs no bias where LoRA has none.

    Raises: AdapterNameError, NoAdapterError.
    """
    config, base = config_of(model, adapter_name), base_model_of(model)
    plain = plain_of(config, inference_mode=False)
    return bias_of(config) == "none" and all(
        why_no_lora(layer, adapter_name) is None and variant_for(plain).check(layer.host, plain, path) is None
        for path, layer in own_layers(base, adapter_name).items()
    )


def config_of(model: nn.Module, name: str) -> PeftConfig:
    """The config of an adapter.

    Raises: AdapterNameError, NoAdapterError.
    """
    state = state_of(model)
    state.checked(name)
    return state.configs[name]


def own_layers(base: nn.Module, name: str) -> dict[str, AdapterLayer]:
    """The layers that have an adapter, by path, modules that come along aside."""
    return {path: layer for path, layer in adapted(base) if name in layer.variants and not is_companion(layer.tuner)}


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> Approximation:
    """Write what `convert_to_lora` makes to a directory; gives how near it is to the original.

    Raises: as `convert_to_lora`, and CheckpointError.
    """
    converted = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    converted.save_pretrained(path)
    return converted.approximation


def kept_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What is in an adapter's file beside the method's own tensors, by file key."""
    places = live_targets(model, name, state_of(model).configs[name]).places
    kept: dict[str, Tensor] = {}
    for key, tensor in adapter_tensors(model, name).items():
        place = places.get(key)
        whole = isinstance(place, LayerTarget) and is_companion(place.layer.tuner)
        if whole or isinstance(place, BaseTarget):
            kept[key] = tensor
    return kept


def factor_tensors(
    base: nn.Module, name: str, layers: Mapping[str, AdapterLayer], made: Mapping[str, Extract]
) -> dict[str, Tensor]:
    """LoRA's tensors by file key."""
    paths = {id(layer): path for path, layer in layers.items()}
    return {
        file_key(spot.path, suffix): tensor
        for spot in spots(base, name)
        if id(spot.module) in paths
        for suffix, tensor in made[paths[id(spot.module)]].tensors.items()
    }


# ---- from a model that was trained whole
def extract_lora(
    fine_tuned: nn.Module,
    base_model: nn.Module,
    rank: float,
    config: LoraConfig | None = None,
    progressbar: bool = False,
) -> Converted:
    """A LoRA adapter for `base_model` that makes `fine_tuned` of it, as well as its rank allows. Both stay as they are.

    Of each layer it is the truncated singular value decomposition of the difference of the weights; differences of
    biases are exact, with `lora_bias`. Layers that do not differ get no adapter.

    Args:
        fine_tuned: a model without adapters.
        base_model: the model that it was trained from.
        rank: as of `convert_to_lora`.
        config: says by its targets which layers, and by `modules_to_save` which modules are to be taken over whole; by
            default `LoraConfig(target_modules="all-linear")`. Its rank and variants have no effect.
        progressbar: show how far it is, where `tqdm` is installed.

    Returns: config and state dict; how near they are to the difference; in `left_out`, what else differs (also warned
    of).

    Raises: StateError for a model with adapters, ConfigError where the models are not of one architecture or nothing
        differs, and what `plan` raises.
    """
    limit = checked_rank(rank)
    for model in (fine_tuned, base_model):
        if find_state(model) is not None:
            raise StateError(
                f"{type(model).__name__} has adapters: call `unload` or `merge_and_unload` first. Nothing was changed."
            )
    template = plain_of(config if config is not None else LoraConfig(target_modules="all-linear"))
    planned = plan(base_model, template)
    sites = {site.path: site for site in planned.sites if site.tuner is LORA}
    hosts = {path: site.host for path, site in sites.items()}
    tuned = {path: host_in(fine_tuned, site) for path, site in sites.items()}
    made: dict[str, Extract] = {}
    for path, host in tracked(list(hosts.items()), progressbar):
        change = change_between(path, tuned[path], host)
        if change is not None:
            made[path] = extracted(host, change, limit)
    whole = {site.path for site in planned.sites if site.tuner is not LORA}
    left_out = unlike(fine_tuned, base_model, tuned.values(), whole)
    if not made:
        raise ConfigError(
            f"No layer that `target_modules` names differs between the two models; what differs is: "
            f"{shown_names(left_out) or 'nothing'}. Nothing was changed."
        )
    if left_out:
        warn(
            f"The models differ in more than the LoRA adapter holds: {shown_names(left_out)}. `modules_to_save` takes "
            "modules over whole."
        )
    lora = config_for(planned.config, base_model, {path: hosts[path] for path in made}, made)
    tensors: dict[str, Tensor] = {}
    narrowed = plan(base_model, lora)
    for spot in spots(base_model, "default", narrowed):
        if spot.site is not None:
            path = spot.site.path
            of_site = made[path].tensors if path in made else fine_tuned.get_submodule(path).state_dict()
            tensors.update((file_key(spot.path, suffix), tensor.detach()) for suffix, tensor in of_site.items())
    approximation = Approximation.of({path: extract.part for path, extract in made.items()})
    return Converted(lora, tensors, approximation, left_out, record_for(narrowed))


def host_in(model: nn.Module, site: Site) -> Host:
    """The host of a site's layer in another model of the same architecture.

    Raises: ConfigError if it has no such layer.
    """
    try:
        host = host_at(model.get_submodule(site.places[0].path), site.param)
        shape = host.shape if host is not None else None
    except AttributeError:
        host = shape = None
    if host is None or shape != site.host.shape:
        found = "no such layer" if shape is None else f"one of shape {shape}"
        raise ConfigError(
            f"`{site.path}` has shape {site.host.shape} in the base model, and the other model has {found}: they are "
            "not of one architecture. Nothing was changed."
        )
    return host


def change_between(path: str, tuned: Host, base: Host) -> Change | None:
    """What makes one layer of the other, or None where that is nothing.

    Raises: ConfigError for weights that are not finite.
    """
    change = difference(base, tuned.read(), base.read())
    if isinstance(base, (ParamHost, EmbeddingHost)):
        change = Change(change.weight)
    if not isinstance(change.weight, Tensor) or not bool(torch.isfinite(change.weight).all()):
        raise ConfigError(f"The weights of `{path}` are not all finite. Nothing was changed.")
    return change if change.bias is not None or bool(change.weight.any()) else None


def unlike(tuned: nn.Module, base: nn.Module, hosts: Collection[Host], whole: Collection[str]) -> tuple[str, ...]:
    """The names of tensors that differ and that neither these layers nor whole modules hold."""
    held = {id(host.parameter) for host in hosts}
    held |= {id(host.bias) for host in hosts if not isinstance(host, (ParamHost, EmbeddingHost))}
    inside = tuple(f"{path}." for path in whole)
    theirs = base.state_dict(keep_vars=True)
    return tuple(
        name
        for name, tensor in tuned.state_dict(keep_vars=True).items()
        if id(tensor) not in held and not name.startswith(inside) and not same(tensor, theirs.get(name))
    )


def same(one: Tensor, other: Any) -> bool:
    """Whether two tensors hold the same numbers."""
    if not isinstance(other, Tensor) or one.shape != other.shape:
        return False
    return torch.equal(one.detach(), other.detach().to(one))


def shown_names(names: Collection[str]) -> str:
    """Some names, for a message."""
    first = [f"`{name}`" for name, _ in zip(names, range(5), strict=False)]
    return ", ".join(first) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# ---- both
def config_for(plain: LoraConfig, model: nn.Module, hosts: Mapping[str, Host], made: dict[str, Extract]) -> LoraConfig:
    """The config of a LoRA adapter with these factors, of which, if any has a bias, all get one.

    Raises: ConfigError for layers that cannot have what they need.
    """
    if any(BIAS in extract.tensors for extract in made.values()):
        plain.lora_bias = True
        for path, extract in made.items():
            zeros = torch.zeros(hosts[path].shape[0])
            made[path] = replace(extract, tensors={BIAS: zeros, **extract.tensors})
    config = fitted(
        addressed(plain, model, list(made)), {path: (extract.part.rank, 1.0) for path, extract in made.items()}
    )
    for path, host in hosts.items():
        reason = variant_for(config).check(host, config, path)
        if reason is not None:
            raise ConfigError(f"`{path}` cannot have the LoRA that does the same: {reason}. Nothing was changed.")
    if LORA.resolve is not None:
        LORA.resolve(config, list(hosts.items()))
    return config


def tracked(items: list[T], progressbar: bool) -> Iterable[T]:
    """The items, with a progress bar if that is asked for."""
    if not progressbar:
        return items
    tqdm: Any = import_module("tqdm.auto")
    shown: Iterable[T] = tqdm.tqdm(items)
    return shown
