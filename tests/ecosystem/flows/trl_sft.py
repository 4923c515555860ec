"""TRL's SFTTrainer with `peft_config`: train, checkpoint, resume, save, load."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from small import llama, tokenizer
from trl import SFTConfig, SFTTrainer

import peftlite

DATA = Dataset.from_dict({"text": [f"w{i} w{i + 1} w{i + 2}" for i in range(16)]})


def trainer(directory: str, steps: int) -> Any:
    args = SFTConfig(
        output_dir=directory,
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_length=16,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    return SFTTrainer(
        model=llama(),
        args=args,
        train_dataset=DATA,
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )


with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as parts:
    straight = trainer(whole, 4)
    assert isinstance(straight.model, peftlite.PeftModel)
    straight.train()
    trainer(parts, 2).train()
    saved = set(os.listdir(f"{parts}/checkpoint-2"))
    assert "adapter_model.safetensors" in saved
    assert "model.safetensors" not in saved
    resumed = trainer(parts, 4)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    expected = dict(straight.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    resumed.save_model(parts)
    loaded = PeftModel.from_pretrained(llama(), parts)
    tokens = torch.arange(4, 12)[None]
    assert torch.equal(loaded(tokens).logits, resumed.model.eval()(tokens).logits)
print("done")
