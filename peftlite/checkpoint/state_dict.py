"""An adapter's tensors out of a model and into it, by the keys that files have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from peftlite.checkpoint import hub
from peftlite.checkpoint.files import read_json
from peftlite.checkpoint.forms import AsOnLayers, as_in_files
from peftlite.checkpoint.keys import PREFIX, file_key, nearest_keys, shown, unwrapped, without_prefix
from peftlite.checkpoint.record import Origin
from peftlite.checkpoint.report import LoadReport, Strict, Wanted, compare, settle
from peftlite.checkpoint.spots import Spot, base_in_files, is_whole, spots
from peftlite.checkpoint.targets import (
    BaseTarget,
    LayerTarget,
    SharedTarget,
    Target,
    Targets,
    live_targets,
    tables_of,
)
from peftlite.checkpoint.tensorfile import MemoryTensors, TensorSource, is_finite, read_each
from peftlite.core.facts import ModelFacts, facts_of
from peftlite.core.layer import AdapterLayer
from peftlite.core.lifecycle import state_of
from peftlite.core.state import bias_of
from peftlite.core.transaction import atomic
from peftlite.core.tree import Shell, base_model_of, is_bias
from peftlite.errors import CheckpointError, ConfigError, StateError, warn

TABLES = frozenset({"embed_tokens", "lm_head"})
"""Embeddings that are saved along when an adapter is on them, by name: what readers of PEFT's files expect."""


# ---- out of a model


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """An adapter's tensors, by keys without its name: a wrapper's begin with `base_model.model.`, a model's do not.

    Args:
        model: a wrapper, or a model with adapters in place.
        state_dict: take the values from this state dict of `model` (gathered from shards, say) and not from the model.
        adapter_name: which adapter.
        unwrap_compiled: names that `torch.compile` adds are never in the result, so this changes nothing.
        save_embedding_layers: whether the base model's embeddings are included. "auto": those with adapters on them,
            or all if their number of rows was changed.

    Raises: NoAdapterError, AdapterNameError, CheckpointError if `state_dict` lacks a tensor.
    """
    tensors = adapter_tensors(model, adapter_name, save_embedding_layers, state_dict)
    prefix = key_prefix(model)
    return {prefix + without_prefix(key) if key.startswith(PREFIX) else key: tensor for key, tensor in tensors.items()}


def key_prefix(model: nn.Module) -> str:
    """What the names of the base model's tensors begin with in `model.state_dict()`, other wrappers aside."""
    model = bare(model)
    if not isinstance(model, Shell):
        return ""
    inner = model.inner()
    name = next(name for name, child in model._modules.items() if child is inner)
    return f"{name}.{key_prefix(inner)}"


def bare(model: nn.Module) -> nn.Module:
    """`model` without the wrappers of data parallelism and torch.compile."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    inner = model.module if isinstance(model, parallel) else model._modules.get("_orig_mod")
    return model if inner is None else bare(inner)


def adapter_tensors(
    model: nn.Module,
    name: str,
    save_embedding_layers: bool | str = "auto",
    state_dict: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The tensors of an adapter's file, which are the same whether the model is wrapped or not.

    Raises: as `get_peft_model_state_dict`.
    """
    if save_embedding_layers not in (True, False, "auto"):
        raise ConfigError(
            f"`save_embedding_layers` is `{save_embedding_layers!r}`; it can be `True`, `False` or `'auto'`. "
            "Nothing was changed."
        )
    model = bare(model)
    state = state_of(model)
    state.checked(name)
    config, base = state.configs[name], base_model_of(model)
    walked, facts = list(spots(base, name)), facts_of(base)
    targets = live_targets(base, name, config, walked, facts)
    tables = saved_tables(base, walked, config, save_embedding_layers, facts)
    chosen: dict[str, Tensor] = {}
    for key, target in targets.places.items():
        if isinstance(target, LayerTarget | SharedTarget):
            chosen[key] = target.present if isinstance(target, LayerTarget) else target.tensor
        elif isinstance(target, BaseTarget) and (target.wanted.required or id(target.module) in tables):
            chosen[key] = target.own
    if bias_of(config) == "all":
        chosen.update(second_copies(walked, name))
    if state_dict is not None:
        chosen = taken_from(state_dict, model, chosen)
    return as_in_files({key: tensor.detach() for key, tensor in chosen.items()}, targets, state.memory.get(name))


