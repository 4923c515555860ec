"""peftlite and transformers meet whichever is imported first, with and without `peft`; each case in a fresh process."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

BLOCK_PEFT = "sys.modules['peft'] = None  # as if it were not installed"

IMPORTS = {
    "peftlite-first": """
        import peftlite
        assert not {"torch", "transformers"} & set(sys.modules), "import peftlite pulled in a heavy package"
        import transformers
        from transformers import Trainer
        """,
    "transformers-first": """
        import transformers
        from transformers import PreTrainedModel, Trainer
        import peftlite
        """,
    "models-first-trainer-last": """
        from transformers import LlamaForCausalLM
        import peftlite
        import transformers
        from transformers import Trainer
        """,
}

USE = """
    import torch, transformers
    from transformers import trainer, trainer_utils
    from transformers.utils import is_peft_available
    from peftlite import LoraConfig, PeftModel, get_peft_model

    torch.set_num_threads(1)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    tokens = torch.arange(4)[None]
    base = model(tokens).logits
    model.add_adapter(LoraConfig(r=2, init_lora_weights=False))
    assert model.active_adapters() == ["default"] and model._hf_peft_config_loaded
    adapted = model(tokens).logits
    assert not torch.equal(adapted, base)
    with model.disable_adapter():
        assert torch.equal(model(tokens).logits, base)
    model.merge_adapter()
    assert torch.allclose(model(tokens).logits, adapted, atol=1e-5)
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert not model._hf_peft_config_loaded and torch.equal(model(tokens).logits, base)

    wrapped = get_peft_model(model, LoraConfig(r=2))
    homes = [module for module in (trainer, trainer_utils) if hasattr(module, "_is_peft_model")]
    assert homes
    for module in homes:
        assert module._is_peft_model(wrapped) and not module._is_peft_model(model)
    for name in ("transformers.pytorch_utils", "transformers.modeling_utils", "transformers.trainer"):
        module = sys.modules[name]
        assert module.__loader__ is module.__spec__.loader and "peftlite" not in type(module.__loader__).__module__
    assert is_peft_available() is PEFT
    """

WITH_PEFT = """
    import peft

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    model.add_adapter(peft.LoraConfig(r=2))
    assert type(model.model.layers[0].self_attn.q_proj).__module__.startswith("peft.")
    assert trainer._is_peft_model(peft.get_peft_model(transformers.LlamaForCausalLM(model.config), peft.LoraConfig()))
    """


def run(*parts: str) -> None:
    """Run the parts as one program, with warnings as errors where they are ours."""
    program = "\n".join(textwrap.dedent(part) for part in ("import sys", *parts))
    command = [sys.executable, "-W", "error::UserWarning:peftlite", "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_peftlite_first_with_peft_installed() -> None:
    """The other order is that of these tests themselves."""
    run("PEFT = True", IMPORTS["peftlite-first"], USE, WITH_PEFT)


@pytest.mark.parametrize("order", IMPORTS)
def test_any_order_without_peft(order: str) -> None:
    run("PEFT = False", BLOCK_PEFT, IMPORTS[order], USE)
