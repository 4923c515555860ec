"""Activations times a vector, in blocks: what torch's own operations give, and their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftlite.tuners import scaled
from peftlite.tuners.lora import blocks


@pytest.fixture(autouse=True)
def in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "LARGE", 24)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def given(dtype: torch.dtype, order: str = "plain") -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    y = torch.randn(3, 5, 8).to(dtype)
    y = y.transpose(0, 1) if order == "turned" else y
    return y.requires_grad_(), torch.randn(8).requires_grad_()


@pytest.mark.parametrize("order", ["plain", "turned"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_numbers_and_gradients_are_torchs(dtype: torch.dtype, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    real = scaled.Scaled.apply
    monkeypatch.setattr(scaled.Scaled, "apply", lambda *args: calls.append(args) or real(*args))
    (y, scale), (other, factor) = given(dtype, order), given(dtype, order)
    ours, theirs = scaled.by_columns(y, scale), (other * factor).to(dtype)
    assert bool(calls) == (dtype is not torch.float32)
    assert torch.equal(ours, theirs)
    grad = torch.randn_like(theirs)
    ours.backward(grad)
    theirs.backward(grad)
    assert y.grad is not None
    assert other.grad is not None
    assert scale.grad is not None
    assert factor.grad is not None
    assert y.grad.dtype is dtype
    assert torch.equal(y.grad, other.grad)
    torch.testing.assert_close(scale.grad, factor.grad)


def test_gradients_have_gradients() -> None:
    found = []
    for call in (scaled.by_columns, lambda y, scale: (y * scale).to(y.dtype)):
        y, scale = given(torch.bfloat16)
        gy, gs = torch.autograd.grad(call(y, scale).float().pow(2).sum(), (y, scale), create_graph=True)
        found.append(torch.autograd.grad(gy.float().sum() + gs.sum(), (y, scale)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=0.5)


def test_what_needs_no_gradient_gets_none() -> None:
    y, scale = given(torch.bfloat16)
    scaled.by_columns(y.detach(), scale).sum().backward()
    assert y.grad is None
    assert scale.grad is not None


def test_compiled_code_and_transforms_see_torchs_own_operations() -> None:
    y, scale = given(torch.bfloat16)
    compiled = torch.compile(scaled.by_columns, fullgraph=True, backend="eager")
    assert torch.equal(compiled(y, scale), scaled.by_columns(y, scale))
    each = torch.func.vmap(scaled.by_columns, (0, None))(y.detach(), scale.detach())
    assert torch.equal(each, scaled.by_columns(y, scale))
