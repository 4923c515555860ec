"""transformers: `from_pretrained` and pipelines of a directory that holds an adapter; AutoPeftModel."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from peft import AutoPeftModel, AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from small import llama, tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM, pipeline

import peftlite

TOKENS = torch.arange(4, 12)[None]

with tempfile.TemporaryDirectory() as scratch:
    base, adapter = Path(scratch, "base"), Path(scratch, "adapter")
    llama().save_pretrained(base)
    tokenizer().save_pretrained(base)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    trained = get_peft_model(LlamaForCausalLM.from_pretrained(base), config).eval()
    expected = trained(TOKENS).logits
    trained.save_pretrained(adapter)

    for load in (AutoModelForCausalLM, LlamaForCausalLM):
        model = load.from_pretrained(adapter)
        assert isinstance(model, LlamaForCausalLM)
        assert model.active_adapters() == ["default"]
        assert torch.equal(model(TOKENS).logits, expected)

    for auto in (AutoPeftModel, AutoPeftModelForCausalLM):
        wrapped = auto.from_pretrained(adapter)
        assert isinstance(wrapped, PeftModel)
        assert isinstance(wrapped, peftlite.PeftModelForCausalLM)
        assert torch.equal(wrapped(TOKENS).logits, expected)

    texts = set()
    for source in (str(adapter), trained, model):
        generate = pipeline("text-generation", model=source, tokenizer=tokenizer(), device="cpu")
        texts.add(generate("w1 w2", max_new_tokens=8, do_sample=False)[0]["generated_text"])
    assert len(texts) == 1
    plain = pipeline("text-generation", model=str(base), tokenizer=tokenizer(), device="cpu")
    assert plain("w1 w2", max_new_tokens=8, do_sample=False)[0]["generated_text"] not in texts
print("done")
