"""DoRA against real PEFT with the same weights, and its norms against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import peftlite
from peftlite import LoraConfig
from peftlite.core.tree import layers
from peftlite.tuners.lora.dora import row_norms
from tests.tuners.pairs import Pair, apart

KINDS = ("linear", "linear-no-bias", "Conv1D", "conv1d", "conv2d-strided", "conv2d-1x1", "conv3d")
FIELDS: dict[str, dict[str, Any]] = {
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True},
    "rslora": {"r": 3, "lora_alpha": 5, "use_dora": True, "use_rslora": True},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_as_in_peft(kind: str, fields: dict[str, Any], tmp_path: Any) -> None:
    pair = Pair("LoraConfig", kind, fields)
    pair.build()
    pair.check_names()
    pair.check_numbers(2e-6)
    pair.check_files(tmp_path)
    pair.check_merged()


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Embedding(20, 10)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.layer(ids)
        return y


def both(
    make: Callable[[], nn.Module], adapters: dict[str, dict[str, Any]], seed: int = 0, scale: float = 1.0
) -> list[Any]:
    """[ours, theirs]: `make()` with these adapters, all active in this order, weights random and equal."""
    models: list[Any] = []
    for library in (peftlite, peft):
        (first, fields), *more = adapters.items()
        model: Any = library.get_peft_model(make(), library.LoraConfig(target_modules=["layer"], **fields), first)
        for name, others in more:
            model.add_adapter(name, library.LoraConfig(target_modules=["layer"], **others))
        model.base_model.set_adapter(list(adapters))
        models.append(model.eval())
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in layers(models[0]):
            for name in layer.variants:
                for parameter in layer.parameters_of(name):
                    parameter.add_(scale * torch.randn_like(parameter))
    models[1].load_state_dict(models[0].state_dict())
    return models


def test_embeddings_are_as_in_peft(tmp_path: Any) -> None:
    ours, theirs = both(Table, {"default": FIELDS["dora"]})
    ids = torch.randint(0, 20, (3, 5))
    assert repr(ours.base_model.model) == repr(theirs.base_model.model)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert apart(ours(ids), theirs(ids)) <= 1e-6
    for model in (ours, theirs):
        model(ids).square().sum().backward()
    for (name, one), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if one.requires_grad:
            assert apart(one.grad, other.grad) <= 2e-6, name
    theirs.save_pretrained(tmp_path)
    expected = ours(ids)
    assert torch.equal(peftlite.PeftModel.from_pretrained(Table(), tmp_path)(ids), expected)
    for model in (ours, theirs):
        model.merge_adapter()
    weights = [model.base_model.model.layer.base_layer.weight for model in (ours, theirs)]
    assert apart(*weights) <= 1e-6


def linear() -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential()
    model.add_module("layer", nn.Linear(12, 10))
    return model


PLAIN = {"r": 3, "lora_alpha": 6}


@pytest.mark.parametrize(
    "adapters",
    [
        {"one": FIELDS["dora"], "two": FIELDS["rslora"]},
        {"one": PLAIN, "two": FIELDS["dora"]},
        {"one": FIELDS["dora"], "two": PLAIN, "three": FIELDS["dora"]},
    ],
    ids=["dora-dora", "lora-dora", "dora-lora-dora"],
)
def test_several_on_one_layer_are_as_in_peft(adapters: dict[str, dict[str, Any]]) -> None:
    ours, theirs = both(linear, adapters)
    x = torch.randn(3, 12)
    expected = ours(x)
    assert apart(expected, theirs(x)) <= 1e-6
    for model in (ours, theirs):
        model.merge_adapter(list(adapters))
    assert apart(*(model.base_model.model.layer.base_layer.weight for model in (ours, theirs))) <= 1e-5  # theirs drift
    assert apart(ours(x), expected) <= 1e-6


def test_merging_the_first_of_several_leaves_the_sum_of_all() -> None:
    ours, _ = both(linear, {"one": FIELDS["dora"], "two": PLAIN, "three": FIELDS["dora"]})
    x = torch.randn(3, 12)
    expected = ours(x)
    for name in ("one", "two", "three"):
        ours.merge_adapter([name])
        assert apart(ours(x), expected) <= 1e-6


def test_dropout_is_as_in_peft() -> None:
    ours, theirs = both(linear, {"default": {**FIELDS["dora"], "lora_dropout": 0.5}})
    x, outputs = torch.randn(3, 12), []
    for model in (ours, theirs):
        model.train()
        torch.manual_seed(7)
        outputs.append(model(x))
    assert apart(*outputs) <= 1e-6
    assert apart(ours.eval()(x), outputs[0]) > 0.01


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("shape", [(64, 96), (300, 280), (128, 64, 3, 3), (32, 8, 3, 3), (7, 5)])
def test_norms_from_the_factors_are_near_float64_truth(shape: tuple[int, ...], scale: float) -> None:
    W = torch.randn(shape)
    A, B = torch.randn(6, W[0].numel()), scale * torch.randn(shape[0], 6)
    truth = (W.double().flatten(1) + 0.7 * B.double() @ A.double()).norm(dim=1)
    dense = (W.flatten(1) + 0.7 * B @ A).norm(dim=1)
    error = ((row_norms(W, A, B, 0.7).double() - truth) / truth).abs().max()
    assert error <= max(4 * float(((dense.double() - truth) / truth).abs().max()), 5e-7)


def test_norms_of_half_precision_weights_are_computed_in_fp32() -> None:
    W = torch.randn(64, 4096, dtype=torch.bfloat16)
    A, B = torch.randn(6, 4096), torch.randn(64, 6)
    assert torch.equal(row_norms(W, A, B, 2.0), row_norms(W.float(), A, B, 2.0))
    assert torch.equal(row_norms(W, A, torch.zeros(64, 6), 2.0), row_norms(W, A, B, 2.0, changed=False))


class Shapes(TorchDispatchMode):
    """Notes the shapes of what is computed, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in given:
            self.seen.add(tuple(result.shape))
        return result


def test_nothing_as_large_as_a_large_weight_is_made() -> None:
    model = nn.Sequential()
    model.add_module("layer", nn.Linear(320, 240))
    config = LoraConfig(r=4, target_modules=["layer"], use_dora=True)
    with Shapes() as start:
        peftlite.inject_adapter_in_model(config, model)
        model(torch.randn(3, 320)).sum().backward()
    assert not {(240, 320), (320, 240)} & start.seen
    assert (3, 240) in start.seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_a_few_roundings_from_float64(dtype: torch.dtype) -> None:
    ours, _ = both(linear, {"default": FIELDS["dora"]}, scale=0.3)
    x = torch.randn(3, 12)
    model = peftlite.get_peft_model(linear().to(dtype), LoraConfig(target_modules=["layer"], **FIELDS["dora"]))
    model.load_state_dict(ours.state_dict())
    exact = both(linear, {"default": FIELDS["dora"]}, scale=0.3)[0].double()
    exact.base_model.model.layer.base_layer.to(dtype).double()
    expected = exact(x.to(dtype).double())
    assert model.base_model.model.layer.lora_magnitude_vector["default"].weight.dtype is torch.float32
    assert apart(model(x.to(dtype)).double(), expected) <= 2 * torch.finfo(dtype).eps


def test_lora_bias_is_refused() -> None:
    with pytest.raises(peftlite.errors.ConfigError, match="`lora_bias`"):
        LoraConfig(use_dora=True, lora_bias=True)
