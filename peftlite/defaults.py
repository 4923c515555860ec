"""Which modules a transformers model's adapters go to when a config does not say."""

from __future__ import annotations

from typing import Final

from peftlite.config import PeftType

LORA: Final[dict[str, tuple[str, ...] | str]] = {
    "RefinedWeb": ("query_key_value",),
    "RefinedWebModel": ("query_key_value",),
    "bart": ("q_proj", "v_proj"),
    "bert": ("query", "value"),
    "blip-2": ("q", "v", "q_proj", "v_proj"),
    "bloom": ("query_key_value",),
    "btlm": ("c_proj", "c_attn"),
    "chatglm": ("query_key_value",),
    "codegen": ("qkv_proj",),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "electra": ("query", "value"),
    "falcon": ("query_key_value",),
    "gemma": ("q_proj", "v_proj"),
    "gemma2": ("q_proj", "v_proj"),
    "gemma3_text": ("q_proj", "v_proj"),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "gpt2": ("c_attn",),
    "gpt_bigcode": ("c_attn",),
    "gpt_neo": ("q_proj", "v_proj"),
    "gpt_neox": ("query_key_value",),
    "gptj": ("q_proj", "v_proj"),
    "layoutlm": ("query", "value"),
    "llama": ("q_proj", "v_proj"),
    "llama4": ("q_proj", "v_proj"),
    "mistral": ("q_proj", "v_proj"),
    "mixtral": ("q_proj", "v_proj"),
    "mpt": ("Wqkv",),
    "mt5": ("q", "v"),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "opt": ("q_proj", "v_proj"),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "qwen2": ("q_proj", "v_proj"),
    "qwen3": ("q_proj", "v_proj"),
    "roberta": ("query", "value"),
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
    "stablelm": ("q_proj", "v_proj"),
    "t5": ("q", "v"),
    "xlm-roberta": ("query", "value"),
}

ADALORA: Final[dict[str, tuple[str, ...] | str]] = {
    "bart": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "bert": ("query", "value"),
    "bloom": ("query_key_value",),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "key_proj", "value_proj", "dense"),
    "gemma": ("q_proj", "v_proj"),
    "gemma2": ("q_proj", "v_proj"),
    "gemma3_text": ("q_proj", "v_proj"),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "gpt2": ("c_attn",),
    "gpt_bigcode": ("c_attn",),
    "gpt_neo": ("q_proj", "v_proj"),
    "gpt_neox": ("query_key_value",),
    "gptj": ("q_proj", "v_proj"),
    "llama": ("q_proj", "v_proj"),
    "llama4": ("q_proj", "v_proj"),
    "mt5": ("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "qwen2": ("q_proj", "v_proj"),
    "qwen3": ("q_proj", "v_proj"),
    "roberta": ("query", "key", "value", "dense"),
    "t5": ("q", "k", "v", "o", "wi", "wo"),
}

IA3: Final[dict[str, tuple[str, ...] | str]] = {
    "RefinedWeb": ("query_key_value", "dense_4h_to_h"),
    "RefinedWebModel": ("query_key_value", "dense_4h_to_h"),
    "bart": ("q_proj", "v_proj", "fc2"),
    "bert": ("key", "value", "output.dense"),
    "bloom": ("query_key_value", "mlp.dense_4h_to_h"),
    "deberta": ("in_proj", "output.dense"),
    "deberta-v2": ("key_proj", "value_proj", "output.dense"),
    "falcon": ("query_key_value", "dense_4h_to_h"),
    "gemma": ("q_proj", "v_proj", "down_proj"),
    "gemma2": ("q_proj", "v_proj", "down_proj"),
    "gemma3_text": ("q_proj", "v_proj", "down_proj"),
    "gpt2": ("c_attn", "mlp.c_proj"),
    "gpt_bigcode": ("c_attn", "mlp.c_proj"),
    "gpt_neo": ("q_proj", "v_proj", "c_proj"),
    "gpt_neox": ("query_key_value", "dense_4h_to_h"),
    "gptj": ("q_proj", "v_proj", "fc_out"),
    "llama": ("k_proj", "v_proj", "down_proj"),
    "llama4": ("q_proj", "v_proj", "down_proj"),
    "mistral": ("k_proj", "v_proj", "down_proj"),
    "mixtral": ("k_proj", "v_proj", "w2"),
    "mt5": ("k", "v", "wi_1"),
    "opt": ("q_proj", "k_proj", "fc2"),
    "phi": ("q_proj", "v_proj", "fc2"),
    "qwen2": ("q_proj", "v_proj", "down_proj"),
    "qwen3": ("q_proj", "v_proj", "down_proj"),
    "roberta": ("key", "value", "output.dense"),
    "t5": ("k", "v", "wo"),
}

