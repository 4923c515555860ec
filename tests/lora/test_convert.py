"""LoRA out of other methods and out of trained models: as near as the rank allows, and it is said how near."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftlite
from peftlite import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    VeraConfig,
    convert_to_lora,
    extract_lora,
    save_as_lora,
)
from peftlite.checkpoint.keys import RECORD_NAME
from peftlite.checkpoint.record import record_of
from peftlite.errors import AdapterNameError, ConfigError, NoAdapterError, PeftliteError, PeftliteWarning, StateError
from tests.contract.rows import KINDS, Holder, scramble
from tests.models import batch, tiny

METHODS: dict[str, Any] = {
    "loha": lambda **more: LoHaConfig(r=2, **more),
    "lokr": lambda **more: LoKrConfig(r=2, **more),
    "vera": lambda **more: VeraConfig(r=4, **more),
    "ia3": lambda **more: IA3Config(feedforward_modules=[], **more),
    "adalora": lambda **more: AdaLoraConfig(init_r=3, target_r=2, total_step=10, **more),
    "mica": lambda **more: LoraConfig(r=2, init_lora_weights="mica", **more),
    "bdlora": lambda **more: LoraConfig(r=2, use_bdlora={"target_modules_bd_a": ["layer"], "nblocks": 2}, **more),
    "qalora": lambda **more: LoraConfig(r=2, use_qalora=True, qalora_group_size=4, **more),
    "dora": lambda **more: LoraConfig(r=2, use_dora=True, **more),
    "rslora": lambda **more: LoraConfig(r=4, use_rslora=True, **more),
    "lora_bias": lambda **more: LoraConfig(r=2, lora_bias=True, **more),
    "pissa": lambda **more: LoraConfig(r=2, init_lora_weights="pissa", **more),
}
LINEAR_ONLY = ("vera", "pissa", "mica", "bdlora", "qalora")
CASES = [
    pytest.param(method, kind, id=f"{method}-{kind}")
    for method in METHODS
    for kind in ("linear", "linear-no-bias", "conv1d", "conv2d", "conv2d-groups", "embedding")
    if not (method in LINEAR_ONLY and kind in ("conv2d", "conv2d-groups", "embedding"))
    and not (method in ("loha", "lokr", "ia3", "adalora") and kind == "embedding")
    and not (method == "dora" and kind == "conv2d-groups")
    and not (method == "lora_bias" and kind == "embedding")
]


def holder(kind: str) -> Holder:
    torch.manual_seed(1)
    return Holder(KINDS[kind]).eval()


def loaded(model: nn.Module, converted: peftlite.convert.Converted) -> nn.Module:
    """`model` with the converted adapter."""
    config, tensors = converted
    peftlite.inject_adapter_in_model(config, model)
    peftlite.set_peft_model_state_dict(model, tensors)
    return model.eval()


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_with_enough_rank_the_outputs_are_the_same(method: str, kind: str) -> None:
    model, x = holder(kind), KINDS[kind].feed(torch.float32)
    peftlite.inject_adapter_in_model(METHODS[method](target_modules=["layer"]), model)
    scramble(model, "default")
    wanted, before = model(x), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    converted = convert_to_lora(model, 20)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    torch.testing.assert_close(loaded(holder(kind), converted)(x), wanted, atol=3e-5, rtol=1e-4)
    assert converted.relative_error < 1e-5


@pytest.mark.filterwarnings("ignore:Converting a PEFT adapter to LoRA that is already a LoRA adapter")  # PEFT's
@pytest.mark.parametrize("rank", [1, 3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("method", ["loha", "lokr", "vera", "lora"])
def test_ranks_and_factors_are_those_of_peft(method: str, rank: float) -> None:
    fields: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "o_proj"]}
    name = {"loha": "LoHaConfig", "lokr": "LoKrConfig", "vera": "VeraConfig", "lora": "LoraConfig"}[method]
    ours = peftlite.get_peft_model(tiny("llama"), getattr(peftlite, name)(**fields))
    reference = peft.get_peft_model(tiny("llama"), getattr(peft, name)(**fields))
    scramble(ours, "default")
    reference.load_state_dict(ours.state_dict())
    got, (_, tensors) = convert_to_lora(ours, rank), peft.convert_to_lora(reference, rank)
    assert got.state_dict.keys() == tensors.keys()
    for key in (key for key in tensors if "lora_A" in key):
        other = key.replace("lora_A", "lora_B")
        path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        assert got.config.rank_for(path) == len(tensors[key]) == len(got.state_dict[key]), path
        assert got.config.scaling_for(path) == 1
        torch.testing.assert_close(
            got.state_dict[other] @ got.state_dict[key], tensors[other] @ tensors[key], atol=1e-5, rtol=1e-4
        )
    assert got.config.target_modules == ["o_proj", "q_proj"]


@pytest.mark.parametrize("rank", [2, 0.8])
def test_the_error_is_that_of_the_truncation(rank: float) -> None:
    model = holder("linear")
    peftlite.inject_adapter_in_model(LoHaConfig(r=3, target_modules=["layer"]), model)
    scramble(model, "default")
    merged = copy.deepcopy(model).double()
    before = merged.layer.get_base_layer().weight.clone()
    peftlite.merge_adapter(merged)
    sizes = torch.linalg.svdvals(merged.layer.get_base_layer().weight - before).detach()
    got = convert_to_lora(model, rank)
    [kept] = got.approximation.ranks.values()
    best = float(sizes[kept:].norm() / sizes.norm())
    assert got.relative_error == pytest.approx(best, rel=1e-4)
    if isinstance(rank, float):
        assert 1 - best**2 >= rank > 1 - float(sizes[kept - 1 :].norm() / sizes.norm()) ** 2


def check_record(place: Path, loaded: nn.Module) -> None:
    """The files say what the adapter was made on, as files of any adapter do."""
    said = json.loads((place / RECORD_NAME).read_text())
    assert said.items() >= record_of(loaded, "default").fields().items()


@pytest.mark.parametrize("wrapped", [True, False])
def test_files_are_read_by_peft_and_modules_trained_whole_go_along(tmp_path: Path, wrapped: bool) -> None:
    config = LoHaConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model: Any = tiny("llama")
    if wrapped:
        model = peftlite.get_peft_model(model, config)
    else:
        peftlite.inject_adapter_in_model(config, model)
    scramble(model, "default")
    model.eval()
    assert save_as_lora(tmp_path, model, 4).relative_error < 1e-5
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    ours = peftlite.PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    with torch.no_grad():
        wanted = model(**batch("llama")).logits
        torch.testing.assert_close(theirs(**batch("llama")).logits, wanted, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(ours(**batch("llama")).logits, wanted, atol=2e-5, rtol=1e-4)
    check_record(tmp_path, ours)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (values["peft_type"], values["task_type"], values["modules_to_save"]) == ("LORA", "CAUSAL_LM", ["lm_head"])
    keys = list(convert_to_lora(model, 4).state_dict)
    assert all(key.startswith("base_model.model.") is wrapped for key in keys)


def test_conv1d_of_transformers_says_so_in_the_config() -> None:
    model = peftlite.get_peft_model(tiny("gpt2"), IA3Config(target_modules=["c_attn"], feedforward_modules=[]))
    scramble(model, "default")
    got = convert_to_lora(model, 4)
    assert got.config.fan_in_fan_out
    assert got.config.lora_bias


@pytest.mark.parametrize("rank", [0, -1, 1.5, 0.0, True, "4", None], ids=str)
def test_a_rank_that_is_none_is_refused(rank: Any) -> None:
    model = holder("linear")
    peftlite.inject_adapter_in_model(LoHaConfig(target_modules=["layer"]), model)
    with pytest.raises(ConfigError, match="rank"):
        convert_to_lora(model, rank)


def test_what_has_no_lora_is_refused() -> None:
    model = holder("linear")
    with pytest.raises(NoAdapterError):
        convert_to_lora(model, 2)
    peftlite.inject_adapter_in_model(LoraConfig(target_modules=["layer"], bias="all"), model)
    with pytest.raises(AdapterNameError, match="typo"):
        convert_to_lora(model, 2, "typo")
    with pytest.raises(ConfigError, match="bias='all'"):
        convert_to_lora(model, 2)
    invoked = tiny("llama")
    peftlite.inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[3]), invoked)
    with pytest.raises(ConfigError, match="alora_invocation_tokens"):
        convert_to_lora(invoked, 2)


# ---- from trained models
def trained(model: nn.Module, *names: str, rank: int | None = None) -> nn.Module:
    """`model` with other numbers in these parameters."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name in names:
            tensor = model.get_parameter(name)
            change = torch.randn(tensor.shape, generator=generator)
            if rank is not None and tensor.dim() == 2:
                change = torch.randn(tensor.shape[0], rank) @ torch.randn(rank, tensor.shape[1]) / 10
            tensor.add_(change.to(tensor.dtype), alpha=0.1)
    return model


