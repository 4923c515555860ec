"""From the names in a config to the modules they mean: pure string work.

`select(paths, TargetSpec.from_config(config))` gives a `Selection`: which paths get an adapter, which are trained as
a whole (`modules_to_save`), and which entries of the config matched nothing. The rules:

    target_modules, exclude_modules   names: the path is the name, or ends with "." + name; a string: a regular
                                      expression for the whole path; "all-linear": the paths that the caller names
    modules_to_save                   the path ends with the entry; what lies at or below it gets no adapter
    layers_to_transform               keeps the paths whose layer index is listed, and those that are named in full
    layers_pattern                    the name in front of the layer index, as a regular expression; without it, the
                                      first number in a path that has at least two names before it
    rank_pattern, alpha_pattern       regular expressions for the path or its end after a dot; the first match counts
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from peftlite.config import PeftConfig
from peftlite.errors import ConfigError, PeftliteWarning, TargetNotFoundError, clipped, nearest
from peftlite.patterns import BoundedPattern, bounded, is_plain

ALL_LINEAR = "all-linear"
UnmatchedPolicy = Literal["error", "warn", "ignore"]


class Unmatched(NamedTuple):
    """An entry of a config field that matched nothing, and the paths (or layer indices) that it was held against."""

    field: str
    entry: str | int
    paths: Sequence[str]

    @property
    def nearest(self) -> str:
        """What the entry may have meant, in backticks."""
        if isinstance(self.entry, int):
            return ", ".join(f"`{index}`" for index in self.paths) or "none"
        entry = self.entry[:1000]
        return nearest(entry, _ends_like(entry, self.paths))


class Selection(NamedTuple):
    """What a config means for one model: paths in the model's order, and the entries that mean nothing there."""

    targets: tuple[str, ...]
    saved: tuple[str, ...]
    unmatched: tuple[Unmatched, ...]


class TargetSpec(NamedTuple):
    """The fields of a config that name modules. A config without one of them has its empty value here."""

    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str = ()
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: tuple[str, ...] = ()
    alpha_pattern: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: PeftConfig) -> TargetSpec:
        """The spec of any kind of config."""
        values = vars(config)
        targets = values.get("target_modules")
        return cls(
            target_modules=targets if targets is None or isinstance(targets, str) else _entries(targets),
            exclude_modules=_name_or_entries(values.get("exclude_modules")),
            modules_to_save=_entries(values.get("modules_to_save")),
            layers_to_transform=_entries(values.get("layers_to_transform")),
            layers_pattern=_entries(values.get("layers_pattern")),
            rank_pattern=_entries(values.get("rank_pattern")) if "rank_pattern" in config.ordered_fields else (),
            alpha_pattern=_entries(values.get("alpha_pattern")),
        )


def is_all_linear(target_modules: object) -> bool:
    """Whether this value of `target_modules` asks for every linear layer."""
    return isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR


def select(paths: Iterable[str], spec: TargetSpec, *, linear: Collection[str] = ()) -> Selection:
    """The paths that `spec` means among all module paths of a model; its root, named "", is never one of them.

    `linear` are the paths that "all-linear" stands for; it is not looked at for another `target_modules`.

    Raises:
        ConfigError: `target_modules` is None, so that the caller has yet to fill in a default.
    """
    if spec.target_modules is None:
        raise ConfigError(
            "`target_modules` is None and there is no default for this model; "
            f"name modules, for example `{ALL_LINEAR}`. Nothing was changed."
        )
    pool = tuple(path for path in paths if path)
    ends = endings(spec.modules_to_save)
    saved = tuple(_outermost(path for path in pool if ends(path)))
    is_target = _target_test(spec.target_modules, linear)
    is_excluded = _target_test(spec.exclude_modules)
    open_ = _not_below(saved)
    candidates = [path for path in pool if is_target(path) and not is_excluded(path) and open_(path)]
    targets = tuple(filter(_layer_test(spec), candidates))
    return Selection(targets, saved, tuple(_unmatched(pool, candidates, targets, spec, linear)))


def entries_for(paths: Iterable[str], wanted: Collection[str], parts: int = 1) -> list[str]:
    """Entries of `target_modules` that mean just the `wanted` of the paths: their endings where these are enough."""
    short = sorted({ending(path, parts) for path in wanted})
    exact = set(select(paths, TargetSpec(target_modules=tuple(short))).targets) == set(wanted)
    return short if exact else sorted(wanted)


def ways_to_name(wanted: Collection[str]) -> Iterator[list[str] | str]:
    """Values of `target_modules` that mean these paths, the shorter first; of the last one, no other path is meant."""
    yield sorted({ending(path) for path in wanted})
    yield sorted(wanted)
    yield "|".join(re.escape(path) for path in sorted(wanted))  # one path may be how another one ends


def ending(path: str, parts: int = 1) -> str:
    """The last parts of a path."""
    return ".".join(path.split(".")[-parts:])


