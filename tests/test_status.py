"""Reports on layers and models: equal to PEFT's through a life of adapters, in both shapes, where PEFT says all."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import peft
import pytest
import torch
from torch import nn

import peftlite
from peftlite import LoraConfig, errors, get_layer_status, get_model_status, get_peft_model, inject_adapter_in_model
from tests.models import tiny
from tests.twins import Twins, twins

FIELDS: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


def same(both: Twins) -> None:
    """Both libraries report the same, asked as functions and as methods."""
    assert asdict(get_model_status(both.ours)) == asdict(peft.get_model_status(both.theirs))
    mine = [asdict(report) for report in get_layer_status(both.ours)]
    assert mine == [asdict(report) for report in peft.get_layer_status(both.theirs)]
    assert both.ours.get_model_status() == get_model_status(both.ours)
    assert both.ours.get_layer_status() == get_layer_status(both.ours)


@pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning:peft")
def test_reports_through_a_life_of_adapters() -> None:
    both = twins("llama", task_type="CAUSAL_LM", **FIELDS)
    models = (both.ours, both.theirs)
    same(both)
    both.add("b", r=2, target_modules=["q_proj", "k_proj", "lm_head"])
    same(both)
    for model in models:
        model.base_model.set_adapter(["b", "default"])
    same(both)
    for model in models:
        model.merge_adapter()
    same(both)
    for model in models:
        model.unmerge_adapter()
        model.merge_adapter(["default"])
    same(both)
    for model in models:
        model.unmerge_adapter()
        model.set_requires_grad("b", False)
    same(both)
    for model in models:
        model.set_requires_grad("b")
        model.delete_adapter("default")
    both.ours.set_adapter("b")
    both.theirs.set_adapter("b")
    mine, theirs = asdict(get_model_status(both.ours)), asdict(peft.get_model_status(both.theirs))
    assert mine.pop("num_adapter_layers") == 5
    assert theirs.pop("num_adapter_layers") == 7  # PEFT keeps layers that no adapter is left on
    assert mine == theirs


def test_reports_of_modules_trained_whole() -> None:
    both = twins("bert", target_modules=["query"], task_type="SEQ_CLS")
    same(both)
    for model in (both.ours, both.theirs):
        model.merge_adapter()
    same(both)
    assert get_model_status(both.ours).merged_adapters == "irregular"  # the head has nothing to merge
    for model in (both.ours, both.theirs):
        model.unmerge_adapter()
    both.add("two", target_modules=["query"], task_type="SEQ_CLS")
    same(both)
    for model in (both.ours, both.theirs):
        model.set_adapter("two")
    same(both)


def test_reports_of_overrides_on_single_layers() -> None:
    both = twins("llama", **FIELDS)
    both.add("b", **FIELDS)
    models = (both.ours, both.theirs)
    places = [model.base_model.model.model.layers[0].self_attn.q_proj for model in models]
    for place in places:
        place.set_adapter("b")
    same(both)
    assert get_model_status(both.ours).active_adapters == "irregular"
    for model, place in zip(models, places, strict=True):
        model.set_adapter("default")
        place.merge()
    same(both)
    assert get_model_status(both.ours).merged_adapters == "irregular"
    for place in places:
        place.unmerge()
        place.lora_A["default"].weight.requires_grad_(False)
    same(both)
    assert get_model_status(both.ours).requires_grad == {"default": "irregular", "b": False}
    for model, place in zip(models, places, strict=True):
        model.set_adapter("default")
        place.lora_A["default"].weight.requires_grad_(True)
        place.enable_adapters(False)
    mine, theirs = get_model_status(both.ours), peft.get_model_status(both.theirs)
    assert mine.enabled == theirs.enabled == "irregular"
    assert mine.requires_grad["default"] is True  # PEFT freezes what it switches off


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_reports_of_other_places(name: str) -> None:
    same(twins("llama", target_modules=[name, "q_proj"]))


def test_devices() -> None:
    fields = {**FIELDS, "task_type": "CAUSAL_LM"}
    ours = get_peft_model(tiny("llama"), LoraConfig(**fields), low_cpu_mem_usage=True)
    theirs = peft.get_peft_model(tiny("llama"), peft.LoraConfig(**fields), low_cpu_mem_usage=True)
    same(Twins("llama", ours, theirs))
    assert get_model_status(ours).devices == {"default": ["meta"]}


def test_in_place_reports_say_what_pefts_leave_out() -> None:
    ours = inject_adapter_in_model(LoraConfig(**FIELDS), tiny("llama"))
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(**FIELDS), tiny("llama"))
    assert [asdict(r) for r in get_layer_status(ours)] == [asdict(r) for r in peft.get_layer_status(theirs)]
    mine = asdict(get_model_status(ours))
    assert mine == {**asdict(peft.get_model_status(theirs)), "peft_types": {"default": "LORA"}}
    plain = inject_adapter_in_model(LoraConfig(target_modules=["0"]), nn.Sequential(nn.Linear(2, 2)))
    assert get_model_status(plain).base_model_type == "Sequential"  # PEFT: "other"


def test_reports_of_the_inner_wrapper() -> None:
    both = twins("llama", **FIELDS)
    assert get_model_status(both.ours.base_model) == get_model_status(both.ours)
    assert get_layer_status(both.ours.base_model) == get_layer_status(both.ours)


def test_inside_a_context_reports_are_about_calls_made_there() -> None:
    both = twins("llama", **FIELDS)
    both.add("b", **FIELDS)
    with both.ours.disable_adapter(), both.theirs.disable_adapter():
        mine, theirs = get_model_status(both.ours), peft.get_model_status(both.theirs)
        assert mine.enabled is theirs.enabled is False
        assert mine.active_adapters == theirs.active_adapters == ["default"]
        assert mine.requires_grad == {"default": True, "b": False}  # PEFT writes to all, and has to guess afterwards
    with both.ours.use_adapter("b"):
        assert get_model_status(both.ours).active_adapters == ["b"]
        assert get_model_status(both.ours).enabled is True
    with peftlite.core.lifecycle.use_adapter_per_row(both.ours, ["b", "__base__", "default"]):
        assert get_model_status(both.ours).active_adapters == ["b", "default"]
    same(both)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_printed_line_is_pefts(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    targets = {"llama": ["q_proj"], "bert": ["query"]}[name]
    both = twins(name, target_modules=targets, task_type={"llama": "CAUSAL_LM", "bert": "SEQ_CLS"}[name])
    both.theirs.print_trainable_parameters()
    theirs = capsys.readouterr().out
    both.ours.print_trainable_parameters()
    peftlite.print_trainable_parameters(both.ours.unwrap())
    assert capsys.readouterr().out == 2 * theirs


def test_parameters_are_counted_once_and_none_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    linear = nn.Linear(2, 3)
    assert peftlite.core.status.count_parameters(nn.ModuleList([linear, linear])) == (9, 9)
    peftlite.print_trainable_parameters(nn.Identity())
    assert capsys.readouterr().out == "trainable params: 0 || all params: 0 || trainable%: 0.0000\n"


def test_a_model_without_adapters_has_no_report() -> None:
    for report in (get_layer_status, get_model_status):
        with pytest.raises(errors.NoAdapterError, match="Linear has no adapters"):
            report(nn.Linear(1, 1))


def test_a_compiled_wrapper_is_looked_through() -> None:
    model = get_peft_model(tiny("llama"), LoraConfig(**FIELDS))
    compiled: Any = torch.compile(model, backend="eager")
    assert get_model_status(compiled) == get_model_status(model)
    assert get_layer_status(compiled) == get_layer_status(model)
