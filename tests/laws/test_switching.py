"""Which adapters a call uses is decided by that call alone, whatever other callers choose at the same time.

`PEFTLITE_CALLS=10000` makes each of the eight threads call so often, and not some hundreds of times.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
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

THREADS = 8
CALLS = int(os.environ.get("PEFTLITE_CALLS", "300"))
NAMES = tuple("abcdefgh")
SHAPES = ("in place", "wrapped")
Choice = Callable[[nn.Module], AbstractContextManager[Any]]


class Net(nn.Module):
    """Two blocks. Each is recomputed as `inner` says, and both together as `outer` says: None for not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.inner: bool | None = None
        self.outer: bool | None = None

    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = again(block, x, self.inner)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return again(self.run, x, self.outer)


def again(part: Callable[[Tensor], Tensor], x: Tensor, reentrant: bool | None) -> Tensor:
    return part(x) if reentrant is None else checkpoint(part, x, use_reentrant=reentrant)  # type: ignore[no-any-return]


def adapted(shape: str = "in place") -> Any:
    """Every adapter trains; of the plain call, `a` and `b` are in use."""
    torch.manual_seed(0)
    model: nn.Module = Net()
    for name in NAMES:
        peftlite.inject(model, LoraConfig(r=2, target_modules=["up", "down"]), name)
        scramble(model, name)
    peftlite.set_adapter(model, ["a", "b"])
    return model if shape == "in place" else peftlite.wrap(model)


CHOICES: dict[str, Choice] = {
    "plain": lambda m: nullcontext(),
    "one": lambda m: peftlite.use_adapter(m, "c"),
    "another": lambda m: peftlite.use_adapter(m, "d"),
    "two": lambda m: peftlite.use_adapter(m, "e", "a"),
    "rows": lambda m: use_adapter_per_row(m, ["b", "__base__", "g", "b"]),
    "other rows": lambda m: use_adapter_per_row(m, ["h", "a", "a", "c"]),
    "disabled": peftlite.disable_adapter,
}
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))


def together(work: Callable[[int], object], count: int = THREADS) -> None:
    """Run `work(0)`, `work(1)`, ... in threads that begin together and are switched between often."""
    gate, failures = threading.Barrier(count), list[BaseException]()

    def one(number: int) -> None:
        gate.wait()
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if failures:
        raise failures[0]


@pytest.fixture(params=SHAPES)
def model(request: pytest.FixtureRequest) -> Any:
    return adapted(request.param)


def outputs(model: Any) -> dict[str, Tensor]:
    """What each choice gives, in a thread of its own."""
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, choose in CHOICES.items():
            with choose(model):
                found[name] = model(X)
    assert len({y.numpy().tobytes() for y in found.values()}) == len(CHOICES)
    return found


# ---- threads
def test_threads_that_mix_all_ways_of_calling_get_no_wrong_result(model: Any) -> None:
    expected, wrong = outputs(model), list[str]()

    @torch.no_grad()
    def work(number: int) -> None:
        order = random.Random(number)
        names = list(CHOICES)
        for _ in range(CALLS):
            name = order.choice(names)
            with CHOICES[name](model):
                if not torch.equal(model(X), expected[name]):
                    wrong.append(name)

    together(work)
    assert not wrong, f"{len(wrong)} of {THREADS * CALLS} calls: {wrong[:5]}"
    assert calls.current() is None


