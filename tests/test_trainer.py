"""transformers' Trainer with adapters in both shapes: it trains and saves them alone, and resumes where it stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import peftlite
from tests.models import batch, tiny
from tests.versions import CHECKPOINTING

SHAPES = ["wrapped", "in-place"]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def model_with_adapter(shape: str, adapter_name: str = "default") -> Any:
    """A tiny Llama with a fresh adapter; equal in both shapes."""
    model = tiny("llama")
    torch.manual_seed(0)
    config = peftlite.LoraConfig(r=4, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear")
    if shape == "wrapped":
        return peftlite.get_peft_model(model, config, adapter_name)
    model.add_adapter(config, adapter_name)
    return model


def rows(count: int = 16) -> list[dict[str, Tensor]]:
    """Rows that are easy to learn: each repeats a few tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 6, (count, 8), generator=generator)
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in tokens]


def arguments(directory: Path, **options: Any) -> TrainingArguments:
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
    }
    return TrainingArguments(str(directory), **{**settings, **options})


def train(model: Any, directory: Path, resume: Path | None = None, **options: Any) -> Trainer:
    trainer = Trainer(model=model, args=arguments(directory, **options), train_dataset=rows(), eval_dataset=rows(4))
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


def losses(trainer: Trainer) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The base model's own tensors, under their original names."""
    kept = {key: value for key, value in model.state_dict().items() if ".lora_" not in key}
    return {key.removeprefix("base_model.model.").replace(".base_layer.", "."): value for key, value in kept.items()}


def logits(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(**batch("llama")).logits
    return found


def test_it_learns_and_leaves_the_base_alone(shape: str, tmp_path: Path) -> None:
    model = model_with_adapter(shape)
    found = losses(train(model, tmp_path))
    assert found[6] < found[1] - 0.3, found
    original = tiny("llama").state_dict()
    after = base_weights(model)
    assert after.keys() == original.keys()
    assert all(torch.equal(after[key], original[key]) for key in original)


OPTIONS: list[dict[str, Any]] = [{}, {CHECKPOINTING: True}, {"label_smoothing_factor": 0.1}, {"bf16": True}]


@pytest.mark.filterwarnings("ignore:`torch.cpu.amp.autocast:FutureWarning")  # transformers 4
@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_both_shapes_train_alike(option: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # transformers 4 sets it, and leaves it behind
    plain = losses(train(model_with_adapter("in-place"), tmp_path / "plain"))
    runs = [losses(train(model_with_adapter(shape), tmp_path / shape, **option)) for shape in SHAPES]
    assert runs[0] == runs[1]
    assert (runs[0] == pytest.approx(plain, rel=1e-4)) == (option.keys() <= {CHECKPOINTING})
    assert runs[0] == pytest.approx(plain, rel=0.2)


def test_a_checkpoint_holds_the_adapter_and_resumes_to_the_same_losses(shape: str, tmp_path: Path) -> None:
    whole = train(model_with_adapter(shape), tmp_path / "whole", save_strategy="steps", save_steps=3)
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_config.json", WEIGHTS, "optimizer.pt"} <= names
    assert not {"model.safetensors", "config.json", "pytorch_model.bin"} & names

    fresh = model_with_adapter(shape)
    resumed = train(fresh, tmp_path / "resumed", resume=checkpoint)
    assert {step: loss for step, loss in losses(whole).items() if step > 3} == {
        step: loss for step, loss in losses(resumed).items() if step > 3
    }
    assert torch.equal(logits(fresh), logits(whole.model))
    assert all(p.requires_grad == (".lora_" in key) for key, p in fresh.named_parameters())


def test_checkpoints_of_both_shapes_are_the_same(tmp_path: Path) -> None:
    for shape in SHAPES:
        train(model_with_adapter(shape), tmp_path / shape, save_strategy="steps", save_steps=6)
    for name in ("adapter_config.json", WEIGHTS):
        one, two = ((tmp_path / shape / "checkpoint-6" / name).read_bytes() for shape in SHAPES)
        assert one == two, name


def test_save_model_saves_what_load_reads(shape: str, tmp_path: Path) -> None:
    trainer = train(model_with_adapter(shape), tmp_path / "run")
    trainer.save_model(str(tmp_path / "saved"))
    again = tiny("llama")
    again.load_adapter(str(tmp_path / "saved"))
    assert torch.equal(logits(again), logits(trainer.model))


class Spoil(TrainerCallback):  # type: ignore[misc]
    """Makes the model useless after step 3, so that the best checkpoint is not the last."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 3:
            with torch.no_grad():
                for parameter in kwargs["model"].parameters():
                    if parameter.requires_grad:
                        parameter.normal_()


def test_load_best_model_at_end(shape: str, tmp_path: Path) -> None:
    model = model_with_adapter(shape)
    options = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 3, "eval_steps": 3}
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, load_best_model_at_end=True, **options),
        train_dataset=rows(),
        eval_dataset=rows(4),
        callbacks=[Spoil()],
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    best = tiny("llama")
    best.load_adapter(str(tmp_path / "checkpoint-3"))
    assert torch.equal(logits(model), logits(best))
    assert {p.requires_grad for key, p in model.named_parameters() if ".lora_" in key} == {True}


def test_an_adapter_with_another_name_resumes(shape: str, tmp_path: Path) -> None:
    whole = train(model_with_adapter(shape, "mine"), tmp_path / "whole", save_strategy="steps", save_steps=3)
    fresh = model_with_adapter(shape, "mine")
    train(fresh, tmp_path / "resumed", resume=tmp_path / "whole" / "checkpoint-3")
    assert torch.equal(logits(fresh), logits(whole.model))


def test_a_checkpoint_that_does_not_fit_is_refused(shape: str, tmp_path: Path) -> None:
    train(model_with_adapter(shape), tmp_path, save_strategy="steps", save_steps=6)
    config = tmp_path / "checkpoint-6" / "adapter_config.json"
    assert json.loads(config.read_text())["r"] == 4
    model = tiny("llama")
    model.add_adapter(peftlite.LoraConfig(r=2, target_modules="all-linear"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(peftlite.errors.CheckpointError):
        train(model, tmp_path / "other", resume=tmp_path / "checkpoint-6")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_both_shapes_without_peft_installed(tmp_path: Path) -> None:
    program = f"""
import sys
sys.modules["peft"] = None  # as if it were not installed
import pytest
chosen = "resumes_to_the_same or load_best"
options = ["-q", "-p", "no:cacheprovider", "--basetemp", {str(tmp_path / "inner")!r}]
sys.exit(pytest.main([*options, "-k", chosen, {__file__!r}]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "4 passed" in done.stdout
