"""transformers' Trainer, with peftlite's models in both shapes: it saves adapters, and loads them back.

What is changed there, and why:

    trainer_utils._is_peft_model, trainer._is_peft_model    our `PeftModel` counts, so that the model in it is inspected
    trainer.PeftModel, trainer.is_peft_available            our `PeftModel` is saved by its own `save_pretrained`
    Trainer._load_from_checkpoint, ._load_best_model        adapters of both shapes are found and loaded; transformers
                                                            looks for a whole model where the shape is in place
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from peftlite.checkpoint.adapters import DEFAULT, load_adapter
from peftlite.checkpoint.hub import resolve
from peftlite.core.tree import find_state
from peftlite.errors import AdapterFilesNotFoundError, CheckpointError
from peftlite.model import PeftModel

IS_PEFT_MODEL = "_is_peft_model"
_ours: set[Callable[..., Any]] = set()


def patch(module: ModuleType) -> None:
    """Make `transformers.trainer_utils` or `transformers.trainer` know our models; once per function."""
    names = vars(module)
    if IS_PEFT_MODEL in names and names[IS_PEFT_MODEL] not in _ours:
        _replace(names[IS_PEFT_MODEL], _or_ours(names[IS_PEFT_MODEL]))
    if "Trainer" in names and names["Trainer"]._load_from_checkpoint not in _ours:
        _patch_trainer(module)


def _patch_trainer(trainer: Any) -> None:
    trainer.PeftModel = (vars(trainer).get("PeftModel", ()), PeftModel)  # for `isinstance` only
    trainer.is_peft_available = _always
    cls = trainer.Trainer
    cls._load_from_checkpoint = _restoring_checkpoint(cls._load_from_checkpoint)
    cls._load_best_model = _restoring_best(cls._load_best_model)


def _always() -> bool:
    """There is a PeftModel to test for: ours at least."""
    return True


def _or_ours(original: Callable[[Any], bool]) -> Callable[[Any], bool]:
    @functools.wraps(original)
    def is_peft_model(model: Any) -> bool:
        if isinstance(model, PeftModel):
            return True
        from transformers.utils.import_utils import is_peft_available

        return is_peft_available() and original(model)  # older versions take names of `peft` for granted: see `_always`

    _ours.add(is_peft_model)
    return is_peft_model


def _replace(original: Callable[..., Any], ours: Callable[..., Any]) -> None:
    """Put `ours` in the place of `original`, also where transformers imported it by name before."""
    for name, module in tuple(sys.modules.items()):
        if name.partition(".")[0] == "transformers" and vars(module).get(original.__name__) is original:
            setattr(module, original.__name__, ours)


# ---- loading
def _restoring_checkpoint(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def load(self: Any, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not restore(self, self.model if model is None else model, resume_from_checkpoint):
            original(self, resume_from_checkpoint, model)

    _ours.add(load)
    return load


def _restoring_best(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def load(self: Any) -> None:
        if not restore(self, self.model, self.state.best_model_checkpoint):
            original(self)

    return load


def restore(trainer: Any, model: nn.Module, directory: str | None) -> bool:
    """Give the adapters of `model` the tensors that a checkpoint has of them; False where that is not for us.

    Tensors are written in place, and which adapters are active and may train stays as it is.

    Raises: CheckpointError for one that does not fit, or lacks an active adapter.
    """
    state = find_state(model)
    if state is None or directory is None or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return False
    homes = {name: home_of(directory, name) for name in state.configs}
    if not any(homes.values()):
        return False
    for name in state.active:
        if homes[name] is None:
            raise CheckpointError(
                f"The checkpoint `{directory}` has no adapter `{name}`, which is active; it has "
                f"{', '.join(f'`{n}`' for n, home in homes.items() if home)}. Nothing was changed."
            )
    for name, home in homes.items():
        if home is not None:
            load_adapter(model, home, name)
    return True


def home_of(directory: str, name: str) -> Path | None:
    """Where in a checkpoint an adapter's files are, as `save_adapter` places them; None if they are not there."""
    try:
        return resolve(Path(directory) if name == DEFAULT else Path(directory) / name)
    except AdapterFilesNotFoundError:
        return None
