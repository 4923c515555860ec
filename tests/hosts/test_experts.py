"""LoRA on the fused experts and routers of real models, as real PEFT has it, in both shapes."""

from __future__ import annotations

import copy
import threading
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftlite
from peftlite.core.tree import layers, named_layers
from tests.adapters import bytes_of, randomised
from tests.models import MOE, batch, tiny
from tests.tuners.pairs import apart
from tests.versions import PEFT_WORKS, VERSION, fused_experts

ROUTERS = {"mixtral": "gate.weight", "qwen2_moe": "gate.weight", "qwen3_moe": "gate.weight", "gpt_oss": "router.weight"}
pytestmark = fused_experts
NAMES = list(MOE)


def fields(name: str, **more: Any) -> dict[str, Any]:
    parameters = ["experts.gate_up_proj", "experts.down_proj", ROUTERS[name]]
    return {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "target_parameters": parameters, **more}


def placed(name: str, *adapters: str, config: dict[str, Any] | None = None, **sizes: Any) -> Any:
    """A model with adapters in place, at random."""
    model = tiny(name, **sizes)
    for adapter in adapters or ("default",):
        peftlite.inject(model, peftlite.LoraConfig(**fields(name, **(config or {}))), adapter)
    return tamed(model)


def tamed(model: Any) -> Any:
    """All tensors of the adapters at random, and so small that rounding stays what it is in one layer."""
    with torch.no_grad():
        for _, layer in named_layers(randomised(model)):
            for name in layer.variants:
                for tensor in layer.tensors(name).values():
                    tensor.mul_(0.2)
    return model


def pair(name: str, **sizes: Any) -> tuple[Any, Any]:
    """The same adapted model by peftlite and by real PEFT, wrapped."""
    ours = peftlite.get_peft_model(tiny(name, **sizes), peftlite.LoraConfig(**fields(name))).eval()
    tamed(ours)
    theirs = peft.get_peft_model(tiny(name, **sizes), peft.LoraConfig(**fields(name))).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=batch("llama")["input_ids"]).logits  # type: ignore[no-any-return]


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch("llama")).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_near(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert apart(ours[name], theirs[name]) <= tolerance, name


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_gradients_and_merged_weights_are_those_of_peft(name: str, experts: str) -> None:
    ours, theirs = pair(name, experts_implementation=experts)
    assert apart(logits(ours), logits(theirs)) <= 1e-6
    by_name = [{k.replace(".default", ""): g for k, g in gradients(model).items()} for model in (ours, theirs)]
    assert len(by_name[0]) == 2 * 4 * 2  # layers, targets, factors
    assert_near(*by_name, tolerance=2e-6)
    merged = [model.merge_and_unload() for model in (ours, theirs)]
    assert_near(*(dict(model.named_parameters()) for model in merged))


@pytest.mark.parametrize("name", NAMES)
def test_files_both_ways_and_both_shapes(name: str, tmp_path: Path) -> None:
    ours, theirs = pair(name)
    expected = logits(ours)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    peftlite.save_adapter(placed(name), tmp_path / "placed")
    written = [(tmp_path / kind / "adapter_model.safetensors").read_bytes() for kind in ("ours", "placed")]
    assert written[0] == written[1]
    if PEFT_WORKS:
        read = peft.PeftModel.from_pretrained(tiny(name), tmp_path / "ours").eval()
        assert apart(logits(read), expected) <= 1e-6
    for kind in ("ours", "theirs"):
        assert torch.equal(logits(peftlite.PeftModel.from_pretrained(tiny(name), tmp_path / kind)), expected)
        model = tiny(name)
        model.load_adapter(tmp_path / kind)
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_merging_and_unmerging(name: str, dtype: torch.dtype) -> None:
    model = placed(name, "a", "b", config={"target_modules": []}, dtype=dtype)
    before = {key: bytes_of(tensor) for key, tensor in model.state_dict().items()}
    peftlite.set_adapter(model, ["a", "b"])
    expected = logits(model)
    peftlite.merge_adapter(model)
    assert torch.equal(logits(model), expected)  # a parameter's forward is its merge
    peftlite.unmerge_adapter(model)
    assert {key: bytes_of(tensor) for key, tensor in model.state_dict().items()} == before
    assert torch.equal(logits(model), expected)


def test_several_adapters_and_calls() -> None:
    for name in NAMES:
        model = placed(name, "a", "b")
        alone = {}
        for adapter in ("a", "b"):
            peftlite.set_adapter(model, adapter)
            alone[adapter] = logits(model)
        assert apart(alone["a"], alone["b"]) > 1e-2
        for adapter in ("a", "b"):
            with peftlite.use_adapter(model, adapter):
                assert torch.equal(logits(model), alone[adapter])
        with peftlite.disable_adapter(model):
            assert torch.equal(logits(model), logits(tiny(name)))
        peftlite.set_adapter(model, "a")
        peftlite.delete_adapter(model, "b")
        assert torch.equal(logits(model), alone["a"])
        assert all(set(layer.variants) == {"a"} for layer in layers(model))


def test_threads_have_adapters_of_their_own() -> None:
    model = placed("mixtral", "a", "b")
    expected, wrong = {}, []
    for adapter in ("a", "b"):
        with peftlite.use_adapter(model, adapter):
            expected[adapter] = logits(model)

    def work(adapter: str) -> None:
        for _ in range(8):
            with peftlite.use_adapter(model, adapter):
                wrong.extend([adapter] * (not torch.equal(logits(model), expected[adapter])))

    threads = [threading.Thread(target=work, args=(adapter,)) for adapter in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    model = placed(name, "a", "b").train()
    peftlite.set_adapter(model, "b")
    model.enable_input_require_grads()
    expected = {}
    for adapter in ("a", "b"):
        peftlite.set_adapter(model, adapter)
        expected[adapter] = gradients(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`gradient_checkpointing_enable`", FutureWarning)  # the name until v6
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    peftlite.set_adapter(model, "a")
    assert_near(gradients(model), expected["a"], 1e-5)  # recomputed, they are summed in another order
    peftlite.set_adapter(model, "b")
    assert_near(gradients(model), expected["b"], 1e-5)


@pytest.mark.skipif(VERSION < (5, 4), reason="transformers 5.0 does not compile it without adapters either")
@pytest.mark.parametrize("name", NAMES)
def test_compiled_in_one_graph(name: str) -> None:
    model = placed(name, experts_implementation="grouped_mm")
    block = model.model.layers[0].mlp
    x = torch.randn(2, 6, 16)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        expected = block(x)
        compiled = torch.compile(block, fullgraph=True, backend=backend)(x)
    for ours, eager in zip(*(out if isinstance(out, tuple) else (out,) for out in (compiled, expected)), strict=True):
        torch.testing.assert_close(ours, eager)
    assert len(graphs) == 1


def test_copies() -> None:
    for name in NAMES:
        model = placed(name)
        other = copy.deepcopy(model)
        assert torch.equal(logits(other), logits(model))
        with torch.no_grad():
            for _, layer in named_layers(other):
                layer.tensors("default")["lora_B.weight"].zero_()
        assert torch.equal(logits(other), logits(tiny(name)))
        assert apart(logits(model), logits(other)) > 1e-2


def test_the_base_is_left_alone() -> None:
    for name in NAMES:
        model, bare = placed(name), tiny(name)
        gradients(model)
        base: nn.Module = peftlite.unload(model)
        assert {k: bytes_of(t) for k, t in base.state_dict().items()} == {
            k: bytes_of(t) for k, t in bare.state_dict().items()
        }
