"""transformers' generate and embeddings on models with adapters, in both shapes, against the merged model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import peftlite
from tests.models import batch, tiny

WAYS = {
    "greedy": {"do_sample": False},
    "without cache": {"do_sample": False, "use_cache": False},
    "beams": {"num_beams": 3, "do_sample": False, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "top_k": 5},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
}


def adapted(name: str, shape: str) -> Any:
    torch.manual_seed(0)
    config = peftlite.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    model = tiny(name)
    if shape == "wrapped":
        return peftlite.get_peft_model(model, config).eval()
    model.add_adapter(config)
    return model.eval()


def generate(model: Any, name: str = "llama", **options: Any) -> Any:
    inputs = {key: value for key, value in batch(name).items() if key != "labels"}
    torch.manual_seed(1)
    special = {"pad_token_id": 0, "eos_token_id": None} if name == "llama" else {}
    return model.generate(**inputs, max_new_tokens=6, **special, **options)


@pytest.mark.parametrize("shape", ["wrapped", "in place"])
@pytest.mark.parametrize("way", WAYS)
def test_generate_is_that_of_the_merged_model(way: str, shape: str) -> None:
    model = adapted("llama", shape)
    merged = adapted("llama", shape).merge_and_unload()
    found = generate(model, **WAYS[way])
    assert torch.equal(found, generate(merged, **WAYS[way]))
    if way == "greedy":
        with model.disable_adapter():
            assert not torch.equal(generate(model, **WAYS[way]), found)


@pytest.mark.parametrize("shape", ["wrapped", "in place"])
def test_an_encoder_and_decoder_generates(shape: str) -> None:
    merged = adapted("t5", shape).merge_and_unload()
    assert torch.equal(generate(adapted("t5", shape), "t5", num_beams=2), generate(merged, "t5", num_beams=2))


@pytest.mark.parametrize("assistant", ["base model", "model with an adapter"])
def test_assisted_decoding_says_the_same(assistant: str) -> None:
    model = adapted("llama", "in place")
    helper = tiny("llama") if assistant == "base model" else adapted("llama", "in place")
    tokens = batch("llama", rows=1)
    options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}
    inputs = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
    plain = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, assistant_model=helper), plain)


@pytest.mark.parametrize("shape", ["wrapped", "in place"])
def test_resized_embeddings_are_saved_with_the_adapter(shape: str, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")

    def base() -> Any:
        return LlamaForCausalLM.from_pretrained(tmp_path / "base")

    model: Any = base()
    model.resize_token_embeddings(52)
    config = peftlite.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    if shape == "wrapped":
        model = peftlite.get_peft_model(model, config)
    else:
        model.add_adapter(config)
    inputs = batch("llama")["input_ids"].clone()
    inputs[0, 0] = 51
    expected = model.eval()(inputs).logits
    model.save_pretrained(tmp_path / "adapter")
    fresh = base()
    fresh.resize_token_embeddings(52)
    with torch.no_grad():
        fresh.get_input_embeddings().weight[48:] = 7  # whatever it drew for the new tokens, the file has them
    loaded = peftlite.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert torch.equal(loaded(inputs).logits, expected)
    with pytest.raises(peftlite.errors.CheckpointError, match=r"resize_token_embeddings\(52\)"):
        peftlite.PeftModel.from_pretrained(base(), tmp_path / "adapter")
