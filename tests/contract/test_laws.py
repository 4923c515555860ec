"""What holds for every tuner on every kind of layer in every dtype."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils.checkpoint import checkpoint

import peftlite
from peftlite.core.slots import ModuleSlot
from peftlite.core.tree import find_state, layers
from peftlite.errors import MergeError, PeftliteError, UnsupportedLayerError
from tests.contract.rows import NEARLY_IDENTITY, NO_IDENTITY, PREPARED, RIVALS, UNSUPPORTED, Case, cases, scramble

pytestmark = pytest.mark.filterwarnings("ignore:Merged into:peftlite.errors.PeftliteWarning")  # quantised layers

all_cases = pytest.mark.parametrize("case", list(cases()), ids=str)
mergeable_cases = pytest.mark.parametrize("case", [c for c in cases() if c.mergeable], ids=str)
exactly_mergeable_cases = pytest.mark.parametrize(
    "case", [c for c in cases() if c.mergeable and not c.quantised], ids=str
)
quantised_cases = pytest.mark.parametrize("case", [c for c in cases() if c.mergeable and c.quantised], ids=str)
# What is about names, modules and files: every cell in one dtype, in turn; quantised layers with one method
in_turn = [c for c in cases(each_dtype=False) if not c.quantised or c.tuner == "lora"]
state_cases = pytest.mark.parametrize("case", in_turn, ids=str)
mergeable_state_cases = pytest.mark.parametrize("case", [c for c in in_turn if c.mergeable], ids=str)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of everything in the model's state dict; of quantised tensors, of what they consist of."""
    return {
        f"{name}.{part}": inner.clone()
        for name, tensor in model.state_dict().items()
        for part, inner in plain_parts(tensor).items()
    }


def plain_parts(tensor: Any) -> dict[str, Tensor]:
    if type(tensor) in (Tensor, nn.Parameter) or "__tensor_flatten__" not in dir(tensor):
        return {"": tensor}
    names, _ = tensor.__tensor_flatten__()
    return {name: getattr(tensor, name) for name in names}


def assert_same_tensors(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = tensors(model)
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """Everything that a failed call must leave alone: tensors, flags, module identities, what is active."""
    state = find_state(model)
    return (
        {name: stamp(t) for held in (model.named_parameters(), model.named_buffers()) for name, t in held},
        {name: p.requires_grad for name, p in model.named_parameters()},
        [id(m) for m in model.modules()],
        None if state is None else (dict(state.configs), state.active, state.trainable, state.enabled),
    )


def stamp(tensor: Tensor) -> list[tuple[int, int]]:
    return [(id(tensor), 0), *((part.data_ptr(), part._version) for part in plain_parts(tensor).values())]


@all_cases
def test_a_fresh_adapter_is_the_identity(case: Case) -> None:
    base, x = case.base().requires_grad_(False), case.feed()  # with gradients, torch may take another kernel
    expected = base(x)
    peftlite.inject_adapter_in_model(case.config(), base)
    if case.tuner in NO_IDENTITY:
        assert not torch.equal(base(x), expected)
    elif case.tuner in NEARLY_IDENTITY:
        torch.testing.assert_close(base(x), expected, **case.tolerance)
    else:
        case.assert_same(base(x), expected)


@exactly_mergeable_cases
def test_the_merged_weight_gives_the_same_outputs(case: Case) -> None:
    model, x = case.adapted(), case.feed()
    expected = model(x)
    assert not torch.equal(expected, case.base()(x))
    peftlite.merge_adapter(model)
    torch.testing.assert_close(model(x), expected, **case.tolerance)
    assert not any(list(layer.active_adapters) != layer.merged_adapters for layer in layers(model) if layer.merged)


@exactly_mergeable_cases
def test_merged_outputs_are_near_float64_truth(case: Case) -> None:
    model, x = case.adapted(), case.feed()
    exact = copy.deepcopy(model).double()(x.double() if x.is_floating_point() else x)
    peftlite.merge_adapter(model)
    torch.testing.assert_close(model(x).double(), exact, **case.tolerance)


@quantised_cases
def test_a_quantised_layer_gives_what_its_merged_weight_gives(case: Case) -> None:
    model, x = case.adapted(), case.feed()
    layer: Any = model.layer
    with torch.no_grad():
        wanted = layer.merged_dense(layer.host.read(), ["default"])
    peftlite.merge_adapter(model)
    merged = layer.host.read()
    torch.testing.assert_close(merged.weight.float(), wanted.weight, rtol=0, atol=float(wanted.weight.abs().max()) / 4)
    assert layer.merge_error < 0.2
    layer.get_base_layer().train()  # bitsandbytes rounds inputs to 8 bits for inference
    expected = torch.nn.functional.linear(x.float(), merged.weight.float(), wanted.bias.float())
    torch.testing.assert_close(layer(x).float(), expected, **case.tolerance)


@mergeable_cases
def test_unmerge_gives_every_bit_back(case: Case) -> None:
    model = case.adapted("a", "b", "c")
    before = tensors(model)
    for order in (["a"], ["a", "b"], ["c", "a", "b"]):
        for name in order:
            peftlite.merge_adapter(model, [name])
        for name in order[1:] + order[:1]:
            peftlite.unmerge_adapter(model, [name])
        assert_same_tensors(model, before)


@exactly_mergeable_cases
def test_merged_and_unmerged_active_adapters_add_up(case: Case) -> None:
    if case.tuner in RIVALS:
        return  # two copies of one module cannot be active together; test_lifecycle shows that it is refused
    model, x = case.adapted("a", "b"), case.feed()
    peftlite.set_adapter(model, ["a", "b"])
    expected = model(x)
    peftlite.merge_adapter(model, ["a" if "dora" in case.tuner else "b"])  # DoRA multiplies: what is merged comes first
    torch.testing.assert_close(model(x), expected, **case.tolerance)


@all_cases
def test_disabled_equals_the_base_model(case: Case) -> None:
    model, x = case.adapted(), case.feed()
    expected, adapted = case.base().requires_grad_(False)(x), model(x)
    with peftlite.disable_adapter(model):
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), adapted)
    peftlite.disable_adapters(model)
    assert torch.equal(model(x), expected)
    peftlite.enable_adapters(model)
    assert torch.equal(model(x), adapted)


