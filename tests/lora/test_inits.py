"""Beginnings that follow from the base weight, against real PEFT and against what they promise."""

from __future__ import annotations

import copy
import json
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peftlite
from peftlite import LoraConfig
from peftlite.core.tree import layers
from peftlite.tuners.lora.inits.weights import lowrank_svd, orthogonal, pissa
from tests.tuners.pairs import apart

FROM_WEIGHTS = ("pissa", "olora")
SCALINGS: list[dict[str, Any]] = [{"lora_alpha": 8}, {"lora_alpha": 3, "use_rslora": True}]


class Net(nn.Module):
    """Two layers, of which the second may have another rank."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer: nn.Module = Conv1D(10, 12) if transposed else nn.Linear(12, 10)
        nn.init.normal_(self.layer.weight, std=0.4)
        self.last = nn.Linear(10, 7)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.layer(x))
        return y


def made(library: Any, model: nn.Module, **fields: Any) -> Any:
    torch.manual_seed(3)
    config = library.LoraConfig(**{"r": 4, "target_modules": ["layer", "last"], **fields})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out", UserWarning)  # PEFT's, about Conv1D
        return library.get_peft_model(model, config).eval()


def factors(model: Any, name: str = "default") -> dict[str, Tensor]:
    return {key: value for key, value in model.state_dict().items() if "lora_" in key}


@torch.no_grad()
def train(model: Any) -> None:
    torch.manual_seed(4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.2 * torch.randn_like(parameter))


@pytest.mark.parametrize("scaling", SCALINGS, ids=["alpha", "rslora"])
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "Conv1D"])
@pytest.mark.parametrize("init", FROM_WEIGHTS)
def test_factors_outputs_and_gradients_are_peft_s(init: str, transposed: bool, scaling: dict[str, Any]) -> None:
    if init == "olora" and transposed:
        return  # PEFT decomposes the stored (in, out) as if it were (out, in), and then cannot multiply
    ours, theirs = (made(library, Net(transposed), init_lora_weights=init, **scaling) for library in (peftlite, peft))
    for one, other in zip(ours.base_model.model.children(), theirs.base_model.model.children(), strict=True):
        A, B = one.lora_A["default"].weight, one.lora_B["default"].weight
        assert apart(B @ A, other.lora_B["default"].weight @ other.lora_A["default"].weight) <= 1e-5
        assert apart(A @ A.T, other.lora_A["default"].weight @ other.lora_A["default"].weight.T) <= 1e-5
    train(ours)
    theirs.load_state_dict(factors(ours), strict=False)
    x = torch.randn(5, 12)
    assert apart(ours(x), theirs(x)) <= 2e-6
    for model in (ours, theirs):
        model(x).square().sum().backward()
    gradients = [{n: p.grad for n, p in model.named_parameters() if p.requires_grad} for model in (ours, theirs)]
    assert gradients[0].keys() == gradients[1].keys()
    assert all(apart(gradients[0][name], gradients[1][name]) <= 3e-6 for name in gradients[0])
    for model in (ours, theirs):
        model.merge_adapter()
    assert apart(ours(x), theirs(x)) <= 2e-6


class Matrix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.weight = nn.Parameter(0.4 * torch.randn(10, 12))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


@pytest.mark.parametrize("init", FROM_WEIGHTS)
def test_a_bare_matrix_begins_as_in_peft_and_is_converted(init: str, tmp_path: Path) -> None:
    fields = {"target_modules": [], "target_parameters": ["layer.weight"], "init_lora_weights": init, "lora_alpha": 8}
    ours, theirs = (made(library, nn.Sequential(OrderedDict(layer=Matrix())), **fields) for library in (peftlite, peft))
    B, A, D, C = (
        model.base_model.model.layer.get_submodule(slot)["default"].weight
        for model in (ours, theirs)
        for slot in ("lora_B", "lora_A")
    )
    assert apart(B @ A, D @ C) <= 1e-5
    ours.save_pretrained(tmp_path / "first")
    train(ours)
    theirs.load_state_dict(factors(ours), strict=False)
    x = torch.randn(5, 12)
    assert apart(ours(x), theirs(x)) <= 2e-6
    ours.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    for library in (peftlite, peft):
        read = library.PeftModel.from_pretrained(nn.Sequential(OrderedDict(layer=Matrix())), tmp_path / "plain")
        assert apart(read(x), ours(x)) <= 2e-6
    with peftlite.disable_adapter(ours):
        assert torch.equal(ours(x), Matrix()(x))


@pytest.mark.parametrize("init", [*FROM_WEIGHTS, "mica", "orthogonal"])
def test_files_are_read_both_ways(init: str, tmp_path: Path) -> None:
    x, written = torch.randn(5, 12), {}
    for library in (peftlite, peft):
        model = made(library, Net(), init_lora_weights=init, lora_alpha=8)
        train(model)
        written[library] = model(x)
        model.save_pretrained(tmp_path / library.__name__)
    for library, other in ((peftlite, peft), (peft, peftlite)):
        read = library.PeftModel.from_pretrained(Net(), tmp_path / other.__name__)
        assert apart(read(x), written[other]) <= 2e-6
    keys = [load_file(tmp_path / lib.__name__ / "adapter_model.safetensors").keys() for lib in (peftlite, peft)]
    assert keys[0] == keys[1]


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_base_layer_stays_as_it_is(init: str) -> None:
    model, base = Net(), Net()
    peftlite.inject_adapter_in_model(LoraConfig(r=4, target_modules=["layer"], init_lora_weights=init), model)
    train(model)
    x = torch.randn(5, 12)
    assert torch.equal(model.layer.base_layer.weight, base.layer.weight)
    with peftlite.disable_adapter(model):
        assert torch.equal(model(x), base(x))
    peftlite.inject_adapter_in_model(LoraConfig(r=2, target_modules=["layer"]), model, "plain")
    peftlite.set_adapter(model, "plain")
    assert torch.equal(model(x), base(x))
    assert torch.equal(peftlite.unload(model).layer.weight, base.layer.weight)


def test_an_adapter_added_while_another_is_merged_begins_from_the_base_weight() -> None:
    alone, after = Net(), Net()
    config = LoraConfig(r=4, target_modules=["layer"], init_lora_weights="pissa")
    dora = LoraConfig(r=4, target_modules=["layer"], use_dora=True)
    peftlite.inject_adapter_in_model(LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False), after, "first")
    peftlite.merge_adapter(after)
    for model in (alone, after):
        torch.manual_seed(5)
        peftlite.inject_adapter_in_model(config, model, "pissa")
        peftlite.inject_adapter_in_model(dora, model, "dora")
    for name in ("pissa", "dora"):
        one, other = (next(layers(model)).tensors(name) for model in (alone, after))
        assert all(torch.equal(one[key], other[key]) for key in one if "lora_A" not in key or name == "pissa")


@pytest.mark.parametrize("shape", [(100, 200), (64, 64)])
def test_random_projections_find_at_least_what_torch_s_find(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    W, r = torch.randn(shape), 8
    best = torch.linalg.svdvals(W.double())[r:].square().sum().sqrt()
    for niter in (0, 1, 4, 16):
        B, s, Vt = lowrank_svd(W, r, niter)
        theirs = torch.svd_lowrank(W, r, niter=niter)
        missed = [
            float((W - (u * v) @ t).double().norm() / best) for u, v, t in ((B, s, Vt), (*theirs[:2], theirs[2].T))
        ]
        assert missed[0] <= missed[1] + 1e-6
    assert missed[0] <= 1.0001


def test_a_random_projection_is_the_same_in_every_run(tmp_path: Path) -> None:
    wide = nn.Sequential()
    wide.add_module("layer", nn.Linear(60, 50))
    model = made(peftlite, copy.deepcopy(wide), init_lora_weights="pissa_niter_1", target_modules=["layer"])
    train(model)
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)
    x = torch.randn(5, 60)
    assert torch.equal(peftlite.PeftModel.from_pretrained(copy.deepcopy(wide), tmp_path)(x), model(x))


def test_orthogonal_factors_are_peft_s_in_distribution() -> None:
    model = nn.Sequential()
    model.add_module("layer", nn.Linear(300, 200))
    config = peft.LoraConfig(r=16, target_modules=["layer"], init_lora_weights="orthogonal")
    theirs = peft.get_peft_model(copy.deepcopy(model), config).base_model.model.layer
    A, B = orthogonal(model.layer.weight.detach(), 16, 1.0)
    for ours, other in ((A, theirs.lora_A["default"].weight), (B.T, theirs.lora_B["default"].weight.T)):
        assert abs(float(ours.std() / other.detach().std()) - 1) < 0.1
        assert torch.linalg.matrix_rank(ours) == torch.linalg.matrix_rank(other) == 8
    assert float((B @ A).abs().max()) < 1e-6


def test_mica_trains_only_a_along_the_minor_directions() -> None:
    ours, theirs = (made(library, Net(), init_lora_weights="mica") for library in (peftlite, peft))
    for one, other in zip(ours.base_model.model.children(), theirs.base_model.model.children(), strict=True):
        B, D = one.lora_B["default"].weight, other.lora_B["default"].weight
        assert apart((B.T @ D).abs(), torch.eye(4)) <= 1e-4
    trainable = [[n for n, p in model.named_parameters() if p.requires_grad] for model in (ours, theirs)]
    assert trainable[0] == trainable[1] == [f"base_model.model.{n}.lora_A.default.weight" for n in ("layer", "last")]
    plan = peftlite.plan(Net(), LoraConfig(r=4, target_modules=["layer", "last"], init_lora_weights="mica"))
    assert plan.parameters == ours.get_nb_trainable_parameters()[0]


def test_a_rank_beyond_the_weight_s_is_filled_up_with_plain_lora() -> None:
    model = Net()
    x, base = torch.randn(5, 12), Net()
    peftlite.inject_adapter_in_model(LoraConfig(r=16, target_modules=["layer"], init_lora_weights="pissa"), model)
    assert torch.equal(model(x), base(x))
    A, B = (model.layer.container(slot)["default"].weight for slot in ("lora_A", "lora_B"))
    assert (A.shape, B.shape) == ((16, 12), (10, 16))
    assert not B[:, 10:].any()
    assert A[10:].any()


REFUSED = [
    ({"init_lora_weights": "orthogonal", "r": 3}, "even rank"),
    ({"init_lora_weights": "mica", "r": 11}, "at most 10"),
    ({"init_lora_weights": "pissa", "lora_alpha": -8}, "alpha above 0, and its alpha is -8"),
    ({"init_lora_weights": "pissa_niter_2", "alpha_pattern": {"layer": 0}}, "alpha above 0, and its alpha is 0"),
    ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}, "lora_alpha": 0}, "alpha above 0"),
]


@pytest.mark.parametrize(("fields", "reason"), REFUSED)
def test_impossible_ranks_and_alphas_are_refused_by_name(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(peftlite.errors.UnsupportedLayerError, match=reason):
        peftlite.plan(Net(), LoraConfig(target_modules=["layer"], **fields))


def test_weights_on_meta_are_asked_for() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa")
    assert peftlite.plan(model, config).parameters == 16
    with pytest.raises(peftlite.errors.StateError, match="meta device"):
        peftlite.inject_adapter_in_model(config, model)
    assert type(model[0]) is nn.Linear


def test_half_precision_bases_lose_nothing_to_a_rounded_residual() -> None:
    base = Net().to(torch.bfloat16)
    x = torch.randn(64, 12).to(torch.bfloat16)
    ours, theirs = (
        made(library, copy.deepcopy(base), init_lora_weights="pissa", lora_alpha=4) for library in (peftlite, peft)
    )
    exact = base(x)
    assert torch.equal(ours(x), exact)
    assert not torch.equal(theirs(x), exact)


# ---- as plain LoRA
PATTERNS = {"rank_pattern": {"last": 2}, "alpha_pattern": {"layer": 3}}


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, PATTERNS], ids=["plain", "rslora", "patterns"])
@pytest.mark.parametrize("init", FROM_WEIGHTS)
def test_conversion_to_plain_lora_is_peft_s_and_exact(init: str, fields: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = (
        made(library, Net(), init_lora_weights=init, lora_alpha=8, **fields) for library in (peftlite, peft)
    )
    theirs.load_state_dict(factors(ours), strict=False)
    for model, place in ((ours, "ours"), (theirs, "theirs")):
        model.peft_config["default"].init_lora_weights = init if model is ours else True
        model.save_pretrained(tmp_path / place / "first")
        model.peft_config["default"].init_lora_weights = init
    train(ours)
    theirs.load_state_dict(factors(ours), strict=False)
    x = torch.randn(5, 12)
    expected = ours(x)
    for model, place in ((ours, "ours"), (theirs, "theirs")):
        first = str(tmp_path / place / "first")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(PiSSA|OLoRA) changes the base weights", UserWarning)  # PEFT's
            model.save_pretrained(tmp_path / place, path_initial_model_for_weight_conversion=first)
    mine, other = (load_file(tmp_path / place / "adapter_model.safetensors") for place in ("ours", "theirs"))
    assert all(torch.equal(mine[key], other[key]) for key in mine.keys() | other.keys())
    configs = [json.loads((tmp_path / place / "adapter_config.json").read_text()) for place in ("ours", "theirs")]
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights"):
        assert configs[0][key] == configs[1][key], key
    for library in (peftlite, peft):
        assert apart(library.PeftModel.from_pretrained(Net(), tmp_path / "ours")(x), expected) <= 2e-6


def test_conversion_refuses_another_adapter(tmp_path: Path) -> None:
    model = made(peftlite, Net(), init_lora_weights="pissa")
    made(peftlite, Net(), init_lora_weights="pissa", r=3).save_pretrained(tmp_path / "first")
    with pytest.raises(peftlite.errors.CheckpointError, match="not what this adapter was at first"):
        model.save_pretrained(tmp_path / "x", path_initial_model_for_weight_conversion=tmp_path / "first")
    assert not (tmp_path / "x").exists()


def test_dora_that_began_away_from_zero_is_converted_to_dora(tmp_path: Path) -> None:
    model = made(peftlite, Net(), init_lora_weights="pissa", use_dora=True)
    model.save_pretrained(tmp_path / "first")
    train(model)
    x = torch.randn(5, 12)
    model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=tmp_path / "first")
    for library in (peftlite, peft):
        assert apart(library.PeftModel.from_pretrained(Net(), tmp_path)(x), model(x)) <= 2e-6


def test_what_began_away_from_zero_and_does_not_say_so_is_saved_as_plain_lora(tmp_path: Path) -> None:
    model = made(peftlite, Net(), init_lora_weights="pissa", lora_alpha=8)
    train(model)
    x = torch.randn(5, 12)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path)
    for library in (peftlite, peft):
        assert apart(library.PeftModel.from_pretrained(Net(), tmp_path)(x), model(x)) <= 2e-6


def test_pissa_helper_balances_the_factors() -> None:
    W = torch.randn(20, 30)
    A, B = pissa(W, 5, 2.0)
    U, S, Vh = torch.linalg.svd(W)
    assert apart(2 * B @ A, (U[:, :5] * S[:5]) @ Vh[:5]) <= 1e-5
    assert apart(A.square().sum(1), B.square().sum(0)) <= 1e-5


@pytest.mark.parametrize("size", [4096, 4097], ids=["even", "odd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_begins_evenly_spread_and_with_every_number_for_itself(dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(size, 4)).to(dtype)
    config = LoraConfig(r=63, target_modules=["0"])
    peftlite.inject_adapter_in_model(config, model, autocast_adapter_dtype=False)
    A: Any = model[0].lora_A["default"].weight
    assert A.dtype is dtype
    x = A.detach().double() * size**0.5  # evenly spread over [-1, 1]
    assert x.abs().max() <= 1 + (2**-7 if dtype is torch.bfloat16 else 1e-6)
    found, even = x.flatten().sort().values, torch.linspace(-1, 1, x.numel(), dtype=torch.float64)
    assert (found - even).abs().max() < 0.012
    for shift in ((0, 1), (1, 0), (1, 1)):
        assert (x * x.roll(shift, (0, 1))).mean().abs() < 0.005  # neighbours say nothing of each other
        assert (x.square() * x.square().roll(shift, (0, 1))).mean() == pytest.approx(1 / 9, abs=0.003)
