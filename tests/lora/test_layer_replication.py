"""Repeated layers on shared weights, against real PEFT, and what PEFT gets wrong there."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftlite
from peftlite.core.tree import find_state
from peftlite.errors import CheckpointError, ConfigError, PeftliteError, PeftliteWarning, StateError
from tests.adapters import logits, randomised, snapshot
from tests.models import VOCAB, batch, tiny
from tests.quantised import QUANTISED

RANGES = [(0, 2), (0, 1), (1, 2)]
ORDER = [0, 1, 0, 1]
TARGETS = {"llama": "q_proj", "bert": "query", "gpt2": "c_attn", "opt": "q_proj", "gemma2": "q_proj"}
LISTS = {
    "llama": "model.layers",
    "bert": "bert.encoder.layer",
    "gpt2": "transformer.h",
    "opt": "model.decoder.layers",
    "gemma2": "model.layers",
}


def base(name: str = "llama", **sizes: Any) -> Any:
    if name != "gemma2":
        return tiny(name, **sizes)
    fields = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Gemma2Config(vocab_size=VOCAB, num_key_value_heads=2, head_dim=4, **fields, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.Gemma2ForCausalLM(config).eval()


def config(library: Any = peftlite, name: str = "llama", **fields: Any) -> Any:
    return library.LoraConfig(
        **{"target_modules": [TARGETS[name]], "layer_replication": RANGES, "r": 2, **fields},
    )


def replicated(name: str = "llama", *names: str, **fields: Any) -> Any:
    model = base(name)
    for adapter in names or ("default",):
        peftlite.inject(model, config(name=name, **fields), adapter)
    return randomised(model)


def layers_of(model: Any, name: str = "llama") -> nn.ModuleList:
    found = model.get_submodule(LISTS[name])
    assert isinstance(found, nn.ModuleList)
    return found


def out(model: Any, name: str = "llama") -> Tensor:
    return logits(model, "bert" if name == "bert" else "llama")


# ---- as PEFT
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}], ids=str)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_models_gradients_and_files_equal_peft_s(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    if name == "bert" and "modules_to_save" in fields:
        fields = {"modules_to_save": ["classifier"]}
    ours = peftlite.get_peft_model(base(name), config(name=name, **fields))
    randomised(ours)
    theirs = peft.get_peft_model(base(name), config(peft, name, **fields))
    theirs.load_state_dict(ours.state_dict())
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, p in ours.named_parameters() if p.requires_grad] == [
        n for n, p in theirs.named_parameters() if p.requires_grad
    ]
    outputs = [model(**batch(name)) for model in (ours, theirs)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-5, atol=1e-6)
    for output in outputs:
        output.loss.backward()
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    got = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)

    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    mine, other = (load_file(tmp_path / whose / "adapter_model.safetensors") for whose in ("ours", "theirs"))
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[key], other[key]) for key in other)
    with torch.no_grad():
        read = peft.PeftModel.from_pretrained(base(name), tmp_path / "ours")
        torch.testing.assert_close(out(read, name), out(ours, name), rtol=1e-5, atol=1e-6)
    inplace = base(name)
    peftlite.load_adapter(inplace, tmp_path / "theirs")
    for model in (inplace, peftlite.PeftModel.from_pretrained(base(name), tmp_path / "theirs")):
        assert torch.equal(out(model, name), out(ours, name))
    peftlite.save_adapter(inplace, tmp_path / "again")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["gpt2", "opt", "gemma2"])
def test_models_that_peft_cannot_repeat(name: str) -> None:
    with pytest.raises((ValueError, IndexError)):
        peft.get_peft_model(base(name), config(peft, name))(**batch("llama"))
    model = replicated(name)
    assert len(layers_of(model, name)) == model.config.num_hidden_layers == 4
    by_hand = base(name)
    parts = layers_of(by_hand, name)
    parts.extend([copy.deepcopy(parts[0]), copy.deepcopy(parts[1])])
    for number, layer in enumerate(parts):
        for part in layer.modules():
            if "layer_idx" in part.__dict__:
                part.layer_idx = number
    by_hand.config.num_hidden_layers = 4
    if name == "gemma2":
        by_hand.config.layer_types = by_hand.config.layer_types * 2
    with peftlite.disable_adapter(model):
        assert torch.equal(out(model, name), out(by_hand, name))


# ---- the lifecycle
@pytest.mark.parametrize("name", TARGETS)
def test_merging_gives_each_layer_its_own_weight_and_unmerging_shares_it_again(name: str) -> None:
    model = replicated(name)
    expected, before = out(model, name), copy.deepcopy(model.state_dict())
    parameters = [id(p) for p in model.parameters()]
    peftlite.merge_adapter(model)  # and no warning of untied weights
    torch.testing.assert_close(out(model, name), expected, rtol=1e-4, atol=1e-5)
    peftlite.unmerge_adapter(model)
    assert [id(p) for p in model.parameters()] == parameters
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("leave", ["unload", "delete", "delete while merged"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_model_has_its_own_layers_again_when_the_last_adapter_goes(name: str, leave: str) -> None:
    model = base(name)
    before, said, modules = out(model, name), model.config.to_dict(), list(model.modules())
    peftlite.inject(model, config(name=name), "a")
    peftlite.inject(model, config(name=name), "b")
    randomised(model)
    if leave == "unload":
        peftlite.unload(model)
    else:
        peftlite.delete_adapter(model, "b")
        assert len(layers_of(model, name)) == 4
        if leave == "delete while merged":
            peftlite.merge_adapter(model)
        peftlite.delete_adapter(model, "a")
    assert [id(module) for module in model.modules()] == [id(module) for module in modules]
    assert model.config.to_dict() == said
    assert torch.equal(out(model, name), before)


def test_own_layers_come_back_with_what_was_moved_or_loaded_meanwhile() -> None:
    model = base(num_hidden_layers=3)
    peftlite.inject(model, config(layer_replication=[(0, 1), (0, 2)]))
    model.double().train()
    peftlite.unload(model)
    assert all(p.dtype is torch.float64 for layer in layers_of(model)[:2] for p in layer.parameters())
    assert all(module.training for module in model.modules())
    assert all(mine.layer_idx == at for at, mine in enumerate(layer.self_attn for layer in layers_of(model)))


def test_a_merged_model_is_one_of_its_own_that_can_be_saved(tmp_path: Path) -> None:
    model = replicated()
    expected = out(model)
    merged = peftlite.merge_and_unload(model)
    torch.testing.assert_close(out(merged), expected, rtol=1e-4, atol=1e-5)
    assert merged.config.num_hidden_layers == 4
    owners = [p.data_ptr() for layer in layers_of(merged) for p in layer.parameters()]
    assert len(set(owners)) == len(owners)
    merged.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(out(again), out(merged))


@pytest.mark.filterwarnings("ignore:.*pad token:UserWarning")
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_generating_with_a_cache_is_generating_without(name: str) -> None:
    model = replicated(name)
    x = {key: value[:1] for key, value in batch("llama").items() if key != "labels"}
    fixed: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached, plain = (model.generate(**x, **fixed, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)


def test_adapters_per_call_and_row_and_copies() -> None:
    model = replicated("llama", "a", "b")
    each = {}
    for name in ("a", "b"):
        with peftlite.use_adapter(model, name):
            each[name] = out(model)
    assert not torch.allclose(each["a"], each["b"])
    wrapper: Any = peftlite.wrap(model)
    with torch.no_grad():
        rows = wrapper(**batch("llama"), adapter_names=["b", "a"]).logits
    torch.testing.assert_close(rows, torch.stack([each["b"][0], each["a"][1]]))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(out(other), out(model))
        shared = [id(layer.self_attn.k_proj.weight) for layer in layers_of(other)]
        assert len(set(shared)) == 2
        own = find_state(other)
        assert own is not None
        peftlite.unload(other)
        assert (len(layers_of(other)), other.config.num_hidden_layers) == (2, 2)
        assert torch.equal(out(other), out(base()))
    assert (len(layers_of(model)), model.config.num_hidden_layers) == (4, 4)


def test_a_quantised_base_is_repeated_without_copies() -> None:
    model = base(hidden_size=64, intermediate_size=64)
    for layer in layers_of(model):
        layer.self_attn.q_proj = QUANTISED["linear4bit-nf4"](layer.self_attn.q_proj)
    before = out(model)
    peftlite.inject(model, config())
    packed = [layer.self_attn.q_proj.get_base_layer().weight for layer in layers_of(model)]
    assert [packed[at] is packed[ORDER[at]] for at in range(4)] == [True] * 4
    randomised(model)
    out(model)
    assert torch.equal(out(peftlite.unload(model)), before)


def test_a_plan_changes_nothing_and_names_the_layers_to_come() -> None:
    for model in (base(), base().to("meta")):
        before, said = snapshot(model), model.config.to_dict()
        planned = peftlite.plan(model, config(layers_to_transform=[2, 3]))
        assert [site.path for site in planned.sites] == [f"model.layers.{at}.self_attn.q_proj" for at in (2, 3)]
        assert snapshot(model) == before
        assert model.config.to_dict() == said


# ---- several adapters
def test_an_adapter_that_says_nothing_is_on_the_repeated_layers_and_its_file_says_so(tmp_path: Path) -> None:
    model = replicated()
    peftlite.inject(model, config(layer_replication=None, target_modules=["v_proj"]), "b")
    randomised(model)
    peftlite.set_adapter(model, "b")
    peftlite.save_adapter(model, tmp_path)
    other = base()
    peftlite.load_adapter(other, tmp_path / "b", "b")
    assert torch.equal(out(other), out(model))


def test_what_does_not_go_together_is_refused() -> None:
    model = replicated()
    before = snapshot(model)
    for unlike in (config(layer_replication=[(0, 2), (0, 2)]), peftlite.LoHaConfig(target_modules=["v_proj"])):
        with pytest.raises(ConfigError, match=r"repeated as `\[\(0, 2\), .*Nothing was changed"):
            peftlite.inject(model, unlike, "b")
    assert snapshot(model) == before
    plain = base()
    peftlite.inject(plain, peftlite.LoraConfig(target_modules=["q_proj"]))
    before = snapshot(plain)
    with pytest.raises(StateError, match=r"`layer_replication` .* call `unload`.*Nothing was changed"):
        peftlite.inject(plain, config(), "b")
    assert snapshot(plain) == before


def test_combinations_conversions_and_ties_know_the_repeated_layers(tmp_path: Path) -> None:
    model = replicated("llama", "a", "b")
    expected = out(model)
    peftlite.add_weighted_adapter(model, ["a"], [1.0], "c", "linear")
    peftlite.set_adapter(model, "c")
    assert torch.equal(out(model), expected)
    peftlite.save_as_lora(tmp_path, model, 4, "a")
    other = base()
    peftlite.load_adapter(other, tmp_path)
    torch.testing.assert_close(out(other), expected, rtol=1e-4, atol=1e-5)
    tied = tiny("llama", tie_word_embeddings=True)
    both = ["q_proj", "embed_tokens"]
    peftlite.inject(tied, config(target_modules=both, ensure_weight_tying=True))
    assert tied.lm_head.leaders
    assert not any(layer.self_attn.q_proj.leaders or layer.self_attn.q_proj.followers for layer in layers_of(tied))
    with pytest.warns(PeftliteWarning, match="shares its weight with another: it has no effect"):
        peftlite.plan(base(), config(ensure_weight_tying=True))


# ---- refused
@pytest.mark.parametrize(
    ("ranges", "said"),
    [
        ([(0, 3)], r"`\[0, 3\]`, and `model.layers` has 2 layers.*at most `2`"),
        ([(0, 2)] * 6000, "asks for `12000` layers.*more than 10000"),
    ],
    ids=["beyond", "masses"],
)
def test_layers_that_there_are_not(ranges: Any, said: str) -> None:
    model = base()
    before = snapshot(model)
    with pytest.raises(ConfigError, match=f"{said}.*Nothing was changed"):
        peftlite.inject(model, config(layer_replication=ranges))
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("x", "a list of ranges"),
        ([0, 2], "a list of ranges"),
        ([(0, 1, 2)], "a list of ranges"),
        ([(-1, 2)], "at least 0"),
        ([(1, 1)], r"not empty, which `\[1, 1\]` is"),
        ([(2, 1)], "not empty"),
        ([("0", 1)], "an int"),
    ],
    ids=str,
)
def test_ranges_that_are_none(value: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=f"`layer_replication` must be .*{said}.*Nothing was changed"):
        peftlite.LoraConfig(layer_replication=value)


def test_no_ranges_are_no_repetition() -> None:
    assert peftlite.LoraConfig(layer_replication=[]).layer_replication is None


@pytest.mark.parametrize("name", ["t5", "torch", "scaled gpt2"])
def test_models_without_one_list_of_layers(name: str) -> None:
    target = {"t5": "q", "torch": "0", "scaled gpt2": "c_attn"}[name]
    model = nn.Sequential(nn.Linear(4, 4))
    if name != "torch":
        model = tiny("t5") if name == "t5" else tiny("gpt2", scale_attn_by_inverse_layer_idx=True)
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"which layers of .* could be repeated is not known.*Nothing was changed"):
        peftlite.inject(model, config(target_modules=[target]))
    assert snapshot(model) == before


def test_a_load_that_fails_leaves_the_layers_alone(tmp_path: Path) -> None:
    model = replicated()
    peftlite.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors.popitem()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    other = base()
    before, said = snapshot(other), other.config.to_dict()
    with pytest.raises(CheckpointError):
        peftlite.load_adapter(other, tmp_path)
    with pytest.raises(PeftliteError):
        peftlite.inject(other, config(target_modules=["typo"]))
    assert snapshot(other) == before
    assert other.config.to_dict() == said
