"""Saving and loading by transformers' own methods: the wrapper's files, byte for byte, and real peft's readers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import peftlite
from peftlite import config
from peftlite.checkpoint import hub
from peftlite.errors import (
    AdapterFilesNotFoundError,
    AdapterNameError,
    CheckpointError,
    ConfigError,
    PeftliteWarning,
    UnsupportedFeatureError,
)
from tests.models import TINY, batch, tiny
from tests.versions import VERSION, works_with_peft

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(params=list(TINY))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def output(model: nn.Module, name: str = "llama") -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**batch(name)).logits
    return logits


def shake(model: nn.Module, seed: int = 0) -> None:
    """Give every trainable parameter random values, so that an adapter has an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def config_for(name: str) -> peftlite.LoraConfig:
    """One with a task: the head of BERT is trained whole."""
    task = {"bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}.get(name, "CAUSAL_LM")
    return peftlite.LoraConfig(r=2, task_type=task)


def adapted(
    name: str, config: peftlite.LoraConfig | None = None, adapter_name: str | None = None, **options: Any
) -> Any:
    model = tiny(name, **options)
    model.add_adapter(config or config_for(name), adapter_name)
    shake(model)
    return model


def files(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in (CONFIG, WEIGHTS)}


# ---- saving
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_shapes_and_both_functions_write_the_same_bytes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted(name, dtype=dtype)
    model.save_pretrained(tmp_path / "method")
    model.save_adapter(tmp_path / "function")
    wrapped = peftlite.wrap(model)
    wrapped.save_pretrained(tmp_path / "wrapped")
    expected = files(tmp_path / "method")
    assert files(tmp_path / "function") == expected
    assert files(tmp_path / "wrapped") == expected
    assert json.loads(expected[CONFIG])["inference_mode"] is True
    assert not model.peft_config["default"].inference_mode, "saving must not freeze the adapter"


def test_both_shapes_give_bit_equal_outputs(name: str) -> None:
    wrapped = peftlite.get_peft_model(tiny(name), config_for(name))
    shake(wrapped)
    assert torch.equal(output(wrapped, name), output(adapted(name), name))


@works_with_peft
@pytest.mark.parametrize("in_place", [True, False])
def test_real_peft_reads_what_save_pretrained_writes(name: str, in_place: bool, tmp_path: Path) -> None:
    model = adapted(name)
    model.save_pretrained(tmp_path)
    theirs = tiny(name)
    if in_place:
        from transformers import PreTrainedModel

        PreTrainedModel.load_adapter.__wrapped__(theirs, str(tmp_path))  # transformers' own
    else:
        theirs = peft.PeftModel.from_pretrained(theirs, str(tmp_path))
    torch.testing.assert_close(output(theirs, name), output(model, name))


@works_with_peft
@pytest.mark.parametrize("in_place", [True, False])
def test_we_read_what_real_peft_writes(name: str, in_place: bool, tmp_path: Path) -> None:
    lora = peft.LoraConfig(r=2, init_lora_weights=False)
    theirs = tiny(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own, about Conv1D
        if in_place:
            theirs.add_adapter(lora)
        else:
            theirs = peft.get_peft_model(theirs, lora)
    theirs.save_pretrained(str(tmp_path))
    ours = tiny(name)
    info = ours.load_adapter(str(tmp_path))
    assert not info.missing_keys | info.unexpected_keys | info.mismatched_keys
    torch.testing.assert_close(output(ours, name), output(theirs, name))


def test_every_adapter_is_saved_whatever_is_active(llama: Any, tmp_path: Path) -> None:
    llama.add_adapter(peftlite.LoraConfig(r=2))
    llama.add_adapter(peftlite.LoraConfig(r=4), "other")
    llama.set_adapter(["default", "other"])
    llama.save_pretrained(tmp_path)
    ranks = [json.loads((place / CONFIG).read_text())["r"] for place in (tmp_path, tmp_path / "other")]
    assert ranks == [2, 4]


def test_merged_adapters_are_saved_as_they_are(llama: Any, tmp_path: Path) -> None:
    llama.add_adapter(peftlite.LoraConfig(r=2))
    shake(llama)
    llama.save_pretrained(tmp_path / "apart")
    llama.merge_adapter()
    llama.save_pretrained(tmp_path / "merged")
    assert files(tmp_path / "apart") == files(tmp_path / "merged")


def test_a_model_without_adapters_is_saved_whole(llama: Any, tmp_path: Path) -> None:
    llama.add_adapter(peftlite.LoraConfig(r=2))
    llama.delete_adapter("default")
    llama.save_pretrained(tmp_path)
    assert not (tmp_path / CONFIG).exists()
    assert set(load_file(tmp_path / "model.safetensors")) == set(tiny("llama").state_dict())


def test_the_state_dict_is_that_of_real_peft(name: str) -> None:
    ours, theirs = adapted(name, peftlite.LoraConfig(r=2)), tiny(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.add_adapter(peft.LoraConfig(r=2))
    assert list(ours.get_adapter_state_dict()) == list(theirs.get_adapter_state_dict())
    ours.add_adapter(peftlite.LoraConfig(r=3), "other")
    assert {t.shape for t in ours.get_adapter_state_dict("default").values()} == {
        t.shape for t in theirs.get_adapter_state_dict().values()
    }


def test_values_are_taken_from_a_given_state_dict(llama: Any, tmp_path: Path) -> None:
    llama.add_adapter(peftlite.LoraConfig(r=2))
    doubled = {key: 2 * tensor for key, tensor in llama.state_dict().items()}
    llama.save_pretrained(tmp_path, state_dict=doubled)
    for key, tensor in llama.get_adapter_state_dict().items():
        assert torch.equal(load_file(tmp_path / WEIGHTS)[f"base_model.model.{key}"], 2 * tensor)


@pytest.mark.parametrize("option", [{"save_peft_format": False}, {"distributed_checkpoint": True}])
def test_ways_to_save_that_adapters_do_not_have(llama: Any, tmp_path: Path, option: dict[str, bool]) -> None:
    llama.add_adapter(peftlite.LoraConfig(r=2))
    with pytest.raises(UnsupportedFeatureError, match=next(iter(option))):
        llama.save_pretrained(tmp_path, **option)
    assert not list(tmp_path.iterdir())


def test_pushing_uploads_the_adapter_and_its_card(llama: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pushed = []

    def push(directory: Any, repo_id: str, **options: Any) -> str:
        pushed.append((repo_id, {path.name for path in Path(directory).iterdir()}, options["token"]))
        return "url"

    monkeypatch.setattr(hub, "push_to_hub", push)
    llama.add_adapter(peftlite.LoraConfig(r=2))
    assert llama.push_to_hub("me/adapter", token="t") == "url"
    llama.save_pretrained(tmp_path / "named", push_to_hub=True, token="t")
    expected = {CONFIG, WEIGHTS, "peftlite.json", "README.md"}
    assert pushed == [("me/adapter", expected, "t"), ("named", expected | {"generation_config.json"}, "t")]


# ---- loading
@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The files of an adapter of the tiny Llama."""
    adapted("llama").save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def trainable(model: nn.Module) -> set[str]:
    """The names of adapters with parameters that require gradients."""
    return {key.split(".")[-2] for key, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_loaded_adapter_is_active_and_frozen(llama: Any, saved: Path) -> None:
    llama.add_adapter(peftlite.LoraConfig(r=4))
    llama.train()
    llama.load_adapter(str(saved), "loaded")
    assert llama.active_adapters() == ["loaded"]
    assert trainable(llama) == set()
    assert not llama.training
    llama.set_adapter("default")
    assert trainable(llama) == {"default"}, "loading froze another adapter"


def test_a_loaded_adapter_may_train(llama: Any, saved: Path) -> None:
    llama.train()
    llama.load_adapter(str(saved), is_trainable=True)
    assert trainable(llama) == {"default"}
    assert llama.training


def test_loading_from_memory(llama: Any, saved: Path) -> None:
    source = adapted("llama")
    llama.load_adapter(peft_config=source.peft_config["default"], adapter_state_dict=source.get_adapter_state_dict())
    assert torch.equal(output(llama), output(source))
    other = tiny("llama")
    other.load_adapter(peft_config=config_for("llama").to_dict(), adapter_state_dict=load_file(saved / WEIGHTS))
    assert torch.equal(output(other), output(source))


@pytest.mark.skipif(VERSION < (5, 0), reason="`load_adapter` has no `hotswap` before transformers 5")
def test_hotswap_replaces_the_tensors_of_an_adapter(llama: Any, saved: Path) -> None:
    llama.add_adapter(config_for("llama"))
    parameters = {id(p) for p in llama.parameters()}
    with pytest.raises(AdapterNameError, match=r"already is an adapter `default`.*hotswap"):
        llama.load_adapter(str(saved))
    llama.load_adapter(str(saved), hotswap=True)
    assert torch.equal(output(llama), output(adapted("llama")))
    assert {id(p) for p in llama.parameters()} == parameters
    assert trainable(llama) == {"default"}
    with pytest.raises(AdapterNameError, match="none called `other`; nearest: `default`"):
        llama.load_adapter(str(saved), "other", hotswap=True)


@pytest.mark.skipif(VERSION < (5, 4), reason="older versions look for the base model where the adapter says")
def test_a_directory_with_base_model_and_adapter_loads_by_from_pretrained(saved: Path) -> None:
    tiny("llama").save_pretrained(saved)
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert torch.equal(output(model), output(adapted("llama")))
    assert isinstance(model.peft_config["default"], peftlite.LoraConfig)
    _, info = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not info["missing_keys"]


def test_a_kind_of_adapter_that_only_peft_has_goes_to_peft(
    llama: Any, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = adapted("llama")
    monkeypatch.delitem(config._classes.homes, "LORA")  # as if it were not built
    with pytest.warns(PeftliteWarning, match="`LORA`.*transformers loads it with `peft`"):
        llama.load_adapter(str(saved))
    assert llama.active_adapters() == ["default"]
    assert isinstance(llama.peft_config["default"], peft.LoraConfig)
    torch.testing.assert_close(output(llama), output(ours))
    with pytest.raises(UnsupportedFeatureError, match="`LORA`"):
        ours.load_adapter(str(saved), "theirs")
    assert list(ours.peft_config) == ["default"]


@pytest.mark.skipif(VERSION < (5, 0), reason="arguments that it does not have are refused by Python")
def test_what_cannot_be_loaded_changes_nothing(llama: Any, saved: Path, tmp_path: Path) -> None:
    before = {key: value.clone() for key, value in llama.state_dict().items()}
    with pytest.raises(AdapterFilesNotFoundError, match="no directory"):
        llama.load_adapter(str(tmp_path / "savd"))
    with pytest.raises(ConfigError, match="needs `peft_model_id`"):
        llama.load_adapter()
    with pytest.raises(ConfigError, match=r"`revison`.*nearest: `revision`"):
        llama.load_adapter(str(saved), revison="main")
    tensors = load_file(saved / WEIGHTS)
    tensors.pop(next(iter(tensors)))
    with pytest.raises(CheckpointError, match="1 tensor missing"):
        llama.load_adapter(peft_config=config_for("llama"), adapter_state_dict=tensors)
    assert not llama._hf_peft_config_loaded
    assert llama.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in llama.state_dict().items())
    assert all(parameter.requires_grad for parameter in llama.parameters())
