"""A call that fails leaves no state behind.

Each call of the lifecycle is made to fail at its steps: KeyboardInterrupt is raised before a line of peftlite, then
before the next one, until the call gets through. Each time the model has to be, bit for bit, what it was before.
`PEFTLITE_EVERY_STEP=1` fails at every step of every call, and not at some hundreds of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftlite
from peftlite import LoraConfig
from peftlite.core.modes import evaluate
from peftlite.core.transaction import atomic, put, unnoted
from tests.contract.rows import scramble
from tests.laws.faults import Steps, Stop, chosen, differences, portrait

IDS = torch.tensor([[0, 3, 6], [2, 2, 5]])
Call = Callable[[Any, Path], object]


class Net(nn.Module):
    """Two layers between a table and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.first = nn.Linear(4, 5)
        self.second = nn.Linear(5, 4)
        self.head = nn.Linear(4, 7)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.second(torch.tanh(self.first(self.table(ids))))))
        return y


def run(model: nn.Module) -> Tensor:
    y: Tensor = model(IDS)
    return y


def bare() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["first", "second"], **fields})


def in_place() -> nn.Module:
    """Adapter `a` is active and trains the head and biases along, `b` is for inference, `c` is on the table too."""
    model = bare()
    configs = {
        "a": lora(modules_to_save=["head"], bias="lora_only"),
        "b": lora(r=3, inference_mode=True),
        "c": lora(target_modules=["table", "first"]),
    }
    for name, config in configs.items():
        peftlite.inject(model, config, name)
        scramble(model, name)
    return model


def wrapped() -> nn.Module:
    return peftlite.wrap(in_place())


def merged() -> nn.Module:
    model = in_place()
    peftlite.set_adapter(model, ["c", "b"])
    peftlite.merge_adapter(model, ["b"])
    return model


def disabled() -> nn.Module:
    model = in_place()
    peftlite.set_adapter(model, "b")
    peftlite.disable_adapters(model)
    return model


def alone() -> nn.Module:
    model = bare()
    peftlite.inject(model, lora(), "b")
    scramble(model, "b")
    return model


def with_other_numbers() -> nn.Module:
    """Adapter `b` has other numbers than in its file."""
    model = in_place()
    scramble(model, "b", seed=9)
    return model


def tied() -> nn.Module:
    model = bare()
    model.head.weight = model.table.weight  # type: ignore[assignment, union-attr]
    for name in ("a", "b"):
        peftlite.inject(model, lora(target_modules=["table"], ensure_weight_tying=True), name)
        scramble(model, name)
    return model


def tied_apart() -> nn.Module:
    model = bare()
    model.head.weight = model.table.weight  # type: ignore[assignment, union-attr]
    peftlite.inject(model, lora(target_modules=["head"]), "a")
    scramble(model, "a")
    return model


def started() -> nn.Module:
    model = bare()
    peftlite.inject(model, lora(init_lora_weights="pissa"), "a")
    scramble(model, "a")
    return model


def allocating() -> nn.Module:
    model = bare()
    targets = ["first", "second"]
    config = peftlite.AdaLoraConfig(init_r=3, target_r=1, tinit=1, deltaT=1, total_step=9, target_modules=targets)
    peftlite.inject(model, config, "a")
    scramble(model, "a")
    run(model).square().sum().backward()
    peftlite.update_and_allocate(model, 1)
    return model


def of_vera() -> nn.Module:
    model = bare()
    for name in ("a", "b"):
        peftlite.inject(model, peftlite.VeraConfig(r=2, target_modules=["first", "second"]), name)
        scramble(model, name)
    return model


def under(context: Callable[..., Any], *names: Any) -> Call:
    def call(model: nn.Module, folder: Path) -> Tensor:
        with context(model, *names):
            return run(model)

    return call


@dataclass(frozen=True)
class Case:
    """A call of the lifecycle, and the models that it is tried on."""

    make: Callable[[], nn.Module]
    call: Call


