"""TRL's DPOTrainer, its reference by disabling the adapter and by a second one; RewardTrainer and GRPOTrainer."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, TaskType, get_peft_model
from small import llama, tokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer

CONFIG = LoraConfig(r=4, target_modules="all-linear")
PAIRS = Dataset.from_dict(
    {
        "prompt": [f"w{i} w{i + 1}" for i in range(8)],
        "chosen": [f" w{i + 3}" for i in range(8)],
        "rejected": [f" w{i + 9}" for i in range(8)],
    }
)


def common(directory: str) -> dict[str, Any]:
    return {
        "output_dir": directory,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "save_strategy": "no",
    }


def dpo(directory: str) -> None:
    args = DPOConfig(**common(directory), max_length=16)
    fresh = DPOTrainer(model=llama(), args=args, train_dataset=PAIRS, processing_class=tokenizer(), peft_config=CONFIG)
    assert fresh.ref_model is None
    assert list(fresh.model.peft_config) == ["default"]
    before = {name: p.clone() for name, p in fresh.model.named_parameters()}
    fresh.train()
    changed = {name for name, p in fresh.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all(".default." in name for name in changed)

    trained = get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    second = DPOTrainer(model=trained, args=args, train_dataset=PAIRS, processing_class=tokenizer())
    assert list(second.model.peft_config) == ["default", "ref"]
    assert second.model.active_adapters == ["default"]
    before = {name: p.clone() for name, p in second.model.named_parameters()}
    for name, parameter in before.items():
        if ".ref." in name:
            assert torch.equal(parameter, before[name.replace(".ref.", ".default.")])
    second.train()
    changed = {name for name, p in second.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all(".default." in name for name in changed)


def reward(directory: str) -> None:
    torch.manual_seed(0)
    base = llama().config
    base.num_labels = 1
    model = transformers.LlamaForSequenceClassification(base)
    data = PAIRS.remove_columns("prompt")
    config = LoraConfig(r=4, task_type=TaskType.SEQ_CLS, target_modules=["q_proj", "v_proj"])
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(**common(directory), max_length=16),
        train_dataset=data,
        processing_class=tokenizer(),
        peft_config=config,
    )
    head = [p for name, p in trainer.model.named_parameters() if "modules_to_save.default" in name]
    assert head
    before = head[0].clone()
    trainer.train()
    assert not torch.equal(head[0], before)


def grpo(directory: str) -> None:
    args = GRPOConfig(**common(directory), num_generations=2, max_completion_length=4, beta=0.1, temperature=1.0)
    trainer = GRPOTrainer(
        model=llama(),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=args,
        train_dataset=PAIRS.select_columns("prompt"),
        processing_class=tokenizer(),
        peft_config=CONFIG,
    )
    trainer.train()
    assert trainer.state.global_step == 2


for use in (dpo, reward, grpo):
    with tempfile.TemporaryDirectory() as scratch:
        use(scratch)
print("done")
