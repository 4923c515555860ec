"""`adapter_names=[...]`: one adapter per row of the batch, in both shapes, in calls and in `generate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import peftlite
from peftlite import LoraConfig
from peftlite.errors import AdapterNameError, StateError
from tests.contract.rows import scramble
from tests.models import batch, tiny

ROWS = ["b", "__base__", "a"]


def wrapped(model: nn.Module) -> Any:
    first, *rest = configs()
    peft_model = peftlite.get_peft_model(model, first[1], first[0])
    for name, config in rest:
        peft_model.add_adapter(name, config)
    return peft_model


def inplace(model: nn.Module) -> Any:
    for name, config in configs():
        peftlite.inject_adapter_in_model(config, model, name)
    return model


def configs() -> list[tuple[str, LoraConfig]]:
    return [
        ("a", LoraConfig(r=2, target_modules="all-linear")),
        ("b", LoraConfig(r=4, target_modules="all-linear", use_rslora=True)),
    ]


@pytest.fixture(params=[wrapped, inplace], ids=["wrapped", "in place"])
def shape(request: pytest.FixtureRequest) -> Callable[[nn.Module], Any]:
    return request.param  # type: ignore[no-any-return]


def adapted(shape: Callable[[nn.Module], Any], name: str) -> Any:
    model = shape(tiny(name))
    for adapter in ("a", "b"):
        scramble(model, adapter)
    return model.eval()


def inputs(name: str) -> dict[str, torch.Tensor]:
    return {key: value[:1].repeat(3, *[1] * (value.dim() - 1)) for key, value in batch(name).items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "opt"])
def test_each_row_gets_its_own_adapter(shape: Callable[[nn.Module], Any], name: str) -> None:
    model, x = adapted(shape, name), inputs(name)
    y = model(**x, adapter_names=ROWS).logits
    for row, adapter in enumerate(ROWS):
        with peftlite.use_adapter(model, *(() if adapter == "__base__" else (adapter,))):
            torch.testing.assert_close(y[row], model(**x).logits[row], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(y[0], y[1])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_generate_keeps_rows_and_their_beams_apart(shape: Callable[[nn.Module], Any], name: str, beams: int) -> None:
    model = adapted(shape, name)
    ids = inputs(name)["input_ids"]
    kwargs = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "num_beams": beams, "do_sample": False}
    together = model.generate(input_ids=ids, adapter_names=ROWS, **kwargs)
    for row, adapter in enumerate(ROWS):
        with peftlite.use_adapter(model, *(() if adapter == "__base__" else (adapter,))):
            alone = model.generate(input_ids=ids, **kwargs)
        width = min(alone.shape[1], together.shape[1])
        assert torch.equal(together[row, :width], alone[row, :width])


def test_unknown_names_and_wrong_counts_are_refused(shape: Callable[[nn.Module], Any]) -> None:
    model, x = adapted(shape, "llama"), inputs("llama")
    expected = model(**x).logits
    with pytest.raises(AdapterNameError, match="`c`"):
        model(**x, adapter_names=["a", "b", "c"])
    for names in (["a", "b"], ["a"], ["a"] * 6, torch.tensor([1])):
        for call in (model, model.generate):
            with pytest.raises(StateError, match=f"{len(names)} rows, and the batch has 3"):
                call(**x, adapter_names=names)
    assert torch.equal(model(**x).logits, expected)