def test_adapter_names_of_the_wrapper_belong_to_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("wrapped")
    rows = [[NAMES[(i + k) % 8] for k in range(4)] for i in range(THREADS)]
    with torch.no_grad():
        expected = [model(X, adapter_names=names) for names in rows]

    @torch.no_grad()
    def work(number: int) -> None:
        for _ in range(CALLS // 3):
            assert torch.equal(model(X, adapter_names=rows[number]), expected[number])

    together(work)


def test_blocks_inside_one_another_and_two_models_in_many_threads() -> None:
    one, other = adapted(), adapted("wrapped")
    expected = outputs(one)

    @torch.no_grad()
    def work(number: int) -> None:
        outer, inner = list(CHOICES)[1 + number % 3], list(CHOICES)[-1 - number % 3]
        for _ in range(CALLS // 6):
            with CHOICES[outer](one), CHOICES[inner](other):
                assert torch.equal(one(X), expected[outer])
                assert torch.equal(other(X), expected[inner])
                with CHOICES[inner](one):
                    assert torch.equal(one(X), expected[inner])
                assert torch.equal(one(X), expected[outer])

    together(work)


def test_adapters_that_come_and_go_meanwhile_change_nothing_for_others(model: Any) -> None:
    """One thread adds and deletes an adapter, also on layers that had none, while others are inside of their blocks."""
    expected = outputs(model)
    for name, choose in CHOICES.items():
        if name == "plain":
            continue
        with torch.no_grad(), choose(model):
            peftlite.inject(model, LoraConfig(r=3, target_modules=["up"]), "new")
            assert torch.equal(model(X), expected[name])
            peftlite.scale_adapter(model, "new", 2.0)
            peftlite.delete_adapter(model, "new")
            assert torch.equal(model(X), expected[name])


def test_layers_that_come_before_those_of_a_call_do_not_take_their_place() -> None:
    torch.manual_seed(0)
    model = Net()
    peftlite.inject(model, LoraConfig(r=2, target_modules=["down"]), "a")
    scramble(model, "a")
    with torch.no_grad(), peftlite.use_adapter(model, "a"), use_adapter_per_row(model, ["a", "__base__", "a", "a"]):
        expected = model(X)
        peftlite.inject(model, LoraConfig(r=2, target_modules=["up"]), "b")
        torch.testing.assert_close(model(X), expected)
        with peftlite.use_adapter(model, "a"):
            peftlite.delete_adapter(model, "b")
            assert not torch.equal(model(X), expected)
        torch.testing.assert_close(model(X), expected)


@pytest.mark.parametrize("choice", ["one", "other rows"])
def test_a_call_whose_adapter_is_deleted_or_that_others_merge_under_is_refused(model: Any, choice: str) -> None:
    with torch.no_grad(), CHOICES[choice](model):
        expected = model(X)
        peftlite.merge_adapter(model, ["a"])
        with pytest.raises(StateError, match="`a` was merged"):
            model(X)
        peftlite.unmerge_adapter(model)
        assert torch.equal(model(X), expected)
        peftlite.scale_adapter(model, "c", 2.0)
        assert not torch.equal(model(X), expected)
        peftlite.delete_adapter(model, "c")
        with pytest.raises(AdapterNameError, match="`c`"):
            model(X)
    model(X)


# ---- tasks and pools
@torch.no_grad()
def test_tasks_that_wait_inside_their_blocks_keep_their_adapters(model: Any) -> None:
    expected = outputs(model)

    async def task(number: int) -> None:
        order = random.Random(number)
        for _ in range(CALLS // 10):
            name = order.choice(list(CHOICES))
            with CHOICES[name](model):
                await asyncio.sleep(0)
                assert torch.equal(model(X), expected[name])
                await asyncio.gather(*(child(name) for _ in range(2)))  # tasks are given a copy of the context
                assert torch.equal(await asyncio.to_thread(once), expected[name])

    async def child(name: str) -> None:
        await asyncio.sleep(0)
        assert torch.equal(once(), expected[name])

    @torch.no_grad()
    def once() -> Tensor:
        y: Tensor = model(X)
        return y

    async def main() -> None:
        await asyncio.gather(*(task(number) for number in range(THREADS)))

    asyncio.run(main())


def test_work_given_to_a_pool_has_the_adapters_of_its_context_only(model: Any) -> None:
    expected = outputs(model)

    @torch.no_grad()
    def once() -> Tensor:
        y: Tensor = model(X)
        return y

    with ThreadPoolExecutor(4) as pool:
        for name, choose in list(CHOICES.items()) * 10:
            with choose(model):
                context = contextvars.copy_context()
                inside = pool.submit(context.run, once)
                outside = pool.submit(once)
                assert torch.equal(outside.result(), expected["plain"])
            assert torch.equal(inside.result(), expected[name])
            assert torch.equal(pool.submit(context.run, once).result(), expected[name])  # after the block, too


def test_an_exception_in_one_thread_is_nothing_to_the_others(model: Any) -> None:
    expected = outputs(model)

    @torch.no_grad()
    def work(number: int) -> None:
        for _ in range(CALLS // 6):
            name = list(CHOICES)[number % len(CHOICES)]
            if number % 2:
                with pytest.raises((RuntimeError, StateError)), CHOICES[name](model):
                    model(torch.ones(4, 7))
                assert torch.equal(model(X), expected["plain"])
            with CHOICES[name](model):
                assert torch.equal(model(X), expected[name])

    together(work)


# ---- recomputation in backward
WAYS = [(inner, outer) for inner in (None, False, True) for outer in (None, False, True)]
WAY_IDS = [f"{inner}-in-{outer}" for inner, outer in WAYS]


def gradients(model: nn.Module, name: str) -> Iterator[Tensor]:
    for layer in layers(model):
        for parameter in layer.parameters_of(name):
            assert parameter.grad is not None
            yield parameter.grad
            parameter.grad = None


def trained(model: Any, number: int, where: str) -> list[Tensor]:
    """One step of the adapter of a thread, of which no other thread has one; with other calls before and after."""
    name = NAMES[number]
    x = X.clone().requires_grad_()
    rows = [name, "__base__", name, name]
    with peftlite.use_adapter(model, name):
        loss = model(x).square().sum()
    with use_adapter_per_row(model, rows):
        loss = loss + model(x).pow(3).sum()
        if where == "inside":
            loss.backward()
    if where == "in the block of another":
        with peftlite.use_adapter(model, NAMES[number - 1]):
            loss.backward()
    if where == "outside":
        loss.backward()
    assert x.grad is not None
    return [x.grad, *gradients(model, name)]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of reentrant ones inside one another
@pytest.mark.parametrize("where", ["outside", "inside", "in the block of another"])
@pytest.mark.parametrize(("inner", "outer"), WAYS, ids=WAY_IDS)
def test_threads_that_train_with_recomputation_get_the_gradients_of_their_calls(
    inner: bool | None, outer: bool | None, where: str
) -> None:
    model = adapted()
    peftlite.set_adapter(model, NAMES)  # all train
    expected = [trained(model, number, "outside") for number in range(THREADS)]
    model.inner, model.outer = inner, outer

    def work(number: int) -> None:
        for _ in range(2):
            for got, wanted in zip(trained(model, number, where), expected[number], strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)

    together(work)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("choice", ["one", "rows", "disabled"])
def test_a_block_inside_of_what_is_recomputed_is_entered_again(choice: str, reentrant: bool) -> None:
    model = adapted()

    def part(x: Tensor) -> Tensor:
        with CHOICES[choice](model):
            y: Tensor = model(x)
        return torch.tanh(y)

    def gradient(way: bool | None) -> Tensor | None:
        x = X.clone().requires_grad_()
        with peftlite.use_adapter(model, "d"):
            y = model(again(part, model(x), way))
        y.square().sum().backward()
        return x.grad

    torch.testing.assert_close(gradient(reentrant), gradient(None), rtol=1e-3, atol=1e-3)


def test_a_thread_that_trains_without_choosing_is_not_given_what_others_choose() -> None:
    """The numbers by which recomputation finds its call are those of a thread: others have the same ones."""
    model = adapted()

    def gradient() -> Tensor | None:
        x = X.clone().requires_grad_()
        model(x).square().sum().backward()
        return x.grad

    expected = gradient()
    model.inner = False
    gate = threading.Barrier(2)
    got: list[Tensor | None] = []

    def plain() -> None:
        x = X.clone().requires_grad_()
        loss = model(x).square().sum()  # before anybody has chosen anything
        gate.wait()
        gate.wait()
        loss.backward()
        got.append(x.grad)

    thread = threading.Thread(target=plain)
    thread.start()
    gate.wait()
    with peftlite.use_adapter(model, "c"):
        kept = [model(X.clone().requires_grad_()) for _ in range(20)]
        gate.wait()
    thread.join()
    assert len(kept) == 20
    torch.testing.assert_close(got[0], expected)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(("inner", "outer"), WAYS, ids=WAY_IDS)
def test_backward_in_another_thread_is_right_or_refused(inner: bool | None, outer: bool | None) -> None:
    """Several threads run forward, and one that made none of the calls runs all of backward."""
    model = adapted()
    peftlite.set_adapter(model, NAMES)
    xs = [X.clone().requires_grad_() for _ in range(THREADS)]
    losses: dict[int, Tensor] = {}

    def forward(number: int) -> None:
        with peftlite.use_adapter(model, NAMES[number]):
            losses[number] = model(xs[number]).square().sum()

    together(forward)
    for loss in losses.values():
        loss.backward()
    expected = [x.grad for x in xs]
    model.zero_grad()
    for x in xs:
        x.grad = None
    model.inner, model.outer = inner, outer
    together(forward)

    def backward(_: int) -> None:
        for number in range(THREADS):
            with contextlib.suppress(StateError):
                losses[number].backward()
                torch.testing.assert_close(xs[number].grad, expected[number], rtol=1e-4, atol=1e-4)

    together(backward, 1)
