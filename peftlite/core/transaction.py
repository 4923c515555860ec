"""All or nothing: a call that does not reach its end leaves a model as it was, whatever stopped it, wherever.

What changes a model is decorated with `atomic`, and notes in a journal how to take every change back *before* it makes
it. Notes hold what there was, so that it does not matter whether the change came about: an exception may strike at any
moment (KeyboardInterrupt does). A call inside another joins the other's journal. Nothing is copied but what is written,
so the cost does not grow with the model or with the number of its adapters.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, ParamSpec, TypeVar

import torch
from torch import Tensor

from peftlite.core.room import copied_in_groups, is_plain

P = ParamSpec("P")
R = TypeVar("R")
Undo = Callable[[], object]
_ABSENT: Final = object()


class _Journal(threading.local):
    steps: list[Undo] | None = None


_journal = _Journal()


def atomic(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: if a call of `function` raises anything, all that it noted is taken back."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        outer = _journal.steps
        steps: list[Undo] = [] if outer is None else outer
        begin, with_gradients = len(steps), torch.is_grad_enabled()
        try:
            _journal.steps = steps
            result = function(*args, **kwargs)
            _journal.steps = outer
            return result
        except BaseException as error:
            _journal.steps = None
            torch.set_grad_enabled(with_gradients)  # what strikes at the end of `with torch.no_grad()` leaves them off
            take_back(steps, begin, error)
            _journal.steps = outer
            raise

    return call


def take_back(steps: list[Undo], begin: int, error: BaseException) -> None:
    """Carry out the notes from `begin` on, the last one first."""
    while len(steps) > begin:
        undo = steps.pop()
        try:
            try:
                undo()
            except BaseException:  # a second interrupt
                undo()
        except Exception as another:  # the others may still succeed
            if sys.version_info >= (3, 11):
                error.add_note(f"Not all of the call could be taken back: {type(another).__name__}: {another}")


def unnoted(function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
    """Call `function`, which changes nothing but what will be given up as a whole if the call around it fails."""
    steps, _journal.steps = _journal.steps, None
    try:
        function(*args, **kwargs)
    finally:
        _journal.steps = steps


@contextmanager
def restoring(undo: Undo) -> Iterator[None]:
    """What is changed inside the block is put back at its end, by `undo`; twice, if something stops it half-way."""
    done = False
    try:
        try:
            yield
        finally:
            undo()
            done = True
    finally:
        if not done:
            undo()


# ---- notes
def on_failure(undo: Undo) -> None:
    """Note how to take back what comes next; it must do no harm if that does not come about."""
    if _journal.steps is not None:
        _journal.steps.append(undo)


def keep(mapping: dict[str, Any], *keys: str) -> None:
    """Note what is in a dict under keys that are about to be set."""
    if _journal.steps is not None:
        for key in keys:
            _journal.steps.append(partial(_put_back, mapping, key, mapping.get(key, _ABSENT)))


def keep_all(mapping: dict[Any, Any]) -> None:
    """Note all that is in a dict, and in which order: for one that entries are about to be taken from."""
    if _journal.steps is not None:
        _journal.steps.append(partial(_refill, mapping, mapping.copy()))


def keep_values(*tensors: Tensor) -> None:
    """Note the numbers in tensors that are about to be written into."""
    if _journal.steps is None:
        return
    plain: list[Tensor] = []
    for tensor in tensors:
        if is_plain(tensor):
            plain.append(tensor)
        else:
            _journal.steps.append(partial(write, tensor, tensor.detach().clone()))
    _journal.steps += [partial(_write_back, *copies) for copies in copied_in_groups(plain)]


def put(mapping: dict[str, Any], key: str, value: Any) -> None:
    """`mapping[key] = value`, to be taken back."""
    keep(mapping, key)
    mapping[key] = value


def put_in_all(mappings: Sequence[dict[str, Any]], key: str, values: Sequence[Any]) -> None:
    """`mapping[key] = value` for each mapping and its value, past what a mapping does then; with a single note."""
    if _journal.steps is not None:
        before = [mapping.get(key, _ABSENT) for mapping in mappings]
        _journal.steps.append(partial(_put_back_in_all, mappings, key, before))
    for mapping, value in zip(mappings, values, strict=True):
        dict.__setitem__(mapping, key, value)


def drop(mapping: dict[str, Any], key: str) -> None:
    """`mapping.pop(key, None)`, to be taken back."""
    if key in mapping:
        if key == next(reversed(mapping)):  # the usual case, and its place is known
            keep(mapping, key)
        else:
            keep_all(mapping)
        dict.__delitem__(mapping, key)


@torch.no_grad()
def write(tensor: Tensor, values: Tensor) -> None:
    """Write numbers into a tensor."""
    tensor.copy_(values)


def _write_back(pieces: Sequence[Tensor], joined: Tensor) -> None:
    for piece, values in zip(pieces, torch.split(joined, [len(piece) for piece in pieces]), strict=True):
        piece.copy_(values)


def _put_back(mapping: dict[str, Any], key: str, value: Any) -> None:
    if value is _ABSENT:
        mapping.pop(key, None)
    else:
        mapping[key] = value


def _put_back_in_all(mappings: Sequence[dict[str, Any]], key: str, values: Sequence[Any]) -> None:
    for mapping, value in zip(mappings, values, strict=True):
        _put_back(mapping, key, value)


def _refill(mapping: dict[Any, Any], before: dict[Any, Any]) -> None:
    mapping.clear()
    mapping.update(before)
