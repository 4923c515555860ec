"""BD-LoRA and QALoRA against real PEFT, and which forms of LoRA go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import GPTQLoraLinear
from torch import Tensor, nn

import peftlite
from peftlite import LoraConfig
from peftlite.core.tree import layers
from tests.tuners.pairs import apart


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.q_proj = nn.Linear(12, 8)
        self.k_proj = nn.Linear(12, 8, bias=False)
        self.o_proj = nn.Linear(8, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.o_proj(self.q_proj(x).tanh() * self.k_proj(x))
        return y


BLOCKS = {"target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_", "k_"], "nblocks": 2}


def both(**fields: Any) -> tuple[Any, Any]:
    """(ours, theirs): `Net` adapted with the same random weights, in eval mode."""
    models = []
    for library in (peftlite, peft):
        config = library.LoraConfig(
            **{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "o_proj"], **fields}
        )
        models.append(library.get_peft_model(Net(), config).eval())
    with torch.no_grad():
        for layer in layers(models[0]):
            for parameter in layer.parameters_of("default"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    models[1].load_state_dict(models[0].state_dict())
    return models[0], models[1]


@pytest.mark.parametrize("fields", [{"use_rslora": True}, {"lora_alpha": 3}], ids=["rslora", "plain"])
def test_blocks_are_as_in_peft(fields: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = both(use_bdlora=BLOCKS, **fields)
    x = torch.randn(5, 12)
    assert repr(ours.base_model.model) == repr(theirs.base_model.model)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    expected = ours(x)
    assert apart(expected, theirs(x)) <= 1e-6
    for model in (ours, theirs):
        model(x).square().sum().backward()
    for (name, one), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert one.requires_grad == other.requires_grad
        if one.grad is not None:
            assert apart(one.grad, other.grad) <= 2e-6, name
    for model, other in ((ours, peft), (theirs, peftlite)):
        place = tmp_path / other.__name__
        model.save_pretrained(place)
        assert apart(other.PeftModel.from_pretrained(Net(), place)(x), expected) <= 1e-6
    for model in (ours, theirs):
        model.merge_adapter()
        assert apart(model(x), expected) <= 1e-6


def test_blocks_begin_as_wide_as_in_peft() -> None:
    drawn = []
    for library in (peftlite, peft):
        model = nn.Sequential()
        model.add_module("layer", nn.Linear(400, 300))
        blocks = {"target_modules_bd_a": ["layer"], "nblocks": 4}
        config = library.LoraConfig(r=8, target_modules=["layer"], use_bdlora=blocks)
        drawn.append(library.get_peft_model(model, config).base_model.model.layer.lora_A["default"].weight.detach())
    assert drawn[0].shape == drawn[1].shape == (8, 100)
    assert abs(float(drawn[0].std() / drawn[1].std()) - 1) < 0.1
    assert abs(float(drawn[0].abs().max() / drawn[1].abs().max()) - 1) < 0.1


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"use_bdlora": {"target_modules_bd_a": ["o_proj"]}}, "neither for A nor for B"),
    ({"use_bdlora": {"target_modules_bd_a": ["proj"], "target_modules_bd_b": ["q_"]}}, "`target_modules_bd_b`"),
    ({"use_bdlora": {"target_modules_bd_a": ["proj"], "nblocks": 5}}, "`nblocks=5`"),
    ({"use_bdlora": {"target_modules_bd_a": ["proj"], "nblocks": 2}, "r": 3}, "rank 3"),
    ({"use_qalora": True, "qalora_group_size": 5}, "`qalora_group_size=5`"),
]


@pytest.mark.parametrize(("fields", "reason"), REFUSED)
def test_layers_that_do_not_divide_are_refused_by_name(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(peftlite.errors.UnsupportedLayerError, match=reason):
        peftlite.plan(Net(), LoraConfig(target_modules=["q_proj", "o_proj"], **fields))


def test_modules_that_blocks_do_not_name_stay_plain_on_request() -> None:
    blocks = {"target_modules_bd_a": ["o_proj"], "nblocks": 2, "match_strict": False}
    ours, theirs = both(use_bdlora=blocks)
    x = torch.randn(5, 12)
    assert repr(ours.base_model.model) == repr(theirs.base_model.model)
    assert apart(ours(x), theirs(x)) <= 1e-6
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    config = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "o_proj"], use_bdlora=blocks)
    assert peftlite.plan(Net(), config).parameters == ours.get_nb_trainable_parameters()[0]


class Packed(nn.Module):
    """What PEFT takes for a GPTQ layer, the only kind on which it has QALoRA."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.bias = linear, None
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", torch.zeros(1, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # PEFT's, about `Packed`
@pytest.mark.parametrize("group", [1, 2, 4, 12])
def test_groups_of_inputs_are_as_in_peft(group: int) -> None:
    ours = peftlite.get_peft_model(
        Net(), LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], use_qalora=True, qalora_group_size=group)
    )
    layer: Any = ours.base_model.model.q_proj
    theirs = GPTQLoraLinear(
        Packed(layer.base_layer),
        "default",
        config=peft.LoraConfig(r=4, lora_alpha=6, use_qalora=True, qalora_group_size=group),
        r=4,
        lora_alpha=6,
    )
    with torch.no_grad():
        for slot in ("lora_A", "lora_B"):
            parameter = getattr(layer, slot)["default"].weight
            parameter.add_(torch.randn_like(parameter))
            getattr(theirs, slot)["default"].weight.copy_(parameter)
    assert repr(layer.lora_A) == repr(theirs.lora_A)
    x = torch.randn(5, 12)
    assert apart(layer(x), theirs(x)) <= 1e-6
    for module in (layer, theirs):
        module(x).square().sum().backward()
    for slot in ("lora_A", "lora_B"):
        assert apart(getattr(layer, slot)["default"].weight.grad, getattr(theirs, slot)["default"].weight.grad) <= 1e-6


