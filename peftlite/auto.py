"""`AutoPeftModel*`: an adapter and its base model from the adapter's directory or repository alone."""

from __future__ import annotations

import importlib
import os
from typing import Any, ClassVar

from peftlite.checkpoint.hub import HubOptions, has, resolve
from peftlite.config import PeftConfig, TaskType
from peftlite.errors import ConfigError
from peftlite.model import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)

BASE_CLASSES: dict[str, str] = {
    TaskType.CAUSAL_LM.value: "AutoModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM.value: "AutoModelForSeq2SeqLM",
    TaskType.SEQ_CLS.value: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS.value: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS.value: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION.value: "AutoModel",
}
"""Task -> the class of transformers that loads a base model for it."""

LIBRARY = "transformers"
"""The only library whose classes a config may name: a file says which code runs, and may be anybody's."""

_HUB = set(HubOptions._fields)


class AutoPeftModel:
    """Loads the base model that an adapter's config names, and the adapter into it."""

    task: ClassVar[TaskType | None] = None
    wrapper: ClassVar[type[PeftModel]] = PeftModel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(f"Call `{type(self).__name__}.from_pretrained(...)`: this class has no instances.")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base model, and then the adapter.

        Args:
            pretrained_model_name_or_path: the adapter's directory, or the id of its repository.
            adapter_name: what to call the adapter.
            is_trainable: whether it may train.
            config: in place of the one in the file.
            revision: of the adapter's repository; the base model's is in the config.
            **kwargs: subfolder, for the adapter; token, cache_dir, local_files_only and force_download, for both; all
                else goes to the base model's `from_pretrained`, such as `dtype` and `device_map`.

        Raises:
            ConfigError: the config names no base model, or another task.
            What `PeftModel.from_pretrained` raises.
        """
        hub = {key: kwargs.pop(key) for key in tuple(kwargs) if key in _HUB} | {"revision": revision}
        if config is None:
            place = resolve(pretrained_model_name_or_path, HubOptions.from_kwargs(hub))
            config = PeftConfig.from_pretrained(place)
        loader = cls._loader(config)
        shared = {key: value for key, value in hub.items() if key not in ("subfolder", "revision")}
        base = loader.from_pretrained(
            config.base_model_name_or_path, **{"revision": config.revision, **shared, **kwargs}
        )
        cls._fit_vocabulary(base, pretrained_model_name_or_path, hub)
        return cls.wrapper.from_pretrained(
            base, pretrained_model_name_or_path, adapter_name, is_trainable=is_trainable, config=config, **hub
        )

    @classmethod
    def _loader(cls, config: PeftConfig) -> Any:
        """The class that loads the base model.

        Raises: ConfigError.
        """
        name = type(config).__name__
        if config.base_model_name_or_path is None:
            raise ConfigError(
                f"The {name} has no `base_model_name_or_path`: load the base model yourself, and then the adapter with "
                "`PeftModel.from_pretrained`. Nothing was changed."
            )
        task = None if config.task_type is None else TaskType(config.task_type)
        if cls.task is not None and task is not None and task is not cls.task:
            raise ConfigError(
                f"`{cls.__name__}` is for `{cls.task.value}`, and the adapter has `task_type={task.value!r}`: call "
                "`AutoPeftModel.from_pretrained`. Nothing was changed."
            )
        transformers = importlib.import_module(LIBRARY)
        task = task or cls.task
        if task is not None:
            return getattr(transformers, BASE_CLASSES[task.value])
        return named_class(config.auto_mapping or {}, transformers, name)

    @staticmethod
    def _fit_vocabulary(base: Any, place: str | os.PathLike[str], hub: dict[str, Any]) -> None:
        """Give the base model as many embeddings as a tokenizer beside the adapter has tokens, if there is one."""
        options = HubOptions.from_kwargs(hub)
        if not has(place, "tokenizer_config.json", options):
            return
        tokenizers: Any = importlib.import_module(LIBRARY).AutoTokenizer
        given = {key: value for key, value in options._asdict().items() if value}
        tokens = len(tokenizers.from_pretrained(place, **given))
        if tokens > base.get_input_embeddings().num_embeddings:
            base.resize_token_embeddings(tokens)


def named_class(mapping: dict[str, Any], transformers: Any, config: str) -> Any:
    """The class of transformers that a config's `auto_mapping` names.

    Raises: ConfigError.
    """
    library, name = str(mapping.get("parent_library", "")), str(mapping.get("base_model_class", ""))
    found = getattr(transformers, name, None) if library.partition(".")[0] == LIBRARY and name else None
    if not isinstance(found, type) or getattr(found, "from_pretrained", None) is None:
        raise ConfigError(
            f"The {config} has no `task_type`, and its `auto_mapping` ({mapping!r}) names no class of `{LIBRARY}`: "
            "load the base model yourself, and then the adapter with `PeftModel.from_pretrained`. Nothing was changed."
        )
    return found


class AutoPeftModelForCausalLM(AutoPeftModel):
    """A causal language model with an adapter."""

    task = TaskType.CAUSAL_LM
    wrapper = PeftModelForCausalLM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """An encoder-decoder language model with an adapter."""

    task = TaskType.SEQ_2_SEQ_LM
    wrapper = PeftModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """A classifier of sequences with an adapter."""

    task = TaskType.SEQ_CLS
    wrapper = PeftModelForSequenceClassification


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """A classifier of tokens with an adapter."""

    task = TaskType.TOKEN_CLS
    wrapper = PeftModelForTokenClassification


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """A model that marks answers, with an adapter."""

    task = TaskType.QUESTION_ANS
    wrapper = PeftModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """A model whose hidden states are wanted, with an adapter."""

    task = TaskType.FEATURE_EXTRACTION
    wrapper = PeftModelForFeatureExtraction
