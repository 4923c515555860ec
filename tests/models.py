"""Tiny real transformers models made from their configs: nothing is downloaded, equal seeds give equal weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCAB = 48


@dataclass(frozen=True)
class Recipe:
    """What makes one tiny model: its classes (by name, since transformers imports them on first use) and its sizes."""

    model: str
    config: str
    sizes: Mapping[str, Any]


TINY: dict[str, Recipe] = {
    "llama": Recipe(
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,  # k_proj and v_proj are narrower than q_proj
            "max_position_embeddings": 64,
            "initializer_range": 0.1,
        },
    ),
    "gpt2": Recipe(
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "n_embd": 16,
            "n_inner": 32,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 64,
            "initializer_range": 0.1,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
    ),
    "bert": Recipe(
        "BertForSequenceClassification",
        "BertConfig",
        {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
            "num_labels": 3,
            "initializer_range": 0.1,
        },
    ),
    "t5": Recipe(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
    ),
    "opt": Recipe(
        "OPTForCausalLM",
        "OPTConfig",
        {
            "hidden_size": 16,
            "word_embed_proj_dim": 16,
            "ffn_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
            "init_std": 0.1,
        },
    ),
}

_MOE_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "experts_implementation": "eager",
}
MOE: dict[str, Recipe] = {
    "mixtral": Recipe("MixtralForCausalLM", "MixtralConfig", {**_MOE_SIZES, "num_local_experts": 3}),
    "qwen2_moe": Recipe(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**_MOE_SIZES, "num_experts": 3, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 10},
    ),
    "qwen3_moe": Recipe(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_MOE_SIZES, "num_experts": 3, "moe_intermediate_size": 8}
    ),
    "gpt_oss": Recipe(
        "GptOssForCausalLM",
        "GptOssConfig",
        {**_MOE_SIZES, "num_local_experts": 3, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}
"""Models whose experts are parameters (experts, out, in), or (experts, in, out) in gpt-oss."""


def tiny(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    """The tiny model `name` in eval mode; `sizes` override or extend its config. The global random state is left alone.

    Vectors (biases, norms) are moved off their usual zeros and ones, so that a forgotten or doubled one shows.
    """
    recipe = (TINY | MOE)[name]
    build: Callable[[Any], nn.Module] = getattr(transformers, recipe.model)
    config = getattr(transformers, recipe.config)(**{"vocab_size": VOCAB, **recipe.sizes, **sizes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype).eval()


def batch(name: str, *, rows: int = 2, length: int = 6, seed: int = 0) -> dict[str, Tensor]:
    """Inputs for `tiny(name)`, labels included: tokens (rows, length); BERT's labels (rows,)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, VOCAB, (rows, length), generator=generator)
    labels = torch.randint(3, (rows,), generator=generator) if name == "bert" else tokens.clone()
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


class Block(nn.Module):
    """Two layers, and a part of the inputs that goes around them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))
