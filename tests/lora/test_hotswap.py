"""Swapping an adapter's weights: the outputs of the other adapter, in the same tensors, by the same compiled code."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import peft
import peft.utils.hotswap
import pytest
import torch
from torch import Tensor, nn

import peftlite
from peftlite import IA3Config, LoraConfig
from peftlite.checkpoint import tensorfile
from peftlite.checkpoint.tensorfile import SafetensorsFile
from peftlite.core.tree import layers, named_layers
from peftlite.errors import AdapterNameError, CheckpointError, ConfigError, NoAdapterError, PeftliteWarning, StateError
from peftlite.hotswap import (
    check_hotswap_configs_compatible,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)
from tests.contract.rows import KINDS, Holder, scramble
from tests.contract.test_laws import snapshot
from tests.lora.test_combine import Odd
from tests.models import batch, tiny

TARGETS = ["q_proj", "v_proj"]
DENSE = ("linear", "linear-no-bias", "conv1d", "conv1d-torch", "conv2d", "conv2d-groups", "conv3d", "embedding")


def llama(name: str = "default", seed: int = 0, wrapped: bool = True, **fields: Any) -> Any:
    """A tiny Llama with an adapter with random weights."""
    config = LoraConfig(**{"target_modules": TARGETS, "r": 4, **fields})
    model = tiny("llama")
    if wrapped:
        model = peftlite.get_peft_model(model, config, name)
    else:
        peftlite.inject_adapter_in_model(config, model, name)
    scramble(model, name, seed)
    return model.eval()


def saved(model: Any, directory: Path, name: str = "default") -> Path:
    peftlite.save_adapter(model, directory, selected_adapters=[name])
    return directory if name == "default" else directory / name


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(**batch("llama")).logits
    return found


def addresses(model: nn.Module) -> dict[str, int]:
    return {name: p.data_ptr() for name, p in model.named_parameters() if "lora_" in name}


OTHERS: list[dict[str, Any]] = [
    {},
    {"lora_alpha": 30},
    {"use_rslora": True, "lora_alpha": 3},
    {"alpha_pattern": {"q_proj": 5}},
    {"r": 2},
    {"r": 7, "lora_alpha": 5},
    {"r": 3, "rank_pattern": {"layers.1.self_attn.q_proj": 5}},
    {"target_modules": ["q_proj"]},
    {"modules_to_save": ["lm_head"]},
]


@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped", "inplace"])
@pytest.mark.parametrize("prepared", [None, 8], ids=["as-is", "prepared"])
@pytest.mark.parametrize("fields", OTHERS, ids=str)
def test_the_outputs_become_those_of_the_other_adapter(
    fields: dict[str, Any], prepared: int | None, wrapped: bool, tmp_path: Path
) -> None:
    whole = {"modules_to_save": fields["modules_to_save"]} if "modules_to_save" in fields else {}
    model, other = llama("mine", wrapped=wrapped, **whole), llama(seed=5, **fields)
    if prepared:
        before = logits(model)
        prepare_model_for_compiled_hotswap(model, target_rank=prepared)
        torch.testing.assert_close(logits(model), before, atol=1e-6, rtol=1e-5)
    same_ranks = prepared or fields.get("r", 4) == 4
    at, flags = addresses(model), {name: p.requires_grad for name, p in model.named_parameters()}
    hotswap_adapter(model, saved(other, tmp_path / "other"), "mine")
    torch.testing.assert_close(logits(model), logits(other), atol=1e-6, rtol=1e-5)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert (addresses(model) == at) or not same_ranks
    again = peftlite.PeftModel.from_pretrained(tiny("llama"), saved(model, tmp_path / "mine", "mine")).eval()
    torch.testing.assert_close(logits(again), logits(other), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
@pytest.mark.parametrize("named", [True, False])
def test_keys_may_be_those_of_files_or_of_the_model(prefix: str, named: bool) -> None:
    model, other = llama("mine", wrapped=bool(prefix)), llama(seed=5)
    tensors = {
        key.replace("base_model.model.", prefix).replace(".weight", ".mine.weight" if named else ".weight"): tensor
        for key, tensor in peftlite.get_peft_model_state_dict(other).items()
    }
    hotswap_adapter_from_state_dict(model, tensors, "mine", other.peft_config["default"])
    assert torch.equal(logits(model), logits(other))


def test_the_state_dict_stays_its_owners() -> None:
    model, other = llama(), llama(seed=5, r=6)
    tensors = {key: tensor.clone() for key, tensor in peftlite.get_peft_model_state_dict(other).items()}
    hotswap_adapter_from_state_dict(model, tensors, "default", other.peft_config["default"])
    for tensor in tensors.values():
        tensor.zero_()
    assert torch.equal(logits(model), logits(other))


def test_swapping_as_peft_does(tmp_path: Path) -> None:
    other = llama(seed=5, lora_alpha=30)
    directory = saved(other, tmp_path)
    theirs = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=4, target_modules=TARGETS)).eval()
    ours = llama(seed=1)
    for prepare, swap, model in (
        (
            peft.utils.hotswap.prepare_model_for_compiled_hotswap,
            peft.utils.hotswap.hotswap_adapter,
            theirs,
        ),
        (prepare_model_for_compiled_hotswap, hotswap_adapter, ours),
    ):
        prepare(model, target_rank=8)
        swap(model, directory, "default")
    torch.testing.assert_close(logits(ours), logits(theirs), atol=2e-6, rtol=1e-5)
    for name, tensor in theirs.state_dict().items():
        if "lora_" in name:
            assert ours.state_dict()[name].shape == tensor.shape


@pytest.mark.parametrize("kind", DENSE)
def test_ranks_are_padded_on_every_kind_of_layer(kind: str, tmp_path: Path) -> None:
    def model_with(seed: int, r: int) -> nn.Module:
        torch.manual_seed(1)
        model = Holder(KINDS[kind]).eval()
        peftlite.inject_adapter_in_model(LoraConfig(r=r, target_modules=["layer"], lora_alpha=5), model)
        scramble(model, "default", seed)
        return model

    model, other, x = model_with(1, 4), model_with(2, 2), KINDS[kind].feed(torch.float32)
    before = model(x)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch.testing.assert_close(model(x), before)
    hotswap_adapter(model, saved(other, tmp_path), "default")
    torch.testing.assert_close(model(x), other(x))
    if kind != "conv2d-groups":
        peftlite.merge_adapter(model)
        torch.testing.assert_close(model(x), other(x), atol=1e-5, rtol=1e-4)


def test_ranks_are_padded_on_experts_and_attention(tmp_path: Path) -> None:
    base, x = Odd().eval(), torch.randn(5, 12)
    config = LoraConfig(r=3, target_modules=["attention", "linear"], target_parameters=["experts.weight"])
    model, other = copy.deepcopy(base), copy.deepcopy(base)
    for seed, (one, r) in enumerate(((model, 3), (other, 2))):
        peftlite.inject_adapter_in_model(LoraConfig(**{**config.to_dict(), "r": r, "peft_type": None}), one)
        scramble(one, "default", seed)
    before = model(x)
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    torch.testing.assert_close(model(x), before)
    hotswap_adapter(model, saved(other, tmp_path), "default")
    torch.testing.assert_close(model(x), other(x))


def test_dora_is_swapped_with_its_magnitudes(tmp_path: Path) -> None:
    model, other = llama(use_dora=True), llama(seed=5, use_dora=True, r=2, lora_alpha=9)
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    hotswap_adapter(model, saved(other, tmp_path), "default")
    torch.testing.assert_close(logits(model), logits(other), atol=1e-6, rtol=1e-5)


def test_pissa_is_swapped_where_first_factors_are_the_same(tmp_path: Path) -> None:
    model, other = (llama(seed=seed, init_lora_weights="pissa") for seed in (1, 5))
    hotswap_adapter(model, saved(other, tmp_path / "a"), "default")
    torch.testing.assert_close(logits(model), logits(other), atol=1e-6, rtol=1e-5)
    rescaled = llama(init_lora_weights="pissa", lora_alpha=3)
    with pytest.raises(ConfigError, match="begins from"):
        hotswap_adapter(model, saved(rescaled, tmp_path / "b"), "default")


@pytest.mark.parametrize("train", [False, True])
def test_compiled_code_serves_all_adapters_that_fit(train: bool, tmp_path: Path) -> None:
    model = llama(modules_to_save=["lm_head"]).train(train)
    model.requires_grad_(False)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    graphs = []

    def backend(module: torch.fx.GraphModule, example: object) -> Any:
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    logits(compiled)
    for at, fields in enumerate(OTHERS[:-1]):
        other = llama(seed=at + 5, modules_to_save=["lm_head"], **fields)
        hotswap_adapter(compiled, saved(other, tmp_path / str(at)), "default")
        torch.testing.assert_close(logits(compiled), logits(other), atol=2e-6, rtol=1e-5)
    assert len(graphs) == 1


def test_an_adapter_that_was_not_prepared_for_is_swapped_with_a_warning(tmp_path: Path) -> None:
    model, other = llama(), llama(seed=5, r=9)
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    with pytest.warns(PeftliteWarning, match="larger `target_rank`"):
        hotswap_adapter(model, saved(other, tmp_path), "default")
    torch.testing.assert_close(logits(model), logits(other), atol=1e-6, rtol=1e-5)


def test_all_adapters_are_prepared_and_keep_working() -> None:
    model = llama(r=3)
    model.add_adapter("b", LoraConfig(r=5, target_modules=["q_proj"], alpha_pattern={"layers.0.self_attn.q_proj": 3}))
    scramble(model, "b")
    before = {name: (model.set_adapter(name), logits(model))[1] for name in ("default", "b")}
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    for name, wanted in before.items():
        model.set_adapter(name)
        torch.testing.assert_close(logits(model), wanted, atol=1e-6, rtol=1e-5)
        assert model.peft_config[name].r == 6
        for path, layer in named_layers(model):
            if name in layer.variants:
                assert float(layer.scaling[name]) == model.peft_config[name].scaling_for(path)
                assert layer.r[name] == layer.lora_A[name].out_features == len(layer.lora_A[name].weight) == 6
    with torch.no_grad():
        model(**batch("llama"), adapter_names=["b", "__base__"])
    model.merge_adapter()
    model.unmerge_adapter()
    peftlite.scale_adapter(model, "b", 0.5)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    report = model.add_weighted_adapter(["default", "b"], [1.0, 0.5], "sum", "cat")
    assert report.relative_error == 0


COMPATIBLE: list[tuple[dict[str, Any], dict[str, Any], str | None]] = [
    ({}, {"r": 2, "lora_alpha": 3, "use_rslora": True, "alpha_pattern": {"q_proj": 2}}, None),
    ({"rank_pattern": {"q_proj": 2}}, {"target_modules": ["k_proj"], "modules_to_save": ["lm_head"]}, None),
    ({}, {"lora_dropout": 0.1}, "lora_dropout"),
    ({}, {"use_dora": True}, "use_dora"),
    ({"lora_bias": True}, {}, "lora_bias"),
    ({}, {"bias": "all"}, "bias"),
    ({"init_lora_weights": "pissa"}, {}, "Shifted"),
]


@pytest.mark.parametrize(("first", "second", "refused"), COMPATIBLE, ids=str)
def test_configs_are_compatible_where_numbers_alone_differ(
    first: dict[str, Any], second: dict[str, Any], refused: str | None
) -> None:
    configs = [LoraConfig(**{"target_modules": TARGETS, **fields}) for fields in (first, second)]
    for pair in (configs, configs[::-1]):
        if refused is None:
            check_hotswap_configs_compatible(*pair)
            continue
        with pytest.raises(ConfigError, match=refused):
            check_hotswap_configs_compatible(*pair)


def test_other_methods_are_refused() -> None:
    lora, ia3 = LoraConfig(target_modules=TARGETS), IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    for pair in ((lora, ia3), (ia3, lora), (ia3, ia3)):
        with pytest.raises(ConfigError, match="only LoRA"):
            check_hotswap_configs_compatible(*pair)


Edit = Callable[[dict[str, Tensor]], object]
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
LAST = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
BROKEN: dict[str, tuple[Edit, str]] = {
    "half a layer": (lambda t: t.pop(LAST), "`lora_B.weight` is missing"),
    "no place": (lambda t: t.update({FIRST.replace("q_proj", "k_proj"): t[FIRST]}), "no place for .*nearest"),
    "shape": (lambda t: t.update({LAST: t[LAST][:-1]}), "by the config it must be"),
    "rank": (lambda t: t.update({FIRST: t[FIRST][:2]}), "by the config it must be"),
    "nan": (lambda t: t.update({LAST: t[LAST] * float("nan")}), "not finite"),
    "inf": (lambda t: t.update({LAST: t[LAST] / 0}), "not finite"),
    "integers": (lambda t: t.update({LAST: t[LAST].int()}), "real numbers"),
}


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_changes_nothing(case: str, prepared: bool) -> None:
    edit, message = BROKEN[case]
    model, other = llama(), llama(seed=5)
    if prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=6)
    tensors = dict(peftlite.get_peft_model_state_dict(other))
    edit(tensors)
    before, config = snapshot(model), model.peft_config["default"]
    with pytest.raises(CheckpointError, match=message):
        hotswap_adapter_from_state_dict(model, tensors, "default", other.peft_config["default"])
    assert snapshot(model) == before
    assert model.peft_config["default"] is config


def test_calls_that_make_no_sense_change_nothing(tmp_path: Path) -> None:
    model, directory = llama(), saved(llama(seed=5), tmp_path)
    with pytest.raises(NoAdapterError):
        hotswap_adapter(tiny("llama"), directory, "default")
    with pytest.raises(NoAdapterError):
        prepare_model_for_compiled_hotswap(tiny("llama"), target_rank=8)
    with pytest.raises(AdapterNameError, match="typo"):
        hotswap_adapter(model, directory, "typo")
    with pytest.raises(ConfigError, match="needs at least 4"):
        prepare_model_for_compiled_hotswap(model, target_rank=3)
    with pytest.raises(ConfigError, match="check_compiled"):
        prepare_model_for_compiled_hotswap(model, check_compiled="typo")
    with pytest.raises(StateError, match="compiled already"):
        prepare_model_for_compiled_hotswap(torch.compile(model), target_rank=8)
    assert all(isinstance(layer.scaling["default"], float) for layer in layers(model))
    model.merge_adapter()
    with pytest.raises(StateError, match="unmerge"):
        hotswap_adapter(model, directory, "default")
    with pytest.raises(StateError, match="unmerge"):
        prepare_model_for_compiled_hotswap(model, target_rank=8)


@pytest.mark.parametrize("policy", ["warn", "ignore"])
def test_a_compiled_model_can_be_prepared_all_the_same(policy: str, recwarn: pytest.WarningsRecorder) -> None:
    prepare_model_for_compiled_hotswap(torch.compile(llama()), target_rank=8, check_compiled=policy)
    assert [w.category for w in recwarn] == ([PeftliteWarning] if policy == "warn" else [])


def test_groups_must_divide_the_rank_to_prepare_for() -> None:
    model = Holder(KINDS["conv2d-groups"])
    peftlite.inject_adapter_in_model(LoraConfig(r=4, target_modules=["layer"]), model)
    with pytest.raises(ConfigError, match="at least 6"):
        prepare_model_for_compiled_hotswap(model, target_rank=5)


def test_a_file_that_is_cut_off_between_the_look_and_the_swap_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, directory = llama(), saved(llama(seed=5), tmp_path)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    config, read, filled = model.peft_config["default"], SafetensorsFile.read_into, []

    def cut(self: SafetensorsFile, places: Iterable[tuple[str, Tensor]]) -> None:
        fill = self._fill_all

        def counted(places: Sequence[tuple[str, Tensor]]) -> None:
            filled.extend(places)
            if len(filled) >= 3:
                weights = directory / "adapter_model.safetensors"
                os.truncate(weights, weights.stat().st_size // 2)
            fill(places)

        monkeypatch.setattr(self, "_fill_all", counted)
        monkeypatch.setattr(tensorfile, "CHUNK", 1)  # so that each is read alone
        read(self, places)

    monkeypatch.setattr(SafetensorsFile, "read_into", cut)
    with pytest.raises(CheckpointError, match="was cut off while it was read"):
        hotswap_adapter(model, directory, "default")
    assert len(filled) >= 3  # two tensors were written by then
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert model.peft_config["default"] is config


def test_a_file_that_is_written_to_between_the_look_and_the_swap_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, directory = llama(), saved(llama(seed=5), tmp_path)
    weights = directory / "adapter_model.safetensors"
    before, look = {key: t.clone() for key, t in model.state_dict().items()}, SafetensorsFile.not_finite

    def spoil(self: SafetensorsFile) -> str | None:
        found = look(self)
        with weights.open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\xff\xff\xff\xff")
        os.utime(weights, ns=(1, 1))
        return found

    monkeypatch.setattr(SafetensorsFile, "not_finite", spoil)
    with pytest.raises(CheckpointError, match="was written to while it was read"):
        hotswap_adapter(model, directory, "default")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_read_into_the_live_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    model, other = llama(), llama(seed=5)
    directory, wanted = saved(other, tmp_path), peftlite.get_peft_model_state_dict(other)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    live = peftlite.get_peft_model_state_dict(model)
    versions = {key: tensor._version for key, tensor in live.items()}
    hotswap_adapter(model, directory, "default")
    for key, tensor in live.items():
        assert torch.equal(tensor, wanted[key].to(dtype))
        assert tensor._version > versions[key]
