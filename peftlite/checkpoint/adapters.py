"""Saving and loading adapters of any model, wrapped or not: the same files from both shapes, all of a file or none."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftlite.checkpoint.attention import metadata_of, warn_of_doubling
from peftlite.checkpoint.card import Card, write_card
from peftlite.checkpoint.convert import plain_lora, portable, resumed
from peftlite.checkpoint.files import read_adapter, write_adapter
from peftlite.checkpoint.former import as_now
from peftlite.checkpoint.forms import AsOnLayers
from peftlite.checkpoint.hub import resolve
from peftlite.checkpoint.keys import shown, with_prefix, without_prefix
from peftlite.checkpoint.record import Origin, Record, difference, read_record, record_for, record_of
from peftlite.checkpoint.report import LoadReport, Strict
from peftlite.checkpoint.spots import spots
from peftlite.checkpoint.state_dict import Staged, adapter_tensors, apply, bare, check_unmerged, stage
from peftlite.checkpoint.targets import Blueprint, Targets, live_targets
from peftlite.checkpoint.tensorfile import TensorInfo, TensorSource
from peftlite.config import HubOptions, PeftConfig, config_from_dict
from peftlite.core.facts import facts_of
from peftlite.core.inject import commit, plan
from peftlite.core.layer import AdapterLayer
from peftlite.core.lifecycle import set_requires_grad, state_of
from peftlite.core.plan import InjectionPlan
from peftlite.core.transaction import atomic
from peftlite.core.tree import base_model_of, find_state
from peftlite.core.variant import Placement, tuner_for
from peftlite.errors import CheckpointError, TargetNotFoundError

DEFAULT = "default"


# ---- saving


def save_adapter(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    *,
    selected_adapters: Collection[str] | None = None,
    save_embedding_layers: bool | str = "auto",
    is_main_process: bool = True,
    path_initial_model_for_weight_conversion: str | os.PathLike[str] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write adapters of `model` to a directory: `default` into it, others into sub-directories of their names.

    Each adapter is written at once, or not at all. The files are those of PEFT, and depend neither on the model's shape
    nor on what is active, merged or enabled.

    Args:
        model: a wrapper, or a model with adapters in place.
        save_directory: where to; made if needed.
        selected_adapters: which adapters; all by default.
        save_embedding_layers: whether the base model's embeddings are included. "auto": those with adapters on them, or
            all if their number of rows was changed.
        is_main_process: processes that say False write nothing.
        path_initial_model_for_weight_conversion: where the same adapter was saved before training. What training
            changed is written, as plain LoRA of twice the rank: for adapters that began with `pissa`, `olora`, ...
        state_dict: take the tensors from this state dict of `model`, gathered from shards.

    Raises: NoAdapterError, AdapterNameError, CheckpointError if the file system refuses, a tensor cannot be written, or
        the initial adapter is another one.
    """
    model = bare(model)
    state = state_of(model)
    names = state.checked(state.configs if selected_adapters is None else selected_adapters)
    files: dict[str, tuple[PeftConfig, dict[str, Tensor]]] = {}
    for name in names:
        config, tensors = saved_config(model, name), adapter_tensors(model, name, save_embedding_layers, state_dict)
        if path_initial_model_for_weight_conversion is None:
            files[name] = portable(model, name, config, tensors)
        else:
            with read_adapter(resolve(path_initial_model_for_weight_conversion)) as first:
                initial = {key: first.tensors.read(key) for key in first.tensors.infos}
            files[name] = plain_lora(config, tensors, initial)
    if not is_main_process:
        return
    place = Path(save_directory)
    for name, (config, tensors) in files.items():
        directory = place if name == DEFAULT else place / name
        made_on = record_of(model, name).fields()
        write_adapter(directory, config.to_json(), tensors, metadata_of(model, name), made_on)
    if files:
        write_card(place, card_of(model, next(iter(files.values()))[0]))


def saved_config(model: nn.Module, name: str) -> PeftConfig:
    """The config that goes into an adapter's file, whatever is true of it here and now."""
    base = base_model_of(model)
    config = state_of(model).configs[name].copy()
    config.inference_mode = True
    config.base_model_name_or_path = config.base_model_name_or_path or facts_of(base).name_or_path
    if config.task_type is None:
        kind = type(base)
        config.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return config


