"""Fine-tune a language model with LoRA, from a text to an adapter on disk, and look at what the adapter changed.

Without arguments it needs no network and no data: it makes a small Llama, which learns from the prose of Python's
`help()`, and adapts it to Python's source code. With `--model` and `--data` it does the same for your model and text.

    python examples/finetune.py
    python examples/finetune.py --model meta-llama/Llama-3.2-1B --data notes.txt --output outputs/notes
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
import transformers
from small_llama import FAST, Recipe, base_model, python_sources
from torch import Tensor, nn
from training import Scores, UserError, blocks_of, make_trainer, scores, split
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    set_seed,
)

from peftlite import LoraConfig, PeftModel, get_peft_model
from peftlite.errors import PeftliteError

matplotlib.use("Agg")
from matplotlib import pyplot


@dataclass(frozen=True)
class Reloaded:
    """How the logits of the saved adapter compare with those of the model that was trained."""

    wrapped_equal: bool
    in_place_equal: bool
    merged_difference: float


def fine_tune(options: argparse.Namespace) -> None:
    """Base model, text, training, adapter on disk, and the checks of what was saved."""
    output = options.output
    make_folder(output)
    texts = read_texts(options.data) if options.data else python_sources(options.fast)
    recipe = FAST if options.fast else Recipe()
    source = options.model or str(base_model(recipe, options.seed, options.cache or output))

    check_context(load(AutoConfig, source), options.block_size)
    tokenizer = load(AutoTokenizer, source)
    train, held_out = blocks_of(texts, tokenizer, options.block_size)
    set_seed(options.seed)
    model = get_peft_model(load(AutoModelForCausalLM, source), lora_config(options))
    print(f"\nadapter: rank {options.rank}, for {len(train)} blocks of {options.block_size} tokens; ", end="")
    model.print_trainable_parameters()

    trainer = make_trainer(model, train, held_out, output, options.steps, learning_rate(options), options.seed)
    base = scores(trainer, held_out)  # a fresh adapter changes nothing: this is the base model
    trainer.train()
    adapted = scores(trainer, held_out)
    show_scores(base, adapted)
    plot(trainer.state.log_history, base, output / "loss.png")
    prompt = options.prompt or (opening(split(texts)[1][0]) if options.data else "def ")
    show_samples(model, tokenizer, prompt, options.seed)

    model.save_pretrained(output / "adapter")
    reloaded = check_reloading(model, source, output / "adapter", held_out.rows[:4])
    record = {"base": asdict(base), "adapted": asdict(adapted), **asdict(reloaded), "log": trainer.state.log_history}
    (output / "results.json").write_text(json.dumps(record, indent=2), "utf-8")
    print(f"\nwritten: {output / 'adapter'}{os.sep}, {output / 'loss.png'}, {output / 'results.json'}")


def lora_config(options: argparse.Namespace) -> LoraConfig:
    rank = options.rank
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=options.target_modules, task_type="CAUSAL_LM")


def learning_rate(options: argparse.Namespace) -> float:
    """What was asked for; else high for the small Llama, and for a model of billions what LoRA's users found safe."""
    default = 2e-4 if options.model else 5e-3
    return default if options.lr is None else float(options.lr)


def opening(text: str) -> str:
    """The first words of a text, for a sample to continue."""
    return " ".join(text.split()[:6])


# --- what the user gives ------------------------------------------------------------------------------------------


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output `{path}` cannot be made: {error}") from error


def read_texts(path: Path) -> list[str]:
    """The text of a `.txt` file, or the texts of a `.jsonl` file: one in each line's field `text`."""
    if path.suffix not in {".txt", ".jsonl"}:
        raise UserError(f"--data `{path}` ends in neither .txt nor .jsonl")
    try:
        content = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--data `{path}` cannot be read: {error}") from error
    if not content.strip():
        raise UserError(f"--data `{path}` is empty")
    if path.suffix == ".txt":
        return [content]
    lines = enumerate(content.split("\n"), 1)
    return [text_of(line, f"--data `{path}`, line {number}") for number, line in lines if line.strip()]


def text_of(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}, is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise UserError(f'{where}, is a {type(record).__name__}, not an object with a field "text"')
    if not isinstance(record.get("text"), str):
        fields = ", ".join(f"`{name}`" for name in record) or "nothing"
        raise UserError(f'{where}, has no field "text" with a string; it has: {fields}')
    return str(record["text"])


def load(kind: Any, source: str) -> Any:
    """`kind.from_pretrained(source)`; what is wrong with `source` becomes a UserError."""
    try:
        return kind.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"--model `{source}` cannot be loaded: {error}") from error


def check_context(config: PretrainedConfig, block_size: int) -> None:
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and longest < block_size:
        raise UserError(f"--block-size `{block_size}`: this model reads at most {longest} tokens at once")


# --- what the user sees -------------------------------------------------------------------------------------------


