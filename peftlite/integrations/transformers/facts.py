"""What transformers knows of its models: name, type, output head, and where adapters usually go."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from peftlite.checkpoint.former import brought_up_to_date
from peftlite.config import PeftConfig, PeftType
from peftlite.core.facts import ModelFacts, register_model_facts
from peftlite.core.found import innermost
from peftlite.core.tree import places
from peftlite.defaults import default_feedforward, default_targets
from peftlite.errors import ConfigError
from peftlite.integrations.transformers.former import former_names
from peftlite.integrations.transformers.layers import stack_of
from peftlite.integrations.transformers.models import FIRST, vocabulary
from peftlite.integrations.transformers.unloaded import follow_weights


def model_facts(model: nn.Module) -> ModelFacts | None:
    """The facts of a transformers model; None for any other module."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return None
    model_type = getattr(model.config, "model_type", None) or None
    found = input_table(model), output_head(model)
    return ModelFacts(
        name_or_path=model.__dict__.get("name_or_path") or None,
        model_type=model_type,
        output_head=found[1],
        embeddings=tuple(layer for layer in found if layer is not None),
        input_table=None if found[0] is None else innermost(found[0]),
        vocab_size=vocabulary(model),
        first_vocab_size=model.__dict__.get(FIRST),
        default_targets=partial(fill_targets, model, model_type or type(model).__name__),
        stack=partial(stack_of, model),
        former=partial(former_names, model),
        unloaded=partial(follow_weights, model),
    )


def output_head(model: Any) -> nn.Module | None:
    """The layer that scores the vocabulary, which "all-linear" leaves out; None for models without one."""
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):  # how composite models say that they have none
        return None
    return head if isinstance(head, nn.Module) else None


def input_table(model: Any) -> nn.Module | None:
    """The layer that turns tokens into vectors; None for models without one."""
    try:
        table = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return table if isinstance(table, nn.Module) else None


def fill_targets(model: nn.Module, model_type: str, config: PeftConfig) -> None:
    """Set `config.target_modules`, and `feedforward_modules`, to what is usual for this type of model where None.

    Where they name layers that transformers has fused since, `target_parameters` is set too.

    Raises: ConfigError if there are no default targets, or they cannot be what they were.
    """
    values: Any = config
    if "feedforward_modules" in values.__dict__ and values.feedforward_modules is None:
        values.feedforward_modules = default_feedforward(model_type, config.peft_type or "")
    if values.target_modules is not None:
        brought_up_to_date(model, config)
        return
    if config.peft_type is PeftType.TRAINABLE_TOKENS:
        values.target_modules = path_of_inputs(model)
        return
    targets = default_targets(model_type, config.peft_type or "")
    if targets is None:
        raise ConfigError(
            f"`target_modules` is None, and there are no default targets for models of type `{model_type}`: name "
            "modules, for example `all-linear`. Nothing was changed."
        )
    values.target_modules = targets


def path_of_inputs(model: nn.Module) -> str | None:
    """The path of the table of inputs; None for models without one."""
    table = input_table(model)
    found = (place.path for place in places(model) if table is not None and place.module is table)
    return next(found, None)


register_model_facts("transformers", model_facts)
