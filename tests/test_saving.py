"""What is saved: PEFT's files byte for byte, the same from both shapes, whatever else is true of the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import peftlite
from peftlite.checkpoint.adapters import load_adapter, save_adapter
from peftlite.checkpoint.keys import CONFIG_NAME, PREFIX, RECORD_NAME, SAFETENSORS_WEIGHTS_NAME
from peftlite.checkpoint.state_dict import get_peft_model_state_dict
from peftlite.errors import AdapterNameError, CheckpointError, ConfigError, NoAdapterError, PeftliteWarning
from tests.models import tiny

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "llama-task": ("llama", {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}),
    "llama-all-linear": ("llama", {"target_modules": "all-linear"}),
    "llama-embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "llama-head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "llama-saved-head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "llama-saved-mlp": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "mlp"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}),
    "gpt2-bias-all": ("gpt2", {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
    "gpt2-bias-lora": ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only", "fan_in_fan_out": True}),
    "bert": ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "bert-bias-all": ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "all"}),
    "bert-bias-lora": ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "lora_only"}),
    "bert-lora-bias": ("bert", {"target_modules": ["query"], "lora_bias": True}),
    "t5": ("t5", {"target_modules": ["q"], "task_type": "SEQ_2_SEQ_LM"}),
    "t5-shared": ("t5", {"target_modules": ["q", "shared"], "bias": "all"}),
    "opt": ("opt", {"target_modules": ["q_proj", "embed_tokens"], "bias": "all"}),
}
cases = pytest.mark.parametrize(("model", "fields"), CASES.values(), ids=CASES)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*:FutureWarning",  # transformers on its own names
    "ignore:Setting `save_embedding_layers`",  # PEFT says that it does what we do
    r"ignore:Adapter '\w+'. \d+ LoRA tensor",
    "ignore:Model has `tie_word_embeddings=True`",
)


def peft_model(model: str, fields: dict[str, Any], name: str = "default") -> Any:
    """Real PEFT's model, all of its adapter's tensors at random."""
    made = peft.get_peft_model(tiny(model), peft.LoraConfig(r=2, **fields), adapter_name=name)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return made


def ours(model: str = "llama", name: str = "default", **fields: Any) -> Any:
    """Our model in place, all of its adapter's tensors at random."""
    base = tiny(model)
    peftlite.inject_adapter_in_model(
        peftlite.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **fields}), base, name
    )
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return base


