"""Adapters on quantised layers of bitsandbytes, torchao and HQQ, on the CPU."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftlite
from peftlite import LoraConfig
from peftlite.core.hosts import host_for
from peftlite.core.packed import PackedHost
from peftlite.core.tree import layers
from peftlite.errors import MergeError, PeftliteWarning, UnsupportedLayerError
from peftlite.integrations.quantised import torchao as torchao_hosts
from tests.quantised import QUANTISED, bytes_of, distance, quantise_linears, same, shake

IN, OUT = 128, 64
ROUNDS = "ignore:Merged into:peftlite.errors.PeftliteWarning"
every_kind = pytest.mark.parametrize("kind", QUANTISED)
ERRORS = {
    "linear4bit-nf4": 0.1,
    "linear4bit-nf4-double": 0.1,
    "linear4bit-fp4": 0.14,
    "linear4bit-fp4-double": 0.14,
    "linear8bit": 0.01,
    "torchao-int8": 0.01,
    "torchao-int8-grouped": 0.01,
    "torchao-int4": 0.1,
    "torchao-int4-packed": 0.1,
    "hqq": 0.1,
}
"""What quantising a weight of random numbers may cost, in parts of its norm."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(IN, OUT)
        self.head = nn.Linear(OUT, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.layer(x).relu())
        return y


def net(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return quantise_linears(Net().to(dtype).eval(), kind)


def adapted(kind: str, *names: str, dtype: torch.dtype = torch.float32) -> Any:
    model = net(kind, dtype)
    for name in names or ("default",):
        peftlite.inject_adapter_in_model(LoraConfig(r=4, target_modules=["layer"]), model, name)
    shake(model)
    return model


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 5, IN, generator=torch.Generator().manual_seed(2)).to(dtype)


# ---- one layer


@every_kind
def test_hosts_answer_from_the_module(kind: str) -> None:
    host = host_for(net(kind, torch.bfloat16).layer)
    assert isinstance(host, PackedHost)
    assert host.shape == (OUT, IN)
    assert host.device == torch.device("cpu")
    assert host.dtype is torch.bfloat16
    assert host.read().weight.shape == (OUT, IN)
    assert distance(host.read().weight, net_weight()) < ERRORS[kind]


def net_weight() -> Tensor:
    torch.manual_seed(0)
    return Net().layer.weight.detach()


@every_kind
def test_adapters_are_in_fp32_and_printed_as_peft_prints_them(kind: str) -> None:
    ours, theirs = adapted(kind, dtype=torch.bfloat16), net(kind, torch.bfloat16)
    theirs.is_loaded_in_4bit, theirs.is_loaded_in_8bit = "4bit" in kind, "8bit" in kind
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT's: it cannot merge into a torchao layer made like this
        wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=4, target_modules=["layer"]))
    assert str(ours.layer) == str(wrapped.base_model.model.layer)
    assert all(p.dtype is torch.float32 for p in next(layers(ours)).parameters_of("default"))


@every_kind
def test_outputs_are_those_of_peft(kind: str) -> None:
    ours, theirs = adapted(kind), net(kind)
    theirs.is_loaded_in_4bit, theirs.is_loaded_in_8bit = "4bit" in kind, "8bit" in kind
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=4, target_modules=["layer"])).eval()
    shake(wrapped)
    torch.testing.assert_close(ours(inputs()), wrapped(inputs()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear4bit-nf4", "linear4bit-nf4-double", "linear4bit-fp4", "linear8bit"])
@pytest.mark.filterwarnings(ROUNDS)
def test_merged_weights_are_those_of_peft(kind: str) -> None:
    ours, theirs = adapted(kind), net(kind)
    theirs.is_loaded_in_4bit, theirs.is_loaded_in_8bit = "4bit" in kind, "8bit" in kind
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=4, target_modules=["layer"])).eval()
    shake(wrapped)
    peftlite.merge_adapter(ours)
    with pytest.warns(UserWarning, match="rounding errors"):
        wrapped.merge_adapter()
    mine, its = (host_for(m.layer.base_layer) for m in (ours, wrapped.base_model.model))
    assert mine is not None
    assert its is not None
    unlike = (mine.read().weight - its.read().weight).abs() > 1e-5
    assert unlike.float().mean() < 0.01  # numbers halfway between two that can be held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@every_kind