def second_copies(walked: Iterable[Spot], name: str) -> Iterator[tuple[str, Tensor]]:
    """Biases of modules that are trained whole, once more: PEFT writes them so, and expects no key less."""
    for spot in walked:
        layer = spot.module
        if isinstance(layer, AdapterLayer) and is_whole(layer.tuner):
            for suffix, tensor in layer.tensors(name).items():
                if is_bias(suffix.rpartition(".")[2]):
                    yield file_key(f"{spot.path}.{layer.tuner.slots[0].name}", suffix), tensor


def saved_tables(
    base: nn.Module, walked: Iterable[Spot], config: Any, choice: bool | str, facts: ModelFacts
) -> set[int]:
    """The embeddings of the base model whose own tensors belong into the file, by id."""
    if choice is False:
        return set()
    known = tables_of(facts)
    tables = [spot for spot in walked if id(spot.module) in known]
    adapted = [spot for spot in tables if spot.adapted]
    if any(_name_of(spot) in TABLES for spot in adapted):
        return {id(spot.module) for spot in adapted}
    if choice is True and not tables:
        warn(f"`save_embedding_layers=True`: no embeddings are known of {type(base).__name__}, so none are saved.")
    changed = choice is True or resized(facts, state_of(base).vocab_size, config)
    return {id(spot.module) for spot in tables} if changed else set()


def _name_of(spot: Spot) -> str:
    slot = base_in_files(spot.around.tuner) if spot.around is not None else ""
    return spot.path.removesuffix(f".{slot}").rpartition(".")[2]


def resized(facts: ModelFacts, vocab_size: int | None, config: Any) -> bool:
    """Whether the model has another vocabulary than it began with, or had when it was given its first adapter, or than
    its files say, as far as those are on this machine. The hub is never asked.
    """
    if facts.vocab_size is None:
        return False
    return any(
        size not in (None, facts.vocab_size)
        for size in (facts.first_vocab_size, vocab_size, saved_vocab(facts, config))
    )


def saved_vocab(facts: ModelFacts, config: Any) -> int | None:
    """The size of the vocabulary in the base model's own files; None if they are not on this machine."""
    if not facts.name_or_path:
        return None
    saved = read_json(hub.local_file(facts.name_or_path, "config.json", config.revision))
    text = saved.get("text_config")
    size = saved.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    return size if isinstance(size, int) else None


