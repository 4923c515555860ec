"""The wrapper against PEFT's, with the same weights, on real architectures; and what only ours does."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import peftlite
from peftlite import IA3Config, LoraConfig, LoraModel, PeftModel, errors, get_peft_model, inject_adapter_in_model, wrap
from tests.models import batch, tiny
from tests.twins import Twins, fill, trainable, twins
from tests.versions import checkpointing

ALL: dict[str, dict[str, Any]] = {
    "llama": {"target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"},
    "gpt2": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"},
    "bert": {"target_modules": ["query", "value", "word_embeddings"], "task_type": "SEQ_CLS"},
    "t5": {"target_modules": ["q", "v", "wo"], "task_type": "SEQ_2_SEQ_LM"},
    "opt": {"target_modules": ["q_proj", "v_proj", "fc1"], "task_type": "CAUSAL_LM"},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, fields) for name, fields in ALL.items()},
    "llama-all-linear": ("llama", {"target_modules": "all-linear"}),
    "llama-regex": ("llama", {"target_modules": r".*\.1\.self_attn\.(q|k)_proj"}),
    "llama-embedding-head": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "llama-layers": ("llama", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}),
    "llama-patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"v_proj": 2, r"^model\.layers\.1\.self_attn\.q_proj": 3},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 20},
        },
    ),
    "llama-rslora": ("llama", {"target_modules": ["q_proj"], "use_rslora": True, "lora_alpha": 5}),
    "llama-excluded": (
        "llama",
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    ),
    "opt-lora_bias": ("opt", {"target_modules": ["q_proj", "fc1"], "lora_bias": True}),
    "opt-bias-all": ("opt", {"target_modules": ["q_proj"], "bias": "all"}),
    "bert-bias-lora_only": ("bert", {"target_modules": ["query"], "bias": "lora_only", "task_type": "SEQ_CLS"}),
    "llama-modules_to_save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "gpt2-defaults": ("gpt2", {"task_type": "CAUSAL_LM", "fan_in_fan_out": True}),
    "t5-defaults": ("t5", {}),
}


@pytest.fixture(params=sorted(CASES))
def pair(request: pytest.FixtureRequest) -> Twins:
    name, fields = CASES[request.param]
    return twins(name, **{"r": 4, "lora_alpha": 8, **fields})


def test_tree_keys_and_trainable_names(pair: Twins) -> None:
    assert str(pair.ours) == str(pair.theirs)
    assert list(pair.ours.state_dict()) == list(pair.theirs.state_dict())
    assert [name for name, _ in pair.ours.named_parameters()] == [name for name, _ in pair.theirs.named_parameters()]
    pair.check_trainable()


def test_outputs(pair: Twins) -> None:
    pair.check_outputs()
    ours, _ = pair.outputs()
    with pair.ours.disable_adapter(), torch.no_grad():
        base = pair.ours(**pair.inputs).logits
    assert not torch.equal(ours, base)


def test_gradients(pair: Twins) -> None:
    for model in (pair.ours, pair.theirs):
        model(**pair.inputs).loss.backward()
    theirs = dict(pair.theirs.named_parameters())
    compared = 0
    for name, parameter in pair.ours.named_parameters():
        assert (parameter.grad is None) == (theirs[name].grad is None), name
        if parameter.grad is not None:
            compared += 1
            torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=2e-6, rtol=1e-4)
    assert compared


def test_merged_weights(pair: Twins) -> None:
    before = {name: tensor.clone() for name, tensor in pair.ours.state_dict().items()}
    for model in (pair.ours, pair.theirs):
        model.merge_adapter()
    theirs = pair.theirs.state_dict()
    for name, tensor in pair.ours.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-6, rtol=1e-5, msg=name)
    pair.check_outputs()
    pair.ours.unmerge_adapter()
    for name, tensor in pair.ours.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_merge_and_unload(pair: Twins) -> None:
    ours, theirs = pair.ours.merge_and_unload(), pair.theirs.merge_and_unload()
    assert str(ours) == str(theirs)
    expected = theirs.state_dict()
    assert list(ours.state_dict()) == list(expected)
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-5, msg=name)


def test_unload_gives_the_base_model_back() -> None:
    model = tiny("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    fill(wrapped)
    wrapped.merge_adapter()
    assert wrapped.unload() is model
    assert str(model) == str(tiny("llama"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("name", sorted(ALL))
def test_the_life_of_two_adapters(name: str) -> None:
    both = twins(name, r=4, **ALL[name])
    both.add("other", **{"r": 2, "lora_alpha": 3, **ALL[name]})
    both.eval()
    both.check_outputs()
    both.check_trainable()
    for model in (both.ours, both.theirs):
        model.set_adapter("other")
    both.check_outputs()
    both.check_trainable()
    if name != "bert":  # two copies of one head cannot be active together
        for model in (both.ours, both.theirs):
            model.base_model.set_adapter(["default", "other"])
        both.check_outputs()
        both.check_trainable()
        for model in (both.ours, both.theirs):
            model.merge_adapter()
        both.check_outputs()
        for model in (both.ours, both.theirs):
            model.unmerge_adapter()
        both.check_outputs()
    with both.ours.disable_adapter(), both.theirs.disable_adapter():
        both.check_outputs()
    for model in (both.ours, both.theirs):
        model.set_adapter("other")
        model.delete_adapter("default")
    assert both.ours.active_adapters == both.theirs.active_adapters == ["other"]
    assert set(both.ours.peft_config) == {"other"}
    both.check_outputs()
    both.check_trainable()


def test_generate() -> None:
    both = twins("llama", **ALL["llama"])
    ids = both.inputs["input_ids"]
    wanted = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    ours, theirs = both.ours.generate(input_ids=ids, **wanted), both.theirs.generate(input_ids=ids, **wanted)
    assert torch.equal(ours, theirs)
    assert torch.equal(both.ours.generate(ids, **wanted), theirs)
    assert torch.equal(both.ours.unwrap().generate(ids, **wanted), theirs)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_gradient_checkpointing(when: str, use_reentrant: bool) -> None:
    fields = {"r": 4, **ALL["llama"]}
    plain = get_peft_model(tiny("llama"), LoraConfig(**fields)).train()
    fill(plain)
    plain(**batch("llama")).loss.backward()

    options = {"use_reentrant": use_reentrant}
    model = tiny("llama").train()
    if when == "before":
        checkpointing(model, options)
    checkpointed = get_peft_model(model, LoraConfig(**fields)).train()
    if when == "after":
        checkpointing(checkpointed, options)
    checkpointed.load_state_dict(plain.state_dict())
    checkpointed(**batch("llama")).loss.backward()
    grads = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert grads
    for name, parameter in checkpointed.named_parameters():
        assert (parameter.grad is not None) == (name in grads), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, grads[name])


class Checkpointing(nn.Module):
    """A model of no library that says it checkpoints."""

    is_gradient_checkpointing = True

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(4, 4)
        self.linear = nn.Linear(4, 4)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(self, ids: torch.Tensor) -> Any:
        hidden = self.embeddings(ids)
        assert hidden.requires_grad
        return self.linear(hidden)


def test_gradient_checkpointing_of_other_models() -> None:
    model = get_peft_model(Checkpointing(), LoraConfig(target_modules=["linear"]))
    assert model(torch.tensor([1])).shape == (1, 4)


# ---- attributes
def test_attributes_pass_through() -> None:
    base = tiny("llama")
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert model.config is base.config
    assert model.device == base.device
    assert model.dtype == base.dtype
    assert model.base_model.model is base
    assert model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.shape == (8, 16)
    assert model.get_base_model() is base
    assert isinstance(model.base_model, LoraModel)
    assert model.prefix == "lora_"
    assert model.targeted_module_names == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    with pytest.raises(AttributeError, match="not_there"):
        model.not_there  # noqa: B018
    assert not hasattr(model, "not_there")


def test_properties_equal_pefts() -> None:
    both = twins("bert", **ALL["bert"])
    for name in ("active_adapter", "active_adapters", "base_model_torch_dtype", "prefix"):
        assert getattr(both.ours, name) == getattr(both.theirs, name), name
    assert both.ours.modules_to_save == {"classifier"}  # PEFT: also `score`, which this model does not have
    assert both.ours.peft_type == both.theirs.peft_type.value
    assert both.ours.base_model.active_adapter == both.theirs.base_model.active_adapter
    assert both.ours.active_peft_config is both.ours.peft_config["default"]
    assert LoraModel.get_model_config(tiny("bert"))["model_type"] == "bert"
    assert LoraModel.get_model_config(nn.Linear(1, 1)) == {"model_type": "custom"}


def test_trainers_see_what_the_model_takes() -> None:
    import peft

    for name, fields in ALL.items():
        ours, theirs = get_peft_model(tiny(name), LoraConfig(**fields)), peft.PeftModel
        theirs = getattr(peft, type(ours).__name__)
        mine = list(inspect.signature(ours.forward).parameters)
        assert mine == [p for p in inspect.signature(theirs.forward).parameters if p not in ("self", "task_ids")]


def test_positional_arguments_mean_what_pefts_mean() -> None:
    both = twins("llama", **ALL["llama"])
    ids, mask, labels = (both.inputs[name] for name in ("input_ids", "attention_mask", "labels"))
    ours, theirs = both.ours(ids, mask, None, labels), both.theirs(ids, mask, None, labels)
    torch.testing.assert_close(ours.loss, theirs.loss)
    with pytest.raises(TypeError, match="7 positional arguments, not 8"):
        both.ours(ids, mask, None, labels, None, None, None, None)


def test_rows_of_a_model_that_flattens_its_batch() -> None:
    model = get_peft_model(tiny("opt"), LoraConfig(**ALL["opt"])).eval()  # PEFT refuses it: fc1 gets rows x tokens
    fill(model)
    inputs = batch("opt", rows=3)
    mixed = model(**inputs, adapter_names=["default", "__base__", "default"]).logits
    with model.use_adapter():
        base = model(**inputs).logits
    torch.testing.assert_close(mixed[1], base[1])
    torch.testing.assert_close(mixed[::2], model(**inputs).logits[::2])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_adapter_for_each_row(name: str) -> None:
    both = twins(name, r=4, **ALL[name])
    both.add("other", **{"r": 2, **ALL[name]})
    both.eval()
    rows = ["other", "default", "__base__", "other"]
    inputs = batch(name, rows=len(rows))
    outputs = [model(**inputs, adapter_names=rows).logits for model in (both.ours, both.theirs)]
    torch.testing.assert_close(*outputs, atol=2e-6, rtol=1e-5)
    wanted = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "adapter_names": rows}
    prompt = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    assert torch.equal(*(model.generate(**prompt, **wanted) for model in (both.ours, both.theirs)))
    with pytest.raises(errors.AdapterNameError, match="`othr`; nearest: `other`"):
        both.ours(**inputs, adapter_names=["othr"] * 4)
    assert both.ours.active_adapters == ["default"]


def test_has_active_enabled_adapter() -> None:
    model = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"]))
    assert model.has_active_enabled_adapter
    with model.disable_adapter():
        assert not model.has_active_enabled_adapter
    model.base_model.disable_adapter_layers()
    assert not model.has_active_enabled_adapter
    model.base_model.enable_adapter_layers()
    assert model.has_active_enabled_adapter
    model.unload()
    assert not model.has_active_enabled_adapter
    assert model.active_adapter is None
    with pytest.raises(errors.StateError, match="set_adapter"):
        model.active_peft_config  # noqa: B018


def test_an_emptied_wrapper_takes_a_new_adapter() -> None:
    model = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"]))
    model.delete_adapter("default")
    assert str(model.get_base_model()) == str(tiny("llama"))
    assert model.active_adapters == []
    model.add_adapter("fresh", LoraConfig(target_modules=["v_proj"]))
    assert model.active_adapters == ["fresh"]
    assert trainable(model) == [
        f"base_model.model.model.layers.{i}.self_attn.v_proj.lora_{x}.fresh.weight" for i in (0, 1) for x in "AB"
    ]


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_independent(how: str) -> None:
    model = get_peft_model(tiny("llama"), LoraConfig(**ALL["llama"])).eval()
    fill(model)
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    inputs = batch("llama")
    assert type(twin) is type(model)
    assert torch.equal(twin(**inputs).logits, model(**inputs).logits)
    before = model(**inputs).logits
    twin.add_adapter("b", LoraConfig(target_modules=["q_proj"]))
    twin.set_adapter("b")
    twin.merge_adapter()
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(**inputs).logits, before)


def test_the_config_is_copied() -> None:
    config = LoraConfig(task_type="SEQ_CLS")
    before = config.to_dict()
    model = get_peft_model(tiny("bert"), config, revision="v2")
    assert config.to_dict() == before
    assert model.peft_config["default"] is not config
    assert model.peft_config["default"].revision == "v2"
    assert model.peft_config["default"].target_modules == ["query", "value"]


def test_inference_mode_gives_a_frozen_adapter() -> None:
    model = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"], inference_mode=True))
    assert trainable(model) == []
    model.set_requires_grad("default")
    assert len(trainable(model)) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_are_fp32_on_a_base_in_half_precision(dtype: torch.dtype) -> None:
    both = twins("llama", dtype=dtype, **ALL["llama"])
    theirs = both.theirs.state_dict()
    assert {k: v.dtype for k, v in both.ours.state_dict().items()} == {k: v.dtype for k, v in theirs.items()}
    plain = get_peft_model(tiny("llama", dtype=dtype), LoraConfig(**ALL["llama"]), autocast_adapter_dtype=False)
    assert {p.dtype for p in plain.parameters()} == {dtype}
    plain.add_adapter("b", LoraConfig(**ALL["llama"]), autocast_adapter_dtype=True)
    assert {p.dtype for n, p in plain.named_parameters() if n.endswith("b.weight")} == {torch.float32}


def test_every_entrance_keeps_the_one_rule_of_dtypes() -> None:
    config = LoraConfig(target_modules=["q_proj"])
    entrances: dict[str, Any] = {
        "wrapped": lambda base, **given: get_peft_model(base, config, **given),
        "inner": lambda base, **given: LoraModel(base, config, "default", **given),
        "injected": lambda base, **given: inject_adapter_in_model(config, base, **given),
    }
    for name, enter in entrances.items():
        for given, wanted in ({}, torch.float32), ({"autocast_adapter_dtype": False}, torch.bfloat16):
            model = enter(tiny("llama", dtype=torch.bfloat16), **given)
            assert {p.dtype for p in model.parameters() if p.requires_grad} == {wanted}, name


def test_low_cpu_mem_usage_leaves_the_adapter_to_be_loaded() -> None:
    model = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"]), low_cpu_mem_usage=True)
    assert {p.device.type for n, p in model.named_parameters() if "lora_" in n} == {"meta"}
    assert {p.device.type for n, p in model.named_parameters() if "lora_" not in n} == {"cpu"}


# ---- from one shape to the other
def test_unwrap_and_wrap_copy_nothing() -> None:
    base = tiny("llama")
    pointers = {name: p.data_ptr() for name, p in base.named_parameters()}
    model = get_peft_model(base, LoraConfig(**ALL["llama"])).eval()
    fill(model)
    inputs = batch("llama")
    expected = model(**inputs).logits
    inside = model.unwrap()
    assert inside is base
    assert torch.equal(inside(**inputs).logits, expected)
    assert peftlite.active_adapters(inside) == ["default"]
    again = wrap(inside)
    assert type(again) is type(model)
    assert again is not model
    assert str(again) == str(model)
    assert torch.equal(again(**inputs).logits, expected)
    assert wrap(again) is again
    assert wrap(model.base_model).base_model is model.base_model
    again.merge_adapter()  # one state: the other wrapper sees it
    assert model.get_model_status().merged_adapters == ["default"]
    again.unload()
    assert {name: p.data_ptr() for name, p in base.named_parameters()} == pointers


def test_both_shapes_give_equal_adapters_for_equal_seeds() -> None:
    fields = {**ALL["llama"], "init_lora_weights": "gaussian", "lora_dropout": 0.1}
    torch.manual_seed(3)
    wrapped = get_peft_model(tiny("llama"), LoraConfig(**fields)).train()
    torch.manual_seed(3)
    in_place = inject_adapter_in_model(LoraConfig(**fields), tiny("llama")).train()
    ours, theirs = wrapped.unwrap().state_dict(), in_place.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    fill(wrapped)
    in_place.load_state_dict(wrapped.unwrap().state_dict())
    inputs = batch("llama")
    outputs = []
    for model in (wrapped, in_place):
        torch.manual_seed(5)
        outputs.append(model(**inputs).logits)
    assert torch.equal(*outputs)


# ---- injection
def test_each_injected_adapter_becomes_the_active_one() -> None:
    model = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), tiny("llama"))
    assert peftlite.active_adapters(model) == ["default"]
    assert inject_adapter_in_model(LoraConfig(target_modules=["v_proj"]), model, "b") is model
    assert peftlite.active_adapters(model) == ["b"]
    assert {name.split(".")[-2] for name in trainable(model)} == {"b"}


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_a_state_dict_says_which_modules_get_an_adapter(prefix: str) -> None:
    weights = {
        f"{prefix}model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(8, 16),
        f"{prefix}model.embed_tokens.lora_embedding_A": torch.zeros(8, 48),
    }
    config = LoraConfig(target_modules=["v_proj"], layers_to_transform=[1], exclude_modules=["q_proj"])
    model = inject_adapter_in_model(config, tiny("llama"), state_dict=weights)
    names = [report.name for report in peftlite.get_layer_status(model)]
    assert names == ["model.embed_tokens", "model.layers.0.self_attn.q_proj"]
    assert config.target_modules == ["v_proj"]


def test_a_state_dict_that_fits_nothing_is_refused() -> None:
    config, model = LoraConfig(target_modules=["v_proj"]), tiny("llama")
    with pytest.raises(errors.CheckpointError, match=r"`LORA`.*`a.weight`.*Nothing was changed"):
        inject_adapter_in_model(config, model, state_dict={"a.weight": torch.zeros(1)})
    with pytest.raises(errors.TargetNotFoundError, match=r"`layers.5.q_proj`.*nearest"):
        inject_adapter_in_model(config, model, state_dict={"layers.5.q_proj.lora_A.weight": torch.zeros(1)})
    assert str(model) == str(tiny("llama"))


def test_adapters_of_two_kinds_have_no_wrapper() -> None:
    model = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), tiny("llama"))
    inject_adapter_in_model(IA3Config(target_modules=["k_proj"], feedforward_modules=[]), model, "b")
    with pytest.raises(errors.StateError, match=r"of one kind.*`IA3`, `LORA`.*Nothing was changed"):
        wrap(model)


def test_methods_pass_their_options_on() -> None:
    model = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert model.targeted_module_names == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    model.add_adapter("b", LoraConfig(target_modules=["v_proj"]))
    model.set_adapter("b", inference_mode=True)
    assert trainable(model) == []
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.v_proj.lora_B["b"].weight.fill_(float("inf"))
    for merge in (model.merge_adapter, model.merge_and_unload, model.base_model.merge_adapter):
        with pytest.raises(errors.MergeError, match="`b`"):
            merge(safe_merge=True)
    model.merge_adapter(["default"])
    assert model.get_model_status().active_adapters == ["b"]
    model.unmerge_adapter()
    model.set_adapter("default")
    model.scale_adapter("default", 3.0)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 3.0


class TakesLabels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        return self.linear(input_ids), labels


def test_arguments_that_are_not_given_are_not_passed_on() -> None:
    config = LoraConfig(target_modules=["linear"], task_type="CAUSAL_LM")
    model = get_peft_model(TakesLabels(), config)
    inputs, labels = torch.zeros(1, 2), torch.ones(1)
    assert model(inputs, None, None, labels)[1] is labels  # PEFT hands None on, to parameters that are not there


def test_lora_model_stands_alone() -> None:
    config = LoraConfig(target_modules=["q_proj"])
    for given in (config, {"a": config}):
        model = LoraModel(tiny("llama"), given, "a")
        assert list(model.peft_config) == ["a"]
        assert "lora_A.a" in str(list(model.state_dict()))
        assert model(**batch("llama")).logits.shape == (2, 6, 48)
        assert isinstance(wrap(model), PeftModel)
    with pytest.raises(errors.AdapterNameError, match="`b`; nearest: `a`"):
        LoraModel(tiny("llama"), {"a": config}, "b")


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_the_wrapper_compiles_to_one_graph(task: str | None) -> None:
    torch._dynamo.reset()
    model = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj", "v_proj"], task_type=task)).eval()
    fill(model)
    counter = torch._dynamo.testing.CompileCounter()
    compiled: Any = torch.compile(model, backend=counter, fullgraph=True)
    ids = batch("llama")["input_ids"]
    with torch.no_grad():
        assert torch.equal(compiled(input_ids=ids).logits, model(input_ids=ids).logits)
        compiled(input_ids=ids.flip(0))
    assert counter.frame_count == 1
