"""Which classes belong to which kind of adapter, and to which task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftlite.base_tuner import TUNER_MODELS, BaseTuner
from peftlite.config import PeftConfig, PeftType, config_class, config_from_dict
from peftlite.model import PeftModel
from peftlite.model.wrapper import TASK_MODELS

MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {task.value: cls for task, cls in TASK_MODELS.items()}
"""Task -> the class of a wrapper for it."""

PEFT_TYPE_TO_CONFIG_MAPPING: dict[PeftType, type[PeftConfig]] = {kind: config_class(kind) for kind in TUNER_MODELS}
"""Kind of adapter -> its config class."""

PEFT_TYPE_TO_TUNER_MAPPING: dict[PeftType, type[BaseTuner]] = TUNER_MODELS
"""Kind of adapter -> the class of the inner wrapper."""

PEFT_TYPE_TO_PREFIX_MAPPING: dict[PeftType, str] = {kind: cls.prefix for kind, cls in TUNER_MODELS.items()}
"""Kind of adapter -> what the names of its parameters begin with."""


def get_peft_config(config_dict: Mapping[str, Any]) -> PeftConfig:
    """The config that the values of an `adapter_config.json` describe.

    Raises: ConfigError for values that cannot be used, UnsupportedFeatureError for a method that is not there.

    Example:
        >>> get_peft_config({"peft_type": "LORA", "r": 4}).r
        4
    """
    return config_from_dict(config_dict)
