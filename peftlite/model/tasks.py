"""The wrapper class of each task: what its `forward` takes, so that trainers see which inputs a model has."""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any

from peftlite.config import TaskType
from peftlite.model.wrapper import PeftModel


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


class PeftModelForCausalLM(PeftModel, task=TaskType.CAUSAL_LM):
    """A causal language model with adapters."""

    forward = takes(*TEXT, "labels", *OUTPUTS)


class PeftModelForSeq2SeqLM(PeftModel, task=TaskType.SEQ_2_SEQ_LM):
    """An encoder-decoder language model with adapters."""

    forward = takes(*TEXT, "decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds", "labels", *OUTPUTS)


class PeftModelForSequenceClassification(PeftModel, task=TaskType.SEQ_CLS):
    """A classifier of sequences with adapters; its head is trained whole."""

    forward = takes(*TEXT, "labels", *OUTPUTS)


class PeftModelForTokenClassification(PeftModel, task=TaskType.TOKEN_CLS):
    """A classifier of tokens with adapters; its head is trained whole."""

    forward = takes(*TEXT, "labels", *OUTPUTS)


class PeftModelForQuestionAnswering(PeftModel, task=TaskType.QUESTION_ANS):
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


class PeftModelForFeatureExtraction(PeftModel, task=TaskType.FEATURE_EXTRACTION):
    """A model whose hidden states are wanted, with adapters."""

    forward = takes(*TEXT, *OUTPUTS)
