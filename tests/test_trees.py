"""Printed models: both trees of a user's report about Llama 3.2 (tests/data), and PEFT's print of the same model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

from peftlite import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model, wrap
from tests.versions import VERSION

DATA = Path(__file__).parent / "data"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FIELDS: dict[str, Any] = {"r": 16, "lora_dropout": 0.05, "target_modules": LINEARS, "task_type": "CAUSAL_LM"}

# Lines of the report that transformers itself prints otherwise today.
RENAMED = {
    "(self_attn): LlamaFlashAttention2(": "(self_attn): LlamaAttention(",
    **({"(act_fn): SiLU()": "(act_fn): SiLUActivation()"} if VERSION >= (5, 0) else {}),
}
GONE_FROM_ATTENTION = "(rotary_emb): LlamaRotaryEmbedding()"  # the model still has one, after its norm


def llama32() -> nn.Module:
    """Llama-3.2-1B on the meta device: shapes without memory."""
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


def as_printed_today(report: list[str]) -> Iterator[str]:
    previous = ""
    for line in report:
        if not (line == GONE_FROM_ATTENTION and not previous.startswith("(norm)")):
            yield RENAMED.get(line, line)
        previous = line


def lines(model: nn.Module) -> list[str]:
    return [line.strip() for line in str(model).splitlines()]


def report(name: str) -> list[str]:
    return (DATA / f"llama32-{name}.txt").read_text().splitlines()


def test_the_adjustment_for_todays_transformers_is_as_small_as_it_says() -> None:
    for name in ("in-place", "wrapped"):
        before, after = report(name), list(as_printed_today(report(name)))
        assert len(before) - len(after) == 1
        changed = [line for line in before if line in RENAMED]
        assert sorted(changed) == sorted(RENAMED)


def test_the_in_place_tree_is_the_one_reported() -> None:
    model: Any = llama32()
    model.add_adapter(LoraConfig(**FIELDS))
    expected = [*as_printed_today(report("in-place")), ")"]  # the report lacks its last parenthesis
    assert lines(model) == expected


def test_the_wrapped_tree_is_the_one_reported() -> None:
    assert lines(get_peft_model(llama32(), LoraConfig(**FIELDS))) == list(as_printed_today(report("wrapped")))


def test_trees_equal_pefts_to_the_last_space() -> None:
    theirs = peft.get_peft_model(llama32(), peft.LoraConfig(**FIELDS))
    ours = get_peft_model(llama32(), LoraConfig(**FIELDS))
    assert str(ours) == str(theirs)
    in_place = inject_adapter_in_model(LoraConfig(**FIELDS), llama32())
    assert str(in_place) == str(peft.inject_adapter_in_model(peft.LoraConfig(**FIELDS), llama32()))
    assert str(in_place) == str(ours.unwrap())
    assert str(wrap(in_place)) == str(ours)


class DummyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 10)
        self.linear = nn.Linear(10, 10)
        self.lm_head = nn.Linear(10, 10)

    def forward(self, input_ids: torch.Tensor) -> Any:
        x = self.embedding(input_ids)
        x = self.linear(x)
        x = self.lm_head(x)
        return x


INJECTED = """\
DummyModel(
  (embedding): Embedding(10, 10)
  (linear): lora.Linear(
    (base_layer): Linear(in_features=10, out_features=10, bias=True)
    (lora_dropout): ModuleDict(
      (default): Dropout(p=0.1, inplace=False)
    )
    (lora_A): ModuleDict(
      (default): Linear(in_features=10, out_features=64, bias=False)
    )
    (lora_B): ModuleDict(
      (default): Linear(in_features=64, out_features=10, bias=False)
    )
    (lora_embedding_A): ParameterDict()
    (lora_embedding_B): ParameterDict()
    (lora_magnitude_vector): ModuleDict()
  )
  (lm_head): Linear(in_features=10, out_features=10, bias=True)
)"""


def test_the_example_of_pefts_page_on_injection() -> None:
    lora_config = LoraConfig(
        lora_alpha=16,
        lora_dropout=0.1,
        r=64,
        bias="none",
        target_modules=["linear"],
    )
    model = DummyModel()
    model = inject_adapter_in_model(lora_config, model)
    dummy_inputs = torch.LongTensor([[0, 1, 2, 3, 4, 5, 6, 7]])
    dummy_outputs = model(dummy_inputs)
    assert dummy_outputs.shape == (1, 8, 10)
    assert str(model) == INJECTED
    theirs = peft.inject_adapter_in_model(
        peft.LoraConfig(lora_alpha=16, lora_dropout=0.1, r=64, bias="none", target_modules=["linear"]), DummyModel()
    )
    assert str(model) == str(theirs)
    assert list(model.state_dict()) == list(theirs.state_dict())
    peft_state_dict = get_peft_model_state_dict(model)
    assert sorted(peft_state_dict) == sorted(peft.get_peft_model_state_dict(theirs))
    assert sorted(peft_state_dict) == ["linear.lora_A.weight", "linear.lora_B.weight"]


@pytest.mark.parametrize("task", [None, *peft.TaskType])
def test_each_task_has_pefts_wrapper_class(task: Any) -> None:
    ours = get_peft_model(DummyModel(), LoraConfig(target_modules=["linear"], task_type=task))
    assert isinstance(ours, PeftModel)
    name = "PeftModel" if task is None else peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task].__name__
    assert type(ours).__name__ == name
