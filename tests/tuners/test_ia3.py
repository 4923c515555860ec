"""(IA)^3 against real PEFT with the same weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import peftlite
from peftlite.core.tree import layers
from peftlite.errors import ConfigError, UnsupportedLayerError
from tests.models import tiny
from tests.tuners.pairs import Pair

KINDS = ("linear", "linear-no-bias", "Conv1D", "conv2d", "conv2d-groups", "conv3d")
ROWS = [Pair.row("IA3Config", kind, feedforward_modules=names) for kind in KINDS for names in ([], ["layer"])]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_everything_equals_peft(row: Pair) -> None:
    row.build()
    row.check_names()
    row.check_numbers()
    row.check_merged()


@pytest.mark.parametrize("row", ROWS[:2], ids=str)
def test_files_are_read_both_ways(row: Pair, tmp_path: Path) -> None:
    row.build()
    row.check_files(tmp_path)


def net() -> nn.Module:
    return nn.ModuleDict({"mylayer": nn.Linear(3, 4), "b": nn.ModuleDict({"layer": nn.Linear(3, 4)})})


@pytest.mark.parametrize(
    "names", [["layer"], ["b.layer"], ["er"], ["mylayer"], [], r"b\.layer", ".*layer", "layer", "m.*"], ids=str
)
def test_which_modules_are_feedforward(names: Any) -> None:
    shapes = []
    for library in (peftlite, peft):
        config = library.IA3Config(target_modules=".*layer", feedforward_modules=names)
        model = library.get_peft_model(net(), config)
        shapes.append({name: tuple(p.shape) for name, p in model.named_parameters() if "ia3_l" in name})
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "opt"])
@pytest.mark.parametrize("targets", [None, ["q_proj", "c_proj", "query", "q"]], ids=["no targets", "targets"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:Model has `tie_word_embeddings")  # PEFT's
def test_defaults_are_those_of_peft(name: str, targets: list[str] | None) -> None:
    if targets is not None:
        have = {path.rpartition(".")[2] for path, _ in tiny(name).named_modules()}
        targets = [target for target in targets if target in have]
    ours = peftlite.get_peft_model(tiny(name), peftlite.IA3Config(target_modules=targets))
    theirs = peft.get_peft_model(tiny(name), peft.IA3Config(target_modules=targets))
    assert [(n, p.shape) for n, p in ours.named_parameters()] == [(n, p.shape) for n, p in theirs.named_parameters()]
    for field in ("target_modules", "feedforward_modules"):
        mine, other = (getattr(m.peft_config["default"], field) for m in (ours, theirs))
        assert mine == sorted(other)


def test_an_input_without_batch_keeps_its_shape() -> None:
    row = Pair.row("IA3Config", "conv2d", feedforward_modules=["layer"])
    row.build()
    torch.testing.assert_close(row.ours(row.x[0]), row.ours(row.x)[0])


def test_two_adapters_of_both_kinds_work_together_and_merge() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4)), torch.randn(5, 3)
    for name, feedforward in (("a", ["0"]), ("b", [])):
        peftlite.inject_adapter_in_model(
            peftlite.IA3Config(target_modules=["0"], feedforward_modules=feedforward), model, name
        )
    for layer in layers(model):
        for name in ("a", "b"):
            for parameter in layer.parameters_of(name):
                parameter.data.uniform_(-2, 2)
    peftlite.set_adapter(model, ["a", "b"])
    base = model[0].get_base_layer()
    expected = base(x * model[0].ia3_l["a"].flatten()) * model[0].ia3_l["b"].flatten()
    torch.testing.assert_close(model(x), expected)
    peftlite.merge_adapter(model)
    torch.testing.assert_close(model(x), expected)


def test_a_scale_of_zero_unmerges() -> None:
    """PEFT divides by the scale, which gives nan."""
    model = nn.Sequential(nn.Linear(3, 4))
    before = model[0].weight.clone()
    peftlite.inject_adapter_in_model(peftlite.IA3Config(target_modules=["0"], feedforward_modules=[]), model)
    model[0].ia3_l["default"].data.zero_()
    peftlite.merge_adapter(model)
    peftlite.unmerge_adapter(model)
    assert torch.equal(model[0].get_base_layer().weight, before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"feedforward_modules": ["b"]}, "`feedforward_modules` has `'b'`"),
        ({"feedforward_modules": "("}, "valid regular expression"),
        ({"feedforward_modules": 3}, "a list of names"),
        ({"init_ia3_weights": 1}, "True or False"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_configs_that_cannot_be_used(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        peftlite.IA3Config(**{"target_modules": ["a"], **fields})


def test_feedforward_modules_must_be_said_where_no_default_is_known() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(ConfigError, match="`feedforward_modules` is None"):
        peftlite.inject_adapter_in_model(peftlite.IA3Config(target_modules=["0"]), model)
    assert type(model[0]) is nn.Linear


def test_layers_without_a_form_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Embedding(3, 4))
    with pytest.raises(UnsupportedLayerError, match="IA3 has no form for Embedding"):
        peftlite.inject_adapter_in_model(peftlite.IA3Config(target_modules=["0"], feedforward_modules=[]), model)
