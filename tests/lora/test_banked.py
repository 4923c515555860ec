"""Rows of different LoRA adapters, run together: equal to one by one, whatever is in the way or in the mix."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftlite
from peftlite import IA3Config, LoraConfig
from peftlite.core.tree import layers
from peftlite.errors import AdapterNameError, StateError
from peftlite.tuners.lora import banked
from peftlite.tuners.lora import blocks as block_sizes
from peftlite.tuners.lora.banked import LoraBank
from tests.contract.rows import scramble
from tests.quantised import QUANTISED

NAMES = ["a", "b", "c", "d"]
ROWS = ["b", "__base__", "a", "d", "b", "c", "a", "a"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 32)
        self.down = nn.Linear(32, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.up(x)))
        return y


def adapted(*more: LoraConfig, dtype: torch.dtype = torch.float32, **fields: Any) -> Net:
    """Adapters of unequal ranks and scalings, one of which is on one of the layers only."""
    torch.manual_seed(0)
    model = Net().to(dtype)
    configs = [
        LoraConfig(r=2, target_modules=["up", "down"], **fields),
        LoraConfig(r=4, lora_alpha=3, target_modules=["up", "down"], **fields),
        LoraConfig(r=3, target_modules=["down"], **fields),
        *(more or [LoraConfig(r=2, use_rslora=True, target_modules=["up", "down"], **fields)]),
    ]
    for name, config in zip(NAMES, configs, strict=False):
        peftlite.inject_adapter_in_model(config, model, name)
        scramble(model, name)
    peftlite.set_adapter(model, NAMES)
    return model


def one_by_one(model: nn.Module, x: Tensor, rows: list[str] = ROWS) -> Tensor:
    found = []
    for part, name in zip(x.chunk(len(rows)), rows, strict=True):
        with peftlite.use_adapter(model, *(() if name == "__base__" else (name,))):
            found.append(model(part))
    return torch.cat(found)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Of each call of a bank, whether it served the batch."""
    served: list[bool] = []
    call = LoraBank.__call__

    def counting(self: LoraBank, x: Tensor, order: Any) -> Tensor | None:
        y = call(self, x, order)
        served.append(y is not None)
        return y

    with monkeypatch.context() as patch:
        patch.setattr(LoraBank, "__call__", counting)
        yield served


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("shape", [(8, 64), (8, 5, 64), (24, 64), (16, 3, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_together_equal_rows_one_by_one(
    dtype: torch.dtype, shape: tuple[int, ...], grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = adapted(dtype=dtype), torch.randn(shape).to(dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
    with torch.set_grad_enabled(grad), counted(monkeypatch) as served:
        expected = one_by_one(model, x)
        with peftlite.use_adapter_per_row(model, ROWS):
            torch.testing.assert_close(model(x), expected, **tolerance)
        order = sorted(range(8), key=lambda i: ROWS[i])
        entries = torch.stack([c for k in order for c in x.chunk(8)[k]])
        with peftlite.use_adapter_per_row(model, sorted(ROWS)):  # nothing to sort
            torch.testing.assert_close(model(entries), one_by_one(model, entries, sorted(ROWS)), **tolerance)
    assert served == [True] * 4


@pytest.mark.parametrize("large", [1 << 17, 128, 1], ids=["whole", "some groups at a time", "by row"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "rows",
    [
        ["d", "__base__", "c", "a", "b"],
        ["a"] * 5 + ["b", "__base__", "c"],
        ["__base__", "d"],
        ["c", "c", "a", "d", "d"],
        ["c", "a", "c"],
    ],
    ids=str,
)
def test_groups_of_every_size_are_right(
    rows: list[str], dtype: torch.dtype, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_sizes, "LARGE", large)
    model = adapted(dtype=dtype)
    for count in (1, 3, 0):
        x = torch.randn(len(rows) * count, 64).to(dtype)
        with torch.no_grad(), counted(monkeypatch) as served, peftlite.use_adapter_per_row(model, rows):
            together = model(x)
        assert served == [True, True]
        if count:
            tolerance = 1e-5 if dtype is not torch.bfloat16 else 2e-2
            torch.testing.assert_close(together, one_by_one(model, x, rows), rtol=tolerance, atol=tolerance * 2)
        assert together.shape == x.shape


def test_small_groups_are_taken_together_and_a_large_one_alone() -> None:
    runs = ((0, 2), (2, 3), (3, 9), (7, 1), (5, 4), (6, 1))
    assert banked.together(runs, 1, 5) == (
        (slice(0, 5), ((0, 2), (2, 3))),
        (slice(5, 14), ((3, 9),)),
        (slice(14, 19), ((7, 1), (5, 4))),
        (slice(19, 20), ((6, 1),)),
    )
    assert banked.together(((1, 2), (0, 1)), 3, 9) == ((slice(0, 9), ((1, 6), (0, 3))),)
    assert banked.together(((0, 2), (1, 1)), 0, 5) == ()


@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "in blocks"])
def test_half_precision_is_as_near_to_float64_as_one_by_one(blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if blocks:
        monkeypatch.setattr(block_sizes, "LARGE", 64)
    model, x = adapted(dtype=torch.bfloat16), torch.randn(8, 50, 64).bfloat16()
    exact = one_by_one(copy.deepcopy(model).double(), x.double())
    with torch.no_grad(), peftlite.use_adapter_per_row(model, ROWS):
        together = (model(x).double() - exact).abs().mean()
    assert together <= 1.02 * (one_by_one(model, x).double() - exact).abs().mean()


@pytest.mark.parametrize("rows", [ROWS, ["b", "__base__", "a"]], ids=["groups", "each its own"])
def test_narrower_adapters_do_not_round_what_the_base_layer_gives(rows: list[str]) -> None:
    model, x = adapted(), torch.randn(len(rows), 64)
    for name, part in model.named_parameters():
        part.data = part.data.bfloat16() if "lora_" in name else part.data
    with torch.no_grad():
        with peftlite.use_adapter_per_row(model, rows):
            together = model.up(x)
        expected, base = one_by_one(model.up, x, rows), rows.index("__base__")
    torch.testing.assert_close(together[base], expected[base], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together, expected, rtol=1e-2, atol=1e-2)  # products in bf16


@pytest.mark.parametrize("batched", [False, True], ids=["by group", "batched"])
def test_each_adapter_gets_the_gradient_of_its_rows(batched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted(), torch.randn(8, 3, 64)

    def gradients(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        model.zero_grad()
        given = x.clone().requires_grad_()
        run(given).pow(2).sum().backward()
        owned = [p for layer in layers(model) for name in NAMES for p in layer.parameters_of(name)]
        return [given.grad, *(p.grad for p in owned)]  # type: ignore[list-item]

    expected = gradients(lambda given: one_by_one(model, given))
    if batched:  # what a GPU does
        monkeypatch.setattr(LoraBank, "by_group", LoraBank.batched)
    with peftlite.use_adapter_per_row(model, ROWS):
        got = gradients(model)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_writes_of_every_kind_are_seen() -> None:
    model, x = adapted(), torch.randn(8, 64)
    A = model.up.lora_A["a"].weight  # type: ignore[union-attr,index]
    with torch.no_grad(), peftlite.use_adapter_per_row(model, ROWS):
        for write in (
            lambda: A.data.mul_(3),
            lambda: A.add_(1),
            lambda: setattr(A, "data", torch.randn_like(A)),
            lambda: model.load_state_dict(
                {k: v * 2 if "lora_" in k else v for k, v in model.state_dict().items()}, assign=True
            ),
        ):
            before = model(x)
            write()
            after = model(x)
            assert not torch.allclose(before, after)
            torch.testing.assert_close(after, one_by_one(model, x), rtol=1e-4, atol=1e-4)


def test_another_variant_in_the_mix_goes_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted(LoraConfig(r=2, use_dora=True, target_modules=["up"])), torch.randn(8, 64)
    with counted(monkeypatch) as served, peftlite.use_adapter_per_row(model, ROWS):
        torch.testing.assert_close(model(x), one_by_one(model, x))
    assert served == [True]  # only the layer without it


def test_another_method_in_the_mix_is_right() -> None:
    model, x, rows = Net(), torch.randn(3, 64), ["b", "__base__", "a"]
    configs = {"a": ["down"], "b": ["down"], "c": ["down"]}
    for name, targets in configs.items():
        saved = ["up"] if name == "b" else None
        peftlite.inject_adapter_in_model(LoraConfig(target_modules=targets, modules_to_save=saved), model, name)
        scramble(model, name)
    with peftlite.use_adapter_per_row(model, rows):
        torch.testing.assert_close(model(x), one_by_one(model, x, rows))


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "base_layer"])
def test_hooks_on_any_part_are_called(part: str) -> None:
    model, x = adapted(), torch.randn(8, 64)
    layer: Any = model.up
    module = layer.base_layer if part == "base_layer" else getattr(layer, part)["a"]
    seen: list[Tensor] = []
    with torch.no_grad(), peftlite.use_adapter_per_row(model, ROWS):
        expected = model(x)
        module.register_forward_hook(lambda module, args, out: seen.append(args[0]))
        torch.testing.assert_close(model(x), expected)
    assert len(seen) == 1
    if part == "base_layer":
        assert torch.equal(seen[0], x)  # in the order in which the rows came


@pytest.mark.parametrize("how", ["hook", "hook, of a module that ran alone", "forward", "dict of hooks"])
@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_dropout"])
def test_what_comes_in_the_way_later_is_seen(part: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, rows = (
        peftlite.get_peft_model(Net(), LoraConfig(target_modules=["up"]), "a"),
        torch.randn(4, 64),
        [*"baab"],
    )
    model.add_adapter("b", LoraConfig(target_modules=["up"]))  # never active alone
    scramble(model, "a")
    scramble(model, "b")
    layer: Any = model.get_submodule("base_model.model.up")
    module = getattr(layer, part)["b"]
    with torch.no_grad(), counted(monkeypatch) as served, peftlite.use_adapter_per_row(model, rows):
        for _ in range(3):  # until no module makes dicts for hooks any more
            model(x)
        if how == "hook, of a module that ran alone":  # which made the dict that the hook goes into
            one_by_one(model, x, rows)
            model(x)
        if how == "forward":
            monkeypatch.setattr(module, "forward", lambda given, run=module.forward: run(given) * 2)
        elif how == "dict of hooks":
            module._forward_hooks = OrderedDict({0: lambda module, args, y: y * 2})
        else:
            module.register_forward_hook(lambda module, args, y: y * 2)
        served.clear()
        torch.testing.assert_close(model(x), one_by_one(model, x, rows))
        assert served == [False]


def test_dropout_drops_in_training_and_not_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted(lora_dropout=0.5), torch.randn(8, 64)
    with counted(monkeypatch) as served, peftlite.use_adapter_per_row(model, ROWS):
        model.eval()
        torch.testing.assert_close(model(x), one_by_one(model, x))
        model.train()
        base = ROWS.index("__base__")
        torch.manual_seed(1)
        many = torch.stack([model(x) for _ in range(2000)])
        assert (many[:, base] == many[0, base]).all()
        assert not torch.equal(many[0], many[1])
    assert all(served)
    model.eval()
    up: Any = model.up
    with peftlite.use_adapter_per_row(model, ROWS):
        expected = up(x)
        model.train()
        mean = torch.stack([up(x) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, expected, rtol=0.2, atol=0.2)
    up.lora_dropout["a"].p = 0.1  # not the same for all: one group after the other
    with counted(monkeypatch) as served, peftlite.use_adapter_per_row(model, ROWS):
        model(x)
    assert served == [False, True]


def test_autocast_and_transforms_go_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted(), torch.randn(8, 64)
    with counted(monkeypatch) as served, peftlite.use_adapter_per_row(model, ROWS):
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(x), one_by_one(model, x), rtol=1e-2, atol=1e-2)
        torch.func.grad(lambda x: model(x).sum())(x)
    assert not any(served)


@pytest.mark.parametrize("kind", ["linear4bit-nf4", "torchao-int8"])
def test_quantised_layers_have_banks_too(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(QUANTISED[kind](nn.Linear(64, 32).bfloat16()))
    for name in ("a", "b"):
        peftlite.inject_adapter_in_model(LoraConfig(r=4, target_modules=["0"]), model, name)
        scramble(model, name)
    x, rows = torch.randn(4, 3, 64).bfloat16(), ["b", "a", "__base__", "a"]
    with counted(monkeypatch) as served, peftlite.use_adapter_per_row(model, rows), torch.no_grad():
        torch.testing.assert_close(model(x), one_by_one(model, x, rows), rtol=2e-2, atol=5e-2)
    assert served == [True]


@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be:DeprecationWarning")
def test_compiled_code_serves_batches_of_any_rows() -> None:
    model, x = adapted(), torch.randn(8, 64)
    graphs = []

    def backend(module: torch.fx.GraphModule, example: object) -> Any:
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    batches = [ROWS, ROWS[::-1], ["a", "c", "a", "__base__", "d", "d", "b", "b"]]
    with torch.no_grad():
        for rows in batches:
            with peftlite.use_adapter_per_row(model, rows):
                torch.testing.assert_close(compiled(x), one_by_one(model, x, rows), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


def test_ids_say_the_same_as_names() -> None:
    model, x = adapted(), torch.randn(8, 64)
    ids = peftlite.adapter_ids(model)
    assert list(ids) == NAMES
    assert 0 not in ids.values()
    rows = torch.tensor([ids.get(name, 0) for name in ROWS])
    with peftlite.use_adapter_per_row(model, ROWS):
        expected = model(x)
    with peftlite.use_adapter_per_row(model, rows):
        assert torch.equal(model(x), expected)
    peftlite.delete_adapter(model, "b")
    with pytest.raises(AdapterNameError, match=f"id `{ids['b']}`"):
        peftlite.use_adapter_per_row(model, rows)
    for wrong in (rows.float(), rows[None], rows[:0], rows.bool()):
        with pytest.raises(StateError, match="one integer per row"):
            peftlite.use_adapter_per_row(model, wrong)
    wrapped = peftlite.get_peft_model(Net(), LoraConfig(target_modules=["up"]))
    scramble(wrapped, "default")
    y = wrapped(x[:2], adapter_names=torch.tensor([1, 0]))
    torch.testing.assert_close(y, wrapped(x[:2], adapter_names=["default", "__base__"]))


def test_a_method_without_a_bank_goes_the_long_way() -> None:
    model = Net()
    for name in ("a", "b"):
        peftlite.inject_adapter_in_model(IA3Config(target_modules=["up"], feedforward_modules=[]), model, name)
        scramble(model, name)
    x, rows = torch.randn(3, 64), ["b", "__base__", "a"]
    with peftlite.use_adapter_per_row(model, rows):
        torch.testing.assert_close(model(x), one_by_one(model, x, rows))
