"""The wrapper's files: from PEFT's `save_pretrained` to ours and back, and what each method accepts and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peftlite import LoraConfig, PeftModel, PeftModelForCausalLM, errors, get_peft_model
from peftlite.checkpoint import adapters, hub
from tests.models import batch, tiny
from tests.snapshots import check_unchanged, snapshot
from tests.twins import fill, trainable, twins

ALL: dict[str, dict[str, Any]] = {
    "llama": {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"], "task_type": "CAUSAL_LM"},
    "gpt2": {"target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"},
    "bert": {"target_modules": ["query", "word_embeddings"], "task_type": "SEQ_CLS", "use_rslora": True},
    "t5": {"target_modules": ["q", "wo"], "task_type": "SEQ_2_SEQ_LM", "rank_pattern": {"wo": 3}},
    "opt": {"target_modules": ["q_proj", "fc1"], "bias": "lora_only"},
}
CAUSAL: dict[str, Any] = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


def logits(model: Any, name: str = "llama") -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch(name)).logits


def saved(directory: Path, name: str = "llama", **fields: Any) -> Any:
    """A model whose adapter is in the directory."""
    model = get_peft_model(tiny(name), LoraConfig(**{**CAUSAL, **fields}))
    fill(model)
    model.save_pretrained(directory)
    return model


# ---- with PEFT
@pytest.mark.parametrize("name", sorted(ALL))
def test_peft_reads_what_the_wrapper_writes(tmp_path: Path, name: str) -> None:
    both = twins(name, **ALL[name])
    both.ours.save_pretrained(tmp_path)
    read = peft.PeftModel.from_pretrained(tiny(name), tmp_path)
    assert type(read).__name__ == type(both.ours).__name__
    torch.testing.assert_close(logits(both.ours, name), logits(read, name), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(ALL))
def test_the_wrapper_reads_what_peft_writes(tmp_path: Path, name: str) -> None:
    both = twins(name, **ALL[name])
    both.theirs.save_pretrained(tmp_path)
    read = PeftModel.from_pretrained(tiny(name), tmp_path)
    assert type(read) is type(both.ours)
    assert str(read) == str(both.ours)
    assert torch.equal(logits(read, name), logits(both.ours, name))


# ---- from_pretrained
def test_a_loaded_adapter_is_for_inference_unless_said_otherwise(tmp_path: Path) -> None:
    saved(tmp_path)
    for given, trains in ({}, False), ({"is_trainable": True}, True):
        ours = PeftModel.from_pretrained(tiny("llama").train(), tmp_path, **given)
        theirs = peft.PeftModel.from_pretrained(tiny("llama").train(), tmp_path, **given)
        assert trainable(ours) == trainable(theirs)
        assert bool(trainable(ours)) is trains
        assert ours.training is theirs.training is trains
        assert ours.get_base_model().training is trains
        assert ours.peft_config["default"].inference_mode is theirs.peft_config["default"].inference_mode
    ours.set_requires_grad("default", False)
    assert trainable(ours) == []


class Mine(PeftModel):
    """A user's own wrapper."""


def test_the_task_picks_the_class(tmp_path: Path) -> None:
    saved(tmp_path / "task")
    saved(tmp_path / "none", task_type=None)
    assert type(Mine.from_pretrained(tiny("llama"), tmp_path / "task")) is PeftModelForCausalLM
    assert type(Mine.from_pretrained(tiny("llama"), tmp_path / "none")) is Mine
    assert type(PeftModel.from_pretrained(tiny("llama"), tmp_path / "none")) is PeftModel
    assert json.loads((tmp_path / "none" / "adapter_config.json").read_text())["auto_mapping"] == {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
    }


def test_names_subfolders_and_mappings(tmp_path: Path) -> None:
    model = saved(tmp_path / "sub")
    read = PeftModel.from_pretrained(tiny("llama"), str(tmp_path), "mine", subfolder="sub")
    assert read.active_adapters == ["mine"]
    assert torch.equal(logits(read), logits(model))
    config = LoraConfig(**CAUSAL, lora_alpha=16)
    other = PeftModel.from_pretrained(tiny("llama"), tmp_path / "sub", config=config)
    assert other.peft_config["default"].lora_alpha == 16
    assert config.inference_mode is False


