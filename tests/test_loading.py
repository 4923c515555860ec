"""What is loaded: all of an adapter or none of it, and never anything that does not fit without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import peftlite
from peftlite.checkpoint.adapters import load_adapter, save_adapter
from peftlite.checkpoint.hub import HubOptions
from peftlite.checkpoint.keys import CONFIG_NAME, PREFIX, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peftlite.checkpoint.state_dict import get_peft_model_state_dict, set_peft_model_state_dict
from peftlite.core.tree import base_model_of
from peftlite.errors import CheckpointError, PeftliteWarning, StateError
from tests.adapters import logits, randomised, rewrite, snapshot, with_adapter
from tests.models import tiny

quiet = pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:Setting `save_embedding_layers`")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A LoRA adapter of rank 2 on the q_proj layers of the tiny Llama."""
    save_adapter(with_adapter(), tmp_path / "saved")
    return tmp_path / "saved"


# ---- what fits


@quiet
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "opt"])
def test_an_adapter_of_peft_gives_the_same_outputs(tmp_path: Path, name: str) -> None:
    sites = {"llama": ["q_proj", "embed_tokens"], "gpt2": ["c_attn", "wte"], "bert": ["query"], "t5": ["q"]}
    task = {"bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}.get(name, "CAUSAL_LM")
    config = peft.LoraConfig(
        r=2, target_modules=sites.get(name, ["q_proj"]), task_type=task, fan_in_fan_out=name == "gpt2"
    )
    theirs = peft.get_peft_model(tiny(name), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    theirs.save_pretrained(tmp_path)
    expected = logits(theirs.eval(), name)
    base = tiny(name)
    report = load_adapter(base, tmp_path)
    torch.testing.assert_close(logits(base, name), expected)
    torch.testing.assert_close(logits(peftlite.wrap(base), name), expected)
    assert report.fits
    assert len(report.loaded_keys) == len(load_file(tmp_path / SAFETENSORS_WEIGHTS_NAME))
    assert not base.training
    assert not any(parameter.requires_grad for parameter in base.parameters())


def test_loading_draws_no_random_numbers_and_leaves_nothing_on_the_meta_device(saved: Path) -> None:
    base = tiny("llama")
    before = torch.get_rng_state()
    load_adapter(base, saved)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(parameter.is_meta for parameter in base.parameters())


@pytest.mark.parametrize("trainable", [False, True])
def test_whether_it_may_train_is_asked_of_the_caller(saved: Path, trainable: bool) -> None:
    base = tiny("llama")
    load_adapter(base, saved, is_trainable=trainable)
    flags = {p.requires_grad for n, p in base.named_parameters() if "lora_" in n}
    assert flags == {trainable}
    assert base.peft_config["default"].inference_mode is not trainable
    assert not any(p.requires_grad for n, p in base.named_parameters() if "lora_" not in n)


def test_a_second_adapter_changes_nothing_for_the_first(saved: Path) -> None:
    base = with_adapter(target_modules=["v_proj"])
    before, flags = logits(base), {n: p.requires_grad for n, p in base.named_parameters()}
    load_adapter(base, saved, "type")
    assert torch.equal(logits(base), before)
    assert base.active_adapters() == ["default"]
    after = {n.replace("q_proj.base_layer", "q_proj"): p.requires_grad for n, p in base.named_parameters()}
    assert {n: after[n] for n in flags} == flags
    peftlite.set_adapter(base, "type")
    alone = tiny("llama")
    load_adapter(alone, saved)
    assert torch.equal(logits(base), logits(alone))


def test_from_a_sub_directory_and_from_a_pickle(tmp_path: Path) -> None:
    base = with_adapter(name="other")
    save_adapter(base, tmp_path)
    found = tiny("llama")
    load_adapter(found, tmp_path, hub=HubOptions(subfolder="other"))
    assert torch.equal(logits(found), logits(base))
    weights = tmp_path / "other" / SAFETENSORS_WEIGHTS_NAME
    torch.save(load_file(weights), tmp_path / "other" / WEIGHTS_NAME)
    weights.unlink()
    found = tiny("llama")
    load_adapter(found, tmp_path / "other")
    assert torch.equal(logits(found), logits(base))


def test_a_config_can_be_given_in_place_of_the_files(saved: Path) -> None:
    (saved / CONFIG_NAME).unlink()
    config = peftlite.LoraConfig(r=2, target_modules=["q_proj"], lora_alpha=64)
    base = tiny("llama")
    load_adapter(base, saved, config=config, is_trainable=True)
    assert base.model.layers[0].self_attn.q_proj.scaling["default"] == 32
    assert config.base_model_name_or_path is None
    assert config.inference_mode is False


@pytest.mark.parametrize(("autocast", "kept"), [(True, torch.float32), (False, torch.bfloat16)])
def test_one_dtype_rule(saved: Path, autocast: bool, kept: torch.dtype) -> None:
    base = tiny("llama", dtype=torch.bfloat16)
    load_adapter(base, saved, autocast_adapter_dtype=autocast)
    assert {p.dtype for n, p in base.named_parameters() if "lora_" in n} == {kept}


def test_adapters_can_be_kept_elsewhere_than_their_layers(saved: Path) -> None:
    base = tiny("llama").to("meta")
    load_adapter(base, saved)
    assert {p.device.type for n, p in base.named_parameters() if "lora_" in n} == {"cpu"}


def test_whole_modules_with_buffers_that_are_never_saved(tmp_path: Path) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(3, 3)
            self.norm = nn.BatchNorm1d(3)
            self.register_buffer("angles", torch.arange(3.0), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.lin(x) + self.angles)  # type: ignore[no-any-return]

    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 3), Block()).eval()

    base = model()
    peftlite.inject(base, peftlite.LoraConfig(target_modules=["0"], modules_to_save=["1"]))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    save_adapter(base, tmp_path)
    again = model()
    load_adapter(again, tmp_path)
    assert torch.equal(again(torch.ones(2, 3)), base(torch.ones(2, 3)))