def files_in(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


# ---- against PEFT


@pytest.mark.parametrize("name", ["default", "other"])
@cases
def test_files_are_pefts(tmp_path: Path, model: str, fields: dict[str, Any], name: str) -> None:
    """PEFT reads ours, and of PEFT's we make the same again: weights byte for byte, and the config."""
    theirs = peft_model(model, fields, name)
    theirs.save_pretrained(tmp_path / "theirs")
    at = "" if name == "default" else name
    base = tiny(model)
    load_adapter(base, tmp_path / "theirs" / at, name)
    save_adapter(base, tmp_path / "ours")
    beside = {str(Path(at) / RECORD_NAME)}
    assert files_in(tmp_path / "ours").keys() - beside == files_in(tmp_path / "theirs").keys()
    here, there = tmp_path / "ours" / at, tmp_path / "theirs" / at
    assert (here / SAFETENSORS_WEIGHTS_NAME).read_bytes() == (there / SAFETENSORS_WEIGHTS_NAME).read_bytes()
    assert _config(here) == _config(there)
    expected = peft.get_peft_model_state_dict(theirs, adapter_name=name)
    again = peft.PeftModel.from_pretrained(tiny(model), str(here), adapter_name=name)
    found = peft.get_peft_model_state_dict(again, adapter_name=name)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def _config(directory: Path) -> dict[str, Any]:
    config = json.loads((directory / CONFIG_NAME).read_text())
    config["target_modules"] = sorted(config["target_modules"])  # the order is random in PEFT's
    return config  # type: ignore[no-any-return]


@cases
def test_keys_are_pefts_in_both_shapes(model: str, fields: dict[str, Any]) -> None:
    base = ours(model, **fields)
    injected = peft.inject_adapter_in_model(peft.LoraConfig(r=2, **fields), tiny(model))
    heads = {key for key in get_peft_model_state_dict(base) if "classifier" in key}  # PEFT forgets the head in place
    assert get_peft_model_state_dict(base).keys() - heads == peft.get_peft_model_state_dict(injected).keys() - heads
    wrapped = peftlite.wrap(base)
    assert get_peft_model_state_dict(wrapped).keys() == peft.get_peft_model_state_dict(peft_model(model, fields)).keys()
    inner = peft.get_peft_model_state_dict(peft_model(model, fields).base_model)
    assert get_peft_model_state_dict(wrapped.base_model).keys() == inner.keys()


def test_tables_are_saved_as_peft_saves_them() -> None:
    fields = {"target_modules": ["q_proj"]}
    for choice in (True, False, "auto"):
        found = get_peft_model_state_dict(peftlite.wrap(ours()), save_embedding_layers=choice)
        theirs = peft.get_peft_model_state_dict(peft_model("llama", fields), save_embedding_layers=choice)
        assert found.keys() == theirs.keys()
    with pytest.raises(ConfigError, match="`save_embedding_layers` is `'yes'`"):
        get_peft_model_state_dict(ours(), save_embedding_layers="yes")


# ---- both shapes, and everything else that must not matter


@cases
def test_both_shapes_write_the_same_files(tmp_path: Path, model: str, fields: dict[str, Any]) -> None:
    base = ours(model, **fields)
    save_adapter(base, tmp_path / "in place")
    save_adapter(peftlite.wrap(base), tmp_path / "wrapped")
    save_adapter(nn.DataParallel(base), tmp_path / "parallel")
    assert files_in(tmp_path / "in place") == files_in(tmp_path / "wrapped") == files_in(tmp_path / "parallel")


@pytest.mark.filterwarnings("ignore:A weight was shared")  # gpt2 ties wte and lm_head, and both are merged
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_what_is_active_merged_or_enabled_does_not_matter(tmp_path: Path, model: str) -> None:
    fields = (
        {"target_modules": ["c_attn", "wte", "lm_head"]}
        if model == "gpt2"
        else {"target_modules": ["q_proj", "embed_tokens"]}
    )
    base = ours(model, bias="all", lora_bias=False, **fields)
    save_adapter(base, tmp_path / "plain", save_embedding_layers=True)
    peftlite.merge_adapter(base)
    save_adapter(base, tmp_path / "merged", save_embedding_layers=True)
    with pytest.warns(PeftliteWarning, match="bias"):
        peftlite.disable_adapters(base)
    save_adapter(base, tmp_path / "disabled", save_embedding_layers=True)
    assert files_in(tmp_path / "plain") == files_in(tmp_path / "merged") == files_in(tmp_path / "disabled")


def test_other_adapters_do_not_matter(tmp_path: Path) -> None:
    base = ours(bias="all", modules_to_save=["lm_head"])
    alone = get_peft_model_state_dict(base)
    save_adapter(base, tmp_path / "alone")
    more = peftlite.LoraConfig(r=3, target_modules=["q_proj", "k_proj", "embed_tokens"], modules_to_save=["lm_head"])
    peftlite.inject(base, more, "more")
    save_adapter(base, tmp_path / "both", selected_adapters=["default"])
    assert files_in(tmp_path / "both") == files_in(tmp_path / "alone")
    assert get_peft_model_state_dict(base).keys() == alone.keys()
    biased = tiny("gpt2")
    peftlite.inject(biased, peftlite.LoraConfig(target_modules=["c_proj"]), "first")
    peftlite.inject(biased, peftlite.LoraConfig(target_modules=["c_attn"], bias="all"), "second")
    keys = get_peft_model_state_dict(biased, adapter_name="second").keys()
    assert "transformer.h.0.attn.c_proj.bias" in keys  # and not `c_proj.base_layer.bias`: only the first one is there
    assert "transformer.h.0.attn.c_attn.base_layer.bias" in keys


def test_names_that_compile_adds_leave_no_trace(tmp_path: Path) -> None:
    base = ours()
    save_adapter(base, tmp_path / "plain")
    expected = get_peft_model_state_dict(base)
    whole = torch.compile(base)
    assert get_peft_model_state_dict(whole).keys() == expected.keys()
    save_adapter(whole, tmp_path / "whole")
    base.model.layers[0] = torch.compile(base.model.layers[0])
    assert get_peft_model_state_dict(base).keys() == expected.keys()
    save_adapter(base, tmp_path / "parts")
    assert files_in(tmp_path / "plain") == files_in(tmp_path / "whole") == files_in(tmp_path / "parts")


def test_the_models_config_stays_what_it_is(tmp_path: Path) -> None:
    config = peftlite.LoraConfig(target_modules=["q_proj"])
    base = tiny("llama")
    peftlite.inject(base, config)
    before = base.peft_config["default"].to_dict(), config.to_dict()
    save_adapter(base, tmp_path)
    assert (base.peft_config["default"].to_dict(), config.to_dict()) == before
    saved = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert saved["inference_mode"] is True
    assert saved["auto_mapping"]["base_model_class"] == "LlamaForCausalLM"


def test_a_plain_module_is_saved_too(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    peftlite.inject(base, peftlite.LoraConfig(target_modules=["0"]))
    save_adapter(base, tmp_path)
    again = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    again.load_state_dict({"0.weight": base[0].base_layer.weight, "0.bias": base[0].base_layer.bias})
    load_adapter(again, tmp_path)
    assert torch.equal(again(torch.ones(2, 3)), base(torch.ones(2, 3)))
    with pytest.warns(PeftliteWarning, match="no embeddings are known of Sequential"):
        save_adapter(base, tmp_path, save_embedding_layers=True)


# ---- which adapters, where


def test_each_adapter_has_its_place(tmp_path: Path) -> None:
    base = ours()
    peftlite.inject(base, peftlite.LoraConfig(target_modules=["v_proj"]), "train")
    save_adapter(base, tmp_path / "all")
    three = [CONFIG_NAME, RECORD_NAME, SAFETENSORS_WEIGHTS_NAME]
    assert sorted(files_in(tmp_path / "all")) == sorted(["README.md", *three, *(f"train/{name}" for name in three)])
    save_adapter(base, tmp_path / "one", selected_adapters=["train"])
    assert sorted(files_in(tmp_path / "one")) == sorted(["README.md", *(f"train/{name}" for name in three)])
    with pytest.raises(AdapterNameError, match="nearest: `train`"):
        save_adapter(base, tmp_path / "typo", selected_adapters=["default", "trian"])
    save_adapter(base, tmp_path / "typo", is_main_process=False)
    assert not (tmp_path / "typo").exists()


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NoAdapterError):
        save_adapter(tiny("llama"), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be saved"):
        save_adapter(ours(), tmp_path / "file")
    base = tiny("llama")
    peftlite.inject(base, peftlite.LoraConfig(target_modules=["q_proj"]), low_cpu_mem_usage=True)
    with pytest.raises(CheckpointError, match="meta device"):
        save_adapter(base, tmp_path / "meta")
    assert not any((tmp_path / "meta").glob("adapter*"))


# ---- values from elsewhere


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_fsdp_wrapped_module."])
@pytest.mark.parametrize("shape", ["wrapped", "in place"])
def test_values_come_from_the_given_state_dict(shape: str, prefix: str) -> None:
    model = (
        ours(modules_to_save=["lm_head"]) if shape == "in place" else peftlite.wrap(ours(modules_to_save=["lm_head"]))
    )
    gathered = {prefix + key: torch.full_like(value, 7.0) for key, value in model.state_dict().items()}
    found = get_peft_model_state_dict(model, state_dict=gathered)
    assert found.keys() == get_peft_model_state_dict(model).keys()
    assert all(bool((value == 7).all()) for value in found.values())


def test_a_state_dict_that_lacks_something_is_refused() -> None:
    model = ours()
    gathered = model.state_dict()
    lost = next(key for key in gathered if "lora_A" in key)
    del gathered[lost]
    with pytest.raises(CheckpointError, match=f"no `{lost}`; nearest: `model.layers.1.*lora_A"):
        get_peft_model_state_dict(model, state_dict=gathered)


# ---- resized vocabularies


@pytest.mark.filterwarnings("ignore:The new embeddings will be initialized")
def test_tables_are_saved_when_their_rows_were_changed(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    tiny("llama").save_pretrained(tmp_path / "base")
    tables = {f"{PREFIX}model.embed_tokens.weight", f"{PREFIX}lm_head.weight"}
    for resized in (False, True):
        base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        if resized:
            base.resize_token_embeddings(60)
        peftlite.inject(base, peftlite.LoraConfig(target_modules=["q_proj"]))
        place = tmp_path / f"{resized}"
        save_adapter(base, place)
        save_adapter(peftlite.wrap(base), place / "wrapped")
        weights = (place / SAFETENSORS_WEIGHTS_NAME).read_bytes()
        assert (place / "wrapped" / SAFETENSORS_WEIGHTS_NAME).read_bytes() == weights
        assert all((key.encode() in weights) is resized for key in tables)
    fresh = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(
        CheckpointError, match=r"vocabulary of 60 tokens, and the model has 48.*resize_token_embeddings\(60\)"
    ):
        load_adapter(fresh, tmp_path / "True")
    fresh.resize_token_embeddings(60)
    load_adapter(fresh, tmp_path / "True")
    assert torch.equal(fresh.get_input_embeddings().weight, base.get_input_embeddings().weight)


@pytest.mark.filterwarnings("ignore:The new embeddings will be initialized")
def test_the_vocabulary_is_looked_up_in_the_cache_and_never_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    repo = tmp_path / "models--some--base"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (repo / "snapshots" / ("0" * 40) / "config.json").write_text('{"text_config": {"vocab_size": 48}}')
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name, size, saved in (("some/base", 48, False), ("some/base", 60, True), ("some/unknown", 60, False)):
        base = tiny("llama", vocab_size=size)
        base.name_or_path = name
        peftlite.inject(base, peftlite.LoraConfig(target_modules=["q_proj"]))
        assert ("lm_head.weight" in get_peft_model_state_dict(base)) is saved


@pytest.mark.filterwarnings("ignore:The new embeddings will be initialized")
@pytest.mark.parametrize("shape", ["in place", "wrapped"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_of_a_base_that_no_file_knows_the_model_remembers_its_vocabulary(tmp_path: Path, when: str, shape: str) -> None:
    base = tiny("llama")
    if when == "before":
        base.resize_token_embeddings(60)
    peftlite.inject(base, peftlite.LoraConfig(target_modules=["q_proj"]))
    if when == "after":
        base.resize_token_embeddings(60)
    save_adapter(peftlite.wrap(base) if shape == "wrapped" else base, tmp_path)
    again = tiny("llama")
    with pytest.raises(CheckpointError, match=r"vocabulary of 60 tokens, and the model has 48"):
        load_adapter(again, tmp_path)
    again.resize_token_embeddings(60)
    load_adapter(again, tmp_path)
    assert torch.equal(again.get_input_embeddings().weight, base.get_input_embeddings().weight)
    base.resize_token_embeddings(48)
    if when == "before":
        assert "lm_head.weight" in get_peft_model_state_dict(base)  # it had 60 when it was given its adapter
        peftlite.delete_adapter(base, "default")
        peftlite.inject(base, peftlite.LoraConfig(target_modules=["q_proj"]))
    assert "lm_head.weight" not in get_peft_model_state_dict(base)
