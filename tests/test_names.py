"""Functions and tables that code for `peft` imports by name, beside those of real PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftlite
from peftlite import LoraConfig, TaskType
from peftlite.errors import CheckpointError, ConfigError, NoAdapterError, StateError, UnsupportedFeatureError
from tests.models import tiny
from tests.quantised import QUANTISED
from tests.snapshots import check_unchanged, snapshot
from tests.twins import fill
from tests.versions import works_with_peft

FIELDS: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}


def wrapped(library: Any = peftlite) -> Any:
    model = library.get_peft_model(tiny("llama"), library.LoraConfig(**FIELDS))
    fill(model)
    return model


# ---- tables
@pytest.mark.parametrize("table", ["PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING"])
def test_tables_by_kind_are_pefts_as_far_as_there_are_methods(table: str) -> None:
    ours, theirs = getattr(peftlite, table), getattr(peft, table)
    for kind, cls in ours.items():
        assert theirs[kind.value].__name__ == cls.__name__  # kinds are strings, too
        assert ours[kind.value] is cls


def test_the_table_by_task_is_pefts() -> None:
    theirs = {task: cls.__name__ for task, cls in peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.items()}
    assert {task: cls.__name__ for task, cls in peftlite.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.items()} == theirs
    assert peftlite.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[TaskType.CAUSAL_LM] is peftlite.PeftModelForCausalLM


@pytest.mark.parametrize("kind", list(peftlite.PEFT_TYPE_TO_CONFIG_MAPPING))
def test_a_config_is_made_of_its_dict(kind: str) -> None:
    cls: Any = peftlite.PEFT_TYPE_TO_CONFIG_MAPPING[kind]  # type: ignore[index]
    config = cls(**{"ADALORA": {"total_step": 9}, "TRAINABLE_TOKENS": {"token_indices": [1]}}.get(kind, {}))
    assert peftlite.get_peft_config(config.to_dict()) == config


def test_a_dict_that_is_no_config_is_refused() -> None:
    with pytest.raises(ConfigError, match="`peft_type` is missing"):
        peftlite.get_peft_config({"r": 2})
    with pytest.raises(UnsupportedFeatureError, match="`PREFIX_TUNING`"):
        peftlite.get_peft_config({"peft_type": "PREFIX_TUNING"})


# ---- the tensors of a file
@pytest.mark.parametrize("key_mapping", [None, {"^model.layers": "layers", "^model": "never"}])
def test_weights_of_a_file_are_pefts(tmp_path: Path, key_mapping: dict[str, str] | None) -> None:
    wrapped().save_pretrained(tmp_path)
    ours = peftlite.load_peft_weights(tmp_path, key_mapping=key_mapping)
    theirs = peft.load_peft_weights(str(tmp_path), key_mapping=key_mapping)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key].to(ours[key].device)) for key in ours)
    assert {tensor.device.type for tensor in peftlite.load_peft_weights(tmp_path, "meta").values()} == {"meta"}


def test_weights_are_read_with_suspicion(tmp_path: Path) -> None:
    wrapped().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="of both"):
        peftlite.load_peft_weights(tmp_path, "cpu", {r".*lora_.*": "one"})
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(CheckpointError, match="damaged"):
        peftlite.load_peft_weights(tmp_path, "cpu")


# ---- precision
def dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in model.state_dict().items()}


@works_with_peft
def test_dtypes_for_mixed_precision_are_pefts() -> None:
    ours, theirs = wrapped(), wrapped(peft)
    peftlite.cast_mixed_precision_params(ours, torch.bfloat16)
    peft.cast_mixed_precision_params(theirs, torch.bfloat16)
    assert dtypes(ours) == dtypes(theirs)
    assert {torch.float32, torch.bfloat16} == set(dtypes(ours).values())
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(torch.arange(4)[None]).logits.isfinite().all()


def test_what_is_packed_is_not_cast() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    packed = model[0].weight = nn.Parameter(torch.ones(2, 2, dtype=torch.uint8), requires_grad=False)
    peftlite.cast_mixed_precision_params(model, torch.float16)
    assert packed.dtype == torch.uint8
    with pytest.raises(ConfigError, match="`dtype`"):
        peftlite.cast_mixed_precision_params(model, torch.int8)


# ---- the base model's own tensors
@works_with_peft
def test_the_base_models_tensors_have_the_keys_from_before() -> None:
    bare = tiny("llama").state_dict()
    ours, theirs = peftlite.get_base_model_state_dict(wrapped()), peft.get_base_model_state_dict(wrapped(peft))
    assert list(ours) == list(theirs) == list(bare)
    assert all(torch.equal(ours[key], bare[key]) for key in bare)


def everywhere() -> nn.Module:
    """Adapters of two kinds around modules, a parameter, and a module with a child that it does not call."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 2)
    model = nn.ModuleDict({"attention": attention, "table": nn.Embedding(4, 4), "conv": nn.Conv2d(2, 2, 1)})
    model.register_buffer("count", torch.ones(3))
    return model


