"""LoHa against real PEFT with the same weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peftlite
from peftlite.errors import ConfigError, UnsupportedLayerError
from tests.tuners.pairs import Pair, apart

KINDS = ("linear", "linear-no-bias", "conv1d", "conv2d", "conv2d-1x1", "conv2d-groups")
FIELDS: tuple[dict[str, Any], ...] = (
    {"r": 4, "alpha": 6},
    {"r": 2, "rank_pattern": {"layer": 3}, "alpha_pattern": {"layer": 5}},
    {"r": 4, "use_effective_conv2d": True},
)
ROWS = [Pair.row("LoHaConfig", kind, **fields) for kind in KINDS for fields in FIELDS]
CORED = [row for row in ROWS if row.fields.get("use_effective_conv2d") and row.kind in KINDS[2:4] + KINDS[5:]]


@pytest.mark.parametrize("row", [row for row in ROWS if row not in CORED], ids=str)
def test_everything_equals_peft(row: Pair) -> None:
    row.build()
    row.check_names()
    row.check_numbers()
    row.check_merged()


@pytest.mark.parametrize("row", CORED, ids=str)
def test_with_a_core_everything_but_peft_s_wrong_gradients_equals_peft(row: Pair) -> None:
    row.build()
    row.check_names()
    assert apart(row.ours(row.x), row.theirs(row.x)) <= 1e-6
    (_, ours), (_, theirs) = row.gradients(row.ours), row.gradients(row.theirs)
    exact = copy.deepcopy(row.ours).double()
    row.x = row.x.double()
    _, truth = row.gradients(exact)
    assert all(apart(ours[name].double(), truth[name]) <= 1e-6 for name in truth)
    wrong = {name.split(".")[-2] for name in truth if apart(theirs[name].double(), truth[name]) > 1e-2}
    assert wrong == {"hada_w1_a", "hada_w2_a"}
    row.x = row.x.float()
    row.check_merged()


@pytest.mark.parametrize("row", [ROWS[0], ROWS[1], CORED[0], CORED[1]], ids=str)
def test_files_are_read_both_ways(row: Pair, tmp_path: Path) -> None:
    row.build()
    row.check_files(tmp_path)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dropout", [{"rank_dropout": 0.5}, {}, {"rank_dropout": 0.3}], ids=str)
def test_dropout_drops_what_peft_drops(kind: str, dropout: dict[str, float]) -> None:
    row = Pair.row("LoHaConfig", kind, r=4, module_dropout=0.4, **dropout)
    row.build()
    same = []
    for model in row.models:
        model.train()
    for seed in range(8):
        outputs = []
        for model in row.models:
            torch.manual_seed(seed)
            outputs.append(model(row.x))
        assert apart(*outputs) <= 1e-6
        same.append(torch.equal(outputs[0], row.ours.base_model.model.layer.base_layer(row.x)))
    assert 0 < sum(same) < 8


def test_few_ranks_of_a_large_layer_are_computed_without_the_product() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(96, 80)), torch.randn(7, 96)
    peftlite.inject_adapter_in_model(peftlite.LoHaConfig(target_modules=["0"], r=4, init_weights=False), model)
    exact = copy.deepcopy(model).double()(x.double())
    assert apart(model(x).double(), exact) <= 1e-6
    peftlite.merge_adapter(model)
    assert apart(model(x).double(), exact) <= 1e-6
    plain = nn.Linear(96, 80)
    assert {tuple(node.shape) for node in saved_for_backward(model[0], x)}.isdisjoint({plain.weight.shape})


def saved_for_backward(layer: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """What autograd keeps of the update alone."""
    layer.unmerge()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer.variants["default"].delta_forward(peftlite.core.slots.View(layer, "default"), x)
    return kept


def test_other_kinds_of_layer_than_peft_s() -> None:
    """Conv1D and Conv3d are covered by the contract; an embedding is refused by name."""
    with pytest.raises(UnsupportedLayerError, match="LOHA has no form for Embedding"):
        peftlite.inject_adapter_in_model(peftlite.LoHaConfig(target_modules=["0"]), nn.Sequential(nn.Embedding(3, 4)))


@pytest.mark.parametrize(
    "fields",
    [{"r": 0}, {"rank_dropout": 1.0}, {"module_dropout": -0.1}, {"init_weights": "yes"}, {"alpha": float("nan")}],
    ids=str,
)
def test_configs_that_cannot_be_used(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(ConfigError, match=f"`{name}` must be"):
        peftlite.LoHaConfig(target_modules=["a"], **fields)
