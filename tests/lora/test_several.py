"""Several LoRA adapters active on one layer: outputs and gradients are those of the formula, in every way torch has."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftlite
from peftlite.tuners.lora import blocks, several
from peftlite.tuners.lora.masks import drawn, opened
from tests.lora.test_training import FUSED, IN, OTHERS, OUT, Formula, Found, twice

NAMES = ("default", "b", "c")
CASES = [(way, dropout) for way in FUSED for dropout in (0.0, 0.4)] + [(way, 0.0) for way in OTHERS]
IDS = [f"{way.__name__}{'-dropout' if dropout else ''}" for way, dropout in CASES]


def adapted(dtype: torch.dtype, dropout: float = 0.0, bias: str = "none") -> Any:
    """A layer with adapters of ranks 2, 3 and 4, of which b never drops anything."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT)).to(dtype)
    for r, name in enumerate(NAMES, 2):
        p = 0.0 if name == "b" else dropout
        config = peftlite.LoraConfig(
            r=r, target_modules=["0"], lora_dropout=p, bias=bias if name == "default" else "none"
        )
        peftlite.inject(model, config, name)
        nn.init.normal_(model[0].lora_B[name].weight, std=0.5)
    peftlite.set_adapter(model, NAMES)
    return model[0]


class Sum(Formula):
    """What `layer` computes, by plain operations, with parameters of its own that have the same names."""

    def __init__(self, layer: Any) -> None:
        nn.Module.__init__(self)
        self.layer = copy.deepcopy(layer)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        y, flat = layer.base_layer(x), x.reshape(-1, x.shape[-1])
        ps = [getattr(layer.lora_dropout[name], "p", 0.0) for name in NAMES]
        masks = [opened(drawn(flat, p), torch.empty(x.shape, dtype=torch.int16)) if p else None for p in ps]
        total = y
        for name, p, mask in zip(NAMES, ps, masks, strict=True):
            A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
            low = x.to(A.dtype) if mask is None else torch.where(mask == 1, x.to(A.dtype), 0.0) / (1 - p)
            total = total + F.linear(F.linear(low, A), B) * layer.scaling[name]
        return total.to(y.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("way", "dropout"), CASES, ids=IDS)
@pytest.mark.parametrize("bias", ["none", "all"])
def test_gradients_are_those_of_the_formula(
    way: Callable[[nn.Module, Tensor], Found],
    dropout: float,
    dtype: torch.dtype,
    bias: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocks, "SMALL", 0)
    monkeypatch.setattr(blocks, "LARGE", 3 * IN)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    layer = adapted(dtype, dropout, bias)
    formula = Sum(layer)
    applied: list[object] = []
    real = several.FusedLoras.apply
    monkeypatch.setattr(several.FusedLoras, "apply", lambda *args: applied.append(args) or real(*args))
    exact = copy.deepcopy(formula).double()
    results = []
    for module in (layer, formula, exact) if way is twice else (layer, formula):
        torch.manual_seed(1)
        x = torch.randn(2, 5, IN).to(dtype).to(torch.float64 if module is exact else dtype)
        torch.manual_seed(2)
        results.append(way(module, x.requires_grad_()))
    ours, theirs, *truth = results
    assert ours.keys() == theirs.keys()
    assert bool(applied) == (way in FUSED)
    low = dtype is torch.bfloat16 or way.__name__ == "autocast"
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        if way is twice and low:  # cubes of cubes: roundings are as large as what differs
            errors = [(one[name].double() - truth[0][name]).norm() for one in (ours, theirs)]
            assert errors[0] <= 1.5 * errors[1] + 1e-2 * truth[0][name].norm(), name
            continue
        size = float(theirs[name].abs().max()) if theirs[name].numel() else 0.0
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=max(1e-12, (4e-2 if low else 1e-5) * size))


def program_of(layer: Any) -> Any:
    layer(torch.randn(1, IN, dtype=layer.base_layer.weight.dtype))
    return layer.__dict__["_program"]