@mergeable_cases
def test_disabling_while_merged_gives_the_base_model_and_merges_again(case: Case) -> None:
    model, x = case.adapted(), case.feed()
    expected = case.base().requires_grad_(False)(x)
    peftlite.merge_adapter(model)
    merged = tensors(model)
    with peftlite.disable_adapter(model):
        assert torch.equal(model(x), expected)
    assert_same_tensors(model, merged)


@all_cases
def test_gradients_reach_the_active_adapter_and_nothing_else(case: Case) -> None:
    model, x = case.adapted("a", "b"), case.feed()
    model.train()
    model(x).float().pow(2).sum().backward()
    owned = {id(p) for layer in layers(model) for p in layer.parameters_of("a")}
    assert owned
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad is (id(parameter) in owned), name
        assert (parameter.grad is not None) is (id(parameter) in owned), name


@state_cases
def test_both_shapes_give_the_same_bits_and_files(case: Case, tmp_path: Path) -> None:
    wrapped, inplace, x = case.base(), case.base(), case.feed()
    torch.manual_seed(3)
    peft_model = peftlite.get_peft_model(wrapped, case.config())
    torch.manual_seed(3)
    peftlite.inject_adapter_in_model(case.config(), inplace)
    for model in (peft_model, inplace):
        scramble(model, "default", seed=4)
    assert torch.equal(peft_model(x), inplace(x))
    peft_model.save_pretrained(tmp_path / "wrapped")
    peftlite.save_adapter(inplace, tmp_path / "inplace")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "wrapped" / name).read_bytes() == (tmp_path / "inplace" / name).read_bytes()


@state_cases
def test_what_is_saved_is_loaded_in_both_shapes(case: Case, tmp_path: Path) -> None:
    model, x = case.adapted(), case.feed()
    expected = model(x)
    peftlite.save_adapter(model, tmp_path)
    inplace = case.base()
    peftlite.load_adapter(inplace, tmp_path)
    wrapped = peftlite.PeftModel.from_pretrained(case.base(), tmp_path)
    for read in (inplace, wrapped):
        if case.tuner in PREPARED:  # written as plain LoRA of twice the rank, which is multiplied in another order
            torch.testing.assert_close(read(x), expected, **case.tolerance)
        else:
            case.assert_same(read(x), expected)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        shared = {"base_model.vera_A", "base_model.vera_B"}
        assert all(key.startswith("base_model.model.") or key in shared for key in file.keys())  # noqa: SIM118


@state_cases
def test_a_failed_call_changes_nothing(case: Case, tmp_path: Path) -> None:
    model = case.adapted("a", "b")
    before = snapshot(model)
    failing = [
        lambda: peftlite.set_adapter(model, "typo"),
        lambda: peftlite.delete_adapter(model, "typo"),
        lambda: peftlite.merge_adapter(model, ["a", "typo"]),
        lambda: peftlite.scale_adapter(model, "typo", 2.0),
        lambda: peftlite.set_requires_grad(model, ["a", "typo"]),
        lambda: peftlite.use_adapter(model, "typo"),
        lambda: peftlite.inject_adapter_in_model(case.config(), model, "a"),
        lambda: peftlite.inject_adapter_in_model(case.config(target_modules=["layer", "typo"]), model, "c"),
        lambda: peftlite.get_peft_model(model, case.config(), "c"),
        lambda: peftlite.load_adapter(model, tmp_path, "c"),
    ]
    for call in failing:
        with pytest.raises(PeftliteError):
            call()
        assert snapshot(model) == before


