"""Adding adapters: what is planned is what is done, exactly once per module, or nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftlite
from peftlite import LoraConfig
from peftlite.core.layer import AdapterLayer
from peftlite.core.tree import layers, named_layers
from peftlite.errors import (
    AdapterNameError,
    ConfigError,
    NoAdapterError,
    PeftliteWarning,
    StateError,
    TargetNotFoundError,
    UnsupportedLayerError,
)
from tests.contract.rows import scramble
from tests.models import batch, tiny


class Encoder(nn.Module):
    """A model in which one module is in two places, and one weight in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = self.first
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.first.weight
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.tied(self.again(self.first(x))))
        return y


def config(*targets: str, **fields: object) -> LoraConfig:
    return LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False, **fields)  # type: ignore[arg-type]


# ---- the plan
def test_the_plan_is_what_is_done() -> None:
    model = tiny("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    planned = peftlite.plan(model, LoraConfig(r=3, target_modules="all-linear", rank_pattern={"up_proj": 5}))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not list(layers(model))
    done = peftlite.inject(model, LoraConfig(r=3, target_modules="all-linear", rank_pattern={"up_proj": 5}))
    assert [(s.path, s.rank, s.parameters) for s in planned.sites] == [
        (s.path, s.rank, s.parameters) for s in done.sites
    ]
    assert [path for path, _ in named_layers(model)] == [site.path for site in planned.sites]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert planned.parameters == sum(p.numel() for p in trained)
    assert planned.adapter_bytes == planned.gradient_bytes == sum(p.numel() * p.element_size() for p in trained)
    assert planned.optimizer_bytes == 2 * planned.adapter_bytes


def test_the_plan_of_a_70b_model_on_the_meta_device_prints_as_a_table() -> None:
    shape = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(shape)
    lines = str(peftlite.plan(model, LoraConfig(r=16, target_modules="all-linear"))).splitlines()
    assert lines[0].split() == ["path", "base", "layer", "shape", "rank", "parameters"]
    assert lines[2].split("  ")[0] == "model.layers.{0-79}.self_attn.q_proj x 80"
    assert "20,971,520" in lines[2]
    assert lines[-1].startswith(
        "adapter `default`: 560 layers, 207,093,760 parameters; 790.0 MiB + gradients 790.0 MiB"
    )


def test_the_dtype_of_adapters_is_one_rule() -> None:
    for dtype, autocast, expected in (
        (torch.bfloat16, True, torch.float32),
        (torch.float16, True, torch.float32),
        (torch.bfloat16, False, torch.bfloat16),
        (torch.float64, True, torch.float64),
    ):
        model = Encoder().to(dtype)
        peftlite.inject(model, config("first"), autocast_adapter_dtype=autocast)
        wrapped = peftlite.get_peft_model(Encoder().to(dtype), config("first"), autocast_adapter_dtype=autocast)
        for either in (model, wrapped):
            assert {p.dtype for layer in layers(either) for p in layer.parameters_of("default")} == {expected}


def test_equal_seeds_give_equal_adapters_in_both_shapes() -> None:
    torch.manual_seed(5)
    inplace = tiny("llama")
    wrapped = copy.deepcopy(inplace)
    torch.manual_seed(6)
    peftlite.inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), inplace)
    torch.manual_seed(6)
    wrapped = peftlite.get_peft_model(wrapped, LoraConfig(target_modules=["q_proj"]))
    one, other = (dict(m.named_parameters()) for m in (inplace, wrapped.unwrap()))
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


# ---- modules in several places, weights in several modules
@pytest.mark.parametrize("targets", [("first", "again"), ("first",), ("again",)])
def test_a_module_in_two_places_gets_one_adapter_in_both(targets: tuple[str, ...]) -> None:
    model = Encoder()
    planned = peftlite.inject(model, config(*targets))
    assert isinstance(model.first, AdapterLayer)
    assert model.first is model.again
    assert [site.path for site in planned.sites] == ["first"]
    assert len(list(layers(model))) == 1
    peftlite.delete_adapter(model, "default")
    assert isinstance(model.first, nn.Linear)
    assert model.first is model.again