@torch.no_grad()
@pytest.mark.parametrize("shape", [(IN,), (4, IN), (2, 3, IN), (0, IN), (2, 2, 2, IN)], ids=str)
@pytest.mark.parametrize(
    ("base", "factors"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
    ids=["fp32", "bf16", "narrow"],
)
@pytest.mark.parametrize("large", [False, True])
def test_calls_without_gradients(
    shape: tuple[int, ...], base: torch.dtype, factors: torch.dtype, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(blocks, "LARGE", 3 * IN)
    layer = adapted(base).eval()
    for name in NAMES:
        layer.lora_A[name].to(factors)
        layer.lora_B[name].to(factors)
    program, x = program_of(layer), torch.randn(shape).to(base)
    assert isinstance(program, several.BoundLoras)
    found, expected = layer(x), program.slow(x)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    rtol, atol = (1e-5, 1e-5) if base is factors else (2**-6, 0.05)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@torch.no_grad()
def test_one_sum_is_nearer_to_the_truth_than_a_rounding_for_each() -> None:
    layer, x = adapted(torch.bfloat16).eval(), torch.randn(64, IN).bfloat16()
    truth = Sum(layer).double()(x.double())
    errors = [float((y.double() - truth).norm()) for y in (layer(x), program_of(layer).slow(x))]
    assert errors[0] <= errors[1]


@torch.no_grad()
@pytest.mark.parametrize("part", ["lora_A", "lora_B", "base_layer", "lora_dropout"])
def test_a_hook_on_any_part_is_called(part: str) -> None:
    layer, x, seen = adapted(torch.float32, 0.5).eval(), torch.randn(3, IN), []
    module = layer.base_layer if part == "base_layer" else getattr(layer, part)["c"]
    handle = module.register_forward_hook(lambda *_: seen.append(part))
    layer(x)
    assert seen == [part]
    handle.remove()
    layer(x)
    assert seen == [part]


@torch.no_grad()
def test_what_is_written_is_seen() -> None:
    layer, x = adapted(torch.float32).eval(), torch.randn(3, IN)
    before = layer(x)
    layer.lora_B["c"].weight.data.mul_(2)
    after = layer(x)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, program_of(layer).slow(x))
    layer.scaling["b"] = 3.0
    torch.testing.assert_close(layer(x), Sum(layer)(x))
    for moved in (copy.deepcopy(layer), layer.double()):
        dtype = moved.base_layer.weight.dtype
        torch.testing.assert_close(moved(x.to(dtype)), Sum(moved)(x.to(dtype)))


def test_the_masks_of_a_recomputation_are_the_same_whoever_wants_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "SMALL", 0)
    layer, x = adapted(torch.float32, 0.5).train(), torch.randn(8, IN)
    torch.manual_seed(5)
    with torch.no_grad():
        without = layer(x)
    torch.manual_seed(5)
    assert torch.equal(layer(x.requires_grad_()), without)


def test_less_is_kept_for_backward_than_by_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "SMALL", 0)
    layer, x = adapted(torch.bfloat16, 0.5).train(), torch.randn(256, IN).bfloat16().requires_grad_()
    sizes = []
    for call in (layer, program_of(layer).slow):
        kept: dict[int, int] = {}

        def pack(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            call(x)
        sizes.append(sum(kept.values()))
    assert sizes[0] < 0.6 * sizes[1]


def test_adapters_of_other_kinds_are_chained() -> None:
    model = nn.Sequential(nn.Linear(IN, OUT))
    peftlite.inject(model, peftlite.LoraConfig(r=2, target_modules=["0"]), "a")
    peftlite.inject(model, peftlite.LoraConfig(r=2, target_modules=["0"], use_dora=True), "b")
    peftlite.set_adapter(model, ["a", "b"])
    assert not isinstance(program_of(model[0]), several.BoundLoras)
