"""`device_map`: base models that transformers loads partly to disk, and adapters on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import peftlite
from tests.models import batch, tiny

MAP = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
MAP |= {"model.rotary_emb": "cpu", "lm_head": "disk"}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory with a base model and an adapter of it."""
    tiny("llama").save_pretrained(tmp_path / "base")
    model: Any = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    model.add_adapter(peftlite.LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path


Load = Callable[..., Any]


def onto_the_base(place: Path, **options: Any) -> Any:
    base = LlamaForCausalLM.from_pretrained(place / "base", **options)
    return peftlite.PeftModel.from_pretrained(base, place / "adapter")


def into_the_base(place: Path, **options: Any) -> Any:
    base: Any = LlamaForCausalLM.from_pretrained(place / "base", **options)
    base.load_adapter(str(place / "adapter"))
    return base


LOADS: dict[str, Load] = {
    "PeftModel": onto_the_base,
    "load_adapter": into_the_base,
    "AutoPeftModel": lambda place, **options: peftlite.AutoPeftModelForCausalLM.from_pretrained(
        place / "adapter", **options
    ),
    "from_pretrained": lambda place, **options: AutoModelForCausalLM.from_pretrained(place / "adapter", **options),
}


@pytest.mark.parametrize("load", LOADS)
def test_layers_on_disk_have_adapters(load: str, saved: Path) -> None:
    inputs = {key: value for key, value in batch("llama").items() if key != "labels"}
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    whole = into_the_base(saved)
    model = LOADS[load](saved, device_map=MAP, offload_folder=str(saved / "offloaded"))
    offloaded = {key for key, p in model.named_parameters() if p.is_meta}
    assert any("layers.1.self_attn.q_proj" in key for key in offloaded)
    assert not any("layers.0" in key or "lora_" in key for key in offloaded)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, whole(**inputs).logits)
        assert torch.equal(model.generate(**inputs, **options), whole.generate(**inputs, **options))
    model.save_pretrained(saved / "again")
    one, two = ((saved / name / "adapter_model.safetensors").read_bytes() for name in ("adapter", "again"))
    assert one == two