@pytest.mark.parametrize("target", ["tied", "first"])
def test_a_tied_weight_is_merged_into_a_copy_and_tied_again(target: str) -> None:
    model, x = Encoder(), torch.randn(3, 6)
    shared = model.tied.weight
    peftlite.inject(model, config(target))
    expected = model(x)
    with pytest.warns(PeftliteWarning, match="A weight was shared"):
        peftlite.merge_adapter(model)
    torch.testing.assert_close(model(x), expected)
    peftlite.unmerge_adapter(model)
    assert torch.equal(model(x), expected)
    weights = [m.base_layer.weight if isinstance(m, AdapterLayer) else m.weight for m in (model.first, model.tied)]
    assert all(weight is shared for weight in weights)


# ---- an overlay leaves the base alone
def test_biases_that_are_shared_are_not_merged_into() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].bias = model[0].bias
    before = [parameter.detach().clone() for parameter in model.parameters()]
    wanted = LoraConfig(target_modules=["0"], lora_bias=True, init_lora_weights=False)
    for other in (peftlite.overlay(model), model):
        bias = other[1].bias
        peftlite.inject(other, wanted)
        peftlite.merge_adapter(other)
        assert not torch.equal(other[0].bias, before[1])
        assert torch.equal(other[1].bias, before[1])
        peftlite.unmerge_adapter(other)
        assert other[0].bias is bias
    now = [layer.get_parameter(name) for layer in (model[0].base_layer, model[1]) for name in ("weight", "bias")]
    assert all(torch.equal(one, other) for one, other in zip(now, [*before, before[1]], strict=True))


def test_an_overlay_never_changes_its_original() -> None:
    model, inputs = tiny("llama"), batch("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    expected = model(**inputs).logits
    twin = peftlite.overlay(model)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert not set(map(id, model.modules())) & set(map(id, twin.modules()))
    peftlite.inject(twin, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    adapted = twin(**inputs).logits
    twin(**inputs).logits.sum().backward()
    peftlite.merge_adapter(twin)
    torch.testing.assert_close(twin(**inputs).logits, adapted)
    assert torch.equal(model(**inputs).logits, expected)
    peftlite.unmerge_adapter(twin)
    assert torch.equal(twin(**inputs).logits, adapted)
    peftlite.merge_and_unload(twin)
    assert torch.equal(model(**inputs).logits, expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters())
    assert not list(layers(model))


def test_an_overlay_keeps_ties() -> None:
    twin = peftlite.overlay(Encoder())
    assert twin.first is twin.again
    assert twin.tied.weight is twin.first.weight


def test_an_overlay_of_a_model_with_adapters_is_refused() -> None:
    model = Encoder()
    peftlite.inject(model, config("first"))
    with pytest.raises(StateError, match="Encoder has adapters"):
        peftlite.overlay(model)


# ---- errors: value, nearest choice, nothing changed
@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"target_modules": ["q_proj", "v_porj"]}, TargetNotFoundError, "`v_porj`.*nearest: .*`v_proj`"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_hed"]}, TargetNotFoundError, "`lm_hed`.*`lm_head`"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 9]}, TargetNotFoundError, "`9`.*`0`, `1`"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"k_proj": 3}}, TargetNotFoundError, "rank_pattern.*`k_proj`"),
        ({"target_modules": ["norm"]}, UnsupportedLayerError, "`model.norm`.*LlamaRMSNorm"),
        ({"target_modules": []}, TargetNotFoundError, "matches no module"),
    ],
)
@pytest.mark.parametrize("shape", ["wrapped", "in place"])
def test_a_config_that_does_not_fit_is_refused(shape: str, fields: dict, error: type, says: str) -> None:  # type: ignore[type-arg]
    model = tiny("llama")
    modules = list(map(id, model.modules()))
    state = {name: (tensor.data_ptr(), tensor._version) for name, tensor in model.state_dict().items()}
    add = peftlite.get_peft_model if shape == "wrapped" else lambda m, c: peftlite.inject_adapter_in_model(c, m)
    with pytest.raises(error, match=f"(?s){says}.*Nothing was changed"):
        add(model, LoraConfig(**fields))
    assert modules == list(map(id, model.modules()))
    assert state == {name: (tensor.data_ptr(), tensor._version) for name, tensor in model.state_dict().items()}
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("policy", ["warn", "ignore"])
def test_a_list_shared_between_models_can_be_accepted(policy: str) -> None:
    model = tiny("llama")
    shared = LoraConfig(target_modules=["q_proj", "c_attn"])
    if policy == "warn":
        with pytest.warns(peftlite.errors.PeftliteWarning, match="`c_attn`"):
            peftlite.inject(model, shared, unmatched="warn")
    else:
        peftlite.inject(model, shared, unmatched="ignore")
    assert len(list(layers(model))) == 2


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "__base__"])
def test_names_that_cannot_be_keys_are_refused(name: str) -> None:
    with pytest.raises(AdapterNameError, match="Nothing was changed"):
        peftlite.inject(Encoder(), config("first"), name)


