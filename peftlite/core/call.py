"""Which adapters does THIS call use? A `Call` is immutable and travels with the call, never in the model.

Eager code reads a ContextVar. Dynamo cannot trace `ContextVar.get`, but it traces (and guards, per thread) an attribute
of a `threading.local`, so `using` sets both. Gradient checkpointing runs forward again inside backward, after the
`with` block has ended: there the ContextVar says nothing, or something else, so the autograd node being evaluated is
looked up in a log of which Call each stretch of nodes was made under.

The private torch functions that this takes are used in this file only and are pinned by tests.
"""

from __future__ import annotations

import math
import sys
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from peftlite.core.state import AdapterState
from peftlite.core.variant import Program
from peftlite.errors import StateError

Programs = dict[int, Program]

_MAX_LOG = 4096
_MAX_DEPTH = 64  # backward passes inside one another that can be told apart
_TLS_KEY = "peftlite.calls"  # torch copies this thread-local to the threads of a backward pass

_variable: ContextVar[Call | None] = ContextVar("peftlite_call", default=None)
_ever_logged = False  # until a Call has recorded gradients, `current` need not look further


class _Mirror(threading.local):
    def __init__(self) -> None:  # not attributes of the class: dynamo would guard those, and miss what hides them later
        self.call: Call | None = None
        self.made = False


_mirror = _Mirror()