@pytest.fixture
def foreign(tmp_path: Path) -> tuple[Path, Any]:
    """An adapter whose keys are another library's, and the model that it is of."""
    model = saved(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key.replace(".self_attn.", ".attn."): t for key, t in load_file(path).items()}, path)
    return tmp_path, model


def test_keys_of_other_libraries_are_mapped(foreign: tuple[Path, Any]) -> None:
    place, model = foreign
    mapping = {r"\.attn\.": ".self_attn."}
    read = PeftModel.from_pretrained(tiny("llama"), place, key_mapping=mapping)
    assert torch.equal(logits(read), logits(model))
    with pytest.raises(errors.CheckpointError, match=r"`base_model\..*attn"):
        read.load_adapter(place, "b")
    read.load_adapter(place, "b", key_mapping=mapping)
    read.set_adapter("b")
    assert torch.equal(logits(read), logits(model))


def test_what_does_not_fit_is_left_out_when_asked(foreign: tuple[Path, Any]) -> None:
    place, _ = foreign
    with pytest.warns(errors.PeftliteWarning, match="missing"):
        read = PeftModel.from_pretrained(tiny("llama"), place, strict=False)
    with pytest.warns(errors.PeftliteWarning, match="missing"):
        report = read.load_adapter(place, "b", strict=False)
    assert len(report.missing_keys) == len(report.unexpected_keys) == 4
    assert not report.loaded_keys


def test_tensors_go_where_they_are_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved(tmp_path)
    asked: list[Any] = []
    load = adapters.load_adapter
    monkeypatch.setattr(
        adapters, "load_adapter", lambda *given, **o: asked.append(o["torch_device"]) or load(*given, **o)
    )
    PeftModel.from_pretrained(tiny("llama"), tmp_path, torch_device="cpu")
    model.load_adapter(tmp_path, "b", torch_device="cpu")
    assert asked == ["cpu", "cpu"]


# ---- several adapters
def test_each_adapter_has_its_directory(tmp_path: Path) -> None:
    both = twins("llama", **CAUSAL)
    both.add("b", target_modules=["v_proj"], task_type="CAUSAL_LM")
    for model, place in (both.ours, "ours"), (both.theirs, "theirs"):
        model.save_pretrained(tmp_path / place)
    files = [sorted(str(f.relative_to(tmp_path / p)) for f in (tmp_path / p).rglob("*")) for p in ("ours", "theirs")]
    assert files[0] == sorted([*files[1], "peftlite.json", "b/peftlite.json"])
    both.ours.save_pretrained(tmp_path / "b-only", selected_adapters=["b"])
    assert {f.name for f in (tmp_path / "b-only").iterdir()} == {"b", "README.md"}

    read = PeftModel.from_pretrained(tiny("llama"), tmp_path / "theirs")
    read.train()
    report = read.load_adapter(tmp_path / "theirs" / "b", "b")
    assert report.fits
    assert not report.missing_keys
    assert read.active_adapters == ["default"]
    assert not read.training
    assert torch.equal(logits(read), logits(both.ours))
    read.set_adapter("b")
    both.ours.set_adapter("b")
    assert torch.equal(logits(read), logits(both.ours))
    assert trainable(read) == []
    read.train()
    read.load_adapter(tmp_path / "theirs" / "b", "c", is_trainable=True)
    assert read.training
    read.set_adapter("c")
    assert len(trainable(read)) == 4


def test_loading_over_an_adapter_replaces_its_weights(tmp_path: Path) -> None:
    model = saved(tmp_path)
    other = get_peft_model(tiny("llama"), LoraConfig(**CAUSAL))
    pointers = [p.data_ptr() for p in other.parameters()]
    other.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits(other), logits(model))
    assert [p.data_ptr() for p in other.parameters()] == pointers  # optimisers keep their hold