PROJECTIONS = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"]


def test_a_difference_of_low_rank_is_found_exactly(tmp_path: Path) -> None:
    tuned = trained(tiny("llama"), *PROJECTIONS, rank=2)
    got = extract_lora(tuned, tiny("llama"), 0.999999)
    assert got.config.r == 2
    assert got.config.rank_pattern == {}
    assert set(got.approximation.ranks) == {name.removesuffix(".weight") for name in PROJECTIONS}
    got.save_pretrained(tmp_path)
    check_record(tmp_path, peftlite.PeftModel.from_pretrained(tiny("llama"), tmp_path))
    with pytest.warns(PeftliteWarning), pytest.raises(PeftliteError, match="GPT2"):
        peftlite.PeftModel.from_pretrained(tiny("gpt2"), tmp_path)
    adapted = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            adapted(**batch("llama")).logits, tuned(**batch("llama")).logits, atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv1d-torch", "conv2d", "conv2d-groups", "embedding"])
def test_a_full_rank_difference_and_a_bias_on_every_kind_of_layer(kind: str) -> None:
    base, x = holder(kind), KINDS[kind].feed(torch.float32)
    tuned = trained(holder(kind), *(f"layer.{name}" for name, _ in base.layer.named_parameters()))
    got = extract_lora(tuned, base, 20, LoraConfig(target_modules=["layer"]))
    torch.testing.assert_close(loaded(holder(kind), got)(x), tuned(x), atol=2e-5, rtol=1e-4)
    assert got.config.lora_bias is ("layer.bias" in dict(base.named_parameters()))
    cut = extract_lora(tuned, base, 2, LoraConfig(target_modules=["layer"]))
    delta = tuned.layer.weight - base.layer.weight
    if delta.dim() == 2:
        sizes = torch.linalg.svdvals(delta.detach())
        assert cut.relative_error == pytest.approx(float(sizes[2:].norm() / sizes.norm()), rel=1e-4)


