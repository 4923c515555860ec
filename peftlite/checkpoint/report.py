"""What a load found: whether the tensors of a file are those that an adapter needs, and if not, why not."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from peftlite.checkpoint import keys
from peftlite.checkpoint.tensorfile import TensorInfo
from peftlite.errors import CheckpointError, warn

_LISTED = 3

Strict = bool | Literal["shapes"]
"""Whether all of a load must fit. "shapes": only what is there must have the right shapes and kinds of dtype."""


class Wanted(NamedTuple):
    """A tensor that an adapter (or, `required=False`, its base model) has a place for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    required: bool = True
    rank: int | None = None
    """The adapter's rank there, which one of the dimensions is."""
    rows: int | None = None
    """The size of the vocabulary, which one of the dimensions is."""


@dataclass(frozen=True)
class Misfit:
    """A tensor that is there, and cannot be used."""

    key: str
    found: str
    wanted: str


@dataclass
class LoadReport:
    """What became of an adapter's tensors. `str(report)` is a short text; `report.fits` says that all was well.

    A load that raises changed nothing; one with `strict=False` used `loaded_keys` and left the rest as it was made.
    """

    adapter_name: str
    loaded_keys: list[str] = field(default_factory=list)
    missing_keys: list[str] = field(default_factory=list)
    unexpected_keys: list[str] = field(default_factory=list)
    mismatched_keys: list[Misfit] = field(default_factory=list)
    wrong_kind_keys: list[Misfit] = field(default_factory=list)
    not_finite_keys: list[str] = field(default_factory=list)
    other_layers: bool = False
    """Whether the adapter was made on layers of other shapes, though its tensors may fit."""
    made_on: str | None = None
    """How the model that it was made on differs from this one, as far as its file says."""
    cause: str | None = None
    nearest: dict[str, str] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Whether every tensor that is needed was there, and nothing else."""
        return not any(self._problems())

    @property
    def has_wrong_sizes(self) -> bool:
        """Whether what is there has other shapes or kinds of dtype."""
        return bool(self.mismatched_keys or self.wrong_kind_keys or self.other_layers)

    def _problems(self) -> tuple[Collection[object], ...]:
        other = ["layers"] if self.other_layers else []
        bad = (self.mismatched_keys, self.wrong_kind_keys, self.not_finite_keys, other)
        return (self.missing_keys, self.unexpected_keys, *bad)

    def __str__(self) -> str:
        if self.fits:
            return f"adapter `{self.adapter_name}`: all {len(self.loaded_keys)} tensors loaded"
        parts = [
            _listed(map(keys.shown, self.missing_keys), len(self.missing_keys), "missing"),
            _listed(map(self._with_nearest, self.unexpected_keys), len(self.unexpected_keys), "unexpected"),
            _listed(map(_misfit, self.mismatched_keys), len(self.mismatched_keys), "of another shape"),
            _listed(map(_misfit, self.wrong_kind_keys), len(self.wrong_kind_keys), "of another kind of dtype"),
            _listed(map(keys.shown, self.not_finite_keys), len(self.not_finite_keys), "not finite"),
            "made on a model whose layers have other shapes or another number" if self.other_layers else "",
        ]
        causes = [text for text in (self.cause, self.made_on) if text]
        cause = f" Likely cause: {'; '.join(causes)}." if causes else ""
        return f"adapter `{self.adapter_name}`: {'; '.join(part for part in parts if part)}.{cause}"

    def _with_nearest(self, key: str) -> str:
        near = self.nearest.get(key)
        return f"{keys.shown(key)} (nearest: {keys.shown(near)})" if near else keys.shown(key)


def _listed(shown: Iterable[str], count: int, what: str) -> str:
    if not count:
        return ""
    first = [text for text, _ in zip(shown, range(_LISTED), strict=False)]
    more = ", ..." if count > _LISTED else ""
    return f"{count} tensor{'s' if count > 1 else ''} {what}: {', '.join(first)}{more}"


def _misfit(misfit: Misfit) -> str:
    return f"{keys.shown(misfit.key)} is {misfit.found}, not {misfit.wanted}"


def compare(
    wanted: Mapping[str, Wanted],
    found: Mapping[str, TensorInfo],
    adapter_name: str,
    slots: Collection[str] = (),
    ignored: Collection[str] = (),
) -> LoadReport:
    """Hold what a file says of its tensors against what is wanted; reads no tensor."""
    report = LoadReport(adapter_name)
    for key, info in found.items():
        want = wanted.get(key)
        if want is None:
            if key not in ignored and keys.without_name(key) not in ignored:
                report.unexpected_keys.append(key)
        elif info.shape != want.shape:
            report.mismatched_keys.append(Misfit(key, str(info.shape), str(want.shape)))
        elif kind_of(info.dtype) != kind_of(want.dtype):
            report.wrong_kind_keys.append(Misfit(key, _name(info.dtype), _name(want.dtype)))
        else:
            report.loaded_keys.append(key)
    needed = [key for key, want in wanted.items() if want.required]
    report.missing_keys = [key for key in needed if key not in found]
    if not report.fits:
        explain(report, wanted, found, needed, slots)
    return report


def explain(
    report: LoadReport,
    wanted: Mapping[str, Wanted],
    found: Mapping[str, TensorInfo],
    needed: Collection[str],
    slots: Collection[str],
) -> None:
    """Add the likely cause and the nearest keys to a report."""
    cause = None
    if report.missing_keys or report.unexpected_keys:
        relevant = [key for key in found if key not in wanted or wanted[key].required]
        cause = keys.diagnose(needed, relevant, slots)
    report.cause = cause.text if cause else _other_sizes(report, wanted, found)
    for key in report.unexpected_keys[:_LISTED]:
        near = keys.nearest_keys(key, wanted)
        if near:
            report.nearest[key] = near[0]


def _other_sizes(report: LoadReport, wanted: Mapping[str, Wanted], found: Mapping[str, TensorInfo]) -> str | None:
    """What shapes that do not fit have in common."""
    ranks, rows, others = set(), set(), 0
    for misfit in report.mismatched_keys:
        want, shape = wanted[misfit.key], found[misfit.key].shape
        unlike = [(w, f) for w, f in zip(want.shape, shape, strict=False) if w != f]
        if len(unlike) == 1 and len(want.shape) == len(shape) and unlike[0][0] == want.rows:
            rows.add(unlike[0])
        elif len(unlike) == 1 and len(want.shape) == len(shape) and unlike[0][0] == want.rank:
            ranks.add(unlike[0])
        else:
            others += 1
    if not others and len(rows) == 1 and not ranks:
        [(here, there)] = rows
        return (
            f"the adapter was made with a vocabulary of {there} tokens, and the model has {here}: "
            f"call `model.resize_token_embeddings({there})` first"
        )
    if not others and ranks and not rows:
        here, there = sorted(ranks)[0]
        return f"the config says rank {here} where the weights have rank {there}: the two are not of one adapter"
    if others == len(report.mismatched_keys) and others:
        return "the adapter was made on a model of other sizes"
    return None


def kind_of(dtype: torch.dtype) -> str:
    """Whether a dtype holds real numbers, complex ones, truth values or integers."""
    if dtype.is_floating_point:
        return "real"
    if dtype.is_complex:
        return "complex"
    return "bool" if dtype is torch.bool else "integer"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def settle(report: LoadReport, what: str, *, strict: Strict = True, other_shapes: bool = False) -> None:
    """Raise if a report has problems, or warn where they were asked to be tolerated.

    `other_shapes` tolerates tensors of another shape even if `strict`.

    Raises: CheckpointError.
    """
    if report.fits:
        return
    shapes = len(report.mismatched_keys)
    tolerated = not strict or (other_shapes and sum(map(len, report._problems())) == shapes)
    tolerated = tolerated or (strict == "shapes" and not report.has_wrong_sizes)
    if not tolerated:
        raise CheckpointError(f"{what} does not fit: {report} Nothing was changed.")
    warn(f"{what} does not fit, and was loaded as far as it does: {report}")