def test_they_have_them_whatever_is_around_them() -> None:
    model = everywhere()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    config = LoraConfig(target_modules=["attention", "conv"], trainable_token_indices={"table": [1]}, r=2)
    peftlite.inject(model, config)
    assert list(model.state_dict()) != list(before)
    for shape in (model, peftlite.wrap(model), nn.DataParallel(model)):
        found = peftlite.get_base_model_state_dict(shape)
        assert list(found) == list(before)
        assert all(torch.equal(found[key], before[key]) for key in before)
    new = {key: tensor + 1 for key, tensor in before.items()}
    assert peftlite.set_base_model_state_dict(model, new) == ([], [])
    assert all(torch.equal(tensor, new[key]) for key, tensor in peftlite.get_base_model_state_dict(model).items())


def test_they_have_them_under_compiled_blocks() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    keys = list(model.state_dict())
    peftlite.inject(model, LoraConfig(target_modules=["0"], r=2))
    model[1] = torch.compile(model[1], backend="eager")  # type: ignore[assignment]
    assert list(peftlite.get_base_model_state_dict(model)) == keys
    assert peftlite.set_base_model_state_dict(model, {"1.bias": torch.ones(2)}, strict=False).unexpected_keys == []
    assert torch.equal(model[1].bias, torch.ones(2))  # type: ignore[arg-type]


@works_with_peft
def test_what_does_not_fit_is_an_error_or_named_as_by_peft() -> None:
    ours, theirs = wrapped(), wrapped(peft)
    good = tiny("llama", seed=1).state_dict()
    bad = {**dict(list(good.items())[1:]), "no.such": torch.ones(1)}
    before = snapshot(ours)
    with pytest.raises(CheckpointError, match=r"lacks 1 of its tensors .*has 1 that it does not have .*Nothing was"):
        peftlite.set_base_model_state_dict(ours, bad)
    with pytest.raises(RuntimeError):
        peft.set_base_model_state_dict(theirs, bad)
    with pytest.raises(CheckpointError, match=r"has shape \(1,\)"):
        peftlite.set_base_model_state_dict(ours, {**good, "lm_head.weight": torch.ones(1)}, strict=False)
    check_unchanged(ours, before)
    found = peftlite.set_base_model_state_dict(ours, bad, strict=False)
    assert found == tuple(peft.set_base_model_state_dict(theirs, bad, strict=False))
    values: list[dict[str, Tensor]] = [
        lib.get_base_model_state_dict(m) for lib, m in ((peftlite, ours), (peft, theirs))
    ]
    assert all(torch.equal(values[0][key], values[1][key]) for key in good)


def test_the_base_models_tensors_are_asked_for_while_they_are_its_own() -> None:
    model = wrapped()
    model.merge_adapter()
    for call in (
        peftlite.get_base_model_state_dict,
        lambda model: peftlite.set_base_model_state_dict(model, {}, strict=False),
    ):
        with pytest.raises(StateError, match="`default` is merged"):
            call(model)
        with pytest.raises(NoAdapterError):
            call(nn.Linear(2, 2))
    twin = peftlite.overlay(tiny("llama"))
    peftlite.inject(twin, LoraConfig(**FIELDS))
    with pytest.raises(StateError, match="overlay"):
        peftlite.set_base_model_state_dict(twin, tiny("llama").state_dict())


def quantised(kind: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(QUANTISED[kind](nn.Linear(64, 32)), nn.Linear(32, 4))


@pytest.mark.parametrize("kind", [pytest.param(kind, id=kind) for kind in QUANTISED])
def test_quantised_layers_are_written_whole_or_refused(kind: str) -> None:
    model = quantised(kind, 0)
    keys = list(model.state_dict())
    peftlite.inject(model, LoraConfig(r=2, target_modules=["0"]))
    assert list(peftlite.get_base_model_state_dict(model)) == keys
    other, x = quantised(kind, 1), torch.randn(2, 64)
    if kind.startswith("torchao"):
        peftlite.set_base_model_state_dict(model, other.state_dict())
        with torch.no_grad():
            assert torch.equal(model(x), other(x))
    else:
        before = snapshot(model)
        with pytest.raises(StateError, match="quantised"):
            peftlite.set_base_model_state_dict(model, other.state_dict())
        check_unchanged(model, before)
        head = {key: tensor for key, tensor in other.state_dict().items() if key.startswith("1.")}
        peftlite.set_base_model_state_dict(model, head, strict=False)
        assert torch.equal(model[1].weight, other[1].weight)  # type: ignore[index]


def test_numbers_are_not_written_into_integers() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(2, 2)})
    model.register_buffer("count", torch.ones(1, dtype=torch.long))
    peftlite.inject(model, LoraConfig(r=1, target_modules=["layer"]))
    with pytest.raises(CheckpointError, match=r"torch.float32, and the base model's has \(1,\) and torch.int64"):
        peftlite.set_base_model_state_dict(model, {"count": torch.tensor([0.5])}, strict=False)
