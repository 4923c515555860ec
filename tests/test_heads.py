"""The head of every task: copied, trained, saved and read again in both shapes, as PEFT does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import peftlite
from tests.adapters import randomised

TEXT = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
IMAGE = {**TEXT, "image_size": 8, "patch_size": 4, "num_channels": 3}
T5 = {
    "vocab_size": 48,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 16,
    "num_layers": 1,
    "num_heads": 2,
    "tie_word_embeddings": False,
}
TOKENS = torch.arange(4, 16).reshape(2, 6)
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)}


@dataclass(frozen=True)
class Row:
    """A class of transformers, the name of its config, the task, and the heads that must come along."""

    model: str
    config: str
    task: str | None
    heads: tuple[str, ...]
    target: str
    named: bool = False
    """Whether `modules_to_save` has to name the heads."""

    def base(self) -> Any:
        sizes = IMAGE if self.config == "ViTConfig" else T5 if self.config == "T5Config" else TEXT
        labels = 2 if self.task == "QUESTION_ANS" else 3
        torch.manual_seed(0)
        return getattr(transformers, self.model)(getattr(transformers, self.config)(num_labels=labels, **sizes)).eval()

    def adapter(self, library: Any, **fields: Any) -> Any:
        saved = {"modules_to_save": list(self.heads)} if self.named else {}
        targets = self.target if "|" in self.target else [self.target]
        return library.LoraConfig(r=2, target_modules=targets, task_type=self.task, **saved, **fields)

    def inputs(self) -> dict[str, Tensor]:
        if self.config == "ViTConfig":
            return PIXELS
        if self.config == "T5Config":
            return {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :3]}
        return {"input_ids": TOKENS[None] if self.model.endswith("MultipleChoice") else TOKENS}

    def out(self, model: Any) -> Tensor:
        output = model(**self.inputs())
        first = next(value for value in output.values() if torch.is_tensor(value))
        return first  # type: ignore[no-any-return]


ROWS = [
    Row("BertForSequenceClassification", "BertConfig", "SEQ_CLS", ("classifier",), "query"),
    Row("RobertaForSequenceClassification", "RobertaConfig", "SEQ_CLS", ("classifier",), "query"),
    Row("LlamaForSequenceClassification", "LlamaConfig", "SEQ_CLS", ("score",), "q_proj"),
    Row("BertForTokenClassification", "BertConfig", "TOKEN_CLS", ("classifier",), "query"),
    Row("LlamaForTokenClassification", "LlamaConfig", "TOKEN_CLS", ("score",), "q_proj"),
    Row("BertForQuestionAnswering", "BertConfig", "QUESTION_ANS", ("qa_outputs",), "query"),
    Row("BertForMultipleChoice", "BertConfig", "SEQ_CLS", ("classifier",), "query"),
    Row("ViTForImageClassification", "ViTConfig", None, ("classifier",), r".*\.(q_proj|query)", named=True),
    Row("T5ForConditionalGeneration", "T5Config", "SEQ_2_SEQ_LM", ("lm_head",), "q", named=True),
    Row("T5ForConditionalGeneration", "T5Config", "SEQ_2_SEQ_LM", (), "q"),
    Row("LlamaForCausalLM", "LlamaConfig", "CAUSAL_LM", (), "q_proj"),
]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.model}-{'-'.join(row.heads)}")
def test_heads_are_trained_saved_and_read_again(row: Row, bias: str, tmp_path: Path) -> None:
    ours = peftlite.get_peft_model(row.base(), row.adapter(peftlite, bias=bias))
    theirs = peft.get_peft_model(row.base(), row.adapter(peft, bias=bias))
    assert type(ours).__name__ == type(theirs).__name__
    assert repr(ours) == repr(theirs)
    trained = [{n for n, p in model.named_parameters() if p.requires_grad} for model in (ours, theirs)]
    assert trained[0] == trained[1]
    for head in row.heads:
        assert f"base_model.model.{head}.modules_to_save.default.weight" in trained[0] or len(trained[0]) > 4

    randomised(ours)
    theirs.load_state_dict(ours.state_dict())
    expected = row.out(ours)
    torch.testing.assert_close(expected, row.out(theirs))
    expected.square().sum().backward()
    for head in row.heads:
        copied = ours.base_model.model.get_submodule(head).modules_to_save["default"]
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in copied.parameters())

    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    mine, other = (load_file(tmp_path / whose / "adapter_model.safetensors") for whose in ("ours", "theirs"))
    assert {key.replace(".default.", ".") for key in other} == mine.keys()
    assert all(torch.equal(mine[key.replace(".default.", ".")], other[key]) for key in other)
    for whose in ("ours", "theirs"):
        inplace = row.base()
        peftlite.load_adapter(inplace, tmp_path / whose)
        for model in (inplace, peftlite.PeftModel.from_pretrained(row.base(), tmp_path / whose)):
            assert torch.equal(row.out(model), expected)
    torch.testing.assert_close(row.out(peft.PeftModel.from_pretrained(row.base(), tmp_path / "ours")), expected)
    peftlite.save_adapter(inplace, tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert again.keys() == mine.keys()
    assert all(torch.equal(again[key], mine[key]) for key in mine)


def test_what_reads_a_head_reads_the_one_in_use() -> None:
    row = ROWS[0]
    model = row.base()
    own = model.classifier.weight
    peftlite.inject(model, row.adapter(peftlite), "a")
    peftlite.inject(model, row.adapter(peftlite), "b")
    copies = {name: model.classifier.modules_to_save[name].weight for name in ("a", "b")}
    assert model.classifier.weight is copies["a"]
    with peftlite.use_adapter(model, "b"):
        assert model.classifier.weight is copies["b"]
    with peftlite.disable_adapter(model):
        assert model.classifier.weight is own
    with peftlite.use_adapter_per_row(model, ["a", "b"]):
        assert model.classifier.weight is own
    peftlite.set_adapter(model, "b")
    assert model.classifier.weight is copies["b"]


@pytest.mark.parametrize("kind", ["ModuleList", "ModuleDict", "ParameterList", "ParameterDict"])
def test_what_is_never_called_is_not_trained_whole(kind: str) -> None:
    model = ROWS[0].base()
    parts = [torch.nn.Parameter(torch.ones(2)) if "Parameter" in kind else torch.nn.Linear(2, 2)]
    model.extra = getattr(torch.nn, kind)({"a": parts[0]} if "Dict" in kind else parts)
    before = list(model.modules())
    config = peftlite.LoraConfig(target_modules=["query"], modules_to_save=["extra"])
    said = rf"`extra` \(a {kind} is not called itself.*other modules in `modules_to_save`\. Nothing was changed"
    with pytest.raises(peftlite.errors.UnsupportedLayerError, match=said):
        peftlite.inject(model, config)
    assert list(model.modules()) == before
