"""Files of adapters on `nn.MultiheadAttention`, where PEFT has the effect on `out_proj` twice."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftlite
from peftlite import LoraConfig
from peftlite.errors import ConfigError, PeftliteWarning, StateError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4, batch_first=True)
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.attn(x, x, x)[0])
        return y


def net() -> Any:
    torch.manual_seed(0)
    return Net().eval()


X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2))


def shake(model: nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)


def test_an_adapter_of_peft_can_be_read_as_peft_applied_it(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(net(), peft.LoraConfig(target_modules=["attn"], r=4)).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    model = net()
    with pytest.warns(PeftliteWarning, match=r"`attn`.*double_out_proj\(model, 'mine'\)"):
        peftlite.load_adapter(model, tmp_path, "mine")
    assert not torch.allclose(model(X), theirs(X), atol=1e-2)
    peftlite.double_out_proj(model, "mine")
    torch.testing.assert_close(model(X), theirs(X), rtol=1e-5, atol=2e-6)
    with pytest.warns(PeftliteWarning, match="double_out_proj"):
        wrapped = peftlite.PeftModel.from_pretrained(net(), tmp_path)
    peftlite.double_out_proj(wrapped)
    assert torch.equal(wrapped(X), model(X))


def test_but_for_the_doubling_everything_is_as_in_peft() -> None:
    ours, theirs = (
        library.get_peft_model(net(), library.LoraConfig(target_modules=["attn"], r=4, lora_alpha=6)).eval()
        for library in (peftlite, peft)
    )
    shake(ours)
    half = {name: p / 2 if "out_proj.lora_B" in name else p for name, p in ours.state_dict().items()}
    theirs.load_state_dict(half)
    gradients = []
    for model in (ours, theirs):
        model(X).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(ours(X), theirs(X), rtol=1e-5, atol=2e-6)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        gradient = gradient * 2 if "out_proj.lora_A" in name else gradient  # through one of PEFT's two effects only
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-5, atol=1e-5)
    expected = ours(X)
    ours.merge_adapter()
    torch.testing.assert_close(ours(X), expected, rtol=1e-5, atol=2e-6)


def test_an_adapter_of_ours_is_read_as_it_is(tmp_path: Path) -> None:
    model = net()
    peftlite.inject(model, LoraConfig(target_modules=["attn"], r=4))
    shake(model)
    peftlite.save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = net()
        peftlite.load_adapter(other, tmp_path)
    torch.testing.assert_close(other(X), model(X))  # not equal: one of them has gradients


def test_doubling_is_refused_where_it_makes_no_sense() -> None:
    model = net()
    peftlite.inject(model, LoraConfig(target_modules=["out"], r=4))
    with pytest.raises(ConfigError, match="on no `nn"):
        peftlite.double_out_proj(model)
    model = net()
    peftlite.inject(model, LoraConfig(target_modules=["attn"], r=4))
    peftlite.merge_adapter(model)
    with pytest.raises(StateError, match="merged"):
        peftlite.double_out_proj(model)
