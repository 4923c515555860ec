"""Weights that several modules share: every shared tensor is merged exactly once, or the layer gets one of its own."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftlite
from peftlite import LoraConfig
from peftlite.core.tree import layers
from peftlite.errors import ConfigError, PeftliteWarning
from tests.models import batch, tiny
from tests.versions import VERSION

TABLE = {"llama": "embed_tokens", "gpt2": "wte", "t5": "shared"}
PLAIN = {"llama": "q_proj", "gpt2": "c_attn", "t5": "q"}
APART = "ignore:A weight was shared:peftlite.errors.PeftliteWarning"
UNTIED = "ignore:.*tied to the input embeddings before:peftlite.errors.PeftliteWarning"

ON: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "table": (("table",), ()),
    "head": (("head",), ()),
    "both": (("table", "head"), ()),
    "whole-table": (("plain",), ("table",)),
    "whole-head": (("plain",), ("head",)),
    "whole-both": (("plain",), ("table", "head")),
}
"""(target_modules, modules_to_save)"""

every_model = pytest.mark.parametrize("name", TABLE)
every_place = pytest.mark.parametrize("place", ON)


def fields(name: str, place: str, **more: Any) -> dict[str, Any]:
    words = {"table": TABLE[name], "head": "lm_head", "plain": PLAIN[name]}
    targets, saved = ([words[word] for word in group] for group in ON[place])
    return {"r": 2, "target_modules": targets, "modules_to_save": saved or None, **more}


def config(name: str, place: str, **more: Any) -> LoraConfig:
    return LoraConfig(**fields(name, place, **more))


def base(name: str) -> Any:
    return tiny(name, tie_word_embeddings=True)


def shake(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def adapted(name: str, place: str, **more: Any) -> Any:
    model = base(name)
    peftlite.inject_adapter_in_model(config(name, place, **more), model)
    shake(model)
    return model


def logits(model: Any, name: str) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch(name)).logits
    return found


def near(one: Tensor, other: Tensor) -> bool:
    return float((one - other).abs().max()) < 2e-6 * float(other.abs().max().clamp_min(1))


def shared(model: nn.Module) -> list[list[str]]:
    """Names of parameters that are one, by group."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return sorted(names for names in groups.values() if len(names) > 1)


# ---- merging


@every_model
@every_place
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.filterwarnings(APART)
def test_merging_and_unmerging_a_tied_weight(name: str, place: str, tied: bool) -> None:
    model = adapted(name, place, ensure_weight_tying=tied)
    expected, ties = logits(model, name), shared(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for _ in range(2):
        peftlite.merge_adapter(model)
        assert near(logits(model, name), expected)
        assert "whole" in place or not tied or shared(model) == ties  # merged once, and still one tensor
        peftlite.unmerge_adapter(model)
        assert shared(model) == ties
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
        assert torch.equal(logits(model, name), expected)


@every_model
@every_place
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.filterwarnings(UNTIED)
def test_a_merged_model_is_saved_and_loaded_as_it_is(name: str, place: str, tied: bool, tmp_path: Path) -> None:
    if VERSION < (5, 0) and name == "t5" and not tied:
        pytest.skip("T5 of transformers 4 ties its embeddings whenever it is loaded")
    model = adapted(name, place, ensure_weight_tying=tied)
    expected, ties = logits(model, name), shared(base(name))
    merged = peftlite.merge_and_unload(model)
    assert near(logits(merged, name), expected)
    assert (shared(merged) == ties) is tied
    assert merged.config.tie_word_embeddings is (tied or name == "t5")  # T5's config knows no False
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(type(merged).from_pretrained(tmp_path).eval(), name), logits(merged, name))


@every_model
def test_tensors_that_are_replaced_train_as_before(name: str) -> None:
    model = adapted(name, "table", ensure_weight_tying=True)
    peftlite.prepare_model_for_compiled_hotswap(model, target_rank=8)
    trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [key for key, _ in model.named_parameters() if "lora_" in key]


@pytest.mark.parametrize("merge", [peftlite.merge_adapter, peftlite.merge_and_unload])
def test_untying_is_said(merge: Any) -> None:
    model = adapted("llama", "table")
    with pytest.warns(
        PeftliteWarning, match=r"`model.embed_tokens` with `lm_head`|`lm_head.weight` of Llama"
    ) as caught:
        merge(model)
    assert len(caught) == 1
    plain = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    plain["b"].weight = plain["a"].weight
    peftlite.inject_adapter_in_model(LoraConfig(target_modules=["b"]), plain)
    with pytest.warns(PeftliteWarning, match="`b` with `a`") as caught:
        merge(plain)
    assert len(caught) == 1