def test_keys_of_other_libraries_are_mapped(saved: Path) -> None:
    def theirs(key: str) -> str:
        return key.replace("model.layers", "decoder.blocks").replace("lora_A", "down")

    rewrite(saved, lambda tensors: {theirs(key): tensor for key, tensor in tensors.items()})
    mapping = {
        r"^model\.decoder\.": "wrong",
        r"^decoder\.blocks\.(\d+)\.(.*)\.down": r"model.layers.\1.\2.lora_A",
        "decoder.blocks": "model.layers",
    }
    base = tiny("llama")
    load_adapter(base, saved, key_mapping=mapping)
    assert torch.equal(logits(base), logits(with_adapter()))
    with pytest.raises(CheckpointError, match=r"`key_mapping` makes `.*` of both"):
        load_adapter(tiny("llama"), saved, key_mapping={r"blocks\.\d": "blocks"})


# ---- into an adapter that is there


def test_an_adapter_that_is_there_is_overwritten_in_place(saved: Path) -> None:
    model = with_adapter()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    with torch.no_grad():
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.zero_()
    load_adapter(model, saved, is_trainable=True)
    assert {id(p) for p in model.parameters() if p.requires_grad} == held
    assert torch.equal(logits(model), logits(with_adapter()))


def test_other_settings_of_an_adapter_that_is_there_are_refused(saved: Path) -> None:
    rewrite(saved, lora_alpha=99)
    model = with_adapter()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r"other settings.*\"scaling\": \[4.0, 49.5\]"):
        load_adapter(model, saved)
    assert snapshot(model) == before


def test_a_merged_adapter_is_not_loaded_into(saved: Path) -> None:
    model = with_adapter()
    peftlite.merge_adapter(model)
    with pytest.raises(StateError, match="unmerge_adapter"):
        load_adapter(model, saved)
    with pytest.raises(StateError, match="unmerge_adapter"):
        set_peft_model_state_dict(model, get_peft_model_state_dict(model))


# ---- tensors of the base model


def test_embeddings_in_the_file_replace_the_models(tmp_path: Path) -> None:
    source = with_adapter(target_modules=["embed_tokens"])
    with torch.no_grad():
        source.model.embed_tokens.base_layer.weight.mul_(2)
    save_adapter(source, tmp_path)
    model = tiny("llama")
    load_adapter(model, tmp_path)
    assert torch.equal(logits(model), logits(source))

    shared = peftlite.overlay(tiny("llama"))
    before = snapshot(shared)
    with pytest.raises(StateError, match="overlay"):
        load_adapter(shared, tmp_path)
    assert snapshot(shared) == before

    merged = with_adapter(target_modules=["embed_tokens"], name="mine")
    peftlite.merge_adapter(merged)
    before = snapshot(merged)
    with pytest.raises(StateError, match="unmerge_adapter"):
        load_adapter(merged, tmp_path)
    assert snapshot(merged) == before


