"""Adapters in transformers models by transformers' own methods: `model.add_adapter(...)` and what belongs to it."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import peftlite
from peftlite.config import PeftConfig
from peftlite.core.facts import facts_of
from peftlite.errors import AdapterNameError, ConfigError, NoAdapterError, StateError, TargetNotFoundError
from tests.models import TINY, VOCAB, batch, tiny
from tests.versions import CHECKPOINTING, VERSION, checkpointing

NAMES = list(TINY)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def output(model: nn.Module, name: str) -> Tensor:
    """The logits of the tiny model `name`, of a fixed batch; (rows, length, VOCAB) or (rows, labels)."""
    with torch.no_grad():
        logits: Tensor = model(**batch(name)).logits
    return logits


def shake(model: nn.Module, seed: int = 0) -> None:
    """Give every trainable parameter random values, so that an adapter has an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def adapted(name: str, config: PeftConfig | None = None) -> Any:
    """The tiny model `name` with an adapter that has an effect."""
    model = tiny(name)
    model.add_adapter(config or peftlite.LoraConfig(r=2))
    shake(model)
    return model


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """What must not change when a call fails: tensors, requires_grad, and which modules are where."""
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    return tensors, flags, {path: id(module) for path, module in model.named_modules()}


def same(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    return (
        before[0].keys() == after[0].keys()
        and all(torch.equal(before[0][key], after[0][key]) for key in before[0])
        and before[1:] == after[1:]
    )


def with_peft(model: Any, config: peft.PeftConfig, adapter_name: str | None = None) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own, about Conv1D
        model.add_adapter(config, adapter_name)
    return model


# ---- like transformers with real peft
def test_tree_keys_and_trainable_names_are_those_of_real_peft(name: str) -> None:
    ours = tiny(name)
    ours.add_adapter(peftlite.LoraConfig(r=2))
    theirs = with_peft(tiny(name), peft.LoraConfig(r=2, target_modules=set(ours.peft_config["default"].target_modules)))
    assert str(ours) == str(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    trainable = [[key for key, p in model.named_parameters() if p.requires_grad] for model in (ours, theirs)]
    assert trainable[0] == trainable[1]


def test_outputs_and_gradients_are_those_of_real_peft(name: str) -> None:
    ours = adapted(name)
    targets = ours.peft_config["default"].target_modules
    theirs = with_peft(tiny(name), peft.LoraConfig(r=2, target_modules=targets))
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(output(ours, name), output(theirs, name))
    for model in (ours, theirs):
        model(**batch(name)).loss.backward()
    gradients = [{k: p.grad for k, p in m.named_parameters() if p.grad is not None} for m in (ours, theirs)]
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key])


def test_default_targets_are_those_of_real_peft(name: str) -> None:
    ours, theirs = tiny(name), tiny(name)
    ours.add_adapter(peftlite.LoraConfig(r=2))
    with_peft(theirs, peft.LoraConfig(r=2))
    assert set(ours.peft_config["default"].target_modules) == theirs.peft_config["default"].target_modules
    assert list(ours.state_dict()) == list(theirs.state_dict())


SMALL = {
    "llama": {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
    "bert": {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
    "roberta": {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
    "gpt2": {"n_embd": 8, "n_layer": 1, "n_head": 2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1},
    "t5": {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0},
}
HEADS = [
    ("llama", "LlamaForCausalLM", (None, "CAUSAL_LM")),
    ("llama", "LlamaModel", (None, "FEATURE_EXTRACTION")),
    ("llama", "LlamaForSequenceClassification", (None, "SEQ_CLS")),
    ("llama", "LlamaForTokenClassification", (None,)),
    ("llama", "LlamaForQuestionAnswering", (None,)),
    ("gpt2", "GPT2LMHeadModel", (None, "CAUSAL_LM")),
    ("gpt2", "GPT2DoubleHeadsModel", (None, "CAUSAL_LM")),
    ("gpt2", "GPT2ForSequenceClassification", (None, "SEQ_CLS")),
    ("bert", "BertForSequenceClassification", (None, "SEQ_CLS")),
    ("bert", "BertForTokenClassification", (None,)),
    ("bert", "BertForQuestionAnswering", (None,)),
    ("bert", "BertForMaskedLM", (None,)),
    ("roberta", "RobertaForSequenceClassification", (None, "SEQ_CLS")),
    ("t5", "T5ForConditionalGeneration", (None, "SEQ_2_SEQ_LM")),
    ("t5", "T5ForSequenceClassification", (None,)),
]


def small(kind: str, cls: str) -> Any:
    config = transformers.AutoConfig.for_model(kind, vocab_size=VOCAB, **SMALL[kind])
    return getattr(transformers, cls)(config)


@pytest.mark.parametrize(("kind", "cls", "task"), [(k, c, t) for k, c, tasks in HEADS for t in tasks])
def test_all_linear_means_the_same_modules_as_for_real_peft(kind: str, cls: str, task: str | None) -> None:
    ours, theirs = small(kind, cls), small(kind, cls)
    peftlite.get_peft_model(ours, peftlite.LoraConfig(r=2, target_modules="all-linear", task_type=task))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules="all-linear", task_type=task))
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("task", ["TOKEN_CLS", "QUESTION_ANS"])
def test_all_linear_leaves_heads_to_be_trained_whole(task: str) -> None:
    """Real peft raises here: it tries to train the adapter on the head whole."""
    cls = {"TOKEN_CLS": "BertForTokenClassification", "QUESTION_ANS": "BertForQuestionAnswering"}[task]
    model = small("bert", cls)
    model.add_adapter(peftlite.LoraConfig(r=2, target_modules="all-linear", task_type=task))
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    heads = {key for key in trained if not re.search("lora_[AB]", key)}
    head = {"TOKEN_CLS": "classifier", "QUESTION_ANS": "qa_outputs"}[task]
    assert heads == {f"{head}.modules_to_save.default.{part}" for part in ("weight", "bias")}


def test_name_of_the_base_model(llama: Any) -> None:
    llama.name_or_path = "some/model"
    llama.add_adapter(peftlite.LoraConfig(r=2))
    assert llama.peft_config["default"].base_model_name_or_path == "some/model"
    assert facts_of(tiny("llama")).name_or_path is None


def test_nothing_is_known_of_other_modules() -> None:
    facts = facts_of(nn.Sequential(nn.Linear(2, 2)))
    assert (facts.name_or_path, facts.model_type, facts.output_head, facts.default_targets) == (None, None, None, None)


def test_a_type_without_default_targets_is_named() -> None:
    config = transformers.ViTConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=4, patch_size=2
    )
    model = transformers.ViTModel(config)
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"models of type `vit`.*Nothing was changed"):
        model.add_adapter(peftlite.LoraConfig())
    assert same(before, snapshot(model))


