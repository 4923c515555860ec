"""Methods that code for `peft` calls on wrappers, tuners' models and layers, beside those of real PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftlite
from peftlite import LoraConfig
from peftlite.core.tree import layers
from peftlite.core.variant import Additive
from peftlite.errors import AdapterNameError, CheckpointError, ConfigError, StateError
from tests.contract.rows import Case, cases
from tests.models import tiny
from tests.twins import fill
from tests.versions import checkpointing, works_with_peft

ROWS = [case for case in cases(each_dtype=False) if not case.quantised]


# ---- becoming LoRA
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_what_can_become_lora_says_so(case: Case) -> None:
    model = peftlite.wrap(case.adapted())
    try:
        peftlite.convert_to_lora(model, 2)
        works = True
    except ConfigError:
        works = False
    assert model.supports_lora_conversion() is model.base_model.supports_lora_conversion() is works


def test_what_trains_the_base_models_biases_cannot() -> None:
    model: Any = peftlite.get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"], bias="all"))
    assert not model.supports_lora_conversion()  # a LoRA has no such biases
    for thing in (model, model.base_model):
        with pytest.raises(AdapterNameError):
            thing.supports_lora_conversion("typo")


# ---- what an adapter adds
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_what_an_adapter_adds_is_what_a_merge_adds(case: Case) -> None:
    for layer in layers(case.adapted()):
        variant = layer.variants["default"]
        if not isinstance(variant, Additive) or not case.mergeable:
            with pytest.raises(StateError, match="no sum with the weight"):
                layer.get_delta_weight("default")
            continue
        delta, parameter = layer.get_delta_weight("default"), layer.host.parameter
        assert delta.shape == parameter.shape
        assert delta.dtype == next(layer.parameters_of("default")).dtype
        assert delta.requires_grad
        if case.mergeable and type(variant).merge is Additive.merge:
            expected = parameter.detach().double() + delta.detach().double()
            layer.merge()
            torch.testing.assert_close(layer.host.parameter.detach().double(), expected, **case.tolerance)
            assert torch.equal(layer.get_delta_weight("default"), delta)


def test_where_an_adapter_adds_nothing_it_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    peftlite.inject(model, LoraConfig(r=1, target_modules=["0"]))
    peftlite.inject(model, LoraConfig(r=1, target_modules=["1"]), "other")
    layer: Any = model[0]
    with pytest.raises(StateError, match="`other` is not on this layer"):
        layer.get_delta_weight("other")
    with pytest.raises(AdapterNameError):
        layer.get_delta_weight("typo")
    assert layer.get_delta_weight("default").requires_grad


# ---- LoRA whose base was changed at first
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fields", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora", "use_dora": True}])
def test_what_training_changed_is_a_lora_as_in_peft(fields: dict[str, Any], tmp_path: Path) -> None:
    fields = {"r": 2, "target_modules": ["q_proj", "v_proj"], **fields}
    ours, theirs = (lib.get_peft_model(tiny("llama"), lib.LoraConfig(**fields)) for lib in (peftlite, peft))
    for library, model in ((peftlite, ours), (peft, theirs)):
        place = tmp_path / library.__name__
        model.save_pretrained(place)
        model.load_adapter(str(place), "initial")
    fill(ours)
    trained = peftlite.get_peft_model_state_dict(ours)
    got = ours.base_model.subtract_mutated_init(trained, "initial", {})
    kept = {
        key: tensor.clone() for key, tensor in peftlite.get_peft_model_state_dict(ours, adapter_name="initial").items()
    }
    peft.set_peft_model_state_dict(theirs, kept, "initial")
    expected = theirs.base_model.subtract_mutated_init(trained, "initial", {})
    lost = {key for key in trained if "magnitude" in key}  # by PEFT, though the update is scaled by them
    assert got.keys() == expected.keys() | lost
    assert all(torch.equal(got[key], trained[key] if key in lost else expected[key]) for key in got)
    with pytest.raises(CheckpointError, match="not what this adapter was at first"):
        ours.base_model.subtract_mutated_init({key: tensor[:1] for key, tensor in trained.items()}, "initial")
    with pytest.raises(AdapterNameError):
        ours.base_model.subtract_mutated_init(trained, "typo")


# ---- what there is
def plain(table: dict[str, Any]) -> dict[str, Any]:
    return {key: value if isinstance(value, str) else list(value) for key, value in table.items()}


@pytest.mark.parametrize("kind", list(peftlite.PEFT_TYPE_TO_TUNER_MAPPING))
def test_tuners_know_their_layers_and_targets_as_in_peft(kind: str) -> None:
    ours: Any = peftlite.PEFT_TYPE_TO_TUNER_MAPPING[kind]  # type: ignore[index]
    theirs = peft.PEFT_TYPE_TO_TUNER_MAPPING[kind]
    assert ours.tuner_layer_cls.__name__ == theirs.tuner_layer_cls.__name__
    if kind != "IA3":  # which has a table, but not as a class attribute
        assert plain(ours.target_module_mapping) == plain(getattr(theirs, "target_module_mapping", {}))
    assert ours.prefix == theirs.prefix


def test_a_tuner_finds_its_own_layers_by_their_class() -> None:
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], r=2)
    model = peftlite.get_peft_model(tiny("llama"), config)
    found = [m for m in model.modules() if isinstance(m, model.base_model.tuner_layer_cls)]
    assert len(found) == 2
    assert not [m for m in model.modules() if isinstance(m, peftlite.IA3Model.tuner_layer_cls)]


def test_parameters_that_are_targeted_are_named_as_in_peft() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 4, 5))
            self.down = nn.Parameter(torch.randn(3, 5, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.up[0].T @ self.down[0].T

    names = []
    for library in (peftlite, peft):
        model = nn.ModuleDict({"experts": Experts(), "head": nn.Linear(4, 4)})
        fields: dict[str, Any] = {"target_modules": ["head"], "target_parameters": ["experts.up", "experts.down"]}
        wrapped: Any = library.get_peft_model(model, library.LoraConfig(**fields))
        names.append((sorted(wrapped.targeted_parameter_names), wrapped.base_model.targeted_module_names))
    assert names[0][0] == names[1][0] == ["experts.down", "experts.up"]
    assert "head" in names[0][1]


# ---- gradient checkpointing
def hooks(model: Any) -> int:
    return len(model.get_input_embeddings()._forward_hooks)


@works_with_peft
def test_a_model_is_prepared_for_gradient_checkpointing() -> None:
    for library in (peftlite, peft):
        model: Any = library.get_peft_model(tiny("llama"), library.LoraConfig(target_modules=["q_proj"]))
        base = model.get_base_model()
        assert hooks(base) == 0
        assert model.prepare_model_for_gradient_checkpointing(base) is None
        assert hooks(base) == 1
        checkpointing(base, {"use_reentrant": True})
        model.train()
        model(torch.arange(4)[None]).logits.sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        assert model.prepare_model_for_gradient_checkpointing(nn.Linear(2, 2)) is None  # has no embeddings


# ---- what configs leave open
@pytest.mark.parametrize("config", ["LoHaConfig", "LoKrConfig", "VeraConfig"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_default_targets_are_those_of_peft(config: str, name: str) -> None:
    found = [
        sorted(library.get_peft_model(tiny(name), getattr(library, config)()).peft_config["default"].target_modules)
        for library in (peftlite, peft)
    ]
    assert found[0] == found[1]
