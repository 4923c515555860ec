"""LoKr against real PEFT with the same weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lokr.layer import factorization
from torch import nn

import peftlite
from peftlite.errors import ConfigError, UnsupportedLayerError
from peftlite.tuners.lokr import factorized
from tests.tuners.pairs import KINDS as MAKE
from tests.tuners.pairs import Pair, apart

KINDS = ("linear", "linear-no-bias", "conv1d", "conv2d", "conv2d-1x1", "conv2d-groups")
FIELDS: tuple[dict[str, Any], ...] = (
    {"r": 4, "alpha": 6},
    {"r": 1},
    {"r": 1, "decompose_both": True},
    {"r": 2, "decompose_factor": 2, "use_effective_conv2d": True},
    {"r": 1, "decompose_both": True, "use_effective_conv2d": True},
)
BROKEN = ("conv1d", {"r": 1, "decompose_both": True, "use_effective_conv2d": True})
"""PEFT raises an error in forward and merge."""
ROWS = [Pair.row("LoKrConfig", kind, **fields) for kind in KINDS for fields in FIELDS if (kind, fields) != BROKEN]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_everything_equals_peft(row: Pair) -> None:
    row.build()
    row.check_names()
    row.check_numbers()
    row.check_merged()


@pytest.mark.parametrize("row", ROWS[:5], ids=str)
def test_files_are_read_both_ways(row: Pair, tmp_path: Path) -> None:
    row.build()
    row.check_files(tmp_path)


def test_a_core_in_a_conv1d_works_where_peft_s_raises() -> None:
    row = Pair.row("LoKrConfig", BROKEN[0], **BROKEN[1])
    row.build()
    row.check_names()
    with pytest.raises(RuntimeError, match="view"):
        row.theirs(row.x)
    exact = copy.deepcopy(row.ours).double()(row.x.double())
    assert apart(row.ours(row.x).double(), exact) <= 1e-6
    row.ours.merge_adapter()
    assert apart(row.ours(row.x).double(), exact) <= 1e-6


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("scale", [True, False], ids=["scaled", "unscaled"])
def test_dropout_drops_what_peft_drops(kind: str, scale: bool) -> None:
    row = Pair.row("LoKrConfig", kind, r=4, module_dropout=0.4, rank_dropout=0.5, rank_dropout_scale=scale)
    row.build()
    for model in row.models:
        model.train()
    for seed in range(8):
        outputs = []
        for model in row.models:
            torch.manual_seed(seed)
            outputs.append(model(row.x))
        assert apart(*outputs) <= 1e-6


@given(size=st.integers(1, 5000), limit=st.integers(1, 200) | st.just(-1))
def test_sizes_are_factorized_as_by_peft(size: int, limit: int) -> None:
    assert factorized(size, limit) == factorization(size, limit)


@pytest.mark.parametrize("start", [True, False, "lycoris"], ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("fields", FIELDS[:3], ids=str)
def test_the_same_factors_start_at_zero(start: bool | str, kind: str, fields: dict[str, Any]) -> None:
    zeros = []
    for library in (peftlite, peft):
        config = library.LoKrConfig(target_modules=["0"], init_weights=start, **fields)
        model = library.get_peft_model(nn.Sequential(MAKE[kind][0]()), config)
        zeros.append({name: not p.any() for name, p in model.named_parameters() if "lokr" in name})
    assert zeros[0] == zeros[1]


def test_layers_without_a_form_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedLayerError, match="LOKR has no form for Embedding"):
        peftlite.inject_adapter_in_model(peftlite.LoKrConfig(target_modules=["0"]), nn.Sequential(nn.Embedding(3, 4)))


@pytest.mark.parametrize(
    "fields", [{"decompose_factor": 0}, {"decompose_factor": -2}, {"decompose_both": 1}, {"init_weights": "x"}], ids=str
)
def test_configs_that_cannot_be_used(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(ConfigError, match=f"`{name}`"):
        peftlite.LoKrConfig(target_modules=["a"], **fields)
