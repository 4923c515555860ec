"""AdaLoRA against real PEFT with the same weights: outputs, training, allocation of ranks, files."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import peftlite
from peftlite.core.tree import find_state, layers
from peftlite.errors import ConfigError, PeftliteWarning, StateError, UnsupportedFeatureError, UnsupportedLayerError
from peftlite.tuners.adalora.allocation import Allocation
from tests.models import batch, tiny
from tests.tuners.pairs import Pair, apart

KINDS = ("linear", "linear-no-bias", "Conv1D", "conv2d", "conv2d-1x1")
FIELDS: tuple[dict[str, Any], ...] = (
    {"init_r": 4, "target_r": 2, "total_step": 10},
    {"init_r": 3, "target_r": 2, "total_step": 10, "lora_alpha": 0, "bias": "lora_only"},
)
ROWS = [Pair.row("AdaLoraConfig", kind, **fields) for kind in KINDS for fields in FIELDS]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_everything_equals_peft(row: Pair) -> None:
    row.build()
    row.check_names()
    row.check_numbers()
    row.check_merged()


@pytest.mark.parametrize("row", ROWS[:2], ids=str)
def test_files_are_read_both_ways(row: Pair, tmp_path: Path) -> None:
    row.build()
    row.check_files(tmp_path)


# ---- training
SCHEDULES = {
    "every step": {"tinit": 0, "tfinal": 0, "deltaT": 1, "total_step": 6},
    "every second step": {"tinit": 2, "tfinal": 3, "deltaT": 2, "total_step": 12},
    "never between": {"tinit": 3, "tfinal": 1, "deltaT": 50, "total_step": 8},
}
TARGETS = ["q_proj", "v_proj", "down_proj"]


def config(library: Any = peftlite, **fields: Any) -> Any:
    schedule = SCHEDULES["every second step"]
    return library.AdaLoraConfig(
        **{"init_r": 4, "target_r": 2, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **schedule, **fields}
    )


@dataclass
class Run:
    """A training of a tiny Llama, with fixed first factors, by whichever library and in whichever shape."""

    model: Any
    update: Callable[[int], None]
    losses: list[float] = field(default_factory=list)
    numbers: list[dict[str, Tensor]] = field(default_factory=list)
    """E by path, after each step."""

    @classmethod
    def of(cls, kind: str, **fields: Any) -> Run:
        base = tiny("llama")
        if kind == "peft":
            model = peft.get_peft_model(base, config(peft, **fields))
        elif kind == "wrapped":
            model = peftlite.get_peft_model(base, config(**fields))
        else:
            model = peftlite.inject_adapter_in_model(config(**fields), base)
        generator = torch.Generator().manual_seed(3)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_E" not in name:
                parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
        inplace = kind == "in place"
        run = cls(model, lambda step: peftlite.update_and_allocate(model, step))
        return run if inplace else cls(model, model.base_model.update_and_allocate)

    def train(self, last: int, first: int = 1) -> Run:
        self.model.train()
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(first, last + 1):
            loss = self.model(**batch("llama", seed=step)).loss
            loss.backward()
            optimizer.step()
            self.update(step)
            optimizer.zero_grad()
            self.losses.append(loss.item())
            self.numbers.append(
                {
                    name.removeprefix("base_model.model."): parameter.detach().clone()
                    for name, parameter in self.model.named_parameters()
                    if "lora_E" in name
                }
            )
        self.model.eval()
        return self

    @property
    def pattern(self) -> dict[str, list[bool]]:
        state = find_state(self.model)
        configs = self.model.peft_config if state is None else state.configs
        return {key.replace(".default", ""): mask for key, mask in configs["default"].rank_pattern.items()}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("shape", ["wrapped", "in place"])
def test_training_allocates_as_peft_does(shape: str, schedule: str) -> None:
    fields = SCHEDULES[schedule]
    steps = fields["total_step"] + 1
    ours, theirs = Run.of(shape, **fields).train(steps), Run.of("peft", **fields).train(steps)
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-6, atol=1e-6)  # with the regularisation
    for mine, other in zip(ours.numbers, theirs.numbers, strict=True):
        assert list(mine) == list(other)
        for name in other:
            assert torch.equal(mine[name] == 0, other[name] == 0)
            torch.testing.assert_close(mine[name], other[name], rtol=1e-5, atol=1e-7)
    assert ours.pattern == theirs.pattern
    assert sum(map(sum, ours.pattern.values())) == 2 * 6


def test_importance_is_peft_s() -> None:
    ours, theirs = Run.of("in place").train(5), Run.of("peft").train(5)
    memory = find_state(ours.model).memory["default"]  # type: ignore[union-attr]
    allocator = theirs.model.base_model.rankallocator
    assert len(memory.importance) == len(allocator.exp_avg_ipt) == 3 * 6
    for (path, slot), importance in memory.importance.items():
        name = f"{path}.{slot}.default"
        assert apart(importance, allocator.exp_avg_ipt[name]) <= 1e-6
        assert apart(memory.uncertainty[path, slot], allocator.exp_avg_unc[name]) <= 1e-6


def test_a_target_above_what_there_is_takes_nothing_away() -> None:
    """PEFT raises an error from `kthvalue`."""
    with pytest.warns(PeftliteWarning, match="no rank is ever taken away"):
        run = Run.of("in place", target_r=9)
    run.train(10)
    assert all(all(mask) and len(mask) == 4 for mask in run.pattern.values())


@pytest.mark.parametrize("seen", [0, 4], ids=["nothing learned", "something learned"])
def test_a_last_allocation_that_was_missed_is_made_up_for(seen: int) -> None:
    """Steps counted from 0, or a training that was resumed: PEFT never allocates for the last time then."""
    run = Run.of("in place").train(seen).train(11, first=11)
    assert sum(map(sum, run.pattern.values())) == 2 * 6
    pattern = run.pattern
    assert run.train(12, first=12).pattern == pattern


def test_parameters_without_gradients_have_no_importance() -> None:
    model = peftlite.inject_adapter_in_model(config(), tiny("llama"))
    unused = model.model.layers[1].mlp.down_proj
    model(**batch("llama")).loss.backward()
    for parameter in unused.parameters_of("default"):
        parameter.grad = None
    peftlite.update_and_allocate(model, 1)
    memory = find_state(model).memory["default"]  # type: ignore[union-attr]
    assert not memory.importance["model.layers.1.mlp.down_proj", "lora_A"].any()
    assert memory.importance["model.layers.0.mlp.down_proj", "lora_A"].any()


def test_what_training_has_shown_goes_with_copies() -> None:
    run = Run.of("in place").train(5)
    for copied in (copy.deepcopy(run.model), pickle.loads(pickle.dumps(run.model))):
        other = Run(copied, lambda step, model=copied: peftlite.update_and_allocate(model, step))
        other.train(12, first=6)
        again = copy.deepcopy(run.model)
        expected = Run(again, lambda step, model=again: peftlite.update_and_allocate(model, step)).train(12, first=6)
        assert other.pattern == expected.pattern
        assert other.losses == expected.losses
    assert find_state(run.model).configs["default"].rank_pattern is None  # type: ignore[union-attr]


def test_one_adapter_trains_at_a_time() -> None:
    model = tiny("llama")
    with pytest.raises(StateError, match="has no adapters"):
        peftlite.update_and_allocate(model, 1)
    peftlite.inject_adapter_in_model(config(), model, "a")
    peftlite.inject_adapter_in_model(config(), model, "b")
    with pytest.raises(StateError, match="no gradients"):
        peftlite.update_and_allocate(model, 1)
    peftlite.set_adapter(model, ["a", "b"])
    with pytest.raises(StateError, match="`a` and `b` is"):
        peftlite.update_and_allocate(model, 1)
    peftlite.set_requires_grad(model, ["a", "b"], False)
    with pytest.raises(StateError, match="none is"):
        peftlite.update_and_allocate(model, 1)


# ---- files
# PEFT says of its own files, and so of ours, that it ignores the keys of `rank_pattern`; it does not
PEFT_WARNS = pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
SHAPES = ("wrapped", "in place")


def loaded(shape: str, folder: Path, **fields: Any) -> Any:
    if shape == "wrapped":
        return peftlite.PeftModel.from_pretrained(tiny("llama"), folder, **fields).eval()
    model = tiny("llama")
    peftlite.load_adapter(model, folder, **fields)
    return model


def logits(model: Any) -> Tensor:
    inputs = batch("llama")
    del inputs["labels"]
    output: Tensor = model(**inputs).logits
    return output


@PEFT_WARNS
@pytest.mark.parametrize("shape", SHAPES)
def test_a_trained_adapter_is_cut_in_its_file_and_read_in_both_shapes(shape: str, tmp_path: Path) -> None:
    run = Run.of(shape).train(12)
    expected = logits(run.model)
    peftlite.save_adapter(run.model, tmp_path)
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert pattern == run.pattern
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for key, mask in pattern.items():
        path = "base_model.model." + key.removesuffix(".lora_E")
        assert tensors[f"{path}.lora_A"].shape[0] == tensors[f"{path}.lora_B"].shape[1] == sum(mask)
        assert tensors[f"{path}.lora_E"].shape == (sum(mask), 1)
    for other in SHAPES:
        assert apart(logits(loaded(other, tmp_path)), expected) <= 1e-6
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    assert apart(logits(theirs), expected) <= 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_peft_s_cut_file_is_read_in_both_shapes(shape: str, tmp_path: Path) -> None:
    run = Run.of("peft").train(12)
    expected = logits(run.model)
    run.model.save_pretrained(tmp_path)
    model = loaded(shape, tmp_path)
    assert apart(logits(model), expected) <= 1e-6
    assert {len(layer.lora_E["default"]) for layer in layers(model)} != {4}
    peftlite.save_adapter(model, tmp_path / "again")
    mine, other = (load_file(tmp_path / at / "adapter_model.safetensors") for at in ("again", "."))
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[key], other[key]) for key in other)


@pytest.mark.parametrize("shape", SHAPES)
def test_before_the_last_allocation_a_file_has_all_triplets(shape: str, tmp_path: Path) -> None:
    """PEFT cuts what it may allocate again later."""
    run = Run.of(shape).train(6)
    peftlite.save_adapter(run.model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"] is None
    model = loaded(shape, tmp_path)
    assert torch.equal(logits(model), logits(run.model))
    assert {len(layer.lora_E["default"]) for layer in layers(model)} == {4}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_cut_file_is_read_into_an_adapter_that_has_all_triplets(shape: str, tmp_path: Path) -> None:
    trained = Run.of(shape).train(12)
    peftlite.save_adapter(trained.model, tmp_path)
    fresh = Run.of(shape)
    peftlite.load_adapter(fresh.model, tmp_path, "default")
    assert apart(logits(fresh.model), logits(trained.model)) <= 1e-6
    assert fresh.pattern == trained.pattern
    state = peftlite.get_peft_model_state_dict(trained.model)
    again = Run.of(shape).train(12)
    peftlite.set_peft_model_state_dict(again.model, state)
    assert apart(logits(again.model), logits(trained.model)) <= 1e-6
    fresh.train(14, first=13)  # what is gone stays gone
    for layer in layers(fresh.model):
        for mask, number in zip(
            fresh.pattern[path_of(fresh.model, layer) + ".lora_E"], layer.lora_E["default"], strict=True
        ):
            assert mask or not number.any()


def path_of(model: Any, layer: nn.Module) -> str:
    return next(path for path, found in peftlite.core.tree.named_layers(model) if found is layer)


@PEFT_WARNS
@pytest.mark.parametrize("shape", SHAPES)
def test_training_goes_on_from_a_cut_file(shape: str, tmp_path: Path) -> None:
    first = Run.of(shape).train(12)
    peftlite.save_adapter(first.model, tmp_path)
    model = loaded(shape, tmp_path, is_trainable=True)
    state = find_state(model)
    assert state is not None
    state.configs["default"].target_r = 1
    run = Run(model, lambda step: peftlite.update_and_allocate(model, step)).train(12)
    assert sum(map(sum, run.pattern.values())) == 6
    assert all(len(mask) == 4 for mask in run.pattern.values())
    assert all(
        was or not left for key in run.pattern for was, left in zip(first.pattern[key], run.pattern[key], strict=True)
    )
    expected = logits(run.model)
    peftlite.save_adapter(run.model, tmp_path / "again")
    for other in SHAPES:
        assert apart(logits(loaded(other, tmp_path / "again")), expected) <= 1e-6
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "again").eval()
    assert apart(logits(theirs), expected) <= 1e-6


def test_a_layer_may_lose_all_its_triplets(tmp_path: Path) -> None:
    pattern = {f"model.layers.{i}.self_attn.q_proj.lora_E": [i == 1] * 4 for i in (0, 1)}
    model = tiny("llama")
    peftlite.inject_adapter_in_model(config(target_modules=["q_proj"], rank_pattern=pattern), model)
    assert [len(layer.lora_E["default"]) for layer in layers(model)] == [0, 4]
    peftlite.save_adapter(model, tmp_path)
    assert torch.equal(logits(loaded("in place", tmp_path)), logits(tiny("llama")))


# ---- regularisation
def test_the_regularisation_is_added_while_gradients_are_recorded() -> None:
    run = Run.of("in place")
    model, inputs = run.model, batch("llama")
    loss, term = model(**inputs).loss, peftlite.orthogonal_regularisation(model)
    assert term is not None
    with torch.no_grad():
        plain = model(**inputs).loss
    torch.testing.assert_close(loss, plain + term)
    with peftlite.disable_adapter(model):
        torch.testing.assert_close(model(**inputs).loss, plain)  # E is still zero
    peftlite.set_requires_grad(model, "default", False)
    assert peftlite.orthogonal_regularisation(model) is None
    assert torch.equal(model(**inputs).loss, plain)


def test_without_a_weight_or_a_loss_nothing_is_added() -> None:
    model = peftlite.inject_adapter_in_model(config(orth_reg_weight=0), tiny("llama"))
    inputs = batch("llama")
    with torch.no_grad():
        plain = model(**inputs).loss
    assert torch.equal(model(**inputs).loss, plain)
    assert model(**{"input_ids": inputs["input_ids"]}).loss is None


@pytest.mark.parametrize("leave", ["unload", "delete"])
def test_nothing_is_left_on_the_model_when_adapters_go(leave: str) -> None:
    model = tiny("llama")
    hooks = len(model._forward_hooks)
    peftlite.inject_adapter_in_model(config(), model)
    assert len(model._forward_hooks) == hooks + 1
    if leave == "unload":
        peftlite.unload(model)
    else:
        peftlite.delete_adapter(model, "default")
    assert len(model._forward_hooks) == hooks


def test_compiled_training_has_the_regularisation_too() -> None:
    model = Run.of("in place").model
    inputs = batch("llama")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs).loss, model(**inputs).loss)


# ---- who forgets to allocate is told
class NeverCalled:
    def __call__(self, step: int) -> None: ...


@pytest.mark.parametrize("shape", SHAPES)
def test_training_past_tinit_without_allocating_warns_once(shape: str) -> None:
    run = Run.of(shape, tinit=3, tfinal=0, total_step=20)
    run.update = NeverCalled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.train(4)
    with pytest.warns(PeftliteWarning, match=r"`tinit` is `3` and `update_and_allocate` was not called") as caught:
        run.train(8, first=5)
    assert len(caught) == 1


def test_accumulating_gradients_is_no_reason_to_warn() -> None:
    run = Run.of("in place", tinit=1, tfinal=0, total_step=20)
    run.model.train()
    optimizer = torch.optim.AdamW([p for p in run.model.parameters() if p.requires_grad])
    for step in range(1, 3):
        for part in range(4):
            run.model(**batch("llama", seed=part)).loss.backward()
        optimizer.step()
        run.update(step)
        optimizer.zero_grad()
    with torch.no_grad():
        run.model(**batch("llama"))


@pytest.mark.parametrize("optimizer", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_steps_of_every_kind_of_optimizer_are_noticed(optimizer: dict[str, bool]) -> None:
    model = Run.of("in place", tinit=50, tfinal=0, total_step=100).model
    stepping = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, **optimizer)
    for _ in range(3):
        for _ in range(2):
            model(**batch("llama")).loss.backward()
        stepping.step()
        stepping.zero_grad()
    model(**batch("llama"))
    memory: Allocation = find_state(model).memory["default"]  # type: ignore[union-attr]
    assert memory.watch is not None
    assert (memory.watch.forwards, int(memory.watch.changes)) == (7, 3)


# ---- Trainer
@pytest.mark.parametrize("shape", SHAPES)
def test_the_callback_allocates_in_trainer(shape: str, tmp_path: Path) -> None:
    run = Run.of(shape, total_step=8, tfinal=2)
    data = [{name: tensor[0] for name, tensor in batch("llama", rows=1, seed=seed).items()} for seed in range(8)]
    args = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    Trainer(run.model, args, train_dataset=data, callbacks=[peftlite.AdaLoraCallback()]).train()
    assert sum(map(sum, run.pattern.values())) == 2 * 6
    for key, number in ((n, p) for n, p in run.model.named_parameters() if "lora_E" in n):
        mask = run.pattern[key.removeprefix("base_model.model.").removesuffix(".default")]
        assert [bool(n.any()) for n in number] == mask


def test_the_callback_says_when_the_schedule_is_for_other_steps() -> None:
    model = Run.of("in place").model
    callback = peftlite.AdaLoraCallback()

    class State:
        max_steps = 99

    with pytest.warns(PeftliteWarning, match="`total_step` of the AdaLoRA adapter is `12`"):
        callback.on_train_begin(None, State(), None, model=model)


# ---- configs and kinds of layer
def test_groups_of_a_convolution_work_where_peft_s_raise() -> None:
    row = Pair.row("AdaLoraConfig", "conv2d-groups", init_r=4, target_r=2, total_step=10)
    torch.manual_seed(1)
    model = peftlite.get_peft_model(row.base(), row.make(peftlite)).eval()
    x = torch.randn(3, 12, 6, 6)
    for layer in layers(model):
        layer.lora_E["default"].data.normal_()
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)


def test_layers_without_a_form_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedLayerError, match="ADALORA has no form for Embedding"):
        peftlite.inject_adapter_in_model(config(target_modules=["0"]), nn.Sequential(nn.Embedding(3, 4)))


@pytest.mark.parametrize(
    "fields",
    [
        {"total_step": None},
        {"total_step": 0},
        {"init_r": 0},
        {"deltaT": 0},
        {"beta1": 1.0},
        {"beta2": 0},
        {"orth_reg_weight": -1},
        {"rank_pattern": {"a.lora_E": [1, 0]}},
        {"tinit": 9},
    ],
    ids=str,
)
def test_configs_that_cannot_be_used(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(ConfigError, match=name):
        config(**fields)


@pytest.mark.parametrize(
    "fields", [{"use_dora": True}, {"target_parameters": ["a"]}, {"loftq_config": {"a": 1}}], ids=str
)
def test_features_that_adalora_lacks(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(UnsupportedFeatureError, match=f"`{name}`"):
        config(**fields)


@pytest.mark.parametrize(
    "fields", [{"r": 4}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}, {"alpha_pattern": {"q": 1}}], ids=str
)
def test_fields_without_effect_are_said_to_have_none(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.warns(PeftliteWarning, match=f"`{name}` is .* which has no effect"):
        config(**fields)


def test_the_config_s_file_is_peft_s(tmp_path: Path) -> None:
    config().save_pretrained(tmp_path)
    theirs = peft.AdaLoraConfig.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "theirs")
    mine, other = (json.loads((tmp_path / at / "adapter_config.json").read_text()) for at in (".", "theirs"))
    assert {**mine, "target_modules": None} == {**other, "target_modules": None}
    assert peftlite.PeftConfig.from_pretrained(tmp_path / "theirs") == config()