# ---- the lifecycle
def test_the_life_of_two_adapters(name: str) -> None:
    model = tiny(name)
    base = output(model, name)
    original = dict(model.named_modules())

    model.add_adapter(peftlite.LoraConfig(r=2))
    assert torch.equal(output(model, name), base)
    shake(model, seed=1)
    one = output(model, name)
    model.add_adapter(peftlite.LoraConfig(r=4), "second")
    assert model.active_adapters() == ["second"], "transformers makes the new adapter active"
    shake(model, seed=2)
    two = output(model, name)
    assert not torch.equal(one, base)
    assert not torch.equal(one, two)

    model.set_adapter("default")
    assert torch.equal(output(model, name), one)
    model.disable_adapters()
    assert torch.equal(output(model, name), base)
    model.enable_adapters()
    model.set_adapter(["default", "second"])
    assert model.active_adapters() == ["default", "second"]
    both = output(model, name)
    with model.disable_adapter():
        assert torch.equal(output(model, name), base)
    model.merge_adapter()
    torch.testing.assert_close(output(model, name), both, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(output(model, name), both)

    model.delete_adapter("default")
    assert model.active_adapters() == ["second"]
    assert torch.equal(output(model, name), two)
    assert list(model.peft_config) == ["second"]
    model.delete_adapter(["second"])
    assert torch.equal(output(model, name), base)
    assert dict(model.named_modules()) == original
    assert not model._hf_peft_config_loaded
    assert not hasattr(model, "peft_config")


def test_merge_and_unload(name: str) -> None:
    model = adapted(name)
    expected = output(model, name)
    merged = model.merge_and_unload()
    assert merged is model
    assert not model._hf_peft_config_loaded
    torch.testing.assert_close(output(model, name), expected, atol=1e-4, rtol=1e-4)


def test_unload(name: str) -> None:
    model = adapted(name)
    assert model.unload() is model
    assert torch.equal(output(model, name), output(tiny(name), name))


def test_scale_adapter(llama: Any) -> None:
    llama.add_adapter(peftlite.LoraConfig(r=2))
    shake(llama)
    llama.scale_adapter("default", 0.0)
    assert torch.equal(output(llama, "llama"), output(tiny("llama"), "llama"))


def test_reports(llama: Any, capsys: pytest.CaptureFixture[str]) -> None:
    llama.add_adapter(peftlite.LoraConfig(r=2))
    llama.print_trainable_parameters()
    parameters = sum(p.numel() for p in llama.parameters() if p.requires_grad)
    assert capsys.readouterr().out.startswith(f"trainable params: {parameters:,d} || ")
    assert len(llama.get_layer_status()) == llama.get_model_status().num_adapter_layers == 4


def test_a_copy_has_adapters_of_its_own(llama: Any) -> None:
    llama.add_adapter(peftlite.LoraConfig(r=2))
    twin = copy.deepcopy(llama)
    twin.delete_adapter("default")
    assert llama._hf_peft_config_loaded
    assert not twin._hf_peft_config_loaded


def test_the_methods_work_on_a_model_injected_by_function(llama: Any) -> None:
    peftlite.inject_adapter_in_model(peftlite.LoraConfig(r=2), llama)
    assert llama._hf_peft_config_loaded
    assert llama.active_adapters() == ["default"]
    llama.delete_adapter("default")
    assert not llama._hf_peft_config_loaded


def test_several_adapters_are_deleted_without_a_word(llama: Any) -> None:
    for adapter in ("default", "second", "third"):
        llama.add_adapter(peftlite.LoraConfig(r=2), adapter)
    llama.set_adapter("default")
    llama.delete_adapter(["default", "second", "third"])
    assert str(llama) == str(tiny("llama"))


def test_the_flag_can_be_lowered_for_a_while(llama: Any) -> None:
    """As models with adapters of their own do, to save the rest by itself."""
    llama.add_adapter(peftlite.LoraConfig(r=2))
    llama._hf_peft_config_loaded = False
    assert not llama._hf_peft_config_loaded
    llama._hf_peft_config_loaded = True
    llama.delete_adapter("default")
    assert not llama._hf_peft_config_loaded
    llama.add_adapter(peftlite.LoraConfig(r=2))
    assert llama._hf_peft_config_loaded


# ---- gradient checkpointing
@pytest.mark.parametrize("first", ["checkpointing", "adapter"])
def test_gradient_checkpointing_reaches_the_adapters(llama: Any, first: str) -> None:
    if VERSION < (5, 0) and first == "checkpointing":
        pytest.skip("transformers 4 recomputes reentrantly, and then asks for the adapter to be there first")
    reference = copy.deepcopy(llama)
    reference.add_adapter(peftlite.LoraConfig(r=2))
    shake(reference)
    if first == "checkpointing":
        checkpointing(llama)
    llama.add_adapter(peftlite.LoraConfig(r=2))
    if first == "adapter":
        checkpointing(llama)
    shake(llama)
    for model in (llama, reference):
        model.train()
        model(**batch("llama")).loss.backward()
    for parameter, expected in zip(llama.parameters(), reference.parameters(), strict=True):
        assert (parameter.grad is None) == (expected.grad is None)
        if expected.grad is not None:
            torch.testing.assert_close(parameter.grad, expected.grad)
    getattr(llama, f"{CHECKPOINTING}_disable")()
    assert not llama.model.embed_tokens._forward_hooks, "inputs still require gradients, as they do not with peft"


# ---- both libraries in one process
def test_configs_of_real_peft_still_go_to_transformers(name: str) -> None:
    mine, theirs = adapted(name), with_peft(tiny(name), peft.LoraConfig(r=2))
    assert isinstance(next(_layers(theirs)), peft.tuners.lora.LoraLayer)
    assert theirs.active_adapters() == ["default"]
    with_peft(theirs, peft.LoraConfig(r=2), "b")
    theirs.set_adapter("default")
    theirs.disable_adapters()
    assert torch.equal(output(theirs, name), output(tiny(name), name))
    theirs.enable_adapters()
    theirs.delete_adapter(["b", "default"])
    assert not theirs._hf_peft_config_loaded
    assert not hasattr(theirs, "peft_config")
    mine.delete_adapter("default")
    assert str(mine) == str(tiny(name))


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if hasattr(module, "lora_A"))


