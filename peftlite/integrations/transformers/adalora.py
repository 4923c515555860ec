"""AdaLoRA in transformers' Trainer."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import TrainerCallback

from peftlite.core.lifecycle import state_of
from peftlite.errors import PeftliteWarning
from peftlite.tuners.adalora.allocation import training_adapter, update_and_allocate


class AdaLoraCallback(TrainerCallback):
    """Calls `update_and_allocate` after every optimizer step: `Trainer(..., callbacks=[AdaLoraCallback()])`."""

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any = None, **kwargs: Any) -> None:
        """Warn if the schedule is for another number of steps than the Trainer makes.

        Raises: StateError if the model has no AdaLoRA adapter that trains.
        """
        adapters = state_of(model)
        config: Any = adapters.configs[training_adapter(adapters)]
        if config.total_step != state.max_steps:
            warnings.warn(
                f"`total_step` of the AdaLoRA adapter is `{config.total_step}`, and this training has "
                f"`{state.max_steps}` steps: the last allocation of ranks is at step `{config.last_allocation}`.",
                PeftliteWarning,
                stacklevel=2,
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any = None, **kwargs: Any) -> None:
        """Measure importance and allocate ranks; the gradients of the step are still there."""
        update_and_allocate(model, state.global_step + 1)
