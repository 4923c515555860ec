"""What differs between the versions of transformers that the tests run with."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
NEW = hasattr(transformers.PreTrainedModel, "activation_checkpointing_enable")
CHECKPOINTING = "activation_checkpointing" if NEW else "gradient_checkpointing"

fused_experts = pytest.mark.skipif(VERSION < (5, 0), reason="experts were modules of their own before transformers 5")
PEFT_WORKS = VERSION >= (5, 4)
works_with_peft = pytest.mark.skipif(not PEFT_WORKS, reason="the tested `peft` and this transformers disagree")


def checkpointing(model: Any, options: dict[str, Any] | None = None) -> None:
    """Switch the recomputation of activations on."""
    getattr(model, f"{CHECKPOINTING}_enable")(options)


def is_checkpointing(model: Any) -> bool:
    """Whether activations are recomputed."""
    return bool(model.is_activation_checkpointing if NEW else model.is_gradient_checkpointing)
