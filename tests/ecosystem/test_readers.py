"""Written files keep the rules of other readers: vLLM's, llama.cpp's, lorax's, and real PEFT's loader."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors
import torch

import peftlite
from tests.models import batch, tiny

BASE = "some/base"


def written(tmp_path: Path, shape: str, **options: Any) -> tuple[dict[str, Any], dict[str, tuple[int, ...]], Any]:
    """(config, shapes of the tensors by key, model) of an adapter of a tiny Llama."""
    model = tiny("llama")
    model.name_or_path = BASE
    config = peftlite.LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False, **options})
    if shape == "wrapped":
        model = peftlite.get_peft_model(model, config)
    else:
        model.add_adapter(config)
    model.save_pretrained(tmp_path)
    with safetensors.safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no mapping
    return json.loads((tmp_path / "adapter_config.json").read_text()), shapes, model


CASES = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "patterns": {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True},
}


@pytest.mark.parametrize("shape", ["wrapped", "in place"])
@pytest.mark.parametrize("case", CASES)
def test_readers_rules(case: str, shape: str, tmp_path: Path) -> None:
    config, shapes, model = written(tmp_path, shape, **CASES[case])
    check_vllm(config, shapes)
    check_llama_cpp(config, shapes)
    for key in shapes:  # lorax
        assert re.fullmatch(r"base_model\.model\..+\.lora_[AB]\.weight", key), key
    base = tiny("llama")
    inputs = batch("llama")["input_ids"]
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.allclose(loaded(inputs).logits, model.eval()(inputs).logits, atol=1e-5)


def check_vllm(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """What vLLM needs, and what it refuses."""
    assert config["r"] > 0
    assert config["lora_alpha"] > 0
    assert isinstance(config["target_modules"], list)
    assert not config["use_dora"]
    assert config["bias"] == "none"
    assert not config["modules_to_save"]
    assert not config["lora_bias"]
    assert config["init_lora_weights"] in (True, False)
    named = set(config["target_modules"])
    for key, shape in shapes.items():
        assert key.startswith("base_model.model.")
        module, _, kind = key.removesuffix(".weight").rpartition(".")
        assert kind in ("lora_A", "lora_B")
        assert module.rpartition(".")[2] in named or module.removeprefix("base_model.model.") in named
        pattern = next((r for n, r in config["rank_pattern"].items() if module.endswith(n)), config["r"])
        assert shape[0 if kind == "lora_A" else 1] == pattern


def check_llama_cpp(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """What llama.cpp's converter needs: a pair of factors for each layer, and no other tensor."""
    assert config["lora_alpha"] is not None
    assert config["base_model_name_or_path"] == BASE
    pairs: dict[str, set[str]] = {}
    for key in shapes:
        module, _, kind = key.removesuffix(".weight").rpartition(".")
        pairs.setdefault(module, set()).add(kind)
    assert all(kinds == {"lora_A", "lora_B"} for kinds in pairs.values())
    for module in pairs:
        assert shapes[f"{module}.lora_A.weight"][0] == shapes[f"{module}.lora_B.weight"][1]


@pytest.mark.parametrize(
    ("options", "reader"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, check_vllm),
        ({"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, check_vllm),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, check_vllm),
        ({"target_modules": ["q_proj"], "use_dora": True}, check_llama_cpp),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, check_llama_cpp),
    ],
)
def test_the_rules_can_fail(options: dict[str, Any], reader: Any, tmp_path: Path) -> None:
    config, shapes, _ = written(tmp_path, "wrapped", **options)
    with pytest.raises(AssertionError):
        reader(config, shapes)
