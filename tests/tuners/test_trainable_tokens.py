"""Rows of embeddings that train: beside LoRA (`trainable_token_indices`) and as a method of its own, against PEFT."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import peftlite
from peftlite.errors import AdapterNameError, ConfigError, TargetNotFoundError, UnsupportedLayerError
from tests.models import batch, tiny
from tests.versions import VERSION

TOKENS = [5, 1]
QUERIES = {"llama": "q_proj", "gpt2": "c_attn", "bert": "query", "t5": "q", "opt": "q_proj"}


def with_lora(library: Any, name: str, tokens: Any = TOKENS) -> Any:
    return library.LoraConfig(target_modules=[QUERIES[name]], trainable_token_indices=tokens, init_lora_weights=False)


def alone(library: Any, name: str) -> Any:
    return library.TrainableTokensConfig(token_indices=TOKENS)


def inputs(name: str) -> dict[str, Any]:
    """A batch that has the tokens in it."""
    found = {key: value.clone() for key, value in batch(name).items()}
    found["input_ids"][:, :2] = torch.tensor([1, 5])
    return found


def output(model: nn.Module, name: str) -> torch.Tensor:
    found = model(**inputs(name))
    return found.logits if "logits" in found else found[0]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for path, p in model.named_parameters() if "trainable_tokens_delta" in path]


@pytest.fixture(params=[with_lora, alone], ids=["with LoRA", "alone"])
def config(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", QUERIES)
def test_files_outputs_and_gradients_are_those_of_peft(name: str, tied: bool, config: Any, tmp_path: Path) -> None:
    if VERSION < (5, 0) and name == "t5":
        pytest.skip("`peft` applies the rows to the untied head of transformers 4's T5 as well")
    base = tiny(name, tie_word_embeddings=tied)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(base), config(peft, name))
        with torch.no_grad():
            for parameter in trained(theirs):
                parameter.add_(torch.randn_like(parameter))
        theirs.save_pretrained(tmp_path / "theirs")
    ours = peftlite.PeftModel.from_pretrained(base, tmp_path / "theirs", is_trainable=True)
    ours.save_pretrained(tmp_path / "ours")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
    expected, found = output(theirs.eval(), name), output(ours.eval(), name)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(y.pow(2).sum(), trained(m)[0])[0] for m, y in ((theirs, expected), (ours, found))]
    assert (grads[1] - grads[0]).norm() <= 1e-6 * grads[0].norm()
    before = {key: tensor.clone() for key, tensor in ours.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", peftlite.errors.PeftliteWarning)  # tied weights that part
        ours.merge_adapter()
    torch.testing.assert_close(output(ours, name), found, rtol=1e-5, atol=1e-5)
    ours.unmerge_adapter()
    assert all(torch.equal(tensor, before[key]) for key, tensor in ours.state_dict().items())


@pytest.mark.parametrize("shape", ["wrapped", "in place"])
def test_both_shapes_write_the_same_files_and_read_them(shape: str, config: Any, tmp_path: Path) -> None:
    model = tiny("llama", tie_word_embeddings=True)
    given = config(peftlite, "llama")
    torch.manual_seed(1)
    adapted = peftlite.get_peft_model(model, given) if shape == "wrapped" else model
    if shape == "in place":
        model.add_adapter(given)
    with torch.no_grad():
        trained(adapted)[0].mul_(2)
    expected = output(adapted.eval(), "llama")
    (adapted.save_pretrained if shape == "wrapped" else adapted.save_adapter)(tmp_path)
    assert any(key.endswith("trainable_tokens_delta") for key in load_file(tmp_path / "adapter_model.safetensors"))
    again = tiny("llama", tie_word_embeddings=True)
    again.load_adapter(tmp_path)
    assert torch.equal(output(again.eval(), "llama"), expected)
    assert torch.equal(output(peftlite.wrap(again), "llama"), expected)
    again.delete_adapter("default")
    assert not any("trainable" in key for key in again.state_dict())
    assert torch.equal(output(again, "llama"), output(tiny("llama", tie_word_embeddings=True).eval(), "llama"))


def test_only_the_tokens_train_and_nothing_else_of_the_table() -> None:
    model = peftlite.get_peft_model(tiny("llama"), with_lora(peftlite, "llama"))
    before = model.get_base_model().model.embed_tokens.weight.clone()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    output(model, "llama").pow(2).mean().backward()
    optimizer.step()
    assert torch.equal(model.get_base_model().model.embed_tokens.weight, before)
    merged = model.merge_and_unload().model.embed_tokens.weight
    changed = (merged != before).any(1).nonzero().flatten().tolist()
    assert changed == sorted(TOKENS)


def test_new_tokens_are_added_trained_saved_and_loaded(tmp_path: Path) -> None:
    def grown() -> Any:
        torch.manual_seed(3)
        model = tiny("llama")
        model.resize_token_embeddings(model.config.vocab_size + 2, mean_resizing=False)
        return model

    base = grown()
    new = [base.config.vocab_size - 2, base.config.vocab_size - 1]
    model = peftlite.get_peft_model(base, with_lora(peftlite, "llama", new))
    with torch.no_grad():
        trained(model)[0].normal_()
    ids = torch.tensor([[1, new[0], new[1]]])
    expected = model.eval()(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    again = peftlite.PeftModel.from_pretrained(grown(), tmp_path)
    assert torch.equal(again(input_ids=ids).logits, expected)


def test_named_tables_have_tokens_of_their_own() -> None:
    tokens = {"embed_tokens": [1, 5], "lm_head": [2]}
    ours = peftlite.get_peft_model(tiny("llama"), with_lora(peftlite, "llama", tokens))
    assert [tuple(p.shape) for p in trained(ours)] == [(2, 16), (1, 16)]
    with torch.no_grad():
        trained(ours)[1].zero_()
    logits = output(ours.eval(), "llama")
    assert logits[..., 2].abs().max() == 0
    assert ours.get_base_model().lm_head.token_indices == {"default": [2]}
    with pytest.raises(ConfigError, match=r"they are given the tokens `\[2\]` and `\[1, 5\]`"):
        peftlite.get_peft_model(tiny("llama", tie_word_embeddings=True), with_lora(peftlite, "llama", tokens))


def test_tables_that_multiply_their_rows() -> None:
    """Gemma 3 scales what its table finds: trained rows, and LoRA on the table, are scaled too."""
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 4}
    base = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=1))
    ids = torch.tensor([[1, 5, 7]])
    lora = peftlite.LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False)
    for config in (peftlite.TrainableTokensConfig(token_indices=[5, 1]), lora):
        model = peftlite.get_peft_model(copy.deepcopy(base), config).eval()
        table = model.get_base_model().model.embed_tokens
        with torch.no_grad():
            for parameter in (p for p in table.parameters() if p.requires_grad):
                parameter.normal_()
        before = table(ids)
        table.merge()
        torch.testing.assert_close(table(ids), before)
        if config is not lora:
            before.sum().backward()
            delta = trained(model)[0]
            assert delta.grad[0].abs().min() > 0
            assert delta.grad[1].abs().max() == 0  # the padding token's row has no gradient, as in its table


def test_adapters_with_different_tokens_work_together_and_rivals_are_refused() -> None:
    model = peftlite.get_peft_model(tiny("llama"), with_lora(peftlite, "llama", [1]), "a")
    model.add_adapter("b", with_lora(peftlite, "llama", [5]))
    model.add_adapter("c", with_lora(peftlite, "llama", [5, 9]))
    model.add_adapter("none", peftlite.LoraConfig(target_modules=["q_proj"]))
    model.set_adapter(["a", "b", "none"])
    with torch.no_grad():
        for parameter in trained(model):
            parameter.fill_(0.5)
    rows = model.get_base_model().model.embed_tokens(torch.tensor([1, 5, 9]))
    assert (rows == 0.5).all(1).tolist() == [True, True, False]
    with pytest.raises(
        AdapterNameError, match=r"both have a row of their own for the token `5` for `model\.embed_tokens`"
    ):
        model.set_adapter(["b", "c"])
    assert model.active_adapters == ["a", "b", "none"]
    ids = torch.tensor([[1, 5, 9]] * 4)
    names = ["a", "c", "__base__", "none"]
    mixed = model.eval()(input_ids=ids, adapter_names=names).logits
    for row, name in enumerate(names):
        with model.use_adapter(*[name] if name != "__base__" else []):
            torch.testing.assert_close(mixed[row : row + 1], model(input_ids=ids[:1]).logits)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([48], ConfigError, r"`model.embed_tokens` has 48 rows, and none for the token `48`; the last one is `47`"),
        ([-1], ConfigError, "`trainable_token_indices`"),
        ([1, 1], ConfigError, r"each once, not `\[1, 1\]`"),
        ([], ConfigError, "at least one index"),
        ({}, ConfigError, "a dict from names"),
        ({"embed_token": [1]}, TargetNotFoundError, "`trainable_token_indices` has `embed_token`.*`embed_tokens`"),
        ({"norm": [1]}, UnsupportedLayerError, "norm"),
        ({"q_proj": [1]}, ConfigError, "would get a LORA and a TOKEN_ADAPTER adapter"),
        ("1", ConfigError, "a list of indices"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_changed(tokens: Any, error: type[Exception], message: str) -> None:
    model = tiny("llama")
    before = str(model)
    with pytest.raises(error, match=message):
        peftlite.get_peft_model(model, with_lora(peftlite, "llama", tokens))
    assert str(model) == before


def test_a_plain_module_has_no_table_of_inputs_that_is_known() -> None:
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4))
    with pytest.raises(ConfigError, match=r'name it, as in `trainable_token_indices=\{"embed_tokens"'):
        peftlite.inject(model, peftlite.LoraConfig(target_modules=["1"], trainable_token_indices=[1]))
    peftlite.inject(model, peftlite.LoraConfig(target_modules=["1"], trainable_token_indices={"0": [1]}))
    assert model[0].token_indices == {"default": [1]}


def test_a_table_that_trains_whole_has_no_rows_that_train_beside() -> None:
    config = peftlite.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["embed_tokens"], trainable_token_indices=[1]
    )
    with pytest.raises(ConfigError, match="would get a MODULES_TO_SAVE and a TOKEN_ADAPTER adapter"):
        peftlite.get_peft_model(tiny("llama"), config)


def test_what_is_converted_or_combined_keeps_its_tokens() -> None:
    model = peftlite.get_peft_model(tiny("llama"), with_lora(peftlite, "llama"))
    with torch.no_grad():
        trained(model)[0].normal_()
    expected = output(model.eval(), "llama")
    model.add_weighted_adapter(["default"], [1.0], "copy")
    model.set_adapter("copy")
    assert torch.equal(output(model, "llama"), expected)
    config, tensors = peftlite.convert_to_lora(model, 8, "default")
    assert config.trainable_token_indices == TOKENS
    again = peftlite.get_peft_model(tiny("llama"), config)
    peftlite.set_peft_model_state_dict(again, tensors)
    torch.testing.assert_close(output(again.eval(), "llama"), expected)


def test_the_config_in_the_file_says_the_tokens(tmp_path: Path) -> None:
    peftlite.get_peft_model(tiny("llama"), with_lora(peftlite, "llama")).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["trainable_token_indices"] == TOKENS
