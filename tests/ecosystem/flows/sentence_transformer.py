"""sentence-transformers: add_adapter, train, save, load."""

from __future__ import annotations

import os
import tempfile

import numpy as np
from datasets import Dataset
from peft import LoraConfig, TaskType
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
    models,
)
from small import bert, tokenizer

TEXTS = ["w1 w2", "w3"]

with tempfile.TemporaryDirectory() as base, tempfile.TemporaryDirectory() as out:
    bert().save_pretrained(base)
    tokenizer().save_pretrained(base)
    transformer = models.Transformer(base)
    model = SentenceTransformer(modules=[transformer, models.Pooling(16)], device="cpu")
    before = model.encode(TEXTS)
    model.add_adapter(LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, r=4, lora_alpha=8))
    assert model.active_adapters() == ["default"]
    assert np.array_equal(model.encode(TEXTS), before)
    data = Dataset.from_dict({"anchor": [f"w{i}" for i in range(8)], "positive": [f"w{i} w{i + 1}" for i in range(8)]})
    args = SentenceTransformerTrainingArguments(
        output_dir=out,
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    SentenceTransformerTrainer(
        model=model, args=args, train_dataset=data, loss=losses.MultipleNegativesRankingLoss(model)
    ).train()
    model.eval()
    trained = model.encode(TEXTS)
    assert not np.allclose(trained, before)
    model.disable_adapters()
    assert np.array_equal(model.encode(TEXTS), before)
    model.enable_adapters()
    model.save_pretrained(out)
    assert "adapter_model.safetensors" in os.listdir(out)
    assert "model.safetensors" not in os.listdir(out)
    assert np.array_equal(SentenceTransformer(out, device="cpu").encode(TEXTS), trained)
print("done")
