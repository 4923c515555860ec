"""PEFT's small helpers do what they do there, and leave everything as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import peft.helpers
import pytest
import torch

import peftlite
from peftlite import IA3Config, LoHaConfig, LoraConfig
from peftlite.core.tree import find_state, layers
from peftlite.errors import ConfigError, NoAdapterError, StateError
from peftlite.helpers import check_if_peft_model, disable_input_dtype_casting, rescale_adapter_scale
from peftlite.hotswap import prepare_model_for_compiled_hotswap
from tests.contract.rows import scramble
from tests.models import batch, tiny
from tests.twins import twins


def scalings(model: Any) -> list[dict[str, float]]:
    return [{name: float(scaling) for name, scaling in layer.scaling.items()} for layer in layers(model)]


@pytest.mark.parametrize("multiplier", [0.5, 0, -2, 3])
@pytest.mark.parametrize("prepared", [False, True])
def test_scalings_are_multiplied_for_the_block_as_in_peft(multiplier: float, prepared: bool) -> None:
    both = twins("llama", target_modules=["q_proj", "v_proj"])
    both.add("other", target_modules=["q_proj"], r=4, lora_alpha=3)
    before, plain = scalings(both.ours), both.outputs()
    if prepared:
        prepare_model_for_compiled_hotswap(both.ours)
    for name in ("default", "other"):
        both.ours.set_adapter(name)
        both.theirs.set_adapter(name)
        with rescale_adapter_scale(both.ours, multiplier), peft.helpers.rescale_adapter_scale(both.theirs, multiplier):
            both.check_outputs()
            assert scalings(both.ours) == [{n: s * multiplier for n, s in layer.items()} for layer in before]
    with pytest.raises(KeyError), rescale_adapter_scale(both.ours, multiplier):
        raise KeyError
    assert scalings(both.ours) == before
    both.ours.set_adapter("default")
    torch.testing.assert_close(both.outputs()[0], plain[0])


def test_compiled_code_sees_other_scalings_in_a_prepared_model() -> None:
    model = peftlite.get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"])).eval()
    scramble(model, "default")
    prepare_model_for_compiled_hotswap(model)
    graphs = []

    def backend(module: torch.fx.GraphModule, example: object) -> Any:
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for multiplier in (1.0, 0.5, -2.0):
            with rescale_adapter_scale(model, multiplier):
                torch.testing.assert_close(compiled(**batch("llama")).logits, model(**batch("llama")).logits)
    assert len(graphs) == 1


def test_scalings_of_other_methods_are_multiplied_too() -> None:
    model = peftlite.get_peft_model(tiny("llama"), LoHaConfig(target_modules=["q_proj"]))
    with rescale_adapter_scale(model, 0.5):
        assert all(scaling == 0.5 for layer in scalings(model) for scaling in layer.values())


def test_what_cannot_be_scaled_is_refused() -> None:
    with pytest.raises(NoAdapterError), rescale_adapter_scale(tiny("llama"), 2):
        pass
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    with (
        pytest.raises(StateError, match="no scaling"),
        rescale_adapter_scale(peftlite.get_peft_model(tiny("llama"), config), 2),
    ):
        pass
    model = peftlite.get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"]))
    for wrong in ("a", None, float("nan")):
        with pytest.raises(ConfigError, match="multiplier"), rescale_adapter_scale(model, wrong):  # type: ignore[arg-type]
            pass
    model.merge_adapter()
    with pytest.raises(StateError, match="unmerge"), rescale_adapter_scale(model, 2):
        pass


def test_inputs_keep_their_dtype_for_the_block() -> None:
    model = peftlite.get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"]))
    state: Any = find_state(model)
    scramble(model, "default")
    seen = []
    for layer in layers(model):
        layer.lora_A["default"].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    bf16 = model.to(torch.bfloat16)
    for layer in layers(bf16):
        layer.lora_A["default"].float()
        layer.lora_B["default"].float()
    with torch.no_grad():
        bf16(**batch("llama"))
        assert set(seen) == {torch.float32}
        seen.clear()
        with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
            bf16(**batch("llama"))
        assert seen == [torch.bfloat16]
        assert state.cast_inputs
        with disable_input_dtype_casting(model, active=False):
            bf16(**batch("llama"))
        with disable_input_dtype_casting(model), disable_input_dtype_casting(model, active=False):
            assert not state.cast_inputs
        with disable_input_dtype_casting(tiny("llama")):
            assert state.cast_inputs


def test_adapters_are_told_from_other_directories(tmp_path: Path) -> None:
    model = peftlite.get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"]))
    peftlite.save_adapter(model, tmp_path / "adapter")
    tiny("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{")
    found = {name: check_if_peft_model(tmp_path / name) for name in ("adapter", "model", "broken", "missing")}
    assert found == {"adapter": True, "model": False, "broken": False, "missing": False}
    assert peft.helpers.check_if_peft_model(str(tmp_path / "adapter"))