@pytest.mark.filterwarnings(APART)
def test_a_weight_that_is_tied_after_the_adapter_came_is_not_written_into() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    peftlite.inject_adapter_in_model(LoraConfig(target_modules=["a"]), model)
    shake(model)
    model["b"].weight = next(layers(model)).get_base_layer().weight
    before = model["b"].weight.detach().clone()
    peftlite.merge_adapter(model)
    assert torch.equal(model["b"].weight, before)
    peftlite.unmerge_adapter(model)
    assert model["b"].weight is next(layers(model)).get_base_layer().weight


@pytest.mark.filterwarnings(APART)
def test_a_second_adapter_added_while_one_is_merged_does_not_forget_the_tie() -> None:
    model = adapted("llama", "table")
    head = model.lm_head.weight.detach().clone()
    peftlite.merge_adapter(model)
    peftlite.inject(model, config("llama", "table"), "second")
    peftlite.unmerge_adapter(model)
    layer: Any = next(layers(model))
    layer.merge(adapter_names=["default"])  # of one layer, which does not see the model
    assert torch.equal(model.lm_head.weight, head)


# ---- one adapter on all of them


@pytest.mark.parametrize("place", ["table", "head", "both"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_adapter_is_printed_and_saved_as_by_peft(name: str, place: str, tmp_path: Path) -> None:
    if (name, place) == ("gpt2", "table"):
        place = "both"  # PEFT does not see that `wte` is tied
    ours: Any = peftlite.get_peft_model(base(name), config(name, place, ensure_weight_tying=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        theirs = peft.get_peft_model(base(name), peft.LoraConfig(**fields(name, place, ensure_weight_tying=True)))
        assert str(ours) == str(theirs)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        shake(ours)
        theirs.load_state_dict(ours.state_dict())
        assert torch.equal(logits(ours.eval(), name), logits(theirs.eval(), name))
        ours.save_pretrained(tmp_path / "ours")
        theirs.save_pretrained(tmp_path / "theirs")
        back = peft.PeftModel.from_pretrained(base(name), tmp_path / "ours")
    assert torch.equal(logits(back, name), logits(ours, name))
    again = peftlite.PeftModel.from_pretrained(base(name), tmp_path / "theirs")
    assert torch.equal(logits(again, name), logits(ours, name))


@pytest.mark.parametrize("place", ["whole-table", "whole-head", "whole-both"])
def test_one_copy_of_a_whole_module_is_saved_as_by_peft(place: str, tmp_path: Path) -> None:
    ours: Any = peftlite.get_peft_model(base("llama"), config("llama", place, ensure_weight_tying=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        theirs = peft.get_peft_model(base("llama"), peft.LoraConfig(**fields("llama", place, ensure_weight_tying=True)))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, p in ours.named_parameters() if p.requires_grad] == [
        n for n, p in theirs.named_parameters() if p.requires_grad
    ]
    shake(ours)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(logits(ours.eval(), "llama"), logits(theirs.eval(), "llama"))
    theirs.save_pretrained(tmp_path)
    again = peftlite.PeftModel.from_pretrained(base("llama"), tmp_path)
    assert torch.equal(logits(again, "llama"), logits(ours, "llama"))


@every_model
@every_place
def test_one_adapter_has_one_set_of_parameters_and_both_gradients(name: str, place: str) -> None:
    model = adapted(name, place, ensure_weight_tying=True)
    table = next(p for n, p in model.named_parameters() if "lora_embedding_A" in n or "modules_to_save" in n)
    model(**batch(name)).loss.backward()
    found = table.grad.clone()
    twin = base(name)  # the same sum in plain torch: one weight, used at all its places
    weight = twin.get_input_embeddings().weight
    assert found.abs().sum() > 0
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len({id(p) for p in trainable}) == len(trainable)
    if "whole" in place:
        with torch.no_grad():
            weight.copy_(table)
            for layer in layers(model):
                if layer.tuner.peft_type == "LORA":
                    path = next(n for n, m in model.named_modules() if m is layer)
                    dense = layer.merged_dense(layer.host.read(), ["default"]).weight
                    twin.get_submodule(path).weight.copy_(dense.T if name == "gpt2" else dense)
        twin(**batch(name)).loss.backward()
        assert near(found, weight.grad)


@pytest.mark.parametrize("place", ["table", "whole-table"])
def test_one_adapter_survives_every_way_of_loading_and_copying(place: str, tmp_path: Path) -> None:
    model = adapted("llama", place, ensure_weight_tying=True)
    expected, ties = logits(model, "llama"), shared(model)
    peftlite.save_adapter(model, tmp_path)
    loaded, empty = base("llama"), base("llama")
    peftlite.load_adapter(loaded, tmp_path)
    peftlite.inject(empty, config("llama", place, ensure_weight_tying=True), low_cpu_mem_usage=True)
    peftlite.load_adapter(empty, tmp_path)
    assigned = adapted("llama", place, ensure_weight_tying=True)
    assigned.load_state_dict(model.state_dict())
    for other in (loaded, empty, assigned, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, "llama"), expected)
        assert shared(other) == ties
        with torch.no_grad():  # one tensor still: a change of the leader's shows at both ends
            for layer in layers(other):
                if not layer.leaders:
                    for parameter in layer.parameters_of("default"):
                        parameter.mul_(2)
            ends = [layer for layer in layers(other) if layer.leaders or layer.followers]
            assert len(ends) == 2
        changed = logits(other, "llama")
        peftlite.merge_adapter(other)
        assert near(logits(other, "llama"), changed)


@pytest.mark.filterwarnings(APART)
def test_adapters_that_are_tied_and_others_are_merged_in_any_order() -> None:
    model = adapted("llama", "both", ensure_weight_tying=True)
    peftlite.inject_adapter_in_model(config("llama", "head"), model, "other")
    shake(model)
    outputs = {}
    for names in (["default"], ["other"], ["default", "other"]):
        peftlite.set_adapter(model, names)
        outputs[tuple(names)] = logits(model, "llama")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for order in (["default", "other"], ["other", "default"]):
        for name in order:
            peftlite.merge_adapter(model, [name])
            assert near(logits(model, "llama"), outputs["default", "other"])
        for name in order:
            peftlite.unmerge_adapter(model, [name])
            assert near(logits(model, "llama"), outputs["default", "other"])
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
        assert model.lm_head.base_layer.weight is model.model.embed_tokens.base_layer.weight
    for name in ("other", "default"):
        peftlite.set_adapter(model, name)
        assert near(logits(model, "llama"), outputs[(name,)])
    peftlite.delete_adapter(model, "other")
    assert near(logits(model, "llama"), outputs[("default",)])
    peftlite.delete_adapter(model, "default")
    assert torch.equal(logits(model, "llama"), logits(base("llama"), "llama"))


@pytest.mark.skipif(VERSION < (5, 0), reason="other modules share the table in transformers 4")
def test_the_plan_says_what_is_tied_and_what_cannot_be() -> None:
    plan = peftlite.plan(base("t5"), config("t5", "head", ensure_weight_tying=True))
    assert {site.path: site.leader for site in plan.sites} == {
        "shared": None,
        "encoder.embed_tokens": "shared",
        "decoder.embed_tokens": "shared",
        "lm_head": "shared",
    }
    assert plan.parameters == 2 * (48 + 16)
    refused = [
        (config("llama", "table", ensure_weight_tying=True, use_dora=True), "Dora has no such form"),
        (config("llama", "table", ensure_weight_tying=True, modules_to_save=["lm_head"]), "LORA adapter and the other"),
    ]
    for wrong, message in refused:
        model = base("llama")
        before = [id(module) for module in model.modules()]
        with pytest.raises(ConfigError, match=message):
            peftlite.inject(model, wrong)
        assert [id(module) for module in model.modules()] == before
    with pytest.warns(PeftliteWarning, match="no effect"):
        peftlite.inject(base("llama"), LoraConfig(target_modules=["q_proj"], ensure_weight_tying=True))
    with pytest.warns(PeftliteWarning, match="no effect"):
        peftlite.inject(tiny("llama", tie_word_embeddings=False), config("llama", "table", ensure_weight_tying=True))


def test_one_adapter_compiles_and_takes_a_scale() -> None:
    model = adapted("llama", "table", ensure_weight_tying=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert near(logits(compiled, "llama"), logits(model, "llama"))
    peftlite.scale_adapter(model, "default", 2.0)
    scaled = logits(model, "llama")
    peftlite.merge_adapter(model)
    assert near(logits(model, "llama"), scaled)
    statuses = peftlite.get_layer_status(model)
    assert [status.requires_grad for status in statuses] == [{"default": True}] * 2
