"""The tensors of an adapter's file alone, without a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftlite.checkpoint.adapters import Renamed
from peftlite.checkpoint.files import read_adapter
from peftlite.checkpoint.hub import HubOptions, resolve


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: str | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hub_options: Any,
) -> dict[str, Tensor]:
    """The tensors of an adapter's file, by their keys there.

    Args:
        model_id: a directory, or the id of a repository.
        device: where the tensors go; by default, to the accelerator, where there is one.
        key_mapping: regular expression -> replacement, for keys without `base_model.model.`; the first that is found
            in a key counts.
        **hub_options: subfolder, revision, token, cache_dir, local_files_only, force_download.

    Raises: AdapterFilesNotFoundError, CheckpointError for files that cannot be trusted.
    """
    place = infer_device() if device is None else device
    with read_adapter(resolve(model_id, HubOptions.from_kwargs(hub_options), config_file=False), config=False) as files:
        source = Renamed(files.tensors, key_mapping) if key_mapping else files.tensors
        return {key: source.read(key).to(place) for key in source.infos}


def infer_device() -> str:
    """The kind of accelerator there is, or "cpu"."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else found.type