# ---- refusals
def test_a_load_that_fails_changes_nothing(tmp_path: Path) -> None:
    saved(tmp_path / "good")
    saved(tmp_path / "other", target_modules=["v_proj"])
    weights = (tmp_path / "other" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "good" / "adapter_model.safetensors").write_bytes(weights)
    base = tiny("llama").train()
    before = snapshot(base)
    with pytest.raises(errors.CheckpointError, match=r"(?s)q_proj.*Nothing was changed"):
        PeftModel.from_pretrained(base, tmp_path / "good")
    with pytest.raises(errors.AdapterFilesNotFoundError, match=r"nearest: `good`"):
        PeftModel.from_pretrained(base, tmp_path / "gud")
    with pytest.raises(errors.ConfigError, match=r"`subfoldr` is not an option of loading; nearest: `subfolder`"):
        PeftModel.from_pretrained(base, tmp_path / "other", subfoldr="x")
    with pytest.raises(errors.ConfigError, match=r"`peftlite\.LoraConfig`"):
        PeftModel.from_pretrained(base, tmp_path / "other", config=peft.LoraConfig())  # type: ignore[arg-type]
    check_unchanged(base, before)
    with pytest.warns(errors.PeftliteWarning, match="`ephemeral_gpu_offload=True` has no effect"):
        model = PeftModel.from_pretrained(base, tmp_path / "other", ephemeral_gpu_offload=True)
    assert model.active_adapters == ["default"]


def test_a_wrapper_refuses_what_it_cannot_take(tmp_path: Path) -> None:
    model = saved(tmp_path / "lora").train()
    ia3 = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    peft.get_peft_model(tiny("llama"), ia3).save_pretrained(tmp_path / "ia3")
    before = snapshot(model)
    with pytest.raises(errors.StateError, match=r"`PeftModelForCausalLM` is a wrapper already.*`load_adapter`"):
        PeftModel.from_pretrained(model, tmp_path / "lora")
    with pytest.raises(errors.StateError, match=r"`default`.*`peftlite.wrap\(model\)`"):
        PeftModel.from_pretrained(model.unwrap(), tmp_path / "lora", "b")
    with pytest.raises(errors.ConfigError, match=r"'IA3'.*PeftModelForCausalLM.*`LORA`"):
        model.load_adapter(tmp_path / "ia3", "b")
    with pytest.raises(errors.AdapterNameError, match=r"`a\.b`"):
        model.load_adapter(tmp_path / "lora", "a.b")
    check_unchanged(model, before)


def test_saving_refuses_what_it_does_not_do(tmp_path: Path) -> None:
    model = get_peft_model(tiny("llama"), LoraConfig(**CAUSAL))
    place = tmp_path / "x"
    with pytest.raises(errors.UnsupportedFeatureError, match="`safe_serialization`"):
        model.save_pretrained(place, safe_serialization=False)
    with pytest.raises(errors.AdapterNameError, match="`defalt`; nearest: `default`"):
        model.save_pretrained(place, selected_adapters=["defalt"])
    model.save_pretrained(place, is_main_process=False)
    assert not place.exists()
    model.unload()
    with pytest.raises(errors.NoAdapterError, match="PeftModelForCausalLM has no adapters"):
        model.save_pretrained(place)
    assert not place.exists()


def test_values_can_come_from_a_state_dict(tmp_path: Path) -> None:
    model = saved(tmp_path / "a")
    gathered = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = logits(model)
    fill(model)
    model.save_pretrained(tmp_path / "b", state_dict=gathered)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny("llama"), tmp_path / "b")), expected)


# ---- the hub
def test_push_to_hub_uploads_all_adapters_and_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(tiny("llama"), LoraConfig(**CAUSAL))
    model.add_adapter("b", LoraConfig(**CAUSAL))
    pushed: dict[str, Any] = {}

    def push(directory: str, repo_id: str, **options: Any) -> str:
        place = Path(directory)
        pushed.update(repo_id=repo_id, files=sorted(str(f.relative_to(place)) for f in place.rglob("*.*")), **options)
        pushed["card"] = (place / "README.md").read_text()
        pushed["place"] = place
        return "url"

    monkeypatch.setattr(hub, "push_to_hub", push)
    assert model.push_to_hub("me/adapter", private=True, commit_message="First", tags=["mine"]) == "url"
    assert pushed["repo_id"] == "me/adapter"
    assert (pushed["private"], pushed["commit_message"], pushed["create_pr"]) == (True, "First", False)
    assert pushed["files"] == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "b/adapter_config.json",
        "b/adapter_model.safetensors",
        "b/peftlite.json",
        "peftlite.json",
    ]
    assert "- mine\n" in pushed["card"]
    assert "- lora\n" in pushed["card"]
    assert not pushed["place"].exists()


def test_the_card_can_be_written_alone(tmp_path: Path) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    model.create_or_update_model_card(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "library_name: peft" in text
    assert "transformers" not in text.partition("\n---\n")[0]