def card_of(model: nn.Module, config: PeftConfig) -> Card:
    """What the model card says of an adapter."""
    task = getattr(config.task_type, "value", config.task_type)
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    return Card(config.base_model_name_or_path, kind, task, facts_of(model).model_type is not None)


# ---- loading


@atomic
def load_adapter(
    model: nn.Module,
    id_or_dir: str | os.PathLike[str],
    adapter_name: str = DEFAULT,
    *,
    is_trainable: bool = False,
    config: PeftConfig | None = None,
    autocast_adapter_dtype: bool = True,
    low_cpu_mem_usage: bool = False,
    strict: Strict = True,
    torch_device: str | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    mmap: bool = False,
    hub: HubOptions | None = None,
    admit: Callable[[PeftConfig], object] | None = None,
) -> LoadReport:
    """Load an adapter from a directory or a hub repository into `model`, in place; all of it, or nothing.

    The model may be bare or have adapters. A new adapter becomes active if it is the first. If the model has an adapter
    of this name already, its tensors are overwritten in place.

    Args:
        model: any module, wrapped or not.
        id_or_dir: where the files are.
        adapter_name: what to call the adapter.
        is_trainable: whether the adapter may train, once it is active.
        config: in place of the one in the file.
        autocast_adapter_dtype: keep adapters in fp32 on a base in half precision.
        low_cpu_mem_usage: no tensor is made before it is loaded anyway, so this changes nothing.
        strict: False leaves out whatever does not fit, with a warning, and says in the report what that was; "shapes"
            accepts that tensors are missing or unexpected, and no more.
        torch_device: where the adapter's tensors go; by default, to the layers that they are for.
        key_mapping: regular expression -> replacement, for keys (without `base_model.model.`) of other libraries; the
            first that is found in a key counts.
        mmap: have the tensors of a new adapter lie in a private map of the file, whose pages all processes share until
            they write there; the file is never written to. What needs another dtype or device is copied, and so, with
            a warning, is what cannot be mapped. Saving replaces files and leaves maps alone (but Windows replaces no
            file that is mapped). A program that overwrites the file in place changes the weights, and one that cuts it
            off has the process killed (SIGBUS).
        hub: subfolder, revision, token, ...
        admit: is shown the config first, and raises if it is not to be loaded.

    Raises:
        AdapterFilesNotFoundError: there are no such files.
        CheckpointError: they cannot be trusted, or do not fit: tensors are missing, unexpected, of another shape or
            kind, or not finite.
        ConfigError, TargetNotFoundError, UnsupportedLayerError: the config cannot be used with this model.
        AdapterNameError, StateError: the name is not allowed; the adapter is merged.
    """
    model = bare(model)
    place = resolve(id_or_dir, hub, config_file=config is None)
    with read_adapter(place, config=config is None, mmap=mmap) as files:
        chosen = config_from_dict(files.config) if config is None else config.copy()
        if admit is not None:
            admit(chosen)
        chosen.inference_mode = not is_trainable
        source = Renamed(files.tensors, key_mapping) if key_mapping else files.tensors
        record = read_record(files.record, files.tensors.table)
        loader = Loader(model, adapter_name, chosen, source, f"The adapter in `{place}`", strict, record)
        state = find_state(model)
        if state is not None and adapter_name in state.configs:
            report = loader.overwrite(is_trainable)
        else:
            device = None if torch_device is None else torch.device(torch_device)
            report = loader.add(is_trainable, autocast_adapter_dtype, device)
        warn_of_doubling(model, adapter_name, files.metadata)
        return report


class Renamed:
    """A `TensorSource` whose keys are rewritten.

    Raises: CheckpointError if two keys become one.
    """

    def __init__(self, source: TensorSource, mapping: Mapping[str, str]) -> None:
        self._source = source
        self._old: dict[str, str] = {}
        for old in source.infos:
            new = _rewritten(old, mapping)
            if new in self._old:
                both = f"{shown(self._old[new])} and {shown(old)}"
                raise CheckpointError(f"`key_mapping` makes {shown(new)} of both {both}. Nothing was changed.")
            self._old[new] = old
        self.infos: Mapping[str, TensorInfo] = {new: source.infos[old] for new, old in self._old.items()}

    def read(self, key: str) -> Tensor:
        return self._source.read(self._old[key])

    def close(self) -> None:
        self._source.close()


