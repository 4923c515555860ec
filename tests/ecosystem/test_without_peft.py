"""transformers finds adapters in directories although there is no `peft`, and nothing stands in for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ecosystem.programs import program

BLOCK = """
    import sys
    sys.modules["peft"] = None  # as if it were not installed
    """

ORDERS = {
    "peftlite-first": "import peftlite, transformers",
    "transformers-first": "from transformers import AutoModel, LlamaForCausalLM, pipeline\nimport peftlite",
}

USE = """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, utils

    torch.set_num_threads(1)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    tokens = torch.arange(4)[None]
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained("base")
    trained = LlamaForCausalLM.from_pretrained("base")
    trained.add_adapter(peftlite.LoraConfig(r=2, init_lora_weights=False))
    trained.save_pretrained("adapter")
    for load in (AutoModelForCausalLM, LlamaForCausalLM):
        model = load.from_pretrained("adapter")
        assert torch.equal(model(tokens).logits, trained.eval()(tokens).logits)
        assert model.active_adapters() == ["default"]
    wrapped = peftlite.AutoPeftModelForCausalLM.from_pretrained("adapter")
    assert torch.equal(wrapped(tokens).logits, trained(tokens).logits)
    assert not utils.is_peft_available()
    """


@pytest.mark.parametrize("order", ORDERS)
def test_a_directory_with_an_adapter_is_loaded(order: str, tmp_path: Path) -> None:
    program(BLOCK, ORDERS[order], f"import os; os.chdir({str(tmp_path)!r})", USE)
