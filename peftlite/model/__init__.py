"""The outer wrapper `PeftModel`, its task classes, and the ways from a model to one and back."""

from peftlite.model.arrow import create_arrow_model
from peftlite.model.entry import get_peft_model, inject_adapter_in_model, wrap
from peftlite.model.tasks import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from peftlite.model.wrapper import PeftModel

__all__ = [
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "create_arrow_model",
    "get_peft_model",
    "inject_adapter_in_model",
    "wrap",
]
