"""Trainer and pipelines on encoder-decoders, vision, audio and mixtures of experts: both shapes, and their files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments, pipeline

import peftlite
from tests.models import VOCAB, tiny
from tests.versions import VERSION

SHAPES = ["wrapped", "in place"]
Row = dict[str, Tensor]


def vit() -> Any:
    config = transformers.ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    return transformers.ViTForImageClassification(config)


def whisper() -> Any:
    config = transformers.WhisperConfig(
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=32,
        vocab_size=VOCAB,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        begin_suppress_tokens=None,
        suppress_tokens=None,
    )
    return transformers.WhisperForConditionalGeneration(config)


def wav2vec2() -> Any:
    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        conv_dim=(8,),
        conv_kernel=(10,),
        conv_stride=(5,),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=8,
        vocab_size=8,
        num_labels=3,
        apply_spec_augment=False,
    )
    return transformers.Wav2Vec2ForSequenceClassification(config)


@dataclass(frozen=True)
class Kind:
    """One model of a modality: how it is made, what it is trained on, and the adapter that it gets."""

    make: Callable[[], Any]
    row: Callable[[int], Row]
    config: dict[str, Any] = field(default_factory=dict)

    def base(self) -> Any:
        """The model without adapters; the same every time."""
        torch.manual_seed(0)
        return self.make().eval()

    def rows(self, count: int = 4) -> list[Row]:
        """What it is trained on."""
        torch.manual_seed(1)
        return [self.row(i) for i in range(count)]

    def adapted(self, shape: str) -> Any:
        """The model with a fresh adapter, in one of the shapes."""
        model = self.base()
        torch.manual_seed(2)
        config = peftlite.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], **self.config})
        if shape == "wrapped":
            return peftlite.get_peft_model(model, config)
        model.add_adapter(config)
        return model


def tokens(_: int) -> Tensor:
    return torch.randint(3, VOCAB, (6,))


EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
KINDS = {
    "t5": Kind(
        lambda: tiny("t5"),
        lambda i: {"input_ids": tokens(i), "labels": tokens(i)},
        {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"},
    ),
    "vit": Kind(
        vit,
        lambda i: {"pixel_values": torch.randn(3, 8, 8), "labels": torch.tensor(i % 3)},
        {"target_modules": r".*\.(query|q_proj)", "modules_to_save": ["classifier"]},
    ),
    "whisper": Kind(
        whisper,
        lambda i: {"input_features": torch.randn(8, 32), "labels": tokens(i)},
        {"task_type": "SEQ_2_SEQ_LM"},
    ),
    "wav2vec2": Kind(
        wav2vec2,
        lambda i: {"input_values": torch.randn(100), "labels": torch.tensor(i % 3)},
        {"modules_to_save": ["projector", "classifier"]},
    ),
    "mixtral": Kind(
        lambda: tiny("mixtral"),
        lambda i: dict.fromkeys(("input_ids", "labels"), tokens(i)),
        EXPERTS if VERSION >= (5, 0) else {"target_modules": ["q_proj", "w1", "w2", "w3"]},
    ),
}
SETTINGS: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
}


def outputs(model: nn.Module, rows: list[Row]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(**{key: torch.stack([row[key] for row in rows]) for key in rows[0]}).logits
    return found


@pytest.mark.parametrize("name", KINDS)
def test_it_trains_saves_and_loads(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    rows = kind.rows()
    plain, trained = outputs(kind.base(), rows), {}
    for shape in SHAPES:
        model = kind.adapted(shape)
        assert torch.equal(outputs(model, rows), plain)
        trainer = Trainer(model=model, args=TrainingArguments(str(tmp_path / "run"), **SETTINGS), train_dataset=rows)
        trainer.train()
        trained[shape] = outputs(model, rows)
        trainer.save_model(str(tmp_path / shape))
    assert torch.equal(*trained.values())
    assert not torch.allclose(trained["wrapped"], plain)
    one, two = ((tmp_path / shape / "adapter_model.safetensors").read_bytes() for shape in SHAPES)
    assert one == two
    wrapped = peftlite.PeftModel.from_pretrained(kind.base(), tmp_path / "in place")
    assert torch.equal(outputs(wrapped, rows), trained["wrapped"])
    place = kind.base()
    peftlite.load_adapter(place, tmp_path / "wrapped")
    assert torch.equal(outputs(place, rows), trained["wrapped"])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_predict_with_generate(name: str, shape: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    model, rows = kind.adapted(shape), kind.rows()
    args = Seq2SeqTrainingArguments(
        str(tmp_path), predict_with_generate=True, generation_max_length=8, generation_num_beams=2, **SETTINGS
    )
    trainer = Seq2SeqTrainer(model=model, args=args, train_dataset=rows)
    trainer.train()
    found = trainer.predict(rows[:2]).predictions
    key = next(key for key in rows[0] if key != "labels")
    merged = model.eval().merge_and_unload()
    expected = merged.generate(torch.stack([row[key] for row in rows[:2]]), max_length=8, num_beams=2)
    assert torch.equal(torch.from_numpy(found[:, : expected.shape[1]]), expected)


def image_processor() -> Any:
    size = {"height": 8, "width": 8}
    return transformers.ViTImageProcessor(size=size)


PIPELINES: dict[str, tuple[str, str, Callable[[], dict[str, Any]], Callable[[], Any]]] = {
    "vit": (
        "image-classification",
        "image_processor",
        image_processor,
        lambda: __import__("PIL.Image").Image.new("RGB", (8, 8), (200, 30, 90)),
    ),
    "wav2vec2": (
        "audio-classification",
        "feature_extractor",
        transformers.Wav2Vec2FeatureExtractor,
        lambda: torch.linspace(-1, 1, 100).sin().numpy(),
    ),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_of_both_shapes(name: str) -> None:
    task, argument, make, example = PIPELINES[name]
    answers = {}
    for shape in ["base", *SHAPES]:
        model = KINDS[name].base() if shape == "base" else KINDS[name].adapted(shape)
        if shape != "base":
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if "lora_B" in key:
                        parameter.fill_(0.5)
        classify = pipeline(task, model=model, **{argument: make()}, device="cpu")
        answers[shape] = {one["label"]: one["score"] for one in classify(example())}
    assert answers["wrapped"] == answers["in place"] != answers["base"]
