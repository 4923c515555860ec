"""Merging never loses a bit of the base model, and costs next to no memory beside the bytes that it keeps.

What is shown for every tuner on every kind of layer is in tests/contract (`test_unmerge_gives_every_bit_back`, ...);
here are the promises about whole models, memory and failures.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftlite
from benchmarks.live import Live
from peftlite import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    VeraConfig,
)
from peftlite.core.hosts import Host
from peftlite.core.merging import MergingLayer
from peftlite.core.slots import View
from peftlite.core.tree import layers
from peftlite.errors import ConfigError, MergeError, PeftliteWarning, StateError
from tests.contract.rows import scramble
from tests.models import batch, tiny
from tests.snapshots import check_unchanged, snapshot

TARGETS = ["q_proj", "k_proj", "down_proj"]
CONFIGS: dict[str, Callable[..., PeftConfig]] = {
    "lora": lambda **more: LoraConfig(r=2, **more),
    "dora": lambda **more: LoraConfig(r=2, use_dora=True, **more),
    "ia3": lambda **more: IA3Config(feedforward_modules=more["target_modules"][-1:], **more),
    "loha": lambda **more: LoHaConfig(r=2, **more),
    "lokr": lambda **more: LoKrConfig(r=2, decompose_factor=2, **more),
    "adalora": lambda **more: AdaLoraConfig(init_r=3, target_r=2, total_step=9, **more),
    "vera": lambda **more: VeraConfig(r=2, **{**more, "target_modules": ["q_proj"]}),
}
every_method = pytest.mark.parametrize("method", CONFIGS)
shapes = pytest.mark.parametrize("wrapped", [False, True], ids=["in place", "wrapped"])


def adapted(method: str = "lora", *names: str, wrapped: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny Llama whose adapters have random weights; the first is active."""
    model = tiny("llama", dtype=dtype)
    torch.manual_seed(0)
    for name in names or ("a",):
        peftlite.inject_adapter_in_model(CONFIGS[method](target_modules=TARGETS), model, name)
        scramble(model, name)
    peftlite.set_adapter(model, (names or ("a",))[0])
    return peftlite.wrap(model) if wrapped else model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch("llama")).logits
    return found


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


# ---- every bit comes back
@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("undo", ["device", "cpu"])
def test_several_merged_adapters_are_taken_out_in_any_order(method: str, dtype: torch.dtype, undo: Any) -> None:
    model = adapted(method, "a", "b", "c", dtype=dtype)
    before = values(model)
    for out in (("a", "b", "c"), ("b", "c", "a"), ("c", "a", "b")):
        for name in ("b", "a", "c"):
            peftlite.merge_adapter(model, [name], undo=undo)
        assert not same(model, before)
        for name in out:
            peftlite.unmerge_adapter(model, [name])
        assert same(model, before)


@pytest.mark.parametrize(
    "move", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(), lambda m: m.bfloat16().float()]
)
@every_method
def test_a_model_that_changed_its_dtype_while_merged_has_the_base_in_that_dtype(
    method: str, move: Callable[[nn.Module], nn.Module]
) -> None:
    model = adapted(method)
    expected = copy.deepcopy(model)
    peftlite.merge_adapter(model)
    move(model), move(expected)
    peftlite.unmerge_adapter(model)
    original = dict(adapted(method).named_parameters())
    for (name, tensor), (_, moved) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        # through bf16 and back: the base's weights come back in full, for they never went that way
        kept = name.endswith("base_layer.weight")
        assert torch.equal(tensor, original[name].to(tensor.dtype) if kept else moved)


def test_on_the_meta_device_there_is_nothing_to_unmerge() -> None:
    model = adapted()
    peftlite.merge_adapter(model)
    model.to("meta")
    with pytest.raises(MergeError, match="meta device"):
        peftlite.unmerge_adapter(model)