@mergeable_state_cases
def test_safe_merge_of_values_that_are_not_finite_changes_nothing(case: Case) -> None:
    model = case.adapted()
    layer = next(layer for layer in layers(model) if layer.mergeable(["default"]))
    next(layer.parameters_of("default")).data.fill_(float("inf"))
    before = snapshot(model)
    with pytest.raises(MergeError, match="default"):
        peftlite.merge_adapter(model, safe_merge=True)
    assert snapshot(model) == before


@state_cases
def test_copies_and_pickles_are_models_of_their_own(case: Case) -> None:
    model, x = case.adapted("a", "b"), case.feed()
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
        peftlite.set_adapter(other, "b")
        assert peftlite.active_adapters(model) == ["a"]
        assert torch.equal(model(x), expected)
        with peftlite.use_adapter(model, "b"), torch.no_grad():
            assert torch.equal(other(x), model(x))


@mergeable_state_cases
def test_a_merged_copy_unmerges_by_itself(case: Case) -> None:
    model = case.adapted()
    before = tensors(model)
    peftlite.merge_adapter(model)
    other = copy.deepcopy(model)
    peftlite.unmerge_adapter(other)
    assert_same_tensors(other, before)
    assert all(not layer.merged for layer in layers(other))
    assert any(layer.merged for layer in layers(model))


@state_cases
@pytest.mark.filterwarnings(
    "ignore:<class 'torch.autograd.function.Function'> should not be:DeprecationWarning"
)  # traced
def test_compiles_into_one_graph_for_all_adapters_of_a_rank(case: Case) -> None:
    names = [f"n{k}" for k in range(6)]
    model, x = case.adapted(*names), case.feed()
    graphs = []

    def backend(module: torch.fx.GraphModule, example: object) -> Any:
        graphs.append(module)
        return module.forward

    if case.kind == "linear8bit":
        model(x)  # the layer moves its tensors about in its first forward
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for name in names:
            peftlite.set_adapter(model, name)
            torch.testing.assert_close(compiled(x), model(x), **case.tolerance)
    assert len(graphs) == 1


@state_cases
def test_a_hook_on_any_part_is_called(case: Case) -> None:
    model, x = case.adapted(), case.feed()
    expected = model(x)
    for layer in layers(model):
        if isinstance(layer.get_base_layer(), NonDynamicallyQuantizableLinear):
            continue  # of nn.MultiheadAttention, which reads its weight and does not call it
        factors = [] if layer.host.weight_only else [s.name for s in layer.tuner.slots if s.kind is ModuleSlot]
        held = [layer.container(slot)["default"] for slot in factors if "default" in layer.container(slot)]
        for part in [layer.get_base_layer(), *held]:
            if not list(part.parameters()) or not layer.variants["default"].mergeable:
                continue
            seen: list[int] = []
            handle = part.register_forward_hook(lambda *_, seen=seen: seen.append(1))
            case.assert_same(model(x), expected)
            handle.remove()
            assert seen, part


@state_cases
def test_threads_use_the_adapters_of_their_own_calls(case: Case) -> None:
    names = ["a", "b", "c"]
    model, x = case.adapted(*names), case.feed()
    expected = {}
    for name in names:
        with peftlite.use_adapter(model, name):
            expected[name] = model(x)
    wrong: list[str] = []

    def whose(y: Tensor) -> str:  # not by equality: with threads, torch's convolutions differ in the last bit
        return min(expected, key=lambda name: float((y - expected[name]).detach().abs().max()))

    def work(name: str) -> None:
        for _ in range(20):
            with peftlite.use_adapter(model, name):
                if whose(model(x)) != name:
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch.equal(model(x), expected["a"])


@state_cases
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "nonreentrant"])
def test_recomputation_sees_the_adapters_of_its_own_call(case: Case, reentrant: bool) -> None:
    model, x = case.adapted("a", "b"), case.feed()
    exclusive = any(layer.variants["b"].exclusive for layer in layers(model))
    peftlite.set_adapter(model, ["b"] if exclusive else ["a", "b"])  # active, so that it trains; chosen per call below

    def gradients(recompute: bool) -> list[Tensor | None]:
        model.zero_grad()
        trigger = torch.ones((), requires_grad=True)  # the reentrant kind needs an input that requires a gradient

        def run(trigger: Tensor) -> Tensor:
            return model(x) * trigger

        with peftlite.use_adapter(model, "b"):
            y = checkpoint(run, trigger, use_reentrant=reentrant) if recompute else run(trigger)
        y.float().pow(2).sum().backward()
        return [p.grad for layer in layers(model) for n in ("a", "b") for p in layer.parameters_of(n)]

    expected, got = gradients(recompute=False), gradients(recompute=True)
    assert any(g is not None for g in expected)
    for one, other in zip(expected, got, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            case.assert_same(one, other)


@pytest.mark.parametrize("case", list(cases(unsupported=True, each_dtype=False)), ids=str)
def test_what_is_not_supported_is_refused_by_name(case: Case) -> None:
    base = case.base()
    before = snapshot(base)
    with pytest.raises(UnsupportedLayerError, match=UNSUPPORTED[case.tuner, case.kind]):
        peftlite.inject_adapter_in_model(case.config(), base)
    assert snapshot(base) == before