def test_a_merge_gives_what_the_quantised_sum_gives_and_says_how_far_that_is(kind: str, dtype: torch.dtype) -> None:
    model, x = adapted(kind, dtype=dtype), inputs(dtype)
    layer = model.layer
    wanted = layer.merged_dense(layer.host.read(), ["default"])
    with pytest.warns(PeftliteWarning, match="quantised anew") as caught:
        peftlite.merge_adapter(model)
    dense = layer.host.read()
    error = distance(dense.weight, wanted.weight)
    assert 0 < error < ERRORS[kind]
    assert layer.merge_error == pytest.approx(error, rel=1e-3)
    assert f"by {error:.2g} of their norm" in str(caught[0].message)
    assert "`layer`" in str(caught[0].message)
    if kind == "linear8bit":
        layer.get_base_layer().train()  # for inference, inputs are rounded to 8 bits too
    expected = F.linear(x.float(), dense.weight.float(), wanted.bias.float())
    assert distance(layer(x), expected) < 8 * torch.finfo(dtype).eps


@every_kind
@pytest.mark.filterwarnings(ROUNDS)
def test_unmerging_gives_the_quantised_bytes_back(kind: str) -> None:
    model, x = adapted(kind, "a", "b", "c"), inputs()
    before, parameter, expected = bytes_of(model), model.layer.host.parameter, model(x)
    for order in (["a"], ["a", "b"], ["c", "a", "b"]):
        for name in order:
            peftlite.merge_adapter(model, [name])
            assert not same(bytes_of(model), before)
            model(x)
        for name in order[1:] + order[:1]:
            peftlite.unmerge_adapter(model, [name])
        assert same(bytes_of(model), before)
        assert torch.equal(model(x), expected)
        assert kind == "linear8bit" or model.layer.host.parameter is parameter
        assert model.layer.merge_error is None


@every_kind
@pytest.mark.filterwarnings(ROUNDS)
def test_errors_of_several_merges_do_not_add_up(kind: str) -> None:
    one, other = adapted(kind, "a", "b"), adapted(kind, "a", "b")
    peftlite.merge_adapter(one, ["a", "b"])
    for names in (["a"], ["b"]):
        peftlite.merge_adapter(other, names)
    assert same(bytes_of(one), bytes_of(other))


@every_kind
@pytest.mark.filterwarnings(ROUNDS)
def test_copies_of_merged_layers_unmerge_by_themselves(kind: str) -> None:
    model, x = adapted(kind), inputs()
    before = bytes_of(model)
    peftlite.merge_adapter(model)
    merged = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        peftlite.unmerge_adapter(other)
        assert same(bytes_of(other), before)
        peftlite.merge_adapter(other)
        assert torch.equal(other(x), merged)
        assert torch.equal(model(x), merged)


@every_kind
@pytest.mark.filterwarnings(ROUNDS)
def test_merging_into_an_overlay_leaves_the_original(kind: str) -> None:
    model, x = net(kind), inputs()
    before, expected = bytes_of(model), model(x)
    twin = peftlite.overlay(model)
    peftlite.inject_adapter_in_model(LoraConfig(r=4, target_modules=["layer"]), twin)
    shake(twin)
    peftlite.merge_adapter(twin)
    assert not torch.equal(twin(x), expected)
    assert same(bytes_of(model), before)
    assert torch.equal(model(x), expected)


@every_kind
def test_an_interrupted_merge_changes_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(kind)
    before = bytes_of(model)
    real = type(model.layer.host).hold

    def fail_once_held(self: PackedHost, packed: Any) -> None:
        monkeypatch.undo()
        real(self, packed)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(model.layer.host), "hold", fail_once_held)
    with pytest.raises(RuntimeError, match="out of memory"):
        peftlite.merge_adapter(model)
    assert same(bytes_of(model), before)
    assert not model.layer.merged


@pytest.mark.filterwarnings(ROUNDS)
def test_a_kind_of_torchao_weight_that_cannot_be_made_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted("torchao-int8"), inputs()
    before, expected = bytes_of(model), model(x)
    monkeypatch.setattr(torchao_hosts, "MAKERS", {})
    with pytest.raises(MergeError, match=r"`Int8Tensor`.*dequantize"):
        peftlite.merge_adapter(model)
    assert same(bytes_of(model), before)
    assert not model.layer.merged
    torch.testing.assert_close(peftlite.merge_and_unload(model, dequantize=True)(x), expected, rtol=1e-5, atol=1e-5)


