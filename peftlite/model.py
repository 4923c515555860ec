"""The outer wrapper: `PeftModel`, its task classes, and the ways from a model to one and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import Parameter, Signature
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from peftlite.base_tuner import BaseTuner, Wrapper, check_bare, tuner_model_for
from peftlite.checkpoint.keys import shown, without_prefix
from peftlite.config import PeftConfig, PeftType, TaskType
from peftlite.core import lifecycle, status
from peftlite.core.inject import check_config, inject
from peftlite.core.targets import UnmatchedPolicy
from peftlite.core.tree import base_model_of, layers
from peftlite.core.variant import tuner_for
from peftlite.errors import CheckpointError, ConfigError, StateError, UnsupportedFeatureError

M = TypeVar("M", bound=nn.Module)


class PeftModel(Wrapper):
    """A model with adapters: `base_model` is the tuner's wrapper (`LoraModel`), `base_model.model` the model itself.

    Args:
        model: the base model, changed in place.
        peft_config: what to add.
        adapter_name: the adapter's name.
        autocast_adapter_dtype: keep adapters in fp32 on a base in half precision.
        low_cpu_mem_usage: make the adapter's tensors on the meta device, to be loaded.
        unmatched: what to do about entries of the config that match nothing: "error", "warn" or "ignore".

    Raises: StateError if `model` has adapters, and what `peftlite.plan` raises; the model is then as it was.
    """

    inside = "base_model"
    base_model: BaseTuner

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        *,
        unmatched: UnmatchedPolicy = "error",
    ) -> None:
        super().__init__()
        check_bare(model)
        inject(
            model,
            peft_config,
            adapter_name,
            low_cpu_mem_usage=low_cpu_mem_usage,
            autocast_adapter_dtype=autocast_adapter_dtype,
            unmatched=unmatched,
        )
        self.base_model = tuner_model_for(peft_config).around(model)
        prepare_for_gradient_checkpointing(model)

    @classmethod
    def around(cls, model: nn.Module) -> PeftModel:
        """The wrapper of a model that has its adapters already; see `peftlite.wrap`."""
        wrapper = cls.__new__(cls)
        nn.Module.__init__(wrapper)
        config = next(iter(lifecycle.state_of(model).configs.values()))
        inside = base_model_of(model)
        wrapper.base_model = model if isinstance(model, BaseTuner) else tuner_model_for(config).around(inside)
        prepare_for_gradient_checkpointing(inside)
        return wrapper

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base model does with these arguments and the active adapters, or with one for each row.

        `adapter_names` has the name of an adapter for each row of the batch; `"__base__"` stands for the base model.
        """
        with self._rows(kwargs.pop("adapter_names", None)):
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate`, with the active adapters, or with `adapter_names`, one for each row."""
        with self._rows(kwargs.pop("adapter_names", None)):
            return self.get_base_model().generate(*args, **kwargs)  # type: ignore[operator]

    def _rows(self, names: Sequence[str] | None) -> AbstractContextManager[object]:
        return nullcontext() if names is None else lifecycle.use_adapter_per_row(self, names)

    # ---- what there is
    @property
    def active_adapter(self) -> str | None:
        """The first of the adapters in use."""
        return next(iter(self.active_adapters), None)

    @property
    def active_peft_config(self) -> PeftConfig:
        """The config of the first adapter in use."""
        name = self.active_adapter
        if name is None:
            raise StateError("No adapter is active: call `set_adapter` first.")
        return self.peft_config[name]

    @property
    def peft_type(self) -> PeftType:
        """The kind of all its adapters."""
        return self.base_model.kind

    @property
    def modules_to_save(self) -> set[str] | None:
        """The names of the modules that any adapter trains whole."""
        return {
            name for config in self.peft_config.values() for name in getattr(config, "modules_to_save", None) or ()
        } or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The dtype that the base model says it has."""
        return getattr(self.get_base_model(), "dtype", None)

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether a call made here and now would use any adapter."""
        return any(enabled and active for enabled, active in map(status.in_use, layers(self)))

    def get_base_model(self) -> nn.Module:
        """The model inside the wrappers. It has its adapters: `unwrap` is the same, `unload` takes them out."""
        return base_model_of(self)

    def unwrap(self) -> nn.Module:
        """The model with its adapters in place, without wrappers; nothing is copied. `peftlite.wrap` undoes it."""
        return base_model_of(self)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(parameters that require gradients, all parameters)."""
        return status.count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, of how many."""
        status.print_trainable_parameters(self)

    def get_layer_status(self) -> list[status.TunerLayerStatus]:
        """One report for each adapter layer."""
        return status.get_layer_status(self)

    def get_model_status(self) -> status.TunerModelStatus:
        """One report for the whole model."""
        return status.get_model_status(self)

    # ---- more adapters
    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        *,
        unmatched: UnmatchedPolicy = "error",
    ) -> None:
        """Add another adapter of the same kind; `set_adapter` makes it the active one.

        Raises: ConfigError for one of another kind, and what `peftlite.plan` raises; nothing is changed then.
        """
        check_config(peft_config)
        self._check_kind(peft_config)
        inject(
            self,
            peft_config,
            adapter_name,
            low_cpu_mem_usage=low_cpu_mem_usage,
            autocast_adapter_dtype=autocast_adapter_dtype,
            unmatched=unmatched,
        )

    def _check_kind(self, config: PeftConfig) -> None:
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind != self.peft_type.value:
            raise ConfigError(
                f"`peft_type={kind!r}`: this {type(self).__name__} has adapters of the kind "
                f"`{self.peft_type.value}`, and all of one model are of one kind. Nothing was changed."
            )


def takes(*names: str) -> Callable[..., Any]:
    """`PeftModel.forward` with these parameters, in this order, so that trainers see what the model takes."""

    def forward(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        if len(args) > len(names):
            raise TypeError(
                f"{type(self).__name__} takes {len(names)} positional arguments, not {len(args)}: name them."
            )
        given = {name: value for name, value in zip(names, args, strict=False) if value is not None}
        return PeftModel.forward(self, **given, **kwargs)

    named = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=None) for name in names]
    this, rest = Parameter("self", Parameter.POSITIONAL_ONLY), Parameter("kwargs", Parameter.VAR_KEYWORD)
    forward.__signature__ = Signature([this, *named, rest])  # type: ignore[attr-defined]
    return forward


OUTPUTS = ("output_attentions", "output_hidden_states", "return_dict")
TEXT = ("input_ids", "attention_mask", "inputs_embeds")


class PeftModelForCausalLM(PeftModel):
    """A causal language model with adapters."""

    forward = takes(*TEXT, "labels", *OUTPUTS)


class PeftModelForSeq2SeqLM(PeftModel):
    """An encoder-decoder language model with adapters."""

    forward = takes(*TEXT, "decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds", "labels", *OUTPUTS)


class PeftModelForSequenceClassification(PeftModel):
    """A classifier of sequences with adapters; its head is trained whole."""

    forward = takes(*TEXT, "labels", *OUTPUTS)


class PeftModelForTokenClassification(PeftModel):
    """A classifier of tokens with adapters; its head is trained whole."""

    forward = takes(*TEXT, "labels", *OUTPUTS)


class PeftModelForQuestionAnswering(PeftModel):
    """A model that marks answers, with adapters; its head is trained whole."""

    forward = takes(
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "position_ids",
        "inputs_embeds",
        "start_positions",
        "end_positions",
        *OUTPUTS,
    )


class PeftModelForFeatureExtraction(PeftModel):
    """A model whose hidden states are wanted, with adapters."""

    forward = takes(*TEXT, *OUTPUTS)


TASK_MODELS: dict[TaskType, type[PeftModel]] = {
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}


def model_class_for(config: PeftConfig) -> type[PeftModel]:
    """The wrapper class for a config's task; `PeftModel` without one."""
    return PeftModel if config.task_type is None else TASK_MODELS[TaskType(config.task_type)]


# ---- from a model to a wrapper
def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
    *,
    unmatched: UnmatchedPolicy = "error",
) -> PeftModel:
    """Add an adapter to `model`, in place, and wrap it in the class that belongs to the config's task.

    The config is copied; `revision`, of the base model, goes into the copy. `unmatched="warn"` or `"ignore"` accepts
    entries of the config that match nothing, of a list shared between models.

    Raises:
        StateError: `model` is a wrapper or has adapters.
        AdapterNameError, ConfigError, TargetNotFoundError, UnsupportedLayerError: as `peftlite.plan`; the model is
            then as it was.
    """
    if mixed:
        raise UnsupportedFeatureError("`mixed` is `True`; it can only be `False`. Nothing was changed.")
    check_config(peft_config)
    if revision is not None:
        peft_config = peft_config.copy()
        peft_config.revision = revision
    return model_class_for(peft_config)(
        model,
        peft_config,
        adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
        unmatched=unmatched,
    )


def wrap(model: nn.Module) -> PeftModel:
    """The wrapper of a model that has adapters in place: nothing is copied; `PeftModel.unwrap` is the way back.

    A model that is wrapped is given back as it is.

    Raises: NoAdapterError, StateError if its adapters are of several kinds.
    """
    if isinstance(model, PeftModel):
        return model
    configs = lifecycle.state_of(model).configs
    kinds = sorted({str(getattr(config.peft_type, "value", config.peft_type)) for config in configs.values()})
    if len(kinds) > 1:
        raise StateError(
            f"A wrapper is for adapters of one kind, and this model has {', '.join(f'`{kind}`' for kind in kinds)}. "
            "Nothing was changed."
        )
    return model_class_for(next(iter(configs.values()))).around(model)


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: M,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
    *,
    unmatched: UnmatchedPolicy = "error",
) -> M:
    """Add an adapter to any torch module, in place, make it the active one, and give the module back.

    `state_dict`, an adapter's weights, says by its keys which modules get one, in place of the config's
    `target_modules`; it is not loaded.

    Raises: what `peftlite.plan` raises; the model is then as it was.
    """
    config = peft_config if state_dict is None else targets_from(state_dict, peft_config)
    inject(model, config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, unmatched=unmatched)
    if lifecycle.active_adapters(model) != [adapter_name]:
        lifecycle.set_adapter(model, adapter_name)
    return model


def targets_from(state_dict: Mapping[str, Tensor], config: PeftConfig) -> PeftConfig:
    """A copy of `config` that targets the modules which have weights in `state_dict`, by their whole paths.

    Raises: CheckpointError if there are none.
    """
    slots = {slot.name for slot in tuner_for(config).slots}
    paths = set()
    for key in state_dict:
        parts = without_prefix(key).split(".")
        at = next((i for i, part in enumerate(parts) if part in slots), 0)
        if at:
            paths.add(".".join(parts[:at]))
    if not paths:
        raise CheckpointError(
            f"`state_dict` has no weights of a `{tuner_for(config).peft_type}` adapter; its keys are "
            f"{', '.join(map(shown, list(state_dict)[:3])) or 'none'}. Nothing was changed."
        )
    selecting: dict[str, Any] = {"target_modules": sorted(paths), "exclude_modules": None, "layers_to_transform": None}
    has = {field.name for field in dataclasses.fields(config)}
    return dataclasses.replace(config.copy(), **{name: v for name, v in selecting.items() if name in has})


def prepare_for_gradient_checkpointing(model: nn.Module) -> None:
    """Under gradient checkpointing, have the embeddings' output require gradients: no layer would get any otherwise."""
    checkpointing = getattr(model, "is_activation_checkpointing", None)  # in older versions `is_gradient_checkpointing`
    if not (getattr(model, "is_gradient_checkpointing", False) if checkpointing is None else checkpointing):
        return
    if (enable := getattr(model, "enable_input_require_grads", None)) is not None:
        enable()
    elif (embeddings := getattr(model, "get_input_embeddings", None)) is not None:
        embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))
