"""Regular expressions out of configs, matched in time that is bounded whoever wrote them.

`re` tries one way of matching after the other, and a pattern such as `(a+)+b` has more ways than anybody can wait for.
Patterns that have few ways are left to `re`. The others are matched by an automaton that is in all its states at once:
one step per character, with the same answers, since a whole text is in a pattern's language or it is not, whichever way
is tried first. Only what is no regular language (references to groups, possessive repeats) needs `re`'s order of
trying; it is refused where it has many ways.

    ways: 1 for a character, a product in a row, a sum of alternatives, and for a repeat the numbers of times it can run
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from importlib import import_module
from typing import Any, NamedTuple

from peftlite.errors import ConfigError

MAX_LENGTH = 100_000
"""Characters of a pattern."""
MAX_PATTERNS = 4096
"""Patterns of one field that are more than names."""
MAX_STATES = 2000
"""Of an automaton, those that look ahead and back for it included."""
MAX_GUARDS = 32
"""Of an automaton."""
MAX_WAYS = 100_000
"""Beyond them, a pattern is not left to `re`."""

_MODULE = "re._{}" if sys.version_info >= (3, 11) else "sre_{}"
_parser: Any = import_module(_MODULE.format("parser"))
_compiler: Any = import_module(_MODULE.format("compile" if sys.version_info < (3, 11) else "compiler"))
_TEXT = 100  # characters of a usual path, for counting ways
_KEPT = 300_000  # states in the steps that an automaton remembers
_PLAIN = re.compile(r"[\w.]*")

Node = tuple[Any, Any]  # operation and argument, as `re` parses them
Wrap = Callable[[Node], Node]  # puts a node under the flags of the groups around it


def is_plain(pattern: str) -> bool:
    """Whether a pattern is a name: of word characters and dots alone."""
    return _PLAIN.fullmatch(pattern) is not None


class BoundedPattern(NamedTuple):
    """A regular expression whose `fullmatch` ends soon."""

    plain: re.Pattern[str] | None
    automaton: Automaton | None = None

    def fullmatch(self, text: str, start: int = 0) -> bool:
        """Whether all of `text` from `start` on matches; `^` is where the text begins."""
        if self.plain is not None:
            return self.plain.fullmatch(text, start) is not None
        return self.automaton is not None and self.automaton.run(text, start, len(text))


@lru_cache(maxsize=MAX_PATTERNS)
def bounded(pattern: str) -> BoundedPattern:
    """A pattern that can be matched in bounded time.

    Raises: ConfigError if it cannot, re.error if it is none.
    """
    if len(pattern) > MAX_LENGTH:
        raise ConfigError(
            f"A pattern has {len(pattern)} characters (`{pattern[:40]}...`), more than the {MAX_LENGTH} that are "
            "accepted. Nothing was changed."
        )
    try:
        compiled = re.compile(pattern)
        parsed = _parser.parse(pattern)
        if _ways(parsed) <= MAX_WAYS:
            return BoundedPattern(compiled)
        automaton = Automaton()
        automaton.end = automaton.add(0, parsed, lambda node: node, parsed.state)
        return BoundedPattern(None, automaton)
    except (RecursionError, OverflowError) as error:
        raise re.error(f"{type(error).__name__}: it is nested too deeply, or a number is too large") from None
    except _TooMuchError as error:
        raise ConfigError(
            f"`{pattern[:200]}` could take for ever to match: {error}. Write it without repeats inside of repeats. "
            "Nothing was changed."
        ) from None


def single(pattern: str) -> re.Pattern[str]:
    """A pattern for `re` itself, which has few ways of matching.

    Raises: ConfigError if it has many, re.error if it is none.
    """
    compiled = bounded(pattern).plain
    if compiled is None:
        raise ConfigError(
            f"`{pattern[:200]}` could take for ever to match. Write it without repeats inside of repeats. "
            "Nothing was changed."
        )
    return compiled


class _TooMuchError(Exception):
    """Why a pattern cannot be matched in bounded time."""


# ---- how many ways there are


def _ways(nodes: Any) -> float:
    """At most so many ways does `re` try for a text of usual length."""
    count = 1.0
    for name, value in _named(nodes):
        count *= _ways_of(name, value)
    return count


def _named(nodes: Any) -> Iterator[tuple[str, Any]]:
    return ((str(op), value) for op, value in nodes)


def _ways_of(name: str, value: Any) -> float:
    if name == "BRANCH":
        return sum(map(_ways, value[1]))
    if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        return _ways_of_repeat(*value)
    if name in ("ASSERT", "ASSERT_NOT"):
        return 1 + _ways(value[1])
    if name == "GROUPREF_EXISTS":
        return sum(_ways(part) for part in value[1:] if part is not None)
    parts = [part for part in _parts(value) if isinstance(part, _parser.SubPattern)]
    return _ways(parts[0]) if parts else 1.0


def _parts(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _ways_of_repeat(least: int, most: int, item: Any) -> float:
    inside, (shortest, longest) = _ways(item), item.getwidth()
    times = min(int(most), _TEXT)
    if inside == 1 and shortest == longest:
        return float(max(times - min(least, times), 0) + 1)
    return float("inf") if times * inside > MAX_WAYS or inside**times > MAX_WAYS else (inside + 1) ** times


# ---- the automaton


class Automaton:
    """Thompson's construction: states joined by edges that cost a character, or none, or that a guard opens."""

    def __init__(self, counts: list[int] | None = None) -> None:
        self.free: list[list[tuple[int, int | None]]] = [[]]
        """State -> (next state, guard or None): edges that cost nothing."""
        self.costly: list[list[tuple[int, re.Pattern[str]]]] = [[]]
        """State -> (next state, the characters that it costs)."""
        self.guards: list[Callable[[str, int], bool]] = []
        """What can be asked of a place in a text: anchors, and what stands before or behind it."""
        self.end = 0
        self.counts = [0, 0] if counts is None else counts
        """Of states and of guards: its own, and of those that look for it."""
        self._steps: dict[Any, frozenset[int]] = {}
        self._kept = 0

    # ---- matching
    def run(self, text: str, start: int, end: int | None) -> bool:
        """Whether the text from `start` matches as far as `end`, or, without one, as far as any place."""
        states = self._open(frozenset([0]), text, start)
        for at in range(start, len(text) if end is None else end):
            if not states or (end is None and self.end in states):
                break
            states = self._open(self._eat(states, text[at]), text, at + 1)
        return self.end in states

    def _eat(self, states: frozenset[int], character: str) -> frozenset[int]:
        key = states, character
        if (found := self._steps.get(key)) is None:
            edges = (edge for state in states for edge in self.costly[state])
            found = frozenset(to for to, one in edges if one.match(character))
            self._keep(key, found)
        return found

    def _open(self, states: frozenset[int], text: str, at: int) -> frozenset[int]:
        """The states that can be reached for nothing."""
        key = states, tuple(guard(text, at) for guard in self.guards)
        if (found := self._steps.get(key)) is None:
            seen, stack = set(states), list(states)
            while stack:
                for to, guard in self.free[stack.pop()]:
                    if to not in seen and (guard is None or key[1][guard]):
                        seen.add(to)
                        stack.append(to)
            found = frozenset(seen)
            self._keep(key, found)
        return found

    def _keep(self, key: Any, states: frozenset[int]) -> None:
        self._kept += len(key[0]) + len(states) + 1
        if self._kept > _KEPT:
            self._steps.clear()
            self._kept = 0
        self._steps[key] = states

    # ---- building
    def add(self, at: int, nodes: Any, wrap: Wrap, state: Any) -> int:
        """Add what `nodes` match after the state `at`; the state where they end."""
        for node in nodes:
            at = self._add_node(at, node, wrap, state)
        return at

    def _state(self) -> int:
        self._count(0, MAX_STATES)
        self.free.append([])
        self.costly.append([])
        return len(self.free) - 1

    def _count(self, what: int, most: int) -> None:
        self.counts[what] += 1
        if self.counts[what] > most:
            raise _TooMuchError(f"its repeats come to more than {most} {('steps', 'conditions')[what]}")

    def _add_node(self, at: int, node: Node, wrap: Wrap, state: Any) -> int:
        name, value = str(node[0]), node[1]
        if name in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            to = self._state()
            self.costly[at].append((to, _compiled(wrap(node), state)))
            return to
        if name == "SUBPATTERN":
            _, add, drop, inside = value
            return self.add(at, inside, lambda n: wrap((node[0], (None, add, drop, _sub([n], state)))), state)
        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            return self._add_repeat(at, value, wrap, state)
        if name == "BRANCH":
            to = self._state()
            for branch in value[1]:
                start = self._state()
                self.free[at].append((start, None))
                self.free[self.add(start, branch, wrap, state)].append((to, None))
            return to
        if name in ("AT", "ASSERT", "ASSERT_NOT"):
            to = self._state()
            self._count(1, MAX_GUARDS)
            guard = _anchor(wrap(node), state) if name == "AT" else self._look(value, name == "ASSERT", wrap, state)
            self.free[at].append((to, len(self.guards)))
            self.guards.append(guard)
            return to
        raise _TooMuchError("it refers to groups, or has parts that are never tried again")

    def _add_repeat(self, at: int, value: Any, wrap: Wrap, state: Any) -> int:
        least, most, item = value
        for _ in range(least):
            at = self.add(at, item, wrap, state)
        to = self._state()
        if most == _parser.MAXREPEAT:
            loop = self._state()
            self.free[at].append((loop, None))
            self.free[self.add(loop, item, wrap, state)].append((loop, None))
            self.free[loop].append((to, None))
            return to
        self.free[at].append((to, None))
        for _ in range(most - least):
            at = self.add(at, item, wrap, state)
            self.free[at].append((to, None))
        return to

    def _look(self, value: Any, wanted: bool, wrap: Wrap, state: Any) -> Callable[[str, int], bool]:
        """A guard for what stands behind a place, or before it."""
        direction, nodes = value
        inside = Automaton(counts=self.counts)
        inside.end = inside.add(0, nodes, wrap, state)
        width = nodes.getwidth()[0]

        def look(text: str, at: int) -> bool:
            if direction > 0:
                return inside.run(text, at, None) is wanted
            return (at >= width and inside.run(text, at - width, at)) is wanted

        return lru_cache(maxsize=1024)(look)  # one within another would be asked again for each place


def _sub(nodes: list[Node], state: Any) -> Any:
    return _parser.SubPattern(state, nodes)


def _compiled(node: Node, state: Any) -> re.Pattern[str]:
    found: re.Pattern[str] = _compiler.compile(_sub([node], state))
    return found


def _anchor(node: Node, state: Any) -> Callable[[str, int], bool]:
    return partial(_is_at, _compiled(node, state))


def _is_at(place: re.Pattern[str], text: str, at: int) -> bool:
    return place.match(text, at) is not None