class Call:
    """What the layers of one model run (see `AdapterLayer.place`), for the calls made inside a `with` block."""

    def __init__(self, state: AdapterState, names: Sequence[str], programs: Programs, outer: Call | None) -> None:
        self.state = state
        self.names = tuple(names)
        self.programs = programs
        self.outer = outer
        self.task = -1
        """The backward pass inside which it began, in a block that is recomputed."""
        self.version = state.version

    def run(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a layer's forward is under this Call."""
        if self.version is not self.state.version:
            self.renew()
        return program_of(layer, self.names, self.programs)(*args, **kwargs)

    def renew(self) -> None:
        """Forget what was derived from the model, which has changed since."""
        self.programs = {}
        self.version = self.state.version

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters that it uses."""
        return self.names

    def rows_of(self, name: str) -> Tensor | None:
        """Which rows of the batch use an adapter, in the order in which its layers see them; None for all."""
        return None

    def of(self, state: AdapterState) -> Call | None:
        """The innermost enclosing Call that is about the model of `state`."""
        call: Call | None = self
        while call is not None and call.state is not state:
            call = call.outer
        return call


def program_of(layer: Any, names: Sequence[str], programs: Programs) -> Program:
    """A layer's program for these adapters; made again if the model was changed after the block began.

    Raises: AdapterNameError, StateError, if an adapter was deleted or merged meanwhile.
    """
    found = programs.get(layer.place)
    if found is None:
        found = programs[layer.place] = layer.program_in_call(names)
    return found


def current() -> Call | None:
    """The Call under which the code now running was called (or, in a recomputation, was called at first)."""
    if is_compiling():
        return _mirror.call
    if _ever_logged and torch._C._current_graph_task_id() != -1:
        return _recall()
    call = _variable.get()
    if call is None and not _mirror.made and is_grad_enabled():
        _mark_as_maker()
    return call


def _mark_as_maker() -> None:
    """Note that this thread makes autograd nodes without a Call, so that it need not look for one in other threads."""
    if not _missing_internals() and torch._C._current_graph_task_id() == -1:
        _log().made = _mirror.made = True


@contextmanager
def using(call: Call) -> Iterator[Call]:
    """Everything that this thread or task calls inside the block runs under `call`."""
    stay = Stay(call)
    try:
        try:
            stay.begin()
            yield call
        finally:
            stay.end()
    finally:
        stay.end()  # again, in case that something (Ctrl-C) came between


class Stay:
    """The time for which a thread or task is under a Call, and what to go back to afterwards."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.mirrored = _mirror.call
        self.outer = None if torch.compiler.is_compiling() else _variable.get()
        self.log: _Log | None = None
        self.stretch: _Stretch | None = None

    def begin(self) -> None:
        """Have what this thread or task calls from now on run under the Call."""
        _mirror.call = self.call
        if torch.compiler.is_compiling():  # inside a compiled region, where a ContextVar cannot be traced
            return
        if _ever_logged:
            self.call.task = torch._C._current_graph_task_id()
        _variable.set(self.call)
        if torch.is_grad_enabled():
            self.log, self.stretch = _log(), _Stretch(self.call)
            self.log.open(self.stretch)

    def end(self) -> None:
        """Undo what of `begin` was done and is not undone yet."""
        if torch.compiler.is_compiling():
            _mirror.call = self.mirrored
            return
        if _variable.get() is self.call:
            _variable.set(self.outer)
        resync()
        if self.log is not None and self.stretch is not None:
            self.log.close(self.stretch)


def resync() -> None:
    """Let compiled code in this thread or task see the ContextVar that it was started with."""
    _mirror.call = _variable.get()


# ---- under which Call was this autograd node made?
class _Stretch:
    """The autograd sequence numbers [first, last) of the nodes made under one Call."""

    def __init__(self, call: Call) -> None:
        self.first, self.last = -1, math.inf
        self.call = call


class _Log:
    """Per thread: the stretches of sequence numbers, and the backward passes in which something was recomputed."""

    def __init__(self) -> None:
        self.stretches: list[_Stretch] = []
        self.tasks: list[tuple[int, Call | None]] = []
        self.made = False
        """Whether the thread made nodes without a Call, too."""
        self.forgotten = -1.0
        """Of nodes before this one it is not known any more."""

    def open(self, stretch: _Stretch) -> None:
        global _ever_logged
        _require_torch_internals()
        _ever_logged = True
        stretch.first = _next_sequence_number()
        self.stretches.append(stretch)
        if len(self.stretches) > _MAX_LOG:
            self.forgotten = max(one.last for one in self.stretches[: _MAX_LOG // 2] if one.last != math.inf)
            del self.stretches[: _MAX_LOG // 2]

    def close(self, stretch: _Stretch) -> None:
        if stretch.first < 0 or stretch.last != math.inf:
            return  # was not opened, or is closed
        stretch.last = _next_sequence_number()
        if stretch.last == stretch.first + 1 and self.stretches[-1:] == [stretch]:
            self.stretches.pop()  # no node was made in it

    def find(self, number: int) -> Call | None:
        """The Call of the innermost stretch around `number`.

        Raises: StateError if that is not known any more.
        """
        if number < self.forgotten:
            raise StateError(
                f"backward() with gradient checkpointing, after {_MAX_LOG // 2} or more later blocks of `use_adapter` "
                "that recorded gradients: call backward() earlier."
            )
        upto = bisect_right(self.stretches, number, key=lambda s: s.first)
        return next((s.call for s in reversed(self.stretches[:upto]) if s.last > number), None)

    def enclosing(self, task: int) -> Call | None:
        """The Call recomputed by the backward pass around this one: a reentrant checkpoint inside another."""
        return next((call for other, call in reversed(self.tasks) if other != task), None)

    def note(self, task: int, call: Call | None) -> None:
        """Remember what backward pass `task` is recomputing."""
        if self.tasks[-1:] != [(task, call)]:
            self.tasks = [(other, c) for other, c in self.tasks[-_MAX_DEPTH:] if other != task] + [(task, call)]

    def __del__(self) -> None:
        """The thread ends: of the nodes that it made it is not known any more under which Call that was."""
        global _lost
        _lost = max(_lost, self.forgotten, *(one.last for one in self.stretches if one.last != math.inf), -1.0)


_logs: WeakSet[_Log] = WeakSet()
_lost = -1.0  # in threads that have ended, nodes before this one may have been made under Calls


def _log() -> _Log:
    if not torch._C._is_key_in_tls(_TLS_KEY):
        log = _Log()
        _logs.add(log)
        torch._C._stash_obj_in_tls(_TLS_KEY, log)
    found: Any = torch._C._get_obj_in_tls(_TLS_KEY)
    return found  # type: ignore[no-any-return]


def _next_sequence_number() -> int:
    """The number that autograd gives the next node of this thread (by making one)."""
    with torch.enable_grad():
        node: Any = torch.zeros((), requires_grad=True).view(()).grad_fn
        return int(node._sequence_nr())


def _recall() -> Call | None:
    """Inside a backward pass: the Call of the node being evaluated, or of the recomputation that made that node.

    Raises: StateError if several threads' Calls fit and none is this thread's.
    """
    task = torch._C._current_graph_task_id()
    number = int(torch._C._current_autograd_node()._sequence_nr())
    log, call = _log(), _variable.get()
    if call is not None and call.task == task:  # what is recomputed has a block inside
        pass
    elif _is_nested():
        call = log.enclosing(task)
    else:
        own = (log.stretches or log.made) and number < _next_sequence_number()
        call = log.find(number) if own else _find_elsewhere(number)
    log.note(task, call)
    return call


def _find_elsewhere(number: int) -> Call | None:
    """For a thread that ran no forward itself: the Call that another thread made around `number`.

    Raises: StateError if it cannot be known.
    """
    found: dict[int, Call | None] = {}
    for log in list(_logs):
        call = log.find(number)
        if call is not None or log.made:
            found[id(call)] = call
    if len(found) > 1 or number < _lost:
        raise StateError(
            "backward() runs in another thread than forward, with gradient checkpointing and several threads that "
            "choose adapters per call: call backward() in the thread that ran forward."
        )
    return next(iter(found.values()), None)


def _is_nested() -> bool:
    """Whether this backward pass was begun by a reentrant checkpoint that is recomputed in the one around it."""
    passes = (torch.autograd.backward.__code__, torch.autograd.grad.__code__)
    inside = False
    frame: Any = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if inside and code.co_name == "backward" and code.co_varnames[:1] == ("ctx",):
            return True
        inside = inside or code in passes
        frame = frame.f_back
    return False


def _missing_internals() -> list[str]:
    names = (
        "_current_graph_task_id",
        "_current_autograd_node",
        "_is_key_in_tls",
        "_stash_obj_in_tls",
        "_get_obj_in_tls",
    )
    return [name for name in names if name not in vars(torch._C)]


def _require_torch_internals() -> None:
    if missing := _missing_internals():
        raise StateError(
            f"torch {torch.__version__} lacks `{missing[0]}`, without which `use_adapter` cannot be right under "
            "gradient checkpointing: use `set_adapter`, or call under `torch.no_grad()`."
        )