def _rewritten(key: str, mapping: Mapping[str, str]) -> str:
    for pattern, replacement in mapping.items():
        plain, count = re.subn(pattern, replacement, without_prefix(key))
        if count:
            return with_prefix(plain)
    return key


class Loader:
    """One load: a model, the name and config of the adapter, and its tensors."""

    def __init__(
        self,
        model: nn.Module,
        name: str,
        config: PeftConfig,
        source: TensorSource,
        what: str,
        strict: Strict,
        record: Record | None = None,
    ) -> None:
        self.model, self.base = model, base_model_of(model)
        self.name, self.what, self.strict = name, what, strict
        self.config, self.source = as_now(self.base, config, source, what, strict)
        self.record = record if self.source is source else None  # else it is about layers of another make

    def add(self, trainable: bool, autocast: bool, device: torch.device | None) -> LoadReport:
        """Add the adapter with the file's tensors: everything is read and checked before the model is touched."""
        planned = self._plan(autocast)
        blueprint = Blueprint.of(planned, device)
        report, staged = self._stage(blueprint.targets(), self._origin(lambda: record_for(planned)))
        blueprint.fill((target, tensor) for target, tensor in staged if not target.of_base)
        commit(planned, blueprint.built(), trainable)
        apply((target, tensor) for target, tensor in staged if target.of_base)
        return report

    def _plan(self, autocast: bool) -> InjectionPlan:
        try:
            return plan(self.model, self.config, self.name, unmatched="warn", autocast_adapter_dtype=autocast)
        except TargetNotFoundError as error:
            here = self.record and difference(self.record, type(self.base).__name__, facts_of(self.base).vocab_size)
            if not here:
                raise
            raise TargetNotFoundError(f"{error} Likely cause: {here}.") from None

    def _origin(self, here: Callable[[], Record]) -> Origin | None:
        return None if self.record is None else Origin(self.record, here())

    def _stage(self, targets: Targets, origin: Origin | None) -> tuple[LoadReport, Staged]:
        report, staged = stage(targets, self.source, self.name, self.what, strict=self.strict, origin=origin)
        if origin is not None and report.fits:
            origin.warn_of_tokens()
        return report, staged

    def overwrite(self, trainable: bool) -> LoadReport:
        """Give the adapter of this name the file's tensors.

        Raises: CheckpointError if the file's config makes something else of the same tensors.
        """
        check_unmerged(self.model, self.name)
        own = state_of(self.model).configs[self.name]
        self.config, self.source = resumed(self.model, self.name, self.config, self.source)
        self._check_same(own)
        targets = live_targets(self.model, self.name, own)
        self.source = AsOnLayers(self.source, targets, self.config)
        report, staged = self._stage(targets, self._origin(lambda: record_of(self.model, self.name)))
        apply(staged)
        form = tuner_for(own).file_form
        if form is not None:
            form.adopt(state_of(self.model), self.name, self.config)
        if trainable:
            set_requires_grad(self.model, self.name, True)
        return report

    def _check_same(self, own: PeftConfig) -> None:
        for spot in spots(self.base, self.name):
            layer = spot.module
            if not isinstance(layer, AdapterLayer) or not layer.tuner.numbers:
                continue
            mine, theirs = (numbers_of(layer, config, spot.path) for config in (own, self.config))
            if own.peft_type != self.config.peft_type or mine != theirs:
                unlike = {key: (mine[key], theirs.get(key)) for key in mine if mine[key] != theirs.get(key)}
                raise CheckpointError(
                    f"{self.what} has other settings than adapter `{self.name}`, which the model has already; for "
                    f"`{spot.path}`, this one's and the file's: {json.dumps(unlike, default=str)}. Load it under "
                    "another name, or call `delete_adapter` first. Nothing was changed."
                )


def numbers_of(layer: AdapterLayer, config: PeftConfig, path: str) -> dict[str, Any]:
    """What a config makes of a layer's tensors: the variant, and numbers such as the scaling."""
    placement = Placement(config, path, torch.device("meta"), layer.host.dtype)
    variant = layer.tuner.variant_for(config)
    values = variant.init(layer.host, placement)
    return {"variant": type(variant).__name__, **{key: values.get(key) for key in layer.tuner.numbers}}
