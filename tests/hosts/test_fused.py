"""Modules of torch that compute with their children's weights themselves see the adapters on these all the same."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftlite
from peftlite import IA3Config, LNTuningConfig, LoraConfig, PeftConfig
from peftlite.core.tree import layers
from peftlite.errors import UnsupportedFeatureError
from tests.contract.rows import scramble

CONFIGS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=4, target_modules=["linear1", "linear2"]),
    "lora-one": LoraConfig(r=4, target_modules=["linear2"]),
    "parameter": LoraConfig(r=4, target_modules=[], target_parameters=["linear1.weight"]),
    "ia3": IA3Config(target_modules=["linear1"], feedforward_modules=[]),
    "layer norm": LNTuningConfig(target_modules=["norm1"]),
    "layer norm beside": LoraConfig(r=4, target_modules=["linear1"], modules_to_save=["norm2"]),
    "attention": LoraConfig(r=4, target_modules=["self_attn"]),
    "attention whole": LoraConfig(r=4, target_modules=["linear1"], modules_to_save=["self_attn"]),
}


def encoder() -> Any:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval().requires_grad_(False)


def inputs() -> Tensor:
    return torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))


def step_by_step(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Without torch's fused path, which training is kept off."""
    found: Tensor = copy.deepcopy(model).train()(*args, **kwargs).detach()
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_have_their_effect_where_torch_fuses(name: str) -> None:
    model, x = encoder(), inputs()
    before = model(x)
    peftlite.inject_adapter_in_model(CONFIGS[name], model)
    scramble(model, "default")
    for one in (model, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        expected = step_by_step(one, x)
        assert (expected - before).abs().max() > 1e-2
        with torch.no_grad():
            torch.testing.assert_close(one(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(peftlite.unload(model)(x), before)


def test_modules_saved_whole_may_be_attention() -> None:
    base = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    x = inputs()
    before = base(x, x)
    peftlite.inject_adapter_in_model(LoraConfig(target_modules=["linear1"], modules_to_save=["multihead_attn"]), base)
    torch.testing.assert_close(base(x, x), before)
    scramble(base, "default")
    assert not torch.allclose(base(x, x), before, atol=1e-2)


def test_nested_tensors_are_refused_with_the_way_out() -> None:
    mask = torch.tensor([[False, False, False], [False, False, True]])
    config = LoraConfig(r=4, target_modules=["linear1"])
    model, x = encoder(), inputs()
    peftlite.inject_adapter_in_model(config, model)
    scramble(model, "default")
    expected = step_by_step(model, x, src_key_padding_mask=mask)
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match="nested tensors"),
        pytest.raises(UnsupportedFeatureError, match="use_nested_tensor = False"),
    ):
        model(x, src_key_padding_mask=mask)
    model.use_nested_tensor = False
    torch.testing.assert_close(model(x, src_key_padding_mask=mask), expected, rtol=1e-4, atol=1e-5)


def test_layers_elsewhere_get_no_hook() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    peftlite.inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), model)
    assert not any(layer._forward_pre_hooks for layer in layers(model))
