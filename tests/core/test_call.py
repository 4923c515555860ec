"""Which adapters a call uses: threads, tasks, exceptions, recomputation, rows."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftlite
from peftlite import LoraConfig
from peftlite.core import call as calls
from peftlite.core.lifecycle import use_adapter_per_row
from peftlite.core.tree import layers
from peftlite.errors import AdapterNameError, StateError
from tests.contract.rows import scramble
from tests.models import Block

NAMES = ("a", "b", "c", "d")


class Net(nn.Module):
    """Three blocks, each of which may be recomputed, and all of which may be recomputed together."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.reentrant: bool | None = None
        self.nested = False

    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.run, x, use_reentrant=self.reentrant) if self.nested else self.run(x)


@pytest.fixture
def net() -> Net:
    model = Net()
    for name in NAMES:
        config = LoraConfig(r=2, target_modules=["up", "down"])
        peftlite.inject_adapter_in_model(config, model, name)
        scramble(model, name)
    peftlite.set_adapter(model, NAMES)  # all train; each call says which it uses
    return model


def gradients(model: nn.Module) -> list[Tensor | None]:
    found = [p.grad for layer in layers(model) for name in NAMES for p in layer.parameters_of(name)]
    model.zero_grad()
    return found


def assert_same_gradients(one: list[Tensor | None], other: list[Tensor | None]) -> None:
    assert [g is None for g in one] == [g is None for g in other]
    assert any(g is not None for g in one)
    for a, b in zip(one, other, strict=True):
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def by_name(model: nn.Module, name: str) -> AbstractContextManager[Any]:
    return peftlite.use_adapter(model, name)


def by_row(model: nn.Module, name: str) -> AbstractContextManager[Any]:
    return use_adapter_per_row(model, [name, "c", name, "__base__"])


def train(net: Net, choose: Callable[..., AbstractContextManager[Any]], where: str) -> list[Tensor | None]:
    torch.manual_seed(1)
    x = torch.randn(4, 6, requires_grad=True)
    with choose(net, "b"):
        first = net(x).pow(2).sum()
    with choose(net, "d"):
        second = net(x).pow(3).sum()
        if where == "inside another block":
            (first + second).backward()
    if where == "outside":
        (first + second).backward()
    if where == "in another thread":
        thread = threading.Thread(target=(first + second).backward)
        thread.start()
        thread.join()
    return gradients(net)


torch_warns = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # if nested


@torch_warns
@pytest.mark.parametrize("where", ["outside", "inside another block", "in another thread"])
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "nonreentrant"])
@pytest.mark.parametrize("choose", [by_name, by_row])
def test_recomputation_uses_the_adapters_of_the_call_it_repeats(
    net: Net, choose: Callable[..., AbstractContextManager[Any]], reentrant: bool, nested: bool, where: str
) -> None:
    expected = train(net, choose, "outside")
    net.reentrant, net.nested = reentrant, nested
    assert_same_gradients(train(net, choose, where), expected)


def test_without_the_log_recomputation_would_be_wrong(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = train(net, by_name, "outside")
    net.reentrant = True
    monkeypatch.setattr(calls, "_recall", lambda: calls._variable.get())
    with pytest.raises(AssertionError):
        assert_same_gradients(train(net, by_name, "inside another block"), expected)


@torch_warns
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "nonreentrant"])
def test_a_plain_call_recomputes_with_the_active_adapters_after_an_aborted_backward(
    net: Net, reentrant: bool, nested: bool
) -> None:
    x = torch.randn(4, 6, requires_grad=True)
    net(x).sum().backward()
    expected = gradients(net)
    net.reentrant, net.nested = reentrant, nested
    with peftlite.use_adapter(net, "b"):
        loss = net(x).sum()
    handle = x.register_hook(lambda grad: 1 / 0)  # the last step of backward fails
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    handle.remove()
    net.zero_grad()
    net(x).sum().backward()
    assert_same_gradients(gradients(net), expected)