def test_what_the_adapter_does_not_hold_is_named_and_can_be_taken_over() -> None:
    tuned = trained(tiny("llama"), *PROJECTIONS, "model.norm.weight", "lm_head.weight")
    with pytest.warns(PeftliteWarning, match=r"`model.norm.weight`, `lm_head.weight`"):
        got = extract_lora(tuned, tiny("llama"), 4)
    assert got.left_out == ("model.norm.weight", "lm_head.weight")
    config = LoraConfig(target_modules="all-linear", modules_to_save=["lm_head", "model.norm"])
    got = extract_lora(tuned, tiny("llama"), 16, config)
    assert got.left_out == ()
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(tiny("llama"), got)(**batch("llama")).logits, tuned(**batch("llama")).logits, atol=1e-5, rtol=1e-4
        )


def other_sizes() -> nn.Module:
    model: nn.Module = tiny("llama", hidden_size=32)
    return model


def with_adapter() -> nn.Module:
    model: nn.Module = tiny("llama")
    peftlite.inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model)
    return model


@pytest.mark.parametrize(
    ("tuned", "error", "message"),
    [
        (lambda: tiny("llama"), ConfigError, "No layer"),
        (lambda: trained(tiny("llama"), "lm_head.weight"), ConfigError, r"what differs is: `lm_head.weight`"),
        (other_sizes, ConfigError, "not of one architecture"),
        (lambda: tiny("gpt2"), ConfigError, "no such layer"),
        (with_adapter, StateError, "has adapters"),
    ],
    ids=["equal", "other layers", "sizes", "architecture", "adapters"],
)
def test_models_without_a_difference_are_refused(tuned: Any, error: type[PeftliteError], message: str) -> None:
    with pytest.raises(error, match=message):
        extract_lora(tuned(), tiny("llama"), 4)


def test_weights_that_are_not_finite_are_refused() -> None:
    tuned = tiny("llama")
    tuned.get_parameter(PROJECTIONS[0]).data[0, 0] = float("nan")
    with pytest.raises(ConfigError, match="finite"):
        extract_lora(tuned, tiny("llama"), 4)


def test_experts_and_attention_are_layers_too() -> None:
    from tests.lora.test_combine import Odd

    base = Odd().eval()
    tuned = trained(copy.deepcopy(base), *(name for name, p in base.named_parameters() if p.dim() > 1))
    config = LoraConfig(target_modules=["attention", "linear"], target_parameters=["experts.weight"])
    got, x = extract_lora(tuned, base, 12, config), torch.randn(5, 12)
    wanted: Tensor = tuned(x)
    torch.testing.assert_close(loaded(base, got)(x), wanted, atol=2e-4, rtol=1e-4)
