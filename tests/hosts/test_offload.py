"""Base layers that accelerate keeps in CPU memory or on a disk: adapters use them, merge into them, leave them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from torch import Tensor, nn

import peftlite
from peftlite import IA3Config, LoHaConfig, LoraConfig, VeraConfig
from peftlite.core.tree import layers
from peftlite.errors import MergeError
from tests.models import batch, tiny
from tests.versions import fused_experts

APART = "ignore:A weight was shared:peftlite.errors.PeftliteWarning"
CPU = torch.device("cpu")
Offload = Callable[[nn.Module, Path], object]
every_way = pytest.mark.parametrize(
    "offload",
    [
        lambda model, place: accelerate.cpu_offload(model, execution_device=CPU),
        lambda model, place: accelerate.disk_offload(model, str(place / "weights"), execution_device=CPU),
    ],
    ids=["cpu", "disk"],
)
orders = pytest.mark.parametrize("order", ["first", "last"])

CONFIGS: dict[str, Callable[..., peftlite.PeftConfig]] = {
    "lora": lambda: LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False),
    "lora-embedding": lambda: LoraConfig(target_modules=["embed_tokens", "q_proj"], r=2, init_lora_weights=False),
    "dora": lambda: LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False, use_dora=True),
    "pissa": lambda: LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights="pissa"),
    "whole": lambda: LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["lm_head"], init_lora_weights=False),
    "ia3": lambda: IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "vera": lambda: VeraConfig(target_modules=["q_proj"], r=2, init_weights=False),
    "loha": lambda: LoHaConfig(target_modules=["q_proj"], r=2, init_weights=False),
}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch("llama")).logits
    return found


def adapted(model: Any, config: peftlite.PeftConfig) -> Any:
    torch.manual_seed(0)
    peftlite.inject(model, config)
    return model


def offloaded(model: Any, config: peftlite.PeftConfig, order: str, offload: Offload, place: Path) -> Any:
    """The model offloaded before ("last") or after ("first") it has the adapter."""
    if order == "first":
        adapted(model, config)
    offload(model, place)
    return adapted(model, config) if order == "last" else model


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-5, atol=1e-5)


@every_way
@orders
@pytest.mark.parametrize("kind", CONFIGS)
def test_offloaded_layers_compute_and_merge_as_others_do(
    kind: str, order: str, offload: Offload, tmp_path: Path
) -> None:
    expected = logits(adapted(tiny("llama"), CONFIGS[kind]()))
    model = offloaded(tiny("llama"), CONFIGS[kind](), order, offload, tmp_path)
    if order == "last":
        assert not any(p.is_meta for layer in layers(model) for p in layer.parameters_of("default"))
    away = {name for name, p in model.named_parameters() if p.is_meta}
    assert away
    for _ in range(2):
        assert close(logits(model), expected)
        peftlite.merge_adapter(model)
        assert close(logits(model), expected)
        peftlite.unmerge_adapter(model)
    with peftlite.disable_adapter(model):
        assert torch.equal(logits(model), logits(tiny("llama")))
    assert close(logits(model), expected)
    assert {name for name, p in model.named_parameters() if p.is_meta} == away
    assert close(logits(peftlite.merge_and_unload(model)), expected)


@every_way
@orders
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings(APART)
def test_offloaded_tied_embeddings(tied: bool, order: str, offload: Offload, tmp_path: Path) -> None:
    if tied and order == "last":
        return  # accelerate has taken the tie apart by then, which is said: `ensure_weight_tying` has no effect
    config = LoraConfig(target_modules=["lm_head"], r=2, init_lora_weights=False, ensure_weight_tying=tied)
    expected = logits(adapted(tiny("llama", tie_word_embeddings=True), config))
    model = offloaded(tiny("llama", tie_word_embeddings=True), config, order, offload, tmp_path)
    assert close(logits(model), expected)
    peftlite.merge_adapter(model)
    assert close(logits(model), expected)
    peftlite.unmerge_adapter(model)
    assert close(logits(model), expected)


@fused_experts
@orders
def test_offloaded_experts(order: str, tmp_path: Path) -> None:
    def mixtral() -> Any:
        torch.manual_seed(1)
        config = transformers.MixtralConfig(
            vocab_size=48,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
        )
        return transformers.MixtralForCausalLM(config).eval()

    config = LoraConfig(
        target_modules=[], target_parameters=["gate_up_proj", "down_proj"], r=2, init_lora_weights=False
    )
    expected = logits(adapted(mixtral(), config))
    model = offloaded(mixtral(), config, order, lambda m, _: accelerate.cpu_offload(m, execution_device=CPU), tmp_path)
    assert close(logits(model), expected)
    peftlite.merge_adapter(model)
    assert close(logits(model), expected)
    peftlite.unmerge_adapter(model)
    assert close(logits(model), expected)


@every_way
@orders
def test_adapters_of_offloaded_layers_are_saved_and_loaded(order: str, offload: Offload, tmp_path: Path) -> None:
    plain = adapted(tiny("llama"), CONFIGS["lora"]())
    peftlite.save_adapter(plain, tmp_path / "plain")
    model = offloaded(tiny("llama"), CONFIGS["lora"](), order, offload, tmp_path)
    with torch.no_grad():
        for layer in layers(plain):
            for parameter in layer.parameters_of("default"):
                parameter.mul_(3)
    peftlite.save_adapter(plain, tmp_path / "tripled")
    for name in ("plain", "tripled"):
        peftlite.load_adapter(model, tmp_path / name)
        peftlite.save_adapter(model, tmp_path / "again")
        one, other = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in (name, "again"))
        assert one == other
    assert close(logits(model), logits(plain))


def test_adapters_of_offloaded_layers_train(tmp_path: Path) -> None:
    models = [adapted(tiny("llama"), CONFIGS["lora"]()), tiny("llama")]
    accelerate.cpu_offload(models[1], execution_device=CPU)
    adapted(models[1], CONFIGS["lora"]())
    for model in models:
        model(**batch("llama")).loss.backward()
    gradients = [[p.grad for layer in layers(m) for p in layer.parameters_of("default")] for m in models]
    assert len(gradients[0]) == 28
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_merging_into_weights_without_memory_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    peftlite.inject(model, LoraConfig(target_modules=["0"]))
    with pytest.raises(MergeError, match="meta device"):
        peftlite.merge_adapter(model)