def test_threads_that_train_with_checkpointing_get_their_own_gradients(net: Net) -> None:
    x = torch.randn(4, 6)

    def gradient(name: str) -> Tensor:
        mine = x.clone().requires_grad_()
        with peftlite.use_adapter(net, name):
            loss = net(mine).pow(2).sum()
        return torch.autograd.grad(loss, mine)[0]

    expected = {name: gradient(name) for name in NAMES}
    net.reentrant = False
    got: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    threads = [threading.Thread(target=lambda n=name: got[n].extend(gradient(n) for _ in range(10))) for name in NAMES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in NAMES:
        assert len(got[name]) == 10
        for one in got[name]:
            torch.testing.assert_close(one, expected[name])


def test_async_tasks_do_not_see_each_other(net: Net) -> None:
    x = torch.randn(2, 6)
    expected = {}
    for name in NAMES:
        with peftlite.use_adapter(net, name):
            expected[name] = net(x)

    async def task(name: str) -> None:
        for _ in range(5):
            with peftlite.use_adapter(net, name):
                await asyncio.sleep(0)
                assert torch.equal(net(x), expected[name])

    async def main() -> None:
        await asyncio.gather(*(task(name) for name in NAMES))

    asyncio.run(main())


def test_an_exception_inside_a_call_leaves_nothing_behind(net: Net) -> None:
    x = torch.randn(2, 6)
    expected = net(x)
    for block in (peftlite.use_adapter(net, "b"), use_adapter_per_row(net, ["a", "b"])):
        with pytest.raises(RuntimeError), block:
            net(torch.randn(2, 7))
        assert calls.current() is None
        assert torch.equal(net(x), expected)


def test_calls_nest_and_models_do_not_mix(net: Net) -> None:
    other, x = Net(), torch.randn(2, 6)
    for name in ("a", "b"):
        peftlite.inject_adapter_in_model(LoraConfig(r=2, target_modules=["up"]), other, name)
        scramble(other, name)
    peftlite.set_adapter(other, "b")
    plain = other(x)
    with peftlite.use_adapter(net, "a"):
        alone = net(x)
        assert torch.equal(other(x), plain)
        with peftlite.use_adapter(other, "a"):
            assert not torch.equal(other(x), plain)
            assert torch.equal(net(x), alone)
            with peftlite.use_adapter(net):
                assert not torch.equal(net(x), alone)
        assert torch.equal(other(x), plain)


@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be:DeprecationWarning")
def test_code_compiled_before_a_thread_chose_adapters_heeds_its_first_choice(net: Net) -> None:
    """In a thread of its own: in this one, earlier tests may have chosen adapters."""
    peftlite.set_adapter(net, "a")
    x = torch.randn(4, 6)
    with torch.no_grad(), peftlite.use_adapter(net, "b"):
        expected = net(x)
    found: list[Tensor] = []

    def work() -> None:
        torch._dynamo.reset()
        compiled = torch.compile(net, fullgraph=True, backend="eager")
        with torch.no_grad():
            compiled(x)
            with peftlite.use_adapter(net, "b"):
                found.append(compiled(x))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.testing.assert_close(found, [expected])


def test_a_thread_started_with_a_copied_context_sees_the_call(net: Net) -> None:
    x = torch.randn(2, 6)
    with peftlite.use_adapter(net, "b"):
        expected, context = net(x), contextvars.copy_context()
    seen: list[Tensor] = []
    thread = threading.Thread(target=lambda: context.run(lambda: seen.append(net(x))))
    thread.start()
    thread.join()
    assert torch.equal(seen[0], expected)


# ---- rows
def test_each_row_uses_its_own_adapter(net: Net) -> None:
    rows = ["b", "__base__", "a", "b", "d"]
    x = torch.randn(5, 3, 6)
    with use_adapter_per_row(net, rows):
        y = net(x)
        flattened = net(x.flatten(0, 1))  # three entries per row
    for i, name in enumerate(rows):
        with peftlite.use_adapter(net, *(() if name == "__base__" else (name,))):
            torch.testing.assert_close(y[i], net(x[i]))
            torch.testing.assert_close(flattened.view_as(y)[i], net(x[i]))


def test_each_adapter_of_a_mixed_batch_gets_its_own_gradient(net: Net) -> None:
    rows, x = ["b", "__base__", "a", "b"], torch.randn(4, 6)
    with use_adapter_per_row(net, rows):
        net(x).pow(2).sum().backward()
    mixed = gradients(net)
    for i, name in enumerate(rows):
        if name != "__base__":
            with peftlite.use_adapter(net, name):
                net(x[i : i + 1]).pow(2).sum().backward()
    assert_same_gradients(mixed, gradients(net))


@pytest.mark.parametrize(
    ("rows", "error", "says"),
    [
        (["a", "typo"], AdapterNameError, "`typo`"),
        ([], StateError, "one name per row"),
        ("ab", StateError, "one name per row"),
    ],
)
def test_rows_that_cannot_be_meant_are_refused_on_entry(net: Net, rows: Any, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        use_adapter_per_row(net, rows)


def test_a_batch_with_another_number_of_rows_is_refused(net: Net) -> None:
    with use_adapter_per_row(net, ["a", "b", "c"]), pytest.raises(StateError, match=r"3 rows.*Linear.*\(4, 6\)"):
        net(torch.randn(4, 6))


def test_per_call_adapters_are_refused_while_some_are_merged(net: Net) -> None:
    peftlite.merge_adapter(net, ["a"])
    for block in (peftlite.use_adapter, lambda model, name: use_adapter_per_row(model, [name])):
        with pytest.raises(StateError, match="`a` is merged"):
            block(net, "b")


def test_torch_still_has_what_recomputation_takes() -> None:
    calls._require_torch_internals()
    node = torch.zeros((), requires_grad=True).view(()).grad_fn
    assert calls._next_sequence_number() > node._sequence_nr()  # type: ignore[union-attr]
    assert torch._C._current_graph_task_id() == -1