def test_embeddings_that_are_the_same_are_not_written(tmp_path: Path) -> None:
    save_adapter(with_adapter(target_modules=["embed_tokens"]), tmp_path)
    shared = peftlite.overlay(tiny("llama"))
    versions = {name: p._version for name, p in shared.named_parameters()}
    load_adapter(shared, tmp_path)
    after = {name.replace("base_layer.", ""): p._version for name, p in shared.named_parameters()}
    assert {name: after[name] for name in versions} == versions
    merged = with_adapter(target_modules=["embed_tokens"], name="mine")
    peftlite.merge_adapter(merged)
    load_adapter(merged, tmp_path)


# ---- from a state dict in memory


@pytest.mark.parametrize("shape", ["wrapped", "in place", "inner"])
def test_what_get_gives_set_takes(shape: str) -> None:
    def shaped() -> Any:
        base = with_adapter(modules_to_save=["lm_head"], bias="all")
        return (
            base
            if shape == "in place"
            else peftlite.wrap(base)
            if shape == "wrapped"
            else peftlite.wrap(base).base_model
        )

    source, model = randomised(shaped(), seed=7), shaped()
    report = set_peft_model_state_dict(model, get_peft_model_state_dict(source))
    assert report.fits
    assert torch.equal(logits(model), logits(source))
    file_keys = {PREFIX + k: v for k, v in get_peft_model_state_dict(base_model_of(source)).items()}
    assert set_peft_model_state_dict(model, file_keys).fits


def test_a_wrapped_model_does_not_guess_at_a_missing_prefix() -> None:
    model = peftlite.wrap(with_adapter())
    with pytest.raises(CheckpointError, match="lack the prefix"):
        set_peft_model_state_dict(model, get_peft_model_state_dict(model.unwrap()))


def test_sizes_that_do_not_match_can_be_ignored() -> None:
    model = with_adapter()
    given = get_peft_model_state_dict(model)
    key = next(iter(given))
    given[key] = torch.ones(3, 3)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match="of another shape"):
        set_peft_model_state_dict(model, given)
    with pytest.warns(PeftliteWarning, match="1 tensor of another shape"):
        report = set_peft_model_state_dict(model, given, ignore_mismatched_sizes=True)
    assert [misfit.key for misfit in report.mismatched_keys] == [PREFIX + key]
    assert snapshot(model) == before
    del given[next(k for k in given if k != key)]
    with pytest.raises(CheckpointError, match="1 tensor missing"):
        set_peft_model_state_dict(model, given, ignore_mismatched_sizes=True)


def test_an_adapter_without_memory_gets_it() -> None:
    model = tiny("llama")
    peftlite.inject(model, peftlite.LoraConfig(r=2, target_modules=["q_proj"]), low_cpu_mem_usage=True)
    given = get_peft_model_state_dict(with_adapter())
    set_peft_model_state_dict(model, given, low_cpu_mem_usage=True)
    assert torch.equal(logits(model), logits(with_adapter()))
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)
    given[next(iter(given))].zero_()  # the model has tensors of its own
    assert torch.equal(logits(model), logits(with_adapter()))


def test_a_report_reads_well(saved: Path) -> None:
    assert str(load_adapter(tiny("llama"), saved)) == "adapter `default`: all 4 tensors loaded"


# ---- adapters on parameters that modules read themselves


@pytest.mark.parametrize("existing", [False, True])
def test_keys_of_layers_inside_layers(tmp_path: Path, existing: bool) -> None:
    """The keys that loading expects before it attaches anything are those of the model afterwards."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        made = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2), "lin": nn.Linear(4, 4)})
        if existing:
            peftlite.inject(made, peftlite.LoraConfig(r=1, target_modules=["lin", "attn"]), "first")
        return made

    source = model()
    peftlite.inject(source, peftlite.LoraConfig(r=2, target_modules=["attn"], target_parameters=["lin.weight"]), "new")
    randomised(source)
    save_adapter(source, tmp_path, selected_adapters=["new"])
    again = model()
    load_adapter(again, tmp_path / "new", "new")
    found, expected = (get_peft_model_state_dict(m, adapter_name="new") for m in (again, source))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
