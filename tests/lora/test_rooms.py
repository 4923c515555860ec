"""Memory that is used again for wide copies: nobody has it twice, and nothing is left in it that anyone reads."""

from __future__ import annotations

import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import peftlite
from peftlite.tuners.lora import rooms
from peftlite.tuners.lora.rooms import left, taken
from tests.lora.test_banked import ROWS, adapted, one_by_one


@pytest.fixture(autouse=True)
def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "_free", rooms._Free())


def test_a_room_is_used_again_once_it_is_left() -> None:
    one, other = taken(8, torch.float32), taken(8, torch.float32)
    assert one is not other
    left(other)
    left(one)
    assert taken(4, torch.float32) is one
    assert taken(8, torch.float32) is other
    assert taken(8, torch.float32) not in (one, other)


def test_a_room_that_does_not_suit_is_not_used() -> None:
    for size, dtype in ((9, torch.float32), (8, torch.float64)):
        room = taken(8, torch.float32)
        left(room)
        assert taken(size, dtype) is not room


def test_few_and_small_rooms_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "MOST", 32)
    for room in [taken(8, torch.float32) for _ in range(4)]:
        left(room)
    left(taken(9, torch.float32))
    assert [room.size for room in rooms._free.rooms] == [8]  # the other one was taken, and was too small
    with FakeTensorMode():
        fake = taken(7, torch.float64)
    left(fake)
    assert fake not in rooms._free.rooms


def test_views_are_made_once_for_a_shape_and_not_for_ever() -> None:
    room = taken(12, torch.float32)
    for sizes in ((1, 1, 1), (2, 1), (3,)):
        matrix, parts = room.views(sizes, 4)
        assert room.views(sizes, 4) is room.views(sizes, 4)
        assert matrix.shape == (3, 4)
        matrix.copy_(torch.arange(12).view(3, 4))
        assert torch.equal(torch.cat([part.view(-1, 4) for part in parts]), matrix)
        assert [part.numel() for part in parts] == [4 * size for size in sizes]
    for rows in range(1, 13):
        room.views((rows,), 1)
    assert len(room.shaped) <= 4


def test_another_thread_has_other_rooms() -> None:
    room = taken(8, torch.float32)
    left(room)
    found = []
    thread = threading.Thread(target=lambda: found.append(taken(8, torch.float32)))
    thread.start()
    thread.join()
    assert found[0] is not room
    assert taken(8, torch.float32) is room


def test_batches_one_after_the_other_are_right_in_every_mode() -> None:
    model = adapted(dtype=torch.bfloat16)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        for rows in (ROWS, ["d", "__base__", "c", "a", "b"], ROWS):
            x = torch.randn(len(rows), 64).bfloat16()
            with mode(), peftlite.use_adapter_per_row(model, rows):
                torch.testing.assert_close(model(x), one_by_one(model, x, rows), rtol=2e-2, atol=5e-2)
    assert len(rooms._free.rooms) == 2