@every_method
@pytest.mark.parametrize("undo", ["device", "cpu"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_while_merged_unmerges_by_itself(method: str, undo: Any, copied: Callable[[Any], Any]) -> None:
    model = adapted(method, "a", "b")
    before = values(model)
    peftlite.merge_adapter(model, ["b", "a"], undo=undo)
    merged, twin = values(model), copied(model)
    peftlite.unmerge_adapter(twin, ["b"])
    peftlite.unmerge_adapter(twin)
    assert same(twin, before)
    assert same(model, merged)
    peftlite.unmerge_adapter(model)
    assert same(model, before)


def test_switching_off_for_a_while_leaves_the_bytes_where_they_were() -> None:
    model = adapted()
    peftlite.merge_adapter(model, undo="cpu")
    with peftlite.disable_adapter(model):
        pass
    assert all(layer._saved is not None and layer._undo == "cpu" for layer in layers(model))


# ---- failures
class Interrupted(BaseException):
    """What nobody expects."""


def at_every_step(monkeypatch: pytest.MonkeyPatch, owner: type, method: str) -> Iterator[None]:
    """Let the n-th call of a method fail, for n = 0, 1, ... until nothing does."""
    original, step = getattr(owner, method), 0
    while True:
        calls = 0

        def failing(*args: Any, step: int = step, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == step + 1:
                raise Interrupted
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, method, failing)
        yield
        monkeypatch.undo()
        if calls <= step:
            return
        step += 1


FAULTS = [(Host, "save"), (Host, "read"), (Host, "write"), (MergingLayer, "_keep"), (MergingLayer, "_write_merged")]
at_faults = pytest.mark.parametrize(("owner", "step"), FAULTS, ids=[step for _, step in FAULTS])


@at_faults
@pytest.mark.parametrize("merged", [[], ["b"]], ids=["nothing", "b"])
def test_a_merge_that_fails_anywhere_changes_nothing(
    owner: type, step: str, merged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted("lora", "a", "b")
    if merged:
        peftlite.merge_adapter(model, merged)
    before, expected, failures = snapshot(model), logits(model), 0
    for _ in at_every_step(monkeypatch, owner, step):
        try:
            peftlite.merge_adapter(model, ["a"])
        except Interrupted:
            failures += 1
            monkeypatch.undo()
            check_unchanged(model, dict(before))
            assert torch.equal(logits(model), expected)
    assert failures >= 6 or (merged and step == "save")  # one of each layer
    peftlite.unmerge_adapter(model)
    assert same(model, values(adapted("lora", "a", "b")))


@at_faults
def test_an_unmerge_that_fails_anywhere_changes_nothing(
    owner: type, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted("lora", "a", "b")
    peftlite.merge_adapter(model, ["a", "b"])
    before = snapshot(model)
    for _ in at_every_step(monkeypatch, owner, step):
        try:
            peftlite.unmerge_adapter(model, ["a"])
        except Interrupted:
            monkeypatch.undo()
            check_unchanged(model, dict(before))


@at_faults
@pytest.mark.parametrize("undo", ["device", "cpu", None])
def test_a_merge_for_good_that_fails_anywhere_computes_the_same_and_can_be_repeated(
    owner: type, step: str, undo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = values(peftlite.merge_and_unload(adapted("dora")))
    model, failures = adapted("dora"), 0
    before = snapshot(model)
    for _ in at_every_step(monkeypatch, owner, step):
        try:
            peftlite.merge_and_unload(model, undo=undo)
        except Interrupted:
            failures += 1
            monkeypatch.undo()
            if undo is not None:
                check_unchanged(model, dict(before))
            torch.testing.assert_close(logits(model), logits(adapted("dora")), rtol=1e-5, atol=1e-5)
    assert failures >= 1
    assert same(model, expected)


@shapes
@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload", "layer"])
def test_a_safe_merge_looks_at_all_layers_before_it_writes_any(wrapped: bool, call: str) -> None:
    model = adapted(wrapped=wrapped)
    last = list(layers(model))[-1]
    last.lora_B["a"].weight.data[0, 0] = float("inf")
    before = snapshot(model)
    with pytest.raises(MergeError, match=r"`a`.*Nothing was changed"):
        last.merge(safe_merge=True) if call == "layer" else getattr(model, call)(safe_merge=True)
    check_unchanged(model, before)


# ---- undo=None
@shapes
def test_what_was_merged_without_undo_stays_and_everything_against_that_is_refused(wrapped: bool) -> None:
    model = adapted("lora", "a", "b", wrapped=wrapped)
    expected = logits(model)
    model.merge_adapter(undo=None)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    before = snapshot(model)
    refused: list[Callable[[], object]] = [
        lambda: peftlite.unmerge_adapter(model),
        lambda: peftlite.unmerge_adapter(model, ["a"]),
        lambda: peftlite.set_adapter(model, "b"),
        lambda: peftlite.delete_adapter(model, "a"),
        lambda: peftlite.disable_adapters(model),
        lambda: peftlite.unload(model),
        lambda: peftlite.merge_and_unload(model, adapter_names=["b"]),
        lambda: peftlite.disable_adapter(model).__enter__(),
        lambda: next(layers(model)).unmerge(),
        lambda: next(layers(model)).enable_adapters(False),
        lambda: next(layers(model)).set_adapter("b"),
        lambda: next(layers(model)).own(),
    ]
    for call in refused:
        with pytest.raises(StateError, match=r"`a` was merged with `undo=None`.*Nothing was changed"):
            call()
        check_unchanged(model, dict(before))


def test_adapters_on_top_of_one_merged_without_undo_come_out_again_exactly() -> None:
    model = adapted("lora", "a", "b", "c")
    peftlite.merge_adapter(model, ["a"], undo=None)
    before = values(model)
    peftlite.set_adapter(model, ["a", "b", "c"])
    expected = logits(model)
    peftlite.merge_adapter(model, ["b"])
    peftlite.merge_adapter(model, ["c"], undo="cpu")
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    peftlite.unmerge_adapter(model, ["b"])
    peftlite.unmerge_adapter(model, ["c"])
    assert same(model, before)
    peftlite.merge_adapter(model, ["b"], undo=None)  # and now that one too
    with pytest.raises(StateError, match="`a`, `b`"):
        peftlite.unmerge_adapter(model, ["b"])
    assert logits(peftlite.merge_and_unload(model)).isfinite().all()


def test_dora_on_top_of_what_was_merged_without_undo_is_refused_wherever_it_would_be_wrong() -> None:
    model = adapted("lora", "a")
    peftlite.merge_adapter(model, undo=None)
    before = snapshot(model)
    with pytest.raises(StateError, match="`a` was merged with `undo=None`"):
        peftlite.inject_adapter_in_model(CONFIGS["dora"](target_modules=TARGETS), model, "b")
    check_unchanged(model, before)
    model = adapted("dora", "a", "b")
    peftlite.merge_adapter(model, undo=None)
    before = snapshot(model)
    with pytest.raises(StateError, match="`a` was merged with `undo=None`"):
        peftlite.merge_adapter(model, ["b"])
    check_unchanged(model, before)
    peftlite.set_adapter(model, ["a", "b"])
    with pytest.raises(StateError, match="`a` was merged with `undo=None`"):
        logits(model)


@pytest.mark.filterwarnings("ignore:A weight was shared:peftlite.errors.PeftliteWarning")
def test_a_file_with_embeddings_is_not_written_from_merged_ones(tmp_path: Any) -> None:
    model = tiny("llama")
    peftlite.inject_adapter_in_model(LoraConfig(r=2, target_modules=["embed_tokens"]), model)
    scramble(model, "default")
    peftlite.merge_adapter(model, undo=None)
    with pytest.raises(StateError, match="`undo=None`"):
        peftlite.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("undo", ["device", "cpu", None])
def test_a_tied_embedding_is_untied_once_whatever_is_kept(undo: Any) -> None:
    model = tiny("llama", tie_word_embeddings=True)
    peftlite.inject_adapter_in_model(LoraConfig(r=2, target_modules=["lm_head"]), model)
    scramble(model, "default")
    expected, table = logits(model), model.model.embed_tokens.weight
    before = table.clone()
    with pytest.warns(PeftliteWarning, match="A weight was shared"):
        peftlite.merge_adapter(model, undo=undo)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(table, before)
    if undo is not None:
        peftlite.unmerge_adapter(model)
        assert model.lm_head.base_layer.weight is table


@pytest.mark.parametrize("undo", ["device", "cpu", None])
def test_one_adapter_on_tied_embeddings_is_merged_once_whatever_is_kept(undo: Any) -> None:
    model = tiny("llama", tie_word_embeddings=True)
    config = LoraConfig(r=2, target_modules=["lm_head"], ensure_weight_tying=True)
    for name in ("a", "b"):
        peftlite.inject_adapter_in_model(config, model, name)
        scramble(model, name)
    peftlite.set_adapter(model, ["a", "b"])
    expected = logits(model)
    peftlite.merge_adapter(model, ["a"], undo=undo)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    before = values(model)
    peftlite.merge_adapter(model, ["b"])
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    peftlite.unmerge_adapter(model, ["b"])
    assert same(model, before)
    torch.testing.assert_close(logits(peftlite.merge_and_unload(model)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("undo", ["gpu", "", True, 0, "None", ["cpu"]])
def test_a_bad_undo_is_named(undo: Any) -> None:
    model = adapted()
    before = snapshot(model)
    for call in (model.merge_adapter, model.merge_and_unload, next(layers(model)).merge):
        with pytest.raises(ConfigError, match=r"`undo` must be `device`, `cpu` or None, not `.*`"):
            call(undo=undo)
    check_unchanged(model, before)


# ---- memory
BIG = (1280, 2048)  # out, in: 5 MiB in bf16
MERGED_IN_BLOCKS: dict[str, Callable[[list[str]], PeftConfig]] = {
    "lora": lambda names: LoraConfig(r=8, target_modules=names),
    "dora": lambda names: LoraConfig(r=8, use_dora=True, target_modules=names),
    "ia3": lambda names: IA3Config(target_modules=names, feedforward_modules=[]),
    "ia3-feedforward": lambda names: IA3Config(target_modules=names, feedforward_modules=names),
    "loha": lambda names: LoHaConfig(r=4, target_modules=names),
    "lokr": lambda names: LoKrConfig(r=4, target_modules=names),
    "lokr-one large factor": lambda names: LoKrConfig(r=4, target_modules=names, decompose_factor=1),
    "adalora": lambda names: AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=names),
    "vera": lambda names: VeraConfig(r=16, target_modules=names),
    "vera-of a high rank": lambda names: VeraConfig(r=256, target_modules=names),
}
CONVOLUTIONS_IN_BLOCKS = {
    "lora": MERGED_IN_BLOCKS["lora"],
    "loha": MERGED_IN_BLOCKS["loha"],
    "lokr": MERGED_IN_BLOCKS["lokr"],
    "lokr-undivided": lambda names: LoKrConfig(r=999, target_modules=names),
    "lokr-undivided and low": lambda names: LoKrConfig(r=999, decompose_factor=256, target_modules=names),
}


def big(method: str, count: int = 1) -> tuple[nn.Sequential, int]:
    """Large adapted linear layers in bf16, and the bytes of one."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(BIG[1], BIG[0]) for _ in range(count))).to(torch.bfloat16)
    peftlite.inject_adapter_in_model(MERGED_IN_BLOCKS[method]([str(k) for k in range(count)]), model)
    scramble(model, "default")
    return model, sum(p.nbytes for p in (model[0].base_layer.weight, model[0].base_layer.bias))


@pytest.mark.parametrize("method", MERGED_IN_BLOCKS)
def test_a_merge_takes_the_kept_bytes_and_a_tenth_of_the_largest_weight(method: str) -> None:
    model, size = big(method)
    before = values(model)
    with Live() as live:
        peftlite.merge_adapter(model)
    assert size <= live.most <= 1.1 * size
    assert live.now == size  # the kept bytes
    with Live() as live:
        peftlite.unmerge_adapter(model)
    assert live.most <= 0.01 * size
    assert same(model, before)


@pytest.mark.parametrize("method", ["vera-of a high rank", "vera"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("narrow", [False, True], ids=["adapters in fp32", "adapters in the base's dtype"])
def test_a_projection_of_all_layers_is_not_copied_to_merge_one(method: str, dtype: torch.dtype, narrow: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1024)).to(dtype)
    peftlite.inject(model, MERGED_IN_BLOCKS[method](["0"]), "a", autocast_adapter_dtype=not narrow)
    scramble(model, "a")
    size = sum(p.nbytes for p in model[0].base_layer.parameters())
    with Live() as live:
        peftlite.merge_adapter(model)
    assert live.most <= 1.1 * size


@pytest.mark.parametrize("method", CONVOLUTIONS_IN_BLOCKS)
@pytest.mark.parametrize(("kind", "into"), [(nn.Conv1d, 1024), (nn.Conv2d, 256)])
def test_convolutions_are_merged_in_blocks_too(method: str, kind: Any, into: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(kind(into, 512, 3)).to(torch.bfloat16)
    peftlite.inject_adapter_in_model(CONVOLUTIONS_IN_BLOCKS[method](["0"]), model, "a")
    scramble(model, "a")
    size, before = sum(p.nbytes for p in model[0].base_layer.parameters()), values(model)
    delta: Tensor = model[0].variants["a"].delta(View(model[0], "a"))  # whole
    with Live() as live:
        peftlite.merge_adapter(model)
    assert live.most <= 1.1 * size
    expected = (before["0.base_layer.weight"].float() + delta).to(torch.bfloat16)
    torch.testing.assert_close(model[0].base_layer.weight.detach(), expected)
    peftlite.unmerge_adapter(model)
    assert same(model, before)


def test_fused_experts_are_merged_in_blocks_too() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 256, 1024).to(torch.bfloat16))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.transpose(1, 2)

    torch.manual_seed(0)
    model = nn.Sequential(Experts())
    config = LoraConfig(r=2, target_modules=[], target_parameters=["0.weight"])
    peftlite.inject_adapter_in_model(config, model)
    scramble(model, "default")
    weight, x = model[0].base_layer.weight, torch.randn(8, 2, 1024).to(torch.bfloat16)
    before, expected = weight.clone(), model(x)
    with Live() as live:
        peftlite.merge_adapter(model)
    assert live.most <= 1.1 * weight.nbytes
    torch.testing.assert_close(model(x), expected, rtol=0.05, atol=0.5)
    peftlite.unmerge_adapter(model)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "loha"])
def test_merging_for_good_never_holds_more_than_the_layer_at_work(method: str) -> None:
    model, size = big(method, count=3)
    with Live() as live:
        merged = peftlite.merge_and_unload(model)
    assert live.most <= 1.1 * size
    assert live.now == 0
    assert type(merged[0]) is nn.Linear


@pytest.mark.parametrize("undo", ["device", "cpu", None])
def test_what_is_kept_is_what_undo_says(undo: Any) -> None:
    model, size = big("lora", count=3)
    with Live() as live:
        peftlite.merge_adapter(model, undo=undo)
        kept = live.now
        peftlite.merge_adapter(model, undo=None)  # what was kept goes
    assert kept == (0 if undo is None else 3 * size)
    assert live.most <= 1.1 * size + max(0, kept - size)
    assert live.now == 0
