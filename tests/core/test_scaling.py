"""Scaling layer by layer, as code written for PEFT does it, against PEFT."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import peft
import pytest
import torch
from torch import nn

import peftlite
from peftlite.core.layer import AdapterLayer
from peftlite.errors import StateError

CONFIG = {"r": 4, "lora_alpha": 6, "target_modules": ["0"], "init_lora_weights": False}


def layer_of(library: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return library.get_peft_model(
        nn.Sequential(nn.Linear(8, 8)), library.LoraConfig(**{**CONFIG, **options})
    ).base_model.model[0]


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha_pattern": {"0": 3}}])
def test_every_step_is_that_of_peft(options: dict[str, Any]) -> None:
    ours, theirs = layer_of(peftlite, **options), layer_of(peft, **options)
    steps = [
        lambda layer: layer.scale_layer(2.0),
        lambda layer: layer.scale_layer(0.25),
        lambda layer: layer.unscale_layer(0.5),
        lambda layer: layer.unscale_layer(),
        lambda layer: layer.set_scale("default", 3.0),
        lambda layer: layer.scale_layer(1),
        lambda layer: layer.set_scale("nobody", 3.0),
        lambda layer: layer.set_scale("default", 0.0),
        lambda layer: layer.set_scale("default", 1.0),
    ]
    for step in steps:
        step(ours)
        step(theirs)
        assert ours.scaling["default"] == pytest.approx(theirs.scaling["default"], rel=1e-12)


def test_unscaling_is_exact_and_outputs_follow() -> None:
    layer = layer_of(peftlite)
    x = torch.randn(2, 8)
    before, plain = layer(x), layer.get_base_layer()(x)
    layer.scale_layer(1 / 3)
    layer.scale_layer(0.7)
    assert not torch.equal(layer(x), before)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer):
        copied.unscale_layer()
        assert torch.equal(copied(x), before)
    layer.set_scale("default", 0.0)
    assert torch.equal(layer(x), plain)


def test_what_something_else_wrote_is_the_new_beginning() -> None:
    layer = layer_of(peftlite)
    layer.scale_layer(2.0)
    layer.scaling["default"] = 5.0
    layer.scale_layer(2.0)
    layer.unscale_layer()
    assert layer.scaling["default"] == 5.0


def test_merged_adapters_and_methods_without_scaling_are_refused() -> None:
    layer = layer_of(peftlite)
    layer.merge()
    with pytest.raises(StateError, match="is merged"):
        layer.scale_layer(2.0)
    layer.scale_layer(1)
    model = peftlite.get_peft_model(
        nn.Sequential(nn.Linear(8, 8)), peftlite.IA3Config(target_modules=["0"], feedforward_modules=[])
    )
    with pytest.raises(StateError, match="IA3"):
        model.base_model.model[0].scale_layer(2.0)


def test_delete_on_one_layer_leaves_the_others() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    plain = copy.deepcopy(model[0])
    peftlite.inject_adapter_in_model(peftlite.LoraConfig(**{**CONFIG, "target_modules": ["0", "1"]}), model)
    first, second = (module for module in model if isinstance(module, AdapterLayer))
    x = torch.randn(2, 8)
    expected = second(x)
    first.delete_adapter("default")
    assert torch.equal(first(x), plain(x))
    assert torch.equal(second(x), expected)
    assert peftlite.get_peft_model_state_dict(model).keys() == {"1.lora_A.weight", "1.lora_B.weight"}
