"""Training adapters on quantised models, from loading to merging."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import peftlite
from peftlite import LoraConfig
from peftlite.core.hosts import host_for
from peftlite.core.packed import PackedHost
from peftlite.errors import PeftliteWarning, StateError, UnsupportedFeatureError
from tests.models import batch, tiny
from tests.quantised import QUANTISED, bytes_of, distance, quantise_linears, same, shake
from tests.versions import is_checkpointing


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.layer(x).relu())
        return y


def net(kind: str) -> Any:
    return quantise_linears(Net().bfloat16(), kind)


def llama(kind: str) -> Any:
    return quantise_linears(tiny("llama", hidden_size=64, intermediate_size=128), kind)


def dequantised(model: nn.Module) -> Any:
    """A tiny Llama with the values that the quantised one computes with."""
    reference = tiny("llama", hidden_size=64, intermediate_size=128)
    for path, module in model.named_modules():
        host = host_for(module)
        if isinstance(host, PackedHost):
            reference.get_submodule(path).weight.data = host.read().weight.clone()
    return reference


@pytest.mark.parametrize("kind", [kind for kind in QUANTISED if "packed" not in kind])
def test_a_qlora_step_is_that_of_the_dequantised_model(kind: str) -> None:
    quantised = llama(kind)
    models = [quantised, dequantised(quantised)]
    for model in models:
        peftlite.inject_adapter_in_model(LoraConfig(r=4, target_modules="all-linear"), model)
        shake(model)
        model.train()
    before = bytes_of(quantised)
    losses = [model(**batch("llama")).loss for model in models]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    gradients = [{name: p.grad for name, p in model.named_parameters() if p.grad is not None} for model in models]
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == 2 * 7 * 2
    for name, gradient in gradients[0].items():
        assert distance(gradient, gradients[1][name]) < 1e-5, name
    torch.optim.AdamW([p for p in quantised.parameters() if p.requires_grad]).step()
    assert same(bytes_of(quantised), before)


class Prepared:
    """The same quantised model, loaded by transformers, for us and for real PEFT."""

    def __init__(self, tmp_path: Path, **config: Any) -> None:
        tiny("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
        self.path = tmp_path
        self.config = transformers.BitsAndBytesConfig(**config)

    def load(self, dtype: torch.dtype = torch.bfloat16) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = transformers.AutoModelForCausalLM.from_pretrained(
                self.path, quantization_config=self.config, dtype=dtype
            )
        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                module.support_avx512bf16_for_cpu = False
        return model


FOUR: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}


def described(model: nn.Module) -> dict[str, Any]:
    parameters = {name: (p.dtype, p.requires_grad, tuple(p.shape)) for name, p in model.named_parameters()}
    return {**parameters, "checkpointing": is_checkpointing(model)}


@pytest.mark.parametrize("use", [True, False], ids=["checkpointing", "plain"])
@pytest.mark.parametrize("config", [FOUR, {"load_in_8bit": True}], ids=["4bit", "8bit"])
def test_a_model_is_prepared_as_peft_prepares_it(tmp_path: Path, config: dict[str, Any], use: bool) -> None:
    source = Prepared(tmp_path, **config)
    ours, theirs = source.load(), source.load()
    assert peftlite.prepare_model_for_kbit_training(ours, use) is ours
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        peft.prepare_model_for_kbit_training(theirs, use)
    assert described(ours) == described(theirs)
    ids = batch("llama")["input_ids"]
    assert ours.get_input_embeddings()(ids).requires_grad is theirs.get_input_embeddings()(ids).requires_grad is use


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("order", ["before", "after"])
def test_a_prepared_model_trains_whenever_it_was_prepared(tmp_path: Path, order: str, reentrant: bool | None) -> None:
    model = Prepared(tmp_path, **FOUR).load()
    kwargs = None if reentrant is None else {"use_reentrant": reentrant}
    if order == "before":
        peftlite.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=kwargs)
    wrapped: Any = peftlite.get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    if order == "after":
        assert peftlite.prepare_model_for_kbit_training(wrapped, gradient_checkpointing_kwargs=kwargs) is wrapped
    trainable = [p for p in wrapped.parameters() if p.requires_grad]
    assert len(trainable) == 2 * 7 * 2  # PEFT freezes the adapters too, if they are there
    optimiser = torch.optim.AdamW(trainable, lr=1e-2)
    wrapped.train()
    losses = []
    for _ in range(8):
        loss = wrapped(**batch("llama")).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_an_adapter_trained_on_a_quantised_model_is_saved_loaded_and_merged(tmp_path: Path) -> None:
    source = Prepared(tmp_path / "base", **FOUR)
    model = peftlite.get_peft_model(source.load(), LoraConfig(r=4, target_modules="all-linear"))
    shake(model)
    expected = model(**batch("llama")).logits
    model.save_pretrained(tmp_path / "adapter")
    again: Any = peftlite.PeftModel.from_pretrained(source.load(), tmp_path / "adapter")
    assert torch.equal(again(**batch("llama")).logits, expected)
    theirs = peft.PeftModel.from_pretrained(source.load(), tmp_path / "adapter")
    torch.testing.assert_close(theirs(**batch("llama")).logits, expected, rtol=0.05, atol=0.05)
    dense: Any = again.merge_and_unload(dequantize=True)
    assert distance(dense(**batch("llama")).logits, expected) < 0.02
    assert not [name for name in vars(dense) if re.search("quant|loaded_in", name)]
    dense.save_pretrained(tmp_path / "dense")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    assert torch.equal(loaded(**batch("llama")).logits, dense(**batch("llama")).logits)


@pytest.mark.parametrize("kind", ["linear4bit-nf4", "linear4bit-nf4-double"])
def test_inference_before_training_costs_no_gradients(kind: str) -> None:
    """Where the CPU has bf16 instructions, bitsandbytes repacks weights for inference, and loses gradients then."""
    model = net(kind)
    weight: Any = model.layer.weight
    dense = host_for(model.layer).read().weight  # type: ignore[union-attr]
    converted = bnb.functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    weight.data, weight.quant_state = converted
    model.layer.support_avx512bf16_for_cpu = True
    peftlite.prepare_model_for_kbit_training(model, False)
    model.eval()
    with torch.no_grad():
        model(torch.randn(2, 64))
    x = torch.randn(2, 64, requires_grad=True)
    model.train()
    model.layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, dense.sum(0).expand(2, 64), rtol=0.02, atol=0.02)  # scales are in bf16 now


def test_preparing_says_what_it_cannot_do() -> None:
    with pytest.warns(PeftliteWarning, match="no quantised layers"):
        model = peftlite.prepare_model_for_kbit_training(Net().bfloat16())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with pytest.raises(UnsupportedFeatureError, match="use_gradient_checkpointing"):
        peftlite.prepare_model_for_kbit_training(net("linear4bit-nf4"))
    merged = net("linear4bit-nf4")
    peftlite.inject_adapter_in_model(LoraConfig(target_modules=["layer"]), merged)
    with pytest.warns(PeftliteWarning):
        peftlite.merge_adapter(merged)
    with pytest.raises(StateError, match="merged"):
        peftlite.prepare_model_for_kbit_training(merged, False)


@pytest.mark.parametrize("kind", ["torchao-int8", "hqq"])
def test_what_takes_one_dtype_only_keeps_it(kind: str) -> None:
    model = peftlite.prepare_model_for_kbit_training(net(kind), False)
    assert model.head.weight.dtype is torch.bfloat16
    assert not model.head.weight.requires_grad
    model(torch.randn(2, 64, dtype=torch.bfloat16))