TOGETHER = [
    {"use_dora": True, "use_qalora": True},
    {"use_dora": True, "use_bdlora": BLOCKS},
    {"use_dora": True, "init_lora_weights": "mica"},
    {"use_dora": True, "lora_bias": True},
    {"use_bdlora": BLOCKS, "lora_bias": True},
    {"use_bdlora": BLOCKS, "init_lora_weights": "pissa"},
    {"use_qalora": True, "init_lora_weights": "olora"},
    {"lora_bias": True, "init_lora_weights": "gaussian"},
]


@pytest.mark.parametrize("fields", TOGETHER, ids=lambda fields: "-".join(fields))
def test_forms_that_do_not_go_together_are_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(peftlite.errors.ConfigError, match=r"no form (together|with)|can only be|needs") as caught:
        LoraConfig(**fields)
    assert any(name in str(caught.value) for name in fields)


def test_two_forms_on_one_layer_each_keep_their_own() -> None:
    model, x = Net(), torch.randn(5, 12)
    forms: dict[str, dict[str, Any]] = {
        "plain": {},
        "dora": {"use_dora": True},
        "pissa": {"init_lora_weights": "pissa"},
        "blocks": {"use_bdlora": BLOCKS},
        "pooled": {"use_qalora": True, "qalora_group_size": 4},
        "mica": {"init_lora_weights": "mica"},
    }
    expected = {}
    for name, fields in forms.items():
        config = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], **fields)
        for target in (model, alone := Net()):
            torch.manual_seed(len(name))
            peftlite.inject_adapter_in_model(config, target, name)
            with torch.no_grad():
                for layer in layers(target):
                    for parameter in layer.parameters_of(name):
                        parameter.add_(torch.randn_like(parameter))
        expected[name] = alone(x)
    for name in forms:
        peftlite.set_adapter(model, name)
        assert torch.equal(model(x), expected[name]), name
        peftlite.merge_adapter(model)
        assert apart(model(x), expected[name]) <= 1e-6, name
        peftlite.unmerge_adapter(model)
    peftlite.set_adapter(model, list(forms))
    together = model(x)
    peftlite.merge_adapter(model, list(forms))
    assert apart(model(x), together) <= 2e-6