@every_kind
def test_merging_into_dense_layers_loses_nothing(kind: str) -> None:
    model, x = adapted(kind, "a", "b"), inputs()
    model.layer.get_base_layer().train(kind == "linear8bit")  # for inference it rounds inputs too
    peftlite.set_adapter(model, ["a", "b"])
    expected = model(x)
    merged = peftlite.merge_and_unload(model, dequantize=True)
    assert type(merged.layer) is nn.Linear
    assert merged.layer.weight.dtype is torch.float32
    torch.testing.assert_close(merged(x), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.filterwarnings(ROUNDS)
def test_dense_layers_replace_all_quantised_ones_or_none() -> None:
    model = quantise_linears(nn.ModuleDict({"a": nn.Linear(IN, IN), "b": nn.Linear(IN, OUT)}), "linear4bit-nf4")
    model["norm"] = nn.LayerNorm(OUT, dtype=torch.bfloat16)
    peftlite.inject_adapter_in_model(LoraConfig(r=4, target_modules=["a"]), model)
    shake(model)
    peftlite.merge_adapter(model)
    before = bytes_of(model)
    packed = model["b"]
    next(next(layers(model)).parameters_of("default")).data.fill_(float("nan"))
    with pytest.raises(MergeError, match="finite"):
        peftlite.merge_and_unload(model, safe_merge=True, dequantize=True)
    assert model["b"] is packed
    assert isinstance(next(layers(model)).get_base_layer(), bnb.nn.Linear4bit)
    assert next(layers(model)).merged_adapters == ["default"]
    peftlite.unmerge_adapter(model)
    shake(model)
    peftlite.merge_adapter(model)
    assert same(bytes_of(model), before)
    done: Any = peftlite.merge_and_unload(model, dequantize=True)
    assert [type(module) for module in done.values()] == [nn.Linear, nn.Linear, nn.LayerNorm]
    assert {p.dtype for p in done.parameters()} == {torch.bfloat16}  # what the rest of the model is in


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.filterwarnings(ROUNDS)
def test_weights_repacked_for_a_cpu_are_read_and_put_back(double: bool) -> None:
    """As `Linear4bit.forward` leaves them where the CPU has bf16 instructions, which this one need not have."""
    model = adapted("linear4bit-nf4-double" if double else "linear4bit-nf4", dtype=torch.bfloat16)
    weight: Any = model.layer.host.parameter
    dense = model.layer.host.read().weight
    converted = bnb.functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    weight.data, weight.quant_state = converted
    before = bytes_of(model)
    assert model.layer.host.dtype is torch.bfloat16
    assert distance(model.layer.host.read().weight, dense) < 4e-3  # its scales are in bf16 now
    peftlite.merge_adapter(model)
    merged = model.layer.host.parameter.quant_state
    assert merged.nested is double
    assert merged.dtype is torch.bfloat16
    peftlite.unmerge_adapter(model)
    assert same(bytes_of(model), before)
    assert model.layer.host.parameter is weight
    assert weight.quant_state.packing_format_for_cpu


def test_a_layer_that_is_not_quantised_yet_can_be_adapted_but_not_merged() -> None:
    model = Net()
    model.layer = bnb.nn.Linear4bit(IN, OUT, compute_dtype=torch.float32)
    peftlite.inject_adapter_in_model(LoraConfig(r=4, target_modules=["layer"]), model)
    with pytest.raises(MergeError, match="moved to its device"):
        peftlite.merge_adapter(model)
    assert isinstance(host_for(model.to("cpu").layer.base_layer), PackedHost)


def test_quantised_embeddings_are_refused_by_name() -> None:
    model = nn.ModuleDict({"table": bnb.nn.Embedding4bit(64, 64)})
    with pytest.raises(UnsupportedLayerError, match=r"`table`.*Embedding4bit"):
        peftlite.inject_adapter_in_model(LoraConfig(target_modules=["table"]), model)


@every_kind
def test_a_quantised_layer_cannot_be_trained_whole(kind: str) -> None:
    model = quantise_linears(nn.ModuleDict({"a": nn.Linear(IN, IN), "b": nn.Linear(IN, IN)}), kind)
    with pytest.raises(UnsupportedLayerError, match=r"`b`.*quantised"):
        peftlite.inject_adapter_in_model(LoraConfig(target_modules=["a"], modules_to_save=["b"]), model)


@pytest.mark.parametrize("first", ["peftlite", "bitsandbytes"])
def test_hosts_cost_nothing_until_their_package_is_imported(first: str, tmp_path: Path) -> None:
    package = tmp_path / "bitsandbytes" / "nn"  # in the place of the real one, which takes long to import
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("from bitsandbytes.nn import modules")
    (package / "__init__.py").touch()
    kinds = "\n".join(
        f"class {n}(nn.Linear): pass" for n in ("Linear4bit", "Linear8bitLt", "Embedding4bit", "Embedding8bit")
    )
    (package / "modules.py").write_text(f"from torch import nn\n{kinds}")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import {first}
import peftlite
peftlite.get_peft_model, peftlite.LoraConfig, peftlite.inject
ours = [name for name in sys.modules if name.startswith("peftlite.integrations.quantised")]
assert "{first}" == "bitsandbytes" or not ours, ours
import bitsandbytes
from peftlite.core.hosts import host_for
assert type(host_for(bitsandbytes.nn.modules.Linear4bit(64, 64))).__name__ == "Linear4bitHost"
assert not {{"torchao", "hqq", "transformers"}} & set(sys.modules)
"""
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
