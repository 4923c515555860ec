"""`model.save_pretrained`, `push_to_hub` and the rest of writing, for models with adapters in place.

transformers' own `save_pretrained` writes the one active adapter into the root, as it is while training, and drops what
is tied. Here the files are those of `save_adapter`, so of every adapter, and the same as the wrapper's.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from peftlite.checkpoint import hub
from peftlite.checkpoint.adapters import card_of, save_adapter
from peftlite.checkpoint.card import write_card
from peftlite.checkpoint.keys import without_prefix
from peftlite.checkpoint.state_dict import get_peft_model_state_dict
from peftlite.core.lifecycle import state_of
from peftlite.errors import NoAdapterError, UnsupportedFeatureError, warn

_FIXED = {"save_peft_format": True, "distributed_checkpoint": False, "safe_serialization": True}
"""Arguments of transformers that can only have one value where adapters are saved."""


def get_adapter_state_dict(
    model: nn.Module, adapter_name: str | None = None, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors of one adapter (default: the first active one), by keys relative to `model`.

    Raises: NoAdapterError, AdapterNameError.
    """
    name = adapter_name or first_active(model)
    tensors = get_peft_model_state_dict(model, state_dict, name)
    return {without_prefix(key): tensor for key, tensor in tensors.items()}


def first_active(model: nn.Module) -> str:
    """The first of the active adapters.

    Raises: NoAdapterError if none is.
    """
    state = state_of(model)
    if not state.active:
        raise NoAdapterError("No adapter is active: name one, or call `set_adapter` first. Nothing was changed.")
    return state.active[0]


def create_or_update_model_card(model: nn.Module, output_dir: str | os.PathLike[str]) -> None:
    """Write the adapters' card, or add what it lacks to the one that is there."""
    write_card(output_dir, card_of(model, next(iter(state_of(model).configs.values()))))


def save(model: Any, given: Mapping[str, Any]) -> None:
    """Save the adapters of a model whose `save_pretrained` was called with these arguments.

    Raises: UnsupportedFeatureError, CheckpointError.
    """
    extra = given.get("kwargs", {})
    for name, value in _FIXED.items():
        if given.get(name, extra.get(name, value)) is not value:
            raise UnsupportedFeatureError(
                f"`{name}={not value}`: a model with adapters is saved with `{name}={value}`; to save all of it, call "
                "`merge_and_unload` first. Nothing was changed."
            )
    directory, main = given["save_directory"], given.get("is_main_process", True)
    save_adapter(model, directory, is_main_process=main, state_dict=given.get("state_dict"))
    if main and model.can_generate():
        model.generation_config.save_pretrained(directory)
    if main and given.get("push_to_hub", False):
        options = {key: value for key, value in extra.items() if key not in _FIXED and key != "repo_id"}
        repo_id = extra.get("repo_id", os.path.basename(os.path.abspath(directory)))
        hub.push_to_hub(directory, repo_id, token=given.get("token"), **options)


def push(
    model: Any,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = None,
    tags: list[str] | None = None,
) -> str:
    """Save the adapters and upload them; they are never split, so `max_shard_size` has no effect."""
    if tags:
        warn("`tags` has no effect on the card of an adapter.")
    with tempfile.TemporaryDirectory() as directory:
        save_adapter(model, directory)
        return hub.push_to_hub(
            directory,
            repo_id,
            commit_message=commit_message,
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )
