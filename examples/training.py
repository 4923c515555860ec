"""What the examples share: text cut into blocks, and transformers' Trainer with one quiet progress bar."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, ProgressCallback, Trainer, TrainingArguments

MOST_HELD_OUT = 128  # blocks: an evaluation of the small model takes about a second


class UserError(Exception):
    """Something about the input that its owner can mend; shown in one line, without a traceback."""


@dataclass(frozen=True)
class Scores:
    """Mean negative log-likelihood of held-out text: in nats per token, and in bits per byte of the text."""

    loss: float
    bits_per_byte: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


class Blocks(Dataset[dict[str, Tensor]]):
    """Texts as one row of tokens, cut into blocks of `size`; an end-of-text token follows each text."""

    def __init__(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, size: int) -> None:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        tokens = torch.tensor([token for ids in encoded for token in (*ids, *end)], dtype=torch.long)
        self.rows = tokens[: len(tokens) // size * size].view(-1, size)  # (blocks, size)
        self.bytes_per_token = sum(len(text.encode()) for text in texts) / max(len(tokens), 1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}

    def thin_out(self, most: int) -> None:
        """Keep at most `most` blocks, evenly from all of the text."""
        self.rows = self.rows[:: math.ceil(len(self) / most)]


def split(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Training and held-out texts: every tenth text is held out or, when they are few, the last tenth of each."""
    if len(texts) >= 10:
        return [text for i, text in enumerate(texts) if i % 10 != 9], list(texts[9::10])
    cuts = [len(text) * 9 // 10 for text in texts]
    return [t[:n] for t, n in zip(texts, cuts, strict=True)], [t[n:] for t, n in zip(texts, cuts, strict=True)]


def blocks_of(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[Blocks, Blocks]:
    """Training and held-out blocks.

    Raises:
        UserError: one of the two would be empty.
    """
    train, held_out = (Blocks(part, tokenizer, size) for part in split(texts))
    if not len(train) or not len(held_out):
        raise UserError(
            f"the text is too small: {len(train)} training and {len(held_out)} held-out blocks of {size} tokens, "
            f"where one of each is needed; give some {20 * size} tokens, or a smaller --block-size"
        )
    held_out.thin_out(MOST_HELD_OUT)
    return train, held_out


class Bar(ProgressCallback):
    """Trainer's progress bar, with the latest losses beside it instead of a printed dict for each log."""

    def __init__(self) -> None:
        super().__init__()
        self.latest: dict[str, str] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        for key, shown in (("loss", "training"), ("eval_loss", "held-out")):
            if logs and key in logs:
                self.latest[shown] = f"{logs[key]:.3f}"
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.latest)

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """No second bar for an evaluation: it takes about a second."""


def make_trainer(
    model: nn.Module, train: Blocks, held_out: Blocks, folder: Path, steps: int, lr: float, seed: int
) -> Trainer:
    """Transformers' Trainer with ten evaluations over the run; it writes nothing to disk."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        adam_beta2=0.95,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=16,
        eval_strategy="steps",
        eval_steps=max(steps // 10, 1),
        logging_steps=max(steps // 40, 1),
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=train, eval_dataset=held_out)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Bar)
    return trainer


def scores(trainer: Trainer, held_out: Blocks) -> Scores:
    loss = trainer.evaluate()["eval_loss"]
    return Scores(loss, loss / math.log(2) / held_out.bytes_per_token)
