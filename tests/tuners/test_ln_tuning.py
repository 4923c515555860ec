"""Layer norms that train, against real PEFT, in both shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import peftlite
from peftlite.defaults import default_targets
from peftlite.errors import PeftliteWarning
from peftlite.kinds import LNTuningLayer
from peftlite.standin.table import MODULES
from tests.models import batch, tiny

pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # PEFT's, of every layer norm


NORM = "base_model.model.model.norm"
NAMES = ["LNTuningConfig", "LNTuningModel", "LNTuningLayer"]


def shaken(model: Any) -> Any:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def both(name: str, **fields: Any) -> tuple[Any, Any]:
    ours, theirs = (shaken(lib.get_peft_model(tiny(name), lib.LNTuningConfig(**fields))) for lib in (peftlite, peft))
    return ours, theirs


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_everything_is_as_in_peft(name: str, tmp_path: Path) -> None:
    ours, theirs = both(name)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    trains = [[n for n, p in model.named_parameters() if p.requires_grad] for model in (ours, theirs)]
    assert trains[0] == trains[1]
    x = batch(name)
    expected = ours(**x).logits
    assert torch.equal(expected, theirs(**x).logits)
    for model in (ours, theirs):
        model(**x).loss.backward()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)
    for library, model in ((peftlite, ours), (peft, theirs)):
        model.save_pretrained(tmp_path / library.__name__)
    files = [load_file(tmp_path / lib.__name__ / "adapter_model.safetensors") for lib in (peftlite, peft)]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    for library, writer in ((peftlite, peft), (peft, peftlite)):
        read = library.PeftModel.from_pretrained(tiny(name), tmp_path / writer.__name__)
        assert torch.equal(read(**x).logits, expected)
    base = tiny(name)
    peftlite.load_adapter(base, tmp_path / "peft")
    assert torch.equal(base(**x).logits, expected)


def test_lifecycle() -> None:
    model, x = shaken(peftlite.get_peft_model(tiny("llama"), peftlite.LNTuningConfig())), batch("llama")
    before, expected = tiny("llama").requires_grad_(False)(**x).logits, model(**x).logits
    assert not torch.equal(expected, before)
    with model.disable_adapter():
        assert torch.equal(model(**x).logits, before)
    model.add_adapter("other", peftlite.LNTuningConfig(target_modules=["norm"]))
    with peftlite.use_adapter(model, "other"):
        assert torch.equal(model(**x).logits, before)
    with pytest.warns(PeftliteWarning, match="nothing to merge of `default`"):
        model.merge_adapter()
    assert torch.equal(model(**x).logits, expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**x).logits, expected)  # not equal: nothing requires gradients now
    assert not any("ln_tuning" in name for name, _ in merged.named_modules())


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.RMSNorm(8), nn.BatchNorm1d(8), nn.GroupNorm(2, 8)], ids=repr)
def test_any_norm_of_torch_trains_as_in_peft(norm: nn.Module) -> None:
    models = []
    for library in (peftlite, peft):
        torch.manual_seed(0)
        base = nn.Sequential()
        base.add_module("norm", type(norm)(*([2, 8] if isinstance(norm, nn.GroupNorm) else [8])))
        base.add_module("out", nn.Linear(8, 3))
        models.append(shaken(library.get_peft_model(base, library.LNTuningConfig(target_modules=["norm"]))))
    x = torch.randn(5, 8)
    assert torch.equal(models[0](x), models[1](x))


def test_defaults_are_those_of_peft() -> None:
    theirs = peft.utils.constants.TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING
    assert all(default_targets(name, "LN_TUNING") == sorted(targets) for name, targets in theirs.items())


def test_other_libraries_see_its_layers() -> None:
    model = peftlite.get_peft_model(tiny("llama"), peftlite.LNTuningConfig(target_modules=["norm"]))
    assert [path for path, module in model.named_modules() if isinstance(module, LNTuningLayer)] == [NORM]
    assert [part.partition("=")[0] for part in MODULES["peft.tuners.ln_tuning"].split()] == NAMES