def taken_from(state_dict: Mapping[str, Tensor], model: nn.Module, chosen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of `chosen` as a state dict of `model` has them.

    Raises: CheckpointError if it lacks any.
    """
    prefix = key_prefix(model)
    names: dict[int, str] = {}
    for tensors in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        names.update((id(tensor), name) for name, tensor in tensors)
    given = {unwrapped(name).removeprefix(prefix): tensor for name, tensor in state_dict.items()} | dict(state_dict)
    found: dict[str, Tensor] = {}
    for key, tensor in chosen.items():
        name = names.get(id(tensor), "")
        plain = unwrapped(name).removeprefix(prefix)
        if not name:  # the base layer's own bytes, kept while something is merged
            found[key] = tensor
        elif name in given or plain in given:
            found[key] = given[name] if name in given else given[plain]
        else:
            near = "".join(f"; nearest: {shown(k)}" for k in nearest_keys(name, given))
            raise CheckpointError(f"`state_dict` has no {shown(name)}{near}. Nothing was changed.")
    return found


# ---- into a model


@atomic
def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
    *,
    strict: Strict = True,
) -> LoadReport:
    """Give an adapter of `model` these tensors; all of them, or none if anything is wrong.

    Args:
        model: a wrapper, or a model with adapters in place.
        peft_model_state_dict: the tensors by key, all with the prefix `base_model.model.`, or all without.
        adapter_name: which adapter.
        ignore_mismatched_sizes: leave out tensors of another shape, with a warning.
        low_cpu_mem_usage: tensors without memory, of an adapter added with `low_cpu_mem_usage`, are replaced, and
            others written in place, so this changes nothing.
        strict: False leaves out whatever does not fit, with a warning; "shapes" accepts that tensors are missing or
            unexpected, and no more.

    Raises:
        CheckpointError: tensors are missing, unexpected, of another shape or kind, or not finite.
        NoAdapterError, AdapterNameError, StateError: there is no such adapter, or it is merged.
    """
    model = bare(model)
    state = state_of(model)
    state.checked(adapter_name)
    check_unmerged(model, adapter_name)
    targets = live_targets(model, adapter_name, state.configs[adapter_name])
    given = with_file_keys(peft_model_state_dict, key_prefix(model), targets)
    report, staged = stage(
        targets,
        AsOnLayers(MemoryTensors(given), targets, state.configs[adapter_name]),
        adapter_name,
        f"The state dict for {type(base_model_of(model)).__name__}",
        strict=strict,
        other_shapes=ignore_mismatched_sizes,
    )
    apply(staged)
    return report


def with_file_keys(tensors: Mapping[str, Tensor], prefix: str, targets: Targets) -> dict[str, Tensor]:
    """`tensors` by the keys of files, where those now are either these, or relative to a module with this prefix."""
    renamed = {
        key if key in targets.places else PREFIX + key.removeprefix(prefix): tensor for key, tensor in tensors.items()
    }
    forms = [dict(tensors), renamed] if prefix != PREFIX else [dict(tensors)]
    return max(forms, key=lambda form: len(form.keys() & targets.places.keys()))


def check_unmerged(model: nn.Module, name: str) -> None:
    """Refuse to change an adapter that is merged into the base weights.

    Raises: StateError.
    """
    for spot in spots(base_model_of(model), name):
        if isinstance(spot.module, AdapterLayer) and name in spot.module.merged_adapters:
            raise StateError(
                f"Adapter `{name}` is merged into the base weights: call `unmerge_adapter` before loading into it. "
                "Nothing was changed."
            )


Staged = list[tuple[Target, Tensor]]


def stage(
    targets: Targets,
    source: TensorSource,
    name: str,
    what: str,
    *,
    strict: Strict = True,
    other_shapes: bool = False,
    origin: Origin | None = None,
) -> tuple[LoadReport, Staged]:
    """Read what belongs into `targets`, after checking that all of it can be used; changes nothing.

    Shapes are compared before anything is read, so memory is bounded by what the model has a place for.

    Raises: CheckpointError if it does not fit and was not asked to be tolerated, StateError.
    """
    wanted = targets.wanted
    report = compare(wanted, source.infos, name, targets.slots, targets.ignored)
    if origin is not None:
        origin.add_to(report)
    if strict == "shapes" and other_shapes:
        strict = False
    if strict is True or (strict and report.has_wrong_sizes):
        settle(report, what, strict=strict, other_shapes=other_shapes)
    staged: Staged = []
    for key, tensor in read_for(source, report.loaded_keys, targets, wanted):
        target = targets.places[key]
        if not is_finite(tensor):
            report.not_finite_keys.append(key)
        target.check(tensor)
        staged.append((target, tensor))
    if strict is not True or report.not_finite_keys:
        settle(report, what, strict=strict)
    return report, staged


def read_for(
    source: TensorSource, keys: Iterable[str], targets: Targets, wanted: Mapping[str, Wanted]
) -> Iterator[tuple[str, Tensor]]:
    """These tensors, as they are to be put in their places. First those that need not be changed, which is no copy."""
    as_they_are: list[str] = []
    others: list[str] = []
    for key in keys:
        same = source.infos[key].dtype == wanted[key].dtype and targets.places[key].device.type == "cpu"
        (as_they_are if same else others).append(key)
    yield from read_each(source, as_they_are)
    for key in others:
        yield key, source.read(key).to(device=targets.places[key].device, dtype=wanted[key].dtype)


@atomic
def apply(staged: Iterable[tuple[Target, Tensor]]) -> None:
    """Put every tensor in its place."""
    for target, tensor in staged:
        target.put(tensor)
