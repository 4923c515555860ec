"""What is written to a base layer while adapters are merged into it is not lost without a word when they come out."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import peftlite
from peftlite import LoraConfig
from peftlite.core.tree import base_model_of, layers
from peftlite.errors import StateError
from tests.laws.test_exactness import adapted, every_method, logits, same, shapes, values
from tests.models import tiny
from tests.snapshots import check_unchanged, snapshot

assigned = pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])


def others(tensors: dict[str, Tensor], *ends: str) -> dict[str, Tensor]:
    return {key: tensor + 1 for key, tensor in tensors.items() if key.endswith(ends)}


@every_method
@shapes
@pytest.mark.parametrize("whose", ["base", "adapter"])
def test_loading_other_values_while_merged_is_refused(method: str, wrapped: bool, whose: str) -> None:
    model = adapted(method, "a", "b", wrapped=wrapped)
    unmerged = values(model)
    model.merge_adapter(["a"])
    before = snapshot(model)
    own = others(unmerged, "base_layer.weight") if whose == "base" else others(unmerged, ".a.weight", ".a")
    key = next(key for key in own if whose == "base" or "_proj" in key)
    for given, assign in (({key: own[key]}, False), (own, False), (own, True)):
        with pytest.raises(StateError, match=r"`.*` of a state dict.*`a` is merged.*Unmerge, load"):
            model.load_state_dict(given, strict=False, assign=assign)
        check_unchanged(model, dict(before))
    peftlite.unmerge_adapter(model)
    assert same(model, unmerged)
    model.load_state_dict(own, strict=False)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in own.items())


@every_method
@shapes
@assigned
def test_loading_what_is_there_while_merged_changes_nothing(method: str, wrapped: bool, assign: bool) -> None:
    model = adapted(method, "a", "b", wrapped=wrapped, dtype=torch.bfloat16)
    unmerged = values(model)
    model.merge_adapter(["a"])
    merged, expected = values(model), logits(model)
    model.load_state_dict({name: tensor.clone() for name, tensor in merged.items()}, assign=assign)
    assert torch.equal(logits(model), expected)
    peftlite.merge_adapter(model, ["b"])
    peftlite.unmerge_adapter(model)
    assert same(model, unmerged)


def test_another_adapter_may_be_loaded_while_one_is_merged() -> None:
    model = adapted("lora", "a", "b")
    unmerged = values(model)
    peftlite.merge_adapter(model, ["a"])
    given = others(unmerged, "lora_B.b.weight")
    model.load_state_dict(given, strict=False)
    peftlite.unmerge_adapter(model)
    assert same(model, unmerged | given)


@every_method
@shapes
def test_writing_to_a_merged_weight_is_not_lost_in_silence(method: str, wrapped: bool) -> None:
    model = adapted(method, "a", "b", wrapped=wrapped)
    unmerged = values(model)
    model.merge_adapter(["a"])
    weight = list(layers(model))[-1].get_base_layer().weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.5)
    before, expected = snapshot(model), logits(model)
    refused: list[Callable[[], object]] = [
        model.unmerge_adapter,
        lambda: model.set_adapter("b"),
        lambda: peftlite.disable_adapter(model).__enter__(),
        lambda: model.merge_adapter(["b"]),
        lambda: model.delete_adapter("a"),
    ]
    for call in refused:
        with pytest.raises(StateError, match=r"Linear was written to while `a` was merged.*Nothing was changed"):
            call()
        check_unchanged(model, dict(before))
    torch.testing.assert_close(logits(copy.deepcopy(model).merge_and_unload()), expected)  # takes them as they are
    with torch.no_grad():
        weight.copy_(kept)
    peftlite.unmerge_adapter(model)
    assert same(model, unmerged)


def test_a_tied_weight_written_to_while_merged_is_not_lost_in_silence() -> None:
    model = tiny("llama", tie_word_embeddings=True)
    peftlite.inject_adapter_in_model(LoraConfig(r=2, target_modules=["lm_head"], ensure_weight_tying=True), model, "a")
    peftlite.merge_adapter(model)
    with torch.no_grad():
        base_model_of(model).lm_head.get_base_layer().weight.add_(1)
    with pytest.raises(StateError, match="was written to while `a` was merged"):
        peftlite.unmerge_adapter(model)


def test_a_bias_written_to_while_merged_is_not_lost_in_silence() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    peftlite.inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), model, "a")
    peftlite.merge_adapter(model)
    with torch.no_grad():
        model[0].base_layer.bias.add_(1)
    with pytest.raises(StateError, match="was written to"):
        peftlite.unmerge_adapter(model)