def match_pattern(patterns: Iterable[str], path: str) -> str | None:
    """The first pattern that matches the path, or its end after a dot, completely; "^" is where the path begins."""
    names = tuple(patterns)
    if not names:
        return None
    index = _index(names)
    found = [*index.plain_matches(path), *index.regular_matches(path)]
    return names[min(found)] if found else None


def contains_any(path: str, names: Iterable[str]) -> bool:
    """Whether one of the names occurs anywhere in the path: what some methods' lists of names mean in PEFT."""
    return any(name in path for name in names)


def layer_index(path: str, patterns: Sequence[str] = ()) -> int | None:
    """The layer that a module belongs to: the number after a name that one of the patterns matches."""
    if patterns:
        numbered = [(rf"(?:{pattern})\.(?P<peftlite_index>\d+)\.", _starts(path)) for pattern in patterns]
    else:
        numbered = [(r"[^.]*\.(?P<peftlite_index>\d+)\.", _starts(path)[1:])]
    for pattern, starts in numbered:
        for start in starts:
            if found := re.compile(pattern).match(path, start):
                return int(found["peftlite_index"])
    return None


def report(unmatched: Iterable[Unmatched], model: str = "the model") -> str:
    """One line for each entry that matched nothing, for the first ten."""
    items = list(unmatched)
    more = [f"... and {len(items) - 10} more entries that match nothing."] if len(items) > 10 else []
    return "\n".join([_line(item, model) for item in items[:10]] + more)


def complain(
    selection: Selection, policy: UnmatchedPolicy = "error", model: str = "the model", *, stacklevel: int = 2
) -> None:
    """Does about entries that matched nothing what the policy says.

    Raises:
        TargetNotFoundError: there are some and the policy is "error".
        ConfigError: the policy is none of the three.
    """
    if policy not in ("error", "warn", "ignore"):
        raise ConfigError(f"`unmatched` is `{policy}`; it can be `error`, `warn`, `ignore`. Nothing was changed.")
    if not selection.unmatched or policy == "ignore":
        return
    text = report(selection.unmatched, model)
    if policy == "error":
        raise TargetNotFoundError(f'{text}\nNothing was changed. (unmatched="warn" or "ignore" accepts such entries.)')
    warnings.warn(text, PeftliteWarning, stacklevel=stacklevel + 1)


# -- which paths -------------------------------------------------------------------------------------------------------


def _entries(value: Any) -> tuple[Any, ...]:
    """A field's value as a tuple of its entries: one entry may stand alone, nothing is None or empty."""
    if value is None or value == "":
        return ()
    return (value,) if isinstance(value, (str, int)) else tuple(value)


def _name_or_entries(value: Any) -> tuple[str, ...] | str:
    return value if isinstance(value, str) and value else _entries(value)


def _starts(path: str) -> list[int]:
    """Where the names in a path begin."""
    starts = [0]
    while start := path.find(".", starts[-1]) + 1:
        starts.append(start)
    return starts


def _ends(path: str) -> list[str]:
    """`a.b.c`, `b.c`, `c`."""
    return [path[start:] for start in _starts(path)]


def absent(names: Iterable[str], paths: Iterable[str]) -> set[str]:
    """Those of the names that no path is, or ends with after a dot; looks no further once there are none."""
    left = set(names)
    for path in paths:
        if not left:
            break
        left.difference_update(_ends(path))
    return left


class _Index(NamedTuple):
    """Positions of patterns in their config, found without trying each: a config can have one for every module.

    Patterns of word characters and dots are kept by the lengths of their names: `a.bcd` is {(1, 3): {("a", "bcd"): 0}}.
    """

    plain: dict[tuple[int, ...], dict[tuple[str, ...], int]]
    regular: list[tuple[int, BoundedPattern]]

    def plain_matches(self, path: str) -> Iterator[int]:
        for lengths, known in self.plain.items():
            start = len(path) - sum(lengths) - len(lengths) + 1
            if start == 0 or (start > 0 and path[start - 1] == "."):
                names = []
                for length in lengths:  # whatever stands between two names, a dot of the pattern matches it
                    names.append(path[start : start + length])
                    start += length + 1
                if (position := known.get(tuple(names))) is not None:
                    yield position

    def regular_matches(self, path: str) -> Iterator[int]:
        starts = _starts(path) if self.regular else []
        return (at for at, whole in self.regular if any(whole.fullmatch(path, start) for start in starts))


@lru_cache(maxsize=64)
def _index(patterns: tuple[str, ...]) -> _Index:
    index = _Index({}, [])
    for position, pattern in enumerate(patterns):
        if is_plain(pattern):
            names = tuple(pattern.split("."))
            index.plain.setdefault(tuple(map(len, names)), {}).setdefault(names, position)
        else:
            index.regular.append((position, bounded(pattern)))
    return index


def _target_test(names: tuple[str, ...] | str, linear: Collection[str] = ()) -> Callable[[str], bool]:
    if is_all_linear(names):
        return frozenset(linear).__contains__
    if isinstance(names, str):
        return bounded(names).fullmatch
    wanted = frozenset(names)
    return lambda path: bool(wanted) and not wanted.isdisjoint(_ends(path))


