"""VeRA against real PEFT with the same weights, and its projections, which all layers share."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftlite
from peftlite.core.tree import find_state, layers
from peftlite.errors import CheckpointError, ConfigError, UnsupportedLayerError
from tests.models import batch, tiny
from tests.tuners.pairs import Pair, apart

KINDS = ("linear", "linear-no-bias", "Conv1D")
FIELDS: tuple[dict[str, Any], ...] = (
    {"r": 4},
    {"r": 20, "projection_prng_key": 5, "save_projection": False},
    {"r": 3, "vera_dropout": 0.1, "d_initial": 0.5, "bias": "vera_only"},
)
ROWS = [Pair.row("VeraConfig", kind, **fields) for kind in KINDS for fields in FIELDS]
PEFT_WARNS = pytest.mark.filterwarnings("ignore:Specified to not save vera_A", "ignore:fan_in_fan_out")


@PEFT_WARNS
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_everything_equals_peft(row: Pair) -> None:
    row.build()
    row.check_names()
    row.check_numbers()
    row.check_merged()


@PEFT_WARNS
@pytest.mark.filterwarnings("ignore:Specified to not load vera_A")
@pytest.mark.parametrize("row", ROWS[:2], ids=str)
def test_files_are_read_both_ways(row: Pair, tmp_path: Path) -> None:
    row.build()
    row.check_files(tmp_path)


def vera(**fields: Any) -> peftlite.VeraConfig:
    return peftlite.VeraConfig(**{"target_modules": ["q_proj", "down_proj"], "r": 6, **fields})


def adapted(*configs: Any, wrapped: bool = False) -> Any:
    """A tiny Llama with adapters `a`, `b`, ... with random vectors."""
    model = tiny("llama")
    for name, config in zip("abc", configs, strict=False):
        peftlite.inject_adapter_in_model(config, model, name)
        for layer in layers(model):
            for parameter in layer.parameters_of(name):
                parameter.data.normal_()
    return peftlite.wrap(model) if wrapped else model


def projections(model: nn.Module, name: str = "a") -> set[int]:
    return {layer.vera_A[name].data_ptr() for layer in layers(model)}


@PEFT_WARNS
@pytest.mark.parametrize("key", [0, 7])
def test_the_projections_are_drawn_as_peft_draws_them(key: int) -> None:
    config = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 6, "projection_prng_key": key}
    ours = peftlite.get_peft_model(tiny("llama"), peftlite.VeraConfig(**config))
    theirs = peft.get_peft_model(tiny("llama"), peft.VeraConfig(**config))
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    assert all(torch.equal(mine[name], other[name]) for name in other)
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("change", ["none", "deepcopy", "pickle", "dtype", "wrap", "load_state_dict"])
def test_a_model_has_one_projection_whatever_is_done_to_it(change: str) -> None:
    model, x = adapted(vera()), batch("llama")
    expected = model(**x).logits
    if change == "deepcopy":
        model = copy.deepcopy(model)
    elif change == "pickle":
        model = pickle.loads(pickle.dumps(model))
    elif change == "dtype":
        model = model.double()
    elif change == "wrap":
        model = peftlite.wrap(model)
    elif change == "load_state_dict":
        model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert len(projections(model)) == 1
    state = find_state(model)
    assert state is not None
    assert {state.shared["vera_A"]["a"].data_ptr()} == projections(model)
    assert apart(model(**x).logits.float(), expected) <= 1e-5


def test_two_adapters_have_projections_of_their_own() -> None:
    """PEFT refuses another key, another rank and more layers; a file in which they differ is not read right."""
    model, x = adapted(vera(), vera(r=9, projection_prng_key=3, target_modules=["v_proj", "down_proj"])), batch("llama")
    both = {}
    for name, config in (
        ("a", vera()),
        ("b", vera(r=9, projection_prng_key=3, target_modules=["v_proj", "down_proj"])),
    ):
        alone = tiny("llama")
        peftlite.inject_adapter_in_model(config, alone, name)
        own = dict(model.named_parameters())
        for path, parameter in alone.named_parameters():
            if f".{name}" in path:
                parameter.data.copy_(own[path])
        peftlite.set_adapter(model, name)
        both[name] = model(**x).logits
        torch.testing.assert_close(both[name], alone(**x).logits)
    assert not torch.allclose(both["a"], both["b"])
    peftlite.delete_adapter(model, "a")
    assert torch.equal(model(**x).logits, both["b"])
    assert {name for layer in layers(model) for name in layer.vera_A} == {"b"}


@pytest.mark.parametrize("saved", [True, False])
def test_files_have_projections_or_draw_them_again(saved: bool, tmp_path: Path) -> None:
    model, x = adapted(vera(save_projection=saved, projection_prng_key=11)), batch("llama")
    expected = model(**x).logits
    peftlite.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert ("base_model.vera_A" in tensors, "base_model.vera_B" in tensors) == (saved, saved)
    torch.manual_seed(99)
    for wrapped in (False, True):
        bare = tiny("llama")
        other: Any = peftlite.PeftModel.from_pretrained(bare, tmp_path / "a") if wrapped else bare
        if not wrapped:
            peftlite.load_adapter(other, tmp_path / "a")
        assert len({id(layer.vera_A) for layer in layers(other)}) == 1
        assert torch.equal(other(**x).logits, expected)


def test_a_projection_in_a_file_counts_whatever_its_key_would_give(tmp_path: Path) -> None:
    model, x = adapted(vera()), batch("llama")
    for container in find_state(model).shared.values():  # type: ignore[union-attr]
        container["a"].normal_()
    peftlite.save_adapter(model, tmp_path)
    other = tiny("llama")
    peftlite.load_adapter(other, tmp_path / "a", "z")
    assert torch.equal(other(**x).logits, model(**x).logits)
    peftlite.load_adapter(model, tmp_path / "a", "a")
    assert len(projections(model)) == 1


def test_a_file_that_lacks_its_projection_is_refused(tmp_path: Path) -> None:
    peftlite.save_adapter(adapted(vera()), tmp_path)
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.vera_A"]
    save_file(tensors, file)
    model = tiny("llama")
    with pytest.raises(CheckpointError, match=r"missing: `base_model\.vera_A`"):
        peftlite.load_adapter(model, tmp_path / "a")
    assert find_state(model) is None


def test_a_projection_that_a_config_does_not_want_is_ignored(tmp_path: Path) -> None:
    model, x = adapted(vera()), batch("llama")
    peftlite.save_adapter(model, tmp_path)
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "save_projection": False}))
    other = tiny("llama")
    peftlite.load_adapter(other, tmp_path / "a")
    assert torch.equal(other(**x).logits, model(**x).logits)


def test_state_dicts_go_out_and_in_in_both_shapes() -> None:
    model, x = adapted(vera(), wrapped=True), batch("llama")
    for source, wrapped in ((model, True), (model, False), (model.unwrap(), False)):
        tensors = peftlite.get_peft_model_state_dict(source, adapter_name="a")
        assert "base_model.vera_A" in tensors
        other = adapted(vera(), wrapped=wrapped)
        peftlite.set_peft_model_state_dict(other, tensors, adapter_name="a")
        assert torch.equal(other(**x).logits, model(**x).logits)


def test_low_cpu_mem_usage_makes_only_what_no_file_has() -> None:
    for saved in (True, False):
        model = tiny("llama")
        peftlite.inject_adapter_in_model(vera(save_projection=saved), model, low_cpu_mem_usage=True)
        (layer, *_) = layers(model)
        assert layer.vera_A["default"].is_meta is saved
        assert layer.vera_lambda_b["default"].is_meta


def test_vectors_are_all_that_trains() -> None:
    model = adapted(vera())
    model(**batch("llama")).loss.backward()
    trained = {name.split(".")[-2] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"vera_lambda_b", "vera_lambda_d"}


def test_layers_without_a_form_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 1))
    with pytest.raises(UnsupportedLayerError, match="VERA has no form for Conv"):
        peftlite.inject_adapter_in_model(vera(target_modules=["0"]), model)


@pytest.mark.parametrize(
    "fields",
    [{"r": 0}, {"projection_prng_key": None}, {"vera_dropout": 1}, {"bias": "some"}, {"d_initial": "0"}],
    ids=str,
)
def test_configs_that_cannot_be_used(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(ConfigError, match=f"`{name}`"):
        vera(**fields)
