"""A transformers model without weights, from its checkpoint's config, and where its tensors are on disk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftlite.auto import BASE_CLASSES, named_class
from peftlite.checkpoint.files import read_json
from peftlite.checkpoint.keys import shown
from peftlite.checkpoint.tensorfile import TensorInfo
from peftlite.config import PeftConfig, TaskType
from peftlite.errors import CheckpointError, MergeError

CONFIG = "config.json"
META = torch.device("meta")


def empty_model(base: Path, adapter: PeftConfig) -> Any:
    """The model that `from_pretrained` would make of a checkpoint for an adapter, on the meta device.

    Raises: CheckpointError, MergeError, ConfigError for one that cannot be made.
    """
    import transformers

    if not (base / CONFIG).is_file():
        raise CheckpointError(f"`{base}` has no `{CONFIG}`: it is no checkpoint of a model. Nothing was changed.")
    raw = read_json(base / CONFIG)
    if raw.get("quantization_config"):
        raise MergeError(
            f"The checkpoint in `{base}` is quantised: load it, and merge with `merge_and_unload(dequantize=True)`. "
            "Nothing was changed."
        )
    config: Any = transformers.AutoConfig.from_pretrained(base, local_files_only=True)
    with META:
        if adapter.task_type is not None:
            auto: Any = getattr(transformers, BASE_CLASSES[TaskType(adapter.task_type).value])
            model: Any = auto.from_config(config)
        else:
            model = class_of(raw, adapter)._from_config(config)
    model.eval().tie_weights()
    return model


def class_of(raw: Mapping[str, Any], adapter: PeftConfig) -> Any:
    """The class that an adapter without a task was made for, or else the one that the checkpoint names."""
    import transformers

    if adapter.auto_mapping:
        return named_class(adapter.auto_mapping, transformers, type(adapter).__name__)
    mapping = {"parent_library": "transformers", "base_model_class": next(iter(raw.get("architectures") or [""]))}
    return named_class(mapping, transformers, type(adapter).__name__)


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What the model's state dict has, as it is, and under every name that it has."""
    return dict(model.state_dict(keep_vars=True))


def names_in(model: Any, keys: Iterable[str]) -> tuple[dict[str, str], set[str]]:
    """(key of the checkpoint -> name in the model, for tensors that are the same in both; names made of several)."""
    tensors = own_tensors(model)
    rename = renamer(model, tensors)
    same: dict[str, str] = {}
    made: set[str] = set()
    for key in keys:
        name, converted = rename(key)
        if name not in tensors and key in tensors:
            name, converted = key, False
        if converted:
            made.add(name)
        elif name in tensors:
            same[key] = name
    return same, made


def renamer(model: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Key -> (name in the model, whether several tensors of the checkpoint are put together there)."""
    prefix = model.base_model_prefix
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # transformers 4
        return lambda key: (fitted(key, prefix, tensors), False)
    mapping: Any = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]

    def rename(key: str) -> tuple[str, bool]:
        name, pattern = rename_source_key(key, renamings, converters, prefix, dict(tensors))
        return name, pattern is not None

    return rename


def fitted(key: str, prefix: str, tensors: Mapping[str, Tensor]) -> str:
    """A key with or without the prefix of the base model, whichever the model has."""
    if prefix and key.startswith(f"{prefix}.") and key.removeprefix(f"{prefix}.") in tensors:
        return key.removeprefix(f"{prefix}.")
    return f"{prefix}.{key}" if prefix and f"{prefix}.{key}" in tensors else key


def take_dtypes(model: nn.Module, names: Mapping[str, str], infos: Mapping[str, TensorInfo]) -> None:
    """Give the model's tensors the dtypes that they have on disk.

    Raises: CheckpointError if shapes differ.
    """
    tensors = own_tensors(model)
    for key, name in names.items():
        info, tensor = infos[key], tensors[name]
        if tuple(tensor.shape) != info.shape:
            raise CheckpointError(
                f"{shown(key)} has the shape {info.shape}, and the model that `{CONFIG}` describes wants "
                f"{tuple(tensor.shape)}. Nothing was changed."
            )
        tensor.data = torch.empty(info.shape, dtype=info.dtype, device=META)


# ---- the config of what was merged
def tie_flags(config: Any) -> dict[tuple[str, ...], bool]:
    """Where a config, and those inside it, say whether embeddings are tied."""
    found: dict[tuple[str, ...], bool] = {(): bool(getattr(config, "tie_word_embeddings", False))}
    for name in getattr(config, "sub_configs", {}) or {}:
        inner = getattr(config, name, None)
        if inner is not None:
            found.update(((name, *path), flag) for path, flag in tie_flags(inner).items())
    return found


def write_config(base: Path, out: Path, model: Any, before: Mapping[tuple[str, ...], bool]) -> None:
    """The checkpoint's config, with what merging changed: what is tied, and the class of the model."""
    raw = json.loads((base / CONFIG).read_text("utf-8"))
    changed = False
    for path, flag in tie_flags(model.config).items():
        if flag is not before[path]:
            place = raw
            for name in path:
                place = place.setdefault(name, {})
            place["tie_word_embeddings"], changed = flag, True
    if type(model).__name__ not in (raw.get("architectures") or ()):
        raw["architectures"], changed = [type(model).__name__], True
    if changed:
        (out / CONFIG).write_text(json.dumps(raw, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
    else:
        (out / CONFIG).write_bytes((base / CONFIG).read_bytes())