def show_scores(base: Scores, adapted: Scores) -> None:
    print(f"\n{'held-out text':<16}{'loss':>8}{'perplexity':>13}{'bits per byte':>16}")
    for name, score in (("base", base), ("adapted", adapted)):
        print(f"{name:<16}{score.loss:>8.3f}{score.perplexity:>13.1f}{score.bits_per_byte:>16.3f}")


def show_samples(model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompt: str, seed: int) -> None:
    with model.disable_adapter():
        before = sample(model, tokenizer, prompt, seed)
    after = sample(model, tokenizer, prompt, seed)
    for name, text in (("base", before), ("adapted", after)):
        print(f"\n--- the {name} model continues {prompt!r}\n{text}")


def sample(model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompt: str, seed: int) -> str:
    set_seed(seed)
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)
    tokens = model.eval().generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=120,
        do_sample=True,
        temperature=0.7,
        top_k=40,
        pad_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


def plot(log: Sequence[dict[str, float]], base: Scores, path: Path) -> None:
    """Training and held-out loss over the steps, the base model's held-out loss as a line."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.axhline(base.loss, color="0.4", linestyle="--", label=f"base model, held-out text: {base.loss:.2f}")
    start = {"step": 0, "eval_loss": base.loss}  # a fresh adapter changes nothing
    for key, text, style in (("loss", "training", {"alpha": 0.6}), ("eval_loss", "held-out", {"marker": "o"})):
        entries = [entry for entry in (start, *log) if key in entry]
        steps, losses = [entry["step"] for entry in entries], [entry[key] for entry in entries]
        axes.plot(steps, losses, label=f"with the adapter, {text} text: {losses[-1]:.2f}", **style)
    axes.set(xlabel="optimiser step", ylabel="loss (nats per token)", title="LoRA fine-tuning")
    axes.set_xlim(left=0, right=1.02 * steps[-1])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


# --- what was saved -----------------------------------------------------------------------------------------------


def check_reloading(model: PeftModel, source: str, adapter: Path, rows: Tensor) -> Reloaded:
    """Load the saved adapter onto fresh base models, in place and wrapped; then merge it."""
    expected = logits_of(model, rows)

    in_place = load(AutoModelForCausalLM, source).to(expected.device)
    in_place.load_adapter(str(adapter))
    in_place_equal = torch.equal(logits_of(in_place, rows), expected)
    del in_place

    wrapped = PeftModel.from_pretrained(load(AutoModelForCausalLM, source).to(expected.device), adapter)
    wrapped_equal = torch.equal(logits_of(wrapped, rows), expected)
    difference = (logits_of(wrapped.merge_and_unload(), rows) - expected).abs().max().item()

    print(f"\nreloaded, wrapped:  PeftModel.from_pretrained(base, adapter)  logits equal: {wrapped_equal}")
    print(f"reloaded, in place: base.load_adapter(adapter)                logits equal: {in_place_equal}")
    print(f"merged:             model.merge_and_unload()                  largest difference: {difference:.1e}")
    return Reloaded(wrapped_equal, in_place_equal, difference)


@torch.no_grad()
def logits_of(model: nn.Module, rows: Tensor) -> Tensor:
    device = next(model.parameters()).device
    return model.eval()(input_ids=rows.to(device)).logits  # (rows, tokens, vocabulary)


# --- the command --------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add(
        "--model",
        metavar="ID_OR_DIR",
        help="causal language model, of the hub or in a directory (without: a small Llama)",
    )
    add("--data", metavar="FILE", type=Path, help='.txt, or .jsonl with a field "text" (without: sources of Python)')
    add("--output", metavar="DIR", type=Path, default=Path("outputs/demo"), help="what is written (%(default)s)")
    add("--cache", metavar="DIR", type=Path, help="where the small Llama is kept for later runs (the output directory)")
    add("--steps", type=positive, default=400, help="optimiser steps of the fine-tuning (%(default)s)")
    add("--rank", type=positive, default=16, help="rank of the adapter (%(default)s)")
    add("--lr", type=float, help="learning rate of the fine-tuning (0.005 for the small Llama, 0.0002 for your model)")
    add("--block-size", type=positive, default=128, help="tokens that the model sees at once (%(default)s)")
    add("--target-modules", default="all-linear", help="regex of the layers to adapt (%(default)s)")
    add("--prompt", help="what the samples continue (without: the start of held-out text, or `def `)")
    add("--seed", type=int, default=0, help="equal seeds give equal results (%(default)s)")
    add("--fast", action="store_true", help="a tiny base model and little text: seconds, only to see that all works")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    transformers.utils.logging.disable_progress_bar()  # the bars of loading a model; Trainer's is another one
    started = time.perf_counter()
    try:
        fine_tune(options)
    except (UserError, PeftliteError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    print(f"{time.perf_counter() - started:.0f} seconds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