IA3_FEEDFORWARD: Final[dict[str, tuple[str, ...]]] = {
    "RefinedWeb": ("dense_4h_to_h",),
    "RefinedWebModel": ("dense_4h_to_h",),
    "bart": ("fc2",),
    "bert": ("output.dense",),
    "bloom": ("mlp.dense_4h_to_h",),
    "deberta": ("output.dense",),
    "deberta-v2": ("output.dense",),
    "falcon": ("dense_4h_to_h",),
    "gemma": ("down_proj",),
    "gemma2": ("down_proj",),
    "gemma3_text": ("down_proj",),
    "gpt2": ("mlp.c_proj",),
    "gpt_bigcode": ("mlp.c_proj",),
    "gpt_neo": ("c_proj",),
    "gpt_neox": ("dense_4h_to_h",),
    "gptj": ("fc_out",),
    "llama": ("down_proj",),
    "llama4": ("down_proj",),
    "mistral": ("down_proj",),
    "mixtral": ("w2",),
    "mt5": (),
    "opt": ("fc2",),
    "phi": ("fc2",),
    "qwen2": ("down_proj",),
    "qwen3": ("down_proj",),
    "roberta": ("output.dense",),
    "t5": ("wo",),
}

LN_TUNING: Final[dict[str, tuple[str, ...] | str]] = {
    "bart": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
    "blip-2": ("layernorm", "LayerNorm", "final_layer_norm", "self_attn_layer_norm"),
    "bloom": ("input_layernorm", "post_attention_layernorm", "ln_f"),
    "falcon": ("input_layernorm", "post_attention_layernorm", "ln_f"),
    "gemma": ("input_layernorm", "post_attention_layernorm", "norm"),
    **dict.fromkeys(
        ("gemma2", "gemma3_text"),
        (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
            "norm",
        ),
    ),
    "gpt2": ("ln_1", "ln_2", "ln_f"),
    "gptj": ("ln_1", "ln_f"),
    "llama": ("input_layernorm", "post_attention_layernorm", "norm"),
    "llava": (
        "multi_modal_projector",
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
        "embed_tokens",
        "lm_head",
    ),
    "mistral": ("input_layernorm", "post_attention_layernorm", "norm"),
    "mt5": ("layer_norm", "final_layer_norm"),
    "phi": ("input_layernorm", "final_layernorm"),
    "qwen2": ("post_attention_layernorm",),
    "qwen3": ("post_attention_layernorm",),
    "t5": ("layer_norm", "final_layer_norm"),
}

LOHA = LOKR = LORA

VERA: Final[dict[str, tuple[str, ...] | str]] = {**LORA, "phi": ("q_proj", "v_proj")}

TARGETS: Final = {
    PeftType.LORA: LORA,
    PeftType.LOHA: LOHA,
    PeftType.LOKR: LOKR,
    PeftType.VERA: VERA,
    PeftType.ADALORA: ADALORA,
    PeftType.IA3: IA3,
    PeftType.LN_TUNING: LN_TUNING,
}
_FEEDFORWARD: Final = {PeftType.IA3: IA3_FEEDFORWARD}


def default_targets(model_type: str, peft_type: PeftType | str) -> list[str] | str | None:
    """Names of modules, or a regular expression, for `target_modules`; None when there is no default."""
    found = TARGETS.get(PeftType(peft_type), {}).get(model_type)
    return found if found is None or isinstance(found, str) else sorted(found)


def default_feedforward(model_type: str, peft_type: PeftType | str) -> list[str] | None:
    """Which of the default targets belong to a feed-forward block, for tuners that treat those differently."""
    found = _FEEDFORWARD.get(PeftType(peft_type), {}).get(model_type)
    return None if found is None else sorted(found)
