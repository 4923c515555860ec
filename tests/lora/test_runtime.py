"""What `LoraRuntimeConfig` asks for: low-rank products in the base layer's dtype, on every layer and in every batch."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peftlite
from peftlite import AdaLoraConfig, IA3Config, LoraConfig, LoraRuntimeConfig, set_runtime_config
from peftlite.errors import AdapterNameError, ConfigError, NoAdapterError, UnsupportedFeatureError
from peftlite.tuners.lora.banked import LoraBank
from tests.contract.rows import scramble
from tests.lora.test_banked import counted, one_by_one

BASE = LoraRuntimeConfig(compute_dtype="base")
LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(16, 8),
    "conv1d": lambda: Conv1D(8, 16),
    "conv2d": lambda: nn.Conv2d(16, 8, 3),
    "embedding": lambda: nn.Embedding(16, 8),
}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lora_bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "qalora": {"use_qalora": True, "qalora_group_size": 4},
    "pissa": {"init_lora_weights": "pissa"},
}


def adapted(kind: str = "linear", dtype: torch.dtype = torch.bfloat16, **fields: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[kind]()).to(dtype)
    peftlite.inject(model, LoraConfig(r=4, target_modules=["0"], **fields))
    scramble(model, "default")
    return model.eval()


def fed(kind: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    torch.manual_seed(1)
    if kind == "embedding":
        return torch.randint(16, (5, 7))
    return torch.randn(*((2, 16, 6, 6) if kind == "conv2d" else (5, 7, 16))).to(dtype)


def test_it_is_checked_and_in_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`compute_dtype` is `'bas'`; nearest: `base`"):
        LoraRuntimeConfig(compute_dtype="bas")
    with pytest.raises(ConfigError, match="`dropout_mask` is `'bool'`"):
        LoraRuntimeConfig(dropout_mask="bool")
    with pytest.raises(ConfigError, match="`runtime_config` has `'dtype'`"):
        LoraConfig(runtime_config={"dtype": "base"})  # type: ignore[arg-type]
    with pytest.raises(UnsupportedFeatureError, match="`compute_dtype` of `runtime_config` is `'base'`, which AdaLoRA"):
        AdaLoraConfig(total_step=10, runtime_config=BASE)
    config = LoraConfig(target_modules=["0"], runtime_config={"compute_dtype": "base"})  # type: ignore[arg-type]
    assert config.runtime_config == BASE
    assert LoraConfig(runtime_config=None).runtime_config == LoraRuntimeConfig()  # type: ignore[arg-type]
    config.save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(tmp_path).runtime_config == LoraRuntimeConfig()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_the_base_dtype_is_that_of_factors_in_it(kind: str, form: str) -> None:
    if (kind, form) in {(k, f) for k in ("conv2d", "embedding") for f in ("qalora", "pissa")} | {
        ("embedding", "lora_bias")
    }:
        return  # which have no such form
    model, x = adapted(kind, **FORMS[form]), fed(kind)
    expected = model(x)
    set_runtime_config(model, BASE)
    found = model(x)
    assert not torch.equal(found, expected)
    narrow = copy.deepcopy(model)
    set_runtime_config(narrow, LoraRuntimeConfig())
    for name, module in narrow[0].named_modules():
        if name.startswith(("lora_A.", "lora_B.")):
            module.bfloat16()
    for name in ("lora_embedding_A", "lora_embedding_B"):
        getattr(narrow[0], name).bfloat16()
    torch.testing.assert_close(found, narrow(x), rtol=2**-6, atol=2**-4)
    found.float().square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.grad.dtype is p.dtype is torch.float32 for p in trained)


def test_it_is_nearly_as_near_to_float64() -> None:
    model, x = adapted(), torch.randn(500, 16).bfloat16()
    exact = copy.deepcopy(model).double()(x.double())
    errors = []
    for runtime in (LoraRuntimeConfig(), BASE):
        set_runtime_config(model, runtime)
        with torch.no_grad():
            errors.append(float((model(x) - exact).norm() / exact.norm()))
    assert errors[0] < errors[1] < 3 * errors[0]


def test_a_base_in_the_adapters_dtype_knows_no_difference() -> None:
    model, x = adapted(dtype=torch.float32), fed("linear", torch.float32)
    expected = model(x)
    set_runtime_config(model, BASE)
    assert torch.equal(model(x), expected)


def test_few_rows_keep_the_adapters_dtype() -> None:
    model, x = adapted(), torch.randn(3, 16).bfloat16()
    with torch.no_grad():
        expected = model(x)
        set_runtime_config(model, BASE)
        assert torch.equal(model(x), expected)


@torch.no_grad()
def test_it_is_changed_for_some_adapters_and_back(tmp_path: Path) -> None:
    model, x = adapted(), fed("linear")
    peftlite.save_adapter(model, tmp_path)
    peftlite.load_adapter(model, tmp_path, "other")
    expected = model(x)
    set_runtime_config(model, BASE, "default")
    assert [config.runtime_config == BASE for config in model[0].state.configs.values()] == [True, False]
    other = model(x)
    assert not torch.equal(other, expected)
    with peftlite.use_adapter(model, "other"):
        assert torch.equal(model(x), expected)
        set_runtime_config(model, BASE)
        assert torch.equal(model(x), other)
    assert torch.equal(copy.deepcopy(model)(x), other)
    set_runtime_config(model, LoraRuntimeConfig())
    assert torch.equal(model(x), expected)


def test_what_cannot_be_changed_is_refused() -> None:
    model = adapted()
    before = dataclasses.replace(model[0].state.configs["default"])
    with pytest.raises(AdapterNameError, match="`typo`"):
        set_runtime_config(model, BASE, ["default", "typo"])
    with pytest.raises(ConfigError, match="`runtime_config` must be a `LoraRuntimeConfig`"):
        set_runtime_config(model, "base")  # type: ignore[arg-type]
    with pytest.raises(NoAdapterError):
        set_runtime_config(nn.Linear(2, 2), BASE)
    assert model[0].state.configs["default"] == before
    scaled = nn.Sequential(nn.Linear(4, 4))
    peftlite.inject(scaled, IA3Config(target_modules=["0"], feedforward_modules=[]))
    for names in (None, "default"):
        with pytest.raises(ConfigError, match="`runtime_config`"):
            set_runtime_config(scaled, BASE, names)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_rows_of_different_adapters(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted(runtime_config=BASE), fed("linear").repeat(4, 1, 1)
    peftlite.inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], runtime_config=BASE), model, "b")
    scramble(model, "b")
    peftlite.set_adapter(model, ["default", "b"])
    rows = ["default", "b", "__base__", "b"] * 5
    with torch.set_grad_enabled(grad), counted(monkeypatch) as served:
        for batched in (False, True):
            if batched:  # what a GPU does
                monkeypatch.setattr(LoraBank, "by_group", LoraBank.batched)
            with peftlite.use_adapter_per_row(model, rows):
                y = model(x)
            torch.testing.assert_close(y, one_by_one(model, x, rows), rtol=2**-6, atol=2**-4)
        if grad:
            y.float().square().sum().backward()
            assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
        assert served == [True, True]
        set_runtime_config(model, LoraRuntimeConfig(), "b")
        with peftlite.use_adapter_per_row(model, rows):  # of two kinds, which go one by one
            torch.testing.assert_close(model(x), one_by_one(model, x, rows), rtol=2**-6, atol=2**-4)
        assert served == [True, True]
