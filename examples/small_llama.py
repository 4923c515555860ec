"""A base model for machines without a network: Llama 3.2's design with a few million parameters.

It learns for about a minute from the prose that comes with every Python, the topics of `help()`; Python's own sources,
which come with every Python too, are the text to adapt it to.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sysconfig
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from training import UserError, blocks_of, make_trainer, split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast, set_seed

# Modules that every Python since 3.10 has as one file; every tenth one is held out.
SOURCES = """
    argparse ast base64 bdb calendar codecs configparser contextlib csv textwrap
    dataclasses difflib dis doctest enum filecmp fileinput fractions ftplib shlex
    functools gettext getpass gzip hmac imaplib inspect ipaddress locale heapq
    mailbox mimetypes netrc optparse os pdb pickle pickletools pkgutil queue
    platform plistlib poplib pprint profile pstats random selectors shutil string
    smtplib socket socketserver statistics subprocess tarfile tempfile threading timeit sched
"""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the base model is: the same recipe and seed give the same model."""

    vocab: int = 2048
    hidden: int = 192
    intermediate: int = 640
    layers: int = 4
    heads: tuple[int, int] = (3, 1)  # of the queries, and of keys and values
    steps: int = 500
    lr: float = 4e-3
    block_size: int = 128
    topics: int | None = None  # how many of the topics of `help()`; None: all


FAST = Recipe(vocab=320, hidden=32, intermediate=64, layers=2, heads=(2, 1), steps=4, block_size=32, topics=20)


def base_model(recipe: Recipe, seed: int, folder: Path) -> Path:
    """The directory of the base model, trained by the first call and found by the next ones."""
    texts = [topics[name] for name in sorted(topics)][: recipe.topics]
    versions = [platform.python_version(), torch.__version__, transformers.__version__]
    made_of = json.dumps([asdict(recipe), seed, versions, texts])
    path = folder / f"base-{hashlib.sha256(made_of.encode()).hexdigest()[:8]}"
    if path.is_dir():
        print(f"base model: {path}, from an earlier run")
        return path
    set_seed(seed)
    tokenizer = byte_level_tokenizer(split(texts)[0], recipe.vocab)
    model = LlamaForCausalLM(llama_config(recipe, tokenizer))
    print(f"base model: a Llama of {model.num_parameters() / 1e6:.2f} M parameters learns from the prose of help()")
    train, held_out = blocks_of(texts, tokenizer, recipe.block_size)
    make_trainer(model, train, held_out, folder, recipe.steps, recipe.lr, seed).train()
    unfinished = path.with_suffix(".unfinished")  # renamed when complete: a run that is stopped leaves no half model
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(path)
    return path


def python_sources(fast: bool) -> list[str]:
    """A fixed selection of the standard library's modules, about 2.5 MB; the beginnings of some if `fast`."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_text("utf-8") for name in SOURCES.split() if (path := folder / f"{name}.py").is_file()]
    if not texts:
        raise UserError(f"this Python has no sources in `{folder}`; give a text of your own with --data FILE")
    return [text[:4000] for text in texts[:20]] if fast else texts


def byte_level_tokenizer(texts: Iterable[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE like Llama 3's: all 256 bytes are in it, so that it can write any text; the rest it learns."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    begin, end = "<|begin_of_text|>", "<|end_of_text|>"
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[begin, end],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token=end)


def llama_config(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """Llama 3.2's design: grouped-query attention, tied embeddings, rotary positions with llama3 scaling."""
    queries, keys = recipe.heads
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=queries,
        num_key_value_heads=keys,
        max_position_embeddings=1024,
        initializer_range=0.06,  # 0.02 suits wider models; this narrow one learns far faster from larger weights
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 256,
        },
    )
