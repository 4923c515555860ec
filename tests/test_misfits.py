"""What does not fit is said, in one error, and changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from peftlite.checkpoint import targets
from peftlite.checkpoint.adapters import load_adapter, save_adapter
from peftlite.checkpoint.keys import CONFIG_NAME, PREFIX, SAFETENSORS_WEIGHTS_NAME
from peftlite.core.layer import AdapterLayer
from peftlite.errors import AdapterNameError, CheckpointError, PeftliteError, PeftliteWarning
from tests.adapters import A, B, Change, rewrite, snapshot, with_adapter
from tests.models import tiny


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A LoRA adapter of rank 2 on the q_proj layers of the tiny Llama."""
    save_adapter(with_adapter(), tmp_path / "saved")
    return tmp_path / "saved"


def same(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors


def without_one(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != A}


def put(**given: Tensor) -> Change:
    named = {"A": A, "B": B, "extra": f"{PREFIX}model.extra"}
    return lambda tensors: tensors | {named[key]: tensor for key, tensor in given.items()}


def renamed(change: Callable[[str], str]) -> Change:
    return lambda tensors: {change(key): tensor for key, tensor in tensors.items()}


def several(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return put(B=torch.ones(3), extra=torch.ones(1))(without_one(tensors))


MISFITS: dict[str, tuple[Change, dict[str, Any], str]] = {
    "without prefix": (
        renamed(lambda key: key.removeprefix(PREFIX)),
        {},
        r"4 tensors missing: `.*`, `.*`, `.*`, \.\.\.; 4 tensors unexpected.*nearest.*lack the prefix `base_model",
    ),
    "prefix twice": (renamed(lambda key: PREFIX + key), {}, "4 tensors missing.*twice"),
    "adapter's name": (
        renamed(lambda key: key.replace(".weight", ".default.weight")),
        {},
        "an adapter's name, `default`",
    ),
    "compiled": (renamed(lambda key: "_orig_mod." + key), {}, "`_orig_mod.`"),
    "empty": (lambda t: {}, {}, "4 tensors missing.*holds no tensors"),
    "half": (without_one, {}, "1 tensor missing: `.*q_proj.lora_A.weight`.*"),
    "more": (put(extra=torch.ones(2)), {}, "1 tensor unexpected: `base_model.model.model.extra`.*accounts for"),
    "more layers": (
        lambda t: t | {k.replace("layers.1", "layers.7"): v for k, v in t.items()},
        {},
        "2 tensors unexpected.*more layers",
    ),
    "other targets": (same, {"target_modules": ["v_proj"]}, "4 tensors missing"),
    "rank": (same, {"r": 8}, "4 tensors of another shape.*the config says rank 8 where the weights have rank 2"),
    "huge rank": (same, {"r": 10**9}, "rank 1000000000 where the weights have rank 2"),
    "impossible rank": (same, {"r": 10**18}, "cannot be made"),
    "transposed": (lambda t: {k: v.T for k, v in t.items()}, {}, "of another shape.*other sizes"),
    "integers": (put(A=torch.ones(2, 16, dtype=torch.int32)), {}, "another kind of dtype: `.*` is int32, not float32"),
    "complex": (put(A=torch.ones(2, 16, dtype=torch.complex64)), {}, "is complex64, not float32"),
    "truth": (put(A=torch.ones(2, 16, dtype=torch.bool)), {}, "is bool, not float32"),
    "nan": (put(A=torch.full((2, 16), math.nan)), {}, "1 tensor not finite: `.*lora_A.weight`"),
    "infinite": (put(B=torch.full((16, 2), math.inf, dtype=torch.float8_e5m2)), {}, "1 tensor not finite"),
    "several": (
        several,
        {},
        "1 tensor missing.*1 tensor unexpected.*1 tensor of another shape",
    ),
    "unknown kind": (same, {"peft_type": "LORRA"}, "`'LORRA'`"),
    "unknown key": (same, {"use_magic": True}, "`use_magic`"),
    "no target": (same, {"target_modules": ["nothing"]}, "matches no module"),
}


@pytest.mark.filterwarnings("ignore:`target_modules` has `nothing`")
@pytest.mark.parametrize("first", [True, False], ids=["bare", "adapted"])
@pytest.mark.parametrize(("change", "config", "words"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_said_and_changes_nothing(
    saved: Path, change: Change, config: dict[str, Any], words: str, first: bool
) -> None:
    rewrite(saved, change, **config)
    model = tiny("llama") if first else with_adapter(name="mine", target_modules=["v_proj"])
    before = snapshot(model)
    with pytest.raises(PeftliteError, match=f"(?s){words}") as caught:
        load_adapter(model, saved)
    assert "Nothing was changed." in str(caught.value)
    assert len(str(caught.value)) < 1500
    assert snapshot(model) == before
    save_adapter(with_adapter(), saved)
    load_adapter(model, saved)  # and can be loaded once it is mended


def test_values_that_a_smaller_dtype_cannot_hold_are_not_finite(saved: Path) -> None:
    rewrite(saved, put(A=torch.full((2, 16), 1e6)))
    load_adapter(tiny("llama", dtype=torch.float16), saved)
    with pytest.raises(CheckpointError, match="not finite"):
        load_adapter(tiny("llama", dtype=torch.float16), saved, autocast_adapter_dtype=False)


def test_an_adapter_of_another_architecture(tmp_path: Path) -> None:
    save_adapter(with_adapter("gpt2", target_modules=["c_attn"]), tmp_path)
    model = tiny("llama")
    before = snapshot(model)
    with pytest.warns(PeftliteWarning, match="c_attn"), pytest.raises(PeftliteError, match="c_attn"):
        load_adapter(model, tmp_path)
    assert snapshot(model) == before
    wider = tiny("llama", hidden_size=32)
    save_adapter(with_adapter(), tmp_path)
    with pytest.raises(CheckpointError, match="made on a model of other sizes"):
        load_adapter(wider, tmp_path)


@pytest.mark.parametrize("name", ["a.b", "", "../up", "__base__", "mine"])
def test_a_name_that_cannot_be_is_refused_before_anything_is_read(saved: Path, name: str) -> None:
    model = with_adapter(name="other")
    if name == "mine":
        (saved / CONFIG_NAME).write_text("[]")
    with pytest.raises(CheckpointError if name == "mine" else AdapterNameError):
        load_adapter(model, saved, name)


def test_asked_to_be_tolerant_it_says_what_it_left_out(saved: Path) -> None:
    rewrite(saved, several)
    base = tiny("llama")
    with pytest.warns(PeftliteWarning, match="loaded as far as it does.*1 tensor missing") as caught:
        report = load_adapter(base, saved, strict=False)
    assert caught[0].filename == __file__
    assert report.missing_keys == [A]
    assert report.unexpected_keys == [f"{PREFIX}model.extra"]
    assert [misfit.key for misfit in report.mismatched_keys] == [B]
    assert len(report.loaded_keys) == 2
    assert not report.fits
    assert not any(parameter.is_meta for parameter in base.parameters())
    first, second = (layer.self_attn.q_proj for layer in base.model.layers)
    assert first.lora_A["default"].weight.abs().sum() > 0  # fresh, as for a new adapter
    assert second.lora_B["default"].weight.abs().sum() == 0
    loaded = load_file(saved / SAFETENSORS_WEIGHTS_NAME)
    assert torch.equal(second.lora_A["default"].weight, loaded[A.replace("layers.0", "layers.1")])


def test_asked_to_be_tolerant_it_loads_values_that_are_not_finite(saved: Path) -> None:
    rewrite(saved, put(A=torch.full((2, 16), math.nan)))
    with pytest.warns(PeftliteWarning, match="1 tensor not finite"):
        report = load_adapter(tiny("llama"), saved, strict=False)
    assert report.not_finite_keys == [A]


@pytest.mark.parametrize("name", ["commit", "take"])
@pytest.mark.parametrize("first", [True, False], ids=["bare", "adapted"])
def test_an_interrupted_load_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool, name: str
) -> None:
    save_adapter(with_adapter("gpt2", target_modules=["c_attn"], bias="all"), tmp_path)
    rewrite(tmp_path, lambda t: {k: v + 1 if "bias" in k else v for k, v in t.items()})
    model = tiny("gpt2") if first else with_adapter("gpt2", name="mine", target_modules=["c_proj"])
    before = snapshot(model)
    if name == "commit":  # while layers are attached
        real, calls = AdapterLayer.add, []

        def add(*args: Any) -> None:
            calls.append(args)
            if len(calls) == 2:
                raise KeyboardInterrupt
            real(*args)

        monkeypatch.setattr(AdapterLayer, "add", add)
    else:  # while biases of the base model are overwritten
        real_copy, copies = targets._copy, []

        def copy(tensor: Tensor, new: Tensor) -> None:
            copies.append(tensor)
            if len(copies) == 3:
                raise KeyboardInterrupt
            real_copy(tensor, new)

        monkeypatch.setattr(targets, "_copy", copy)
    with pytest.raises(KeyboardInterrupt):
        load_adapter(model, tmp_path)
    monkeypatch.undo()
    assert snapshot(model) == before
    load_adapter(model, tmp_path)