def get_weights(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {key: tensor + 1 for key, tensor in peftlite.get_peft_model_state_dict(model, adapter_name=name).items()}


CASES: dict[str, Case] = {
    # ---- adding
    "get_peft_model": Case(bare, lambda m, f: peftlite.get_peft_model(m, lora(modules_to_save=["head"], bias="all"))),
    "inject the first": Case(bare, lambda m, f: peftlite.inject(m, lora(target_modules=["table", "first"]))),
    "inject_adapter_in_model": Case(in_place, lambda m, f: peftlite.inject_adapter_in_model(lora(), m, "new")),
    "add_adapter": Case(wrapped, lambda m, f: m.add_adapter("new", lora(target_modules=["table", "second"]))),
    "add VeRA": Case(of_vera, lambda m, f: peftlite.inject(m, peftlite.VeraConfig(r=3, target_modules=["head"]), "n")),
    "add to tied weights": Case(
        tied, lambda m, f: peftlite.inject(m, lora(target_modules=["table"], ensure_weight_tying=True), "new")
    ),
    "wrap": Case(in_place, lambda m, f: peftlite.wrap(m)),
    # ---- loading
    "from_pretrained": Case(bare, lambda m, f: peftlite.PeftModel.from_pretrained(m, f / "a")),
    "load_adapter, the first": Case(bare, lambda m, f: peftlite.load_adapter(m, f / "a", "a", is_trainable=True)),
    "load_adapter, another": Case(wrapped, lambda m, f: m.load_adapter(f / "b", "new")),
    "load_adapter, over one": Case(in_place, lambda m, f: peftlite.load_adapter(m, f / "b", "b", is_trainable=True)),
    "set_peft_model_state_dict": Case(
        in_place, lambda m, f: peftlite.set_peft_model_state_dict(m, get_weights(m, "a"), "a")
    ),
    "set_base_model_state_dict": Case(
        wrapped, lambda m, f: peftlite.set_base_model_state_dict(m, {k: v + 1 for k, v in bare().state_dict().items()})
    ),
    "hotswap_adapter": Case(in_place, lambda m, f: peftlite.hotswap_adapter(m, f / "d", "b")),
    "hotswap into the tensors": Case(with_other_numbers, lambda m, f: peftlite.hotswap_adapter(m, f / "b", "b")),
    "prepare for hotswap": Case(
        alone, lambda m, f: peftlite.prepare_model_for_compiled_hotswap(m, target_rank=6, check_compiled="ignore")
    ),
    # ---- which are in use
    "set_adapter": Case(in_place, lambda m, f: peftlite.set_adapter(m, ["b", "c"], inference_mode=True)),
    "set_adapter, merged": Case(merged, lambda m, f: peftlite.set_adapter(m, "a")),
    "set_requires_grad": Case(in_place, lambda m, f: peftlite.set_requires_grad(m, ["a", "b"], False)),
    "disable_adapters": Case(merged, lambda m, f: peftlite.disable_adapters(m)),
    "enable_adapters": Case(disabled, lambda m, f: peftlite.enable_adapters(m)),
    "disable_adapter": Case(in_place, under(peftlite.disable_adapter)),
    "disable_adapter, merged": Case(merged, under(peftlite.disable_adapter)),
    "use_adapter": Case(wrapped, under(peftlite.use_adapter, "b", "c")),
    "adapter_names": Case(wrapped, lambda m, f: m(IDS, adapter_names=["b", "__base__"])),
    # ---- merging and leaving
    "merge_adapter": Case(in_place, lambda m, f: peftlite.merge_adapter(m, ["b", "c"])),
    "merge_adapter, safe": Case(merged, lambda m, f: peftlite.merge_adapter(m, ["c"], safe_merge=True)),
    "merge_adapter, tied": Case(tied, lambda m, f: peftlite.merge_adapter(m, ["a", "b"])),
    "merge_adapter, tied apart": Case(tied_apart, lambda m, f: peftlite.merge_adapter(m)),
    "unmerge_adapter": Case(merged, lambda m, f: peftlite.unmerge_adapter(m)),
    "merge_and_unload": Case(in_place, lambda m, f: peftlite.merge_and_unload(m, undo="device")),
    "unload": Case(merged, lambda m, f: peftlite.unload(m)),
    "delete_adapter": Case(in_place, lambda m, f: peftlite.delete_adapter(m, "b")),
    "delete_adapter, the active one": Case(wrapped, lambda m, f: m.delete_adapter("a")),
    "delete_adapter, a merged one": Case(merged, lambda m, f: peftlite.delete_adapter(m, "b")),
    "delete_adapter, the last": Case(alone, lambda m, f: peftlite.delete_adapter(m, "b")),
    "delete_adapter, tied": Case(tied, lambda m, f: peftlite.delete_adapter(m, "a")),
    "delete_adapter, VeRA": Case(of_vera, lambda m, f: peftlite.delete_adapter(m, "a")),
    # ---- numbers and combinations
    "scale_adapter": Case(in_place, lambda m, f: peftlite.scale_adapter(m, "a", 2.0)),
    "rescale_adapter_scale": Case(in_place, under(peftlite.rescale_adapter_scale, 0.5)),
    "disable_input_dtype_casting": Case(in_place, under(peftlite.disable_input_dtype_casting)),
    "cast_mixed_precision_params": Case(alone, lambda m, f: peftlite.cast_mixed_precision_params(m, torch.float64)),
    "add_weighted_adapter": Case(
        in_place, lambda m, f: peftlite.add_weighted_adapter(m, ["b", "c"], [1.0, 0.5], "new", "linear")
    ),
    "update_and_allocate": Case(allocating, lambda m, f: peftlite.update_and_allocate(m, 3)),
    "residual_into_base": Case(started, lambda m, f: peftlite.residual_into_base(m, "a")),
    "convert_to_lora": Case(of_vera, lambda m, f: peftlite.convert_to_lora(m, 2, "a")),
    "save_adapter": Case(in_place, lambda m, f: peftlite.save_adapter(m, f / "written")),
    # ---- one layer at a time
    "layer.set_adapter": Case(merged, lambda m, f: m.first.set_adapter("c")),
    "layer.enable_adapters": Case(merged, lambda m, f: m.first.enable_adapters(False)),
    "layer.merge": Case(in_place, lambda m, f: m.first.merge(adapter_names=["b", "c"])),
    "layer.unmerge": Case(merged, lambda m, f: m.first.unmerge()),
    "layer.delete_adapter": Case(merged, lambda m, f: m.first.delete_adapter("b")),
    "layer.scale_layer": Case(in_place, lambda m, f: m.first.scale_layer(3.0)),
    "layer.unscale_layer": Case(in_place, lambda m, f: m.first.unscale_layer(3.0)),
    "layer.set_scale": Case(in_place, lambda m, f: m.first.set_scale("b", 3.0)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of adapters: `a` and `b` as in the models, `d` with other values and another rank than `b`."""
    place = tmp_path_factory.mktemp("adapters")
    model = in_place()
    scramble(model, "b")
    peftlite.save_adapter(model, place)
    other = bare()
    peftlite.inject(other, lora(r=5, lora_alpha=3), "d")
    scramble(other, "d")
    peftlite.save_adapter(other, place)
    return place


def stopped(call: Call, step: int, model: nn.Module, folder: Path) -> str:
    """Make a call fail at a step; gives where that was, or nothing if the call got through."""
    try:
        with Steps(step).counted():
            call(model, folder)
    except Stop as stop:
        return str(stop)
    return ""


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # files
@pytest.mark.filterwarnings("ignore::peftlite.errors.PeftliteWarning")
@pytest.mark.parametrize("case", CASES)
def test_a_call_that_is_stopped_at_any_step_changes_nothing(case: str, folder: Path) -> None:
    make, call = CASES[case].make, CASES[case].call
    call(make(), folder)  # what is done once only is done now
    model, twin, steps = make(), make(), Steps()
    torch.manual_seed(1)
    with steps.counted():
        call(twin, folder)
    before = portrait(model, run)
    for step in chosen(steps.seen):
        where = stopped(call, step, model, folder)
        if not where:  # some things are worked out again and others are not, so that the number of steps varies
            model = make()
            before = portrait(model, run)
        elif changed := differences(before, portrait(model, run)):
            pytest.fail(f"{changed} after {where}", pytrace=False)
    torch.manual_seed(1)
    call(model, folder)
    after, expected = (portrait(done, run, identity=False) for done in (model, twin))
    if changed := differences(expected, after):
        pytest.fail(f"{changed} when the call is made again", pytrace=False)


def test_gradients_are_recorded_after_a_call_that_is_stopped_at_the_end_of_a_block_without() -> None:
    @atomic
    def call() -> None:
        torch.set_grad_enabled(False)  # what an exception finds that strikes before the block's end puts it back
        raise Stop

    with torch.enable_grad():
        with pytest.raises(Stop):
            call()
        assert torch.is_grad_enabled()


def test_what_is_not_noted_stays_and_what_is_noted_before_and_after_it_is_taken_back() -> None:
    noted, left = {"a": 1, "b": 1}, {"c": 1}

    def fails(left: dict[str, int]) -> None:
        put(left, "c", 2)
        raise ValueError

    @atomic
    def call() -> None:
        put(noted, "a", 2)
        with pytest.raises(ValueError):  # noqa: PT011 - the one above
            unnoted(fails, left)
        put(noted, "b", 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call()
    assert noted == {"a": 1, "b": 1}
    assert left == {"c": 2}


def test_eval_mode_is_taken_back_where_it_was_training_mode() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout().eval(), nn.Sequential(nn.Linear(2, 2)))
    peftlite.inject_adapter_in_model(peftlite.LoraConfig(target_modules=["0"], lora_dropout=0.1), model)
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2

    @atomic
    def call() -> None:
        evaluate(model)
        assert not any(module.training for module in model.modules())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call()
    assert [module.training for module in model.modules()] == before
