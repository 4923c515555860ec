"""Classes of PEFT that libraries import and peftlite does not have: they exist, and cannot be made."""

from __future__ import annotations

from typing import Any

from peftlite.config import PeftConfig
from peftlite.errors import UnsupportedFeatureError


def _refuse(name: str) -> UnsupportedFeatureError:
    return UnsupportedFeatureError(
        f"`{name}` is a class of PEFT that peftlite does not have; it stands here for programs that import it without "
        "using it. Nothing was changed."
    )


class AbsentConfig(PeftConfig):
    """A config of a method that peftlite does not have."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise _refuse(type(self).__name__)


class PromptLearningConfig(AbsentConfig):
    """Base of the methods that learn a prompt."""


class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning."""


class PrefixTuningConfig(PromptLearningConfig):
    """Prefix tuning."""


class PromptEncoderConfig(PromptLearningConfig):
    """P-tuning."""


class AdaptionPromptConfig(AbsentConfig):
    """LLaMA-Adapter."""


class OFTConfig(AbsentConfig):
    """Orthogonal fine-tuning."""


class PeftMixedModel:
    """A wrapper for adapters of several kinds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise _refuse(type(self).__name__)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> PeftMixedModel:
        """Not there.

        Raises: UnsupportedFeatureError.
        """
        raise _refuse(cls.__name__)