@pytest.mark.parametrize("name", ["train", "type", "weight", "default_2", "keys", "items", "update", "add_module"])
def test_names_of_methods_are_names_like_any_other(name: str) -> None:
    model, x = nn.Sequential(nn.Embedding(5, 6), Encoder()), torch.randint(0, 5, (3,))
    peftlite.inject(model, config("0", "first"), name)
    peftlite.inject(model, config("0", "first"), "other")
    scramble(model, name)
    expected = model(x)
    peftlite.set_adapter(model, "other")
    assert not torch.equal(model(x), expected)
    peftlite.set_adapter(model, name)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert f"1.first.lora_A.{name}.weight" in model.state_dict()
    peftlite.set_adapter(model, "other")
    peftlite.delete_adapter(model, name)
    assert peftlite.active_adapters(model) == ["other"]


def test_a_second_owner_of_the_biases_is_refused() -> None:
    model = Encoder()
    peftlite.inject(model, config("first", bias="all"))
    with pytest.raises(ConfigError, match="`default` already trains"):
        peftlite.inject(model, config("first", bias="lora_only"), "second")


def test_parts_with_adapters_of_their_own_are_told_apart() -> None:
    model = nn.ModuleDict({"a": Encoder(), "b": Encoder()})
    peftlite.inject(model["a"], config("first"))
    peftlite.inject(model["b"], config("first"))
    with pytest.raises(StateError, match=r"`a.first` and `b.first`"):
        peftlite.set_adapter(model, "default")


def test_a_model_without_adapters_says_how_to_add_one() -> None:
    with pytest.raises(NoAdapterError, match="add one with"):
        peftlite.merge_adapter(Encoder())


def test_the_users_config_is_never_changed() -> None:
    mine = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    text = mine.to_json()
    model = peftlite.get_peft_model(tiny("llama"), mine)
    assert mine.to_json() == text
    model.peft_config["default"].r = 99
    assert mine.r == 8


def test_a_second_copy_of_a_module_of_any_kind_is_of_the_base_s() -> None:
    model, x = tiny("llama"), batch("llama")
    expected = model.requires_grad_(False)(**x).logits
    for name in ("a", "b"):
        config = LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"])
        peftlite.inject_adapter_in_model(config, model, name)
        if name == "a":
            scramble(model, "a")
    peftlite.set_adapter(model, "b")
    assert torch.equal(model(**x).logits, expected)
    assert type(model.model.norm.modules_to_save["b"]) is type(tiny("llama").model.norm)
