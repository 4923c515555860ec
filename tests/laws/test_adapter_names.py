"""An adapter may be called what modules call their attributes, or anything else that can be printed."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import peftlite
from peftlite import IA3Config, LoraConfig, PeftConfig
from peftlite.core.layer import AdapterLayer
from peftlite.core.state import AdapterState
from peftlite.core.tree import find_state
from peftlite.errors import AdapterNameError
from tests.contract.rows import scramble

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
TAKEN = sorted(
    {
        *(
            name
            for kind in (nn.Linear, nn.ParameterDict, nn.ModuleDict, AdapterLayer, AdapterState)
            for name in dir(kind)
        ),
        *vars(nn.Linear(2, 2)),
        *("default", "weight", "bias", "base_layer", "lora_A", "lora_B", "lora_embedding_A", "scaling", "r", "0", "1"),
        *("modules_to_save", "original_module", "base_model", "model", "self", "None", "adapter_model", "checkpoint-1"),
    }
)
NAMES = st.sampled_from(TAKEN) | st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=20)


def allowed(name: str) -> bool:
    return not set(name) & set("./\\") and name != "__base__"


def config(method: str) -> PeftConfig:
    if method == "ia3":
        return IA3Config(target_modules=["0"], feedforward_modules=[])
    return LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


def adapted(shape: str, method: str, *names: str) -> Any:
    model: Any = net()
    for name in names:
        peftlite.inject(model, config(method), name)
        scramble(model, name)
    peftlite.set_adapter(model, names[0])
    return peftlite.wrap(model) if shape == "wrapped" else model


@torch.no_grad()
def run(model: Any) -> Tensor:
    y: Tensor = model(X)
    return y


@pytest.mark.parametrize("shape", ["in place", "wrapped"])
@pytest.mark.parametrize("method", ["lora", "ia3"])
@settings(max_examples=20)
@given(name=NAMES)
@example("train")
@example("training")
@example("type")
@example("forward")
@example("lora_A")
@example("..")
@example("__base__")
@example("é")
def test_the_whole_lifecycle_of_an_adapter_of_any_name(shape: str, method: str, name: str) -> None:
    if not allowed(name):
        model = net()
        with pytest.raises(AdapterNameError, match="Nothing was changed"):
            peftlite.inject(model, config(method), name)
        assert find_state(model) is None
        return
    other = f"not {name}"
    base, model = net(), adapted(shape, method, name, other)
    twin = adapted(shape, method, "x", "y")
    twin.load_state_dict(dict(zip(twin.state_dict(), model.state_dict().values(), strict=True)))
    expected = run(twin)
    assert torch.equal(run(model), expected)
    assert list(peftlite.active_adapters(model)) == [name]
    with peftlite.use_adapter(model, other), peftlite.use_adapter(twin, "y"):
        assert torch.equal(run(model), run(twin))
    with peftlite.disable_adapter(model):
        assert torch.equal(run(model), run(base))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    peftlite.merge_adapter(model)
    torch.testing.assert_close(run(model), expected)
    peftlite.unmerge_adapter(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    if method == "lora":
        peftlite.scale_adapter(model, name, 1.0)
    with tempfile.TemporaryDirectory() as place:
        peftlite.save_adapter(model, place, selected_adapters=[name])
        home = Path(place) if name == "default" else Path(place) / name
        again = net()
        peftlite.load_adapter(again, home, name)
        if shape == "wrapped":
            again = peftlite.PeftModel.from_pretrained(net(), home, adapter_name=name)
        assert torch.equal(run(again), expected)
    peftlite.delete_adapter(model, other)
    assert torch.equal(run(model), expected)
    peftlite.delete_adapter(model, name)
    assert torch.equal(run(model), run(base))


@pytest.mark.parametrize("name", ["\0", "a\nb", "\ud800", "\x1b[31m", "\u202e", ""])
def test_what_cannot_be_printed_is_no_name(name: str) -> None:
    model = net()
    with pytest.raises(AdapterNameError, match="Nothing was changed"):
        peftlite.inject(model, config("lora"), name)
    assert find_state(model) is None