def test_libraries_are_not_mixed_in_one_model(llama: Any) -> None:
    llama.add_adapter(peftlite.LoraConfig(r=2))
    before = snapshot(llama)
    with pytest.raises(StateError, match=r"has adapters of peftlite \(`default`\)"):
        llama.add_adapter(peft.LoraConfig(r=2), "b")
    assert same(before, snapshot(llama))

    foreign = with_peft(tiny("llama"), peft.LoraConfig(r=2))
    before = snapshot(foreign)
    for call in (
        lambda: foreign.add_adapter(peftlite.LoraConfig(r=2), "b"),
        foreign.merge_adapter,
        foreign.get_model_status,
    ):
        with pytest.raises(StateError, match=r"has adapters of the `peft` package \(`default`\)"):
            call()
    assert same(before, snapshot(foreign))


# ---- errors
def test_errors_name_what_was_asked_and_change_nothing(llama: Any) -> None:
    with pytest.raises(NoAdapterError, match="has no adapters"):
        llama.active_adapters()
    with pytest.raises(ConfigError, match="`dict`"):
        llama.add_adapter({"r": 2})
    with pytest.raises(TargetNotFoundError, match=r"`q_prok`.*nearest: `q_proj`"):
        llama.add_adapter(peftlite.LoraConfig(target_modules=["q_prok"]))
    assert not llama._hf_peft_config_loaded
    llama.add_adapter(peftlite.LoraConfig(r=2), "first")
    before = snapshot(llama)
    with pytest.raises(AdapterNameError, match="already is an adapter `first`"):
        llama.add_adapter(peftlite.LoraConfig(r=2), "first")
    with pytest.raises(AdapterNameError, match="no adapter `frist`; nearest: `first`"):
        llama.set_adapter("frist")
    with pytest.raises(AdapterNameError, match="no adapter `second`"):
        llama.delete_adapter(["first", "second"])
    assert same(before, snapshot(llama))
    assert llama.active_adapters() == ["first"]