def _not_below(roots: tuple[str, ...]) -> Callable[[str], bool]:
    taken = frozenset(roots)
    return lambda path: not taken or not any(parent in taken for parent in _parents(path))


def _parents(path: str) -> Iterator[str]:
    """`a`, `a.b`, `a.b.c`."""
    return (path[: start - 1] if start else path for start in [*_starts(path)[1:], 0])


def _outermost(paths: Iterable[str]) -> list[str]:
    """Without those that lie below another: a module trained as a whole holds its children already."""
    found = list(dict.fromkeys(paths))
    taken = frozenset(found)
    return [path for path in found if not any(parent in taken for parent in _parents(path) if parent != path)]


def _layer_test(spec: TargetSpec) -> Callable[[str], bool]:
    if not spec.layers_to_transform:
        return lambda path: True
    named = frozenset(() if isinstance(spec.target_modules, str) else spec.target_modules or ())
    layers = frozenset(spec.layers_to_transform)
    return lambda path: path in named or layer_index(path, spec.layers_pattern) in layers


def endings(entries: Iterable[str]) -> Callable[[str], list[str]]:
    """A function that gives those of the entries with which a path ends; looked up, as there can be masses of them."""
    known = frozenset(entries)
    lengths = sorted(set(map(len, known)))

    def found(path: str) -> list[str]:
        ends = (path[len(path) - length :] for length in lengths if length <= len(path))
        return [end for end in ends if end in known]

    return found


# -- which entries matched nothing -------------------------------------------------------------------------------------


def _unmatched(
    pool: Sequence[str], candidates: list[str], targets: tuple[str, ...], spec: TargetSpec, linear: Collection[str]
) -> Iterator[Unmatched]:
    """Names are sought among all modules; layers and patterns among those that the targets leave over."""
    yield from _unmatched_names("target_modules", spec.target_modules or (), pool, linear)
    yield from _unmatched_names("exclude_modules", spec.exclude_modules, pool)
    ends_of = endings(spec.modules_to_save)
    ends = {end for path in pool for end in ends_of(path)}
    yield from (Unmatched("modules_to_save", entry, pool) for entry in spec.modules_to_save if entry not in ends)
    yield from _unmatched_layers(pool, candidates, spec)
    for field, patterns in (("rank_pattern", spec.rank_pattern), ("alpha_pattern", spec.alpha_pattern)):
        if not patterns:
            continue
        index = _index(patterns)
        used = {at for path in targets for at in (*index.plain_matches(path), *index.regular_matches(path))}
        yield from (Unmatched(field, pattern, targets) for at, pattern in enumerate(patterns) if at not in used)


def _unmatched_layers(pool: Sequence[str], candidates: list[str], spec: TargetSpec) -> Iterator[Unmatched]:
    if not spec.layers_to_transform:
        return
    indices = sorted({i for i in (layer_index(path, spec.layers_pattern) for path in candidates) if i is not None})
    found = [str(index) for index in indices]
    yield from (Unmatched("layers_to_transform", i, found) for i in spec.layers_to_transform if i not in indices)
    for pattern in spec.layers_pattern:
        if not any(layer_index(path, [pattern]) is not None for path in pool):
            containers = [path.rpartition(".")[0] for path in pool if path.rpartition(".")[2].isdigit()]
            yield Unmatched("layers_pattern", pattern, containers)


def _unmatched_names(
    field: str, names: tuple[str, ...] | str, pool: Sequence[str], linear: Collection[str] = ()
) -> Iterator[Unmatched]:
    if isinstance(names, str):
        test = _target_test(names, linear)
        if not any(test(path) for path in pool):
            yield Unmatched(field, names, pool)
        return
    unknown = absent(names, pool)
    yield from (Unmatched(field, name, pool) for name in names if name in unknown)


def _ends_like(entry: str, paths: Iterable[str], most: int = 1000) -> list[str]:
    """The ends of paths with as many names as the entry has; of very many those whose last name is like the entry's."""
    depth = entry.count(".") + 1
    ends = dict.fromkeys(".".join(path.split(".")[-depth:]) for path in paths)
    found = [end for end in ends if not end.isdigit()]
    if len(found) <= most:
        return found
    lasts = {end.rpartition(".")[2] for end in found}
    alike = difflib.get_close_matches(entry.rpartition(".")[2], sorted(lasts))
    return [end for end in found if end.rpartition(".")[2] in alike][:most]


def _line(item: Unmatched, model: str) -> str:
    kind = {"layers_to_transform": "no layer", "rank_pattern": "no target", "alpha_pattern": "no target"}
    what = kind.get(item.field, "no module")
    tail = ""
    entry = clipped(str(item.entry))
    if item.field in ("target_modules", "exclude_modules") and f"`{entry}`" in item.nearest.split(", "):
        tail = f" A string is a regular expression for a whole path; as a name it goes into a list: [{entry!r}]."
    return f"`{item.field}` has `{entry}`, which matches {what} of {model}; nearest: {item.nearest}.{tail}"
