"""A batch whose rows use different adapters: which row is whose, and how a layer runs such a batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftlite.core.call import Call, Programs, program_of
from peftlite.core.state import BASE, AdapterState
from peftlite.core.variant import Bank, Program
from peftlite.errors import AdapterNameError, StateError

Runs = tuple[tuple[int, int], ...]
"""(group, how many of it), one after the other."""


class Order:
    """How the entries of a batch, `each` for a row, are brought together by adapter, one group after the other.

    rows: the group of each row; perm: the rows brought together, None where they come so; runs: (group, rows) in the
    order that they then have. What a caller does not use is not worked out, and so nothing that compiled code depends
    on.
    """

    def __init__(self, rows: Tensor, perm: Tensor | None, runs: Runs, each: int) -> None:
        self.count = rows.shape[0]
        self.rows = rows
        self.perm = perm
        self.runs = runs
        self.each = each

    def parts(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(group, its entries) of entries that were brought together."""
        sizes = [count * self.each for _, count in self.runs]
        return zip((group for group, _ in self.runs), split(x, sizes), strict=True)

    @property
    def group(self) -> Tensor:
        """(entries,): the group of each entry, as they come."""
        return self.rows if self.each == 1 else self.rows.repeat_interleave(self.each)

    @cached_property
    def sort(self) -> Tensor | None:
        """(entries,): the entries brought together; None where they come so."""
        return None if self.perm is None else spread(self.perm, self.each)

    @cached_property
    def unsort(self) -> Tensor | None:
        """The inverse."""
        return None if self.sort is None else torch.argsort(self.sort)

    def sorted(self, x: Tensor) -> Tensor:
        """The entries of the first dimension, brought together by group."""
        return x if self.sort is None else x.index_select(0, self.sort)

    def restored(self, y: Tensor) -> Tensor:
        """Entries that were brought together in the order in which they came."""
        return y if self.unsort is None else y.index_select(0, self.unsort)


class RowsCall(Call):
    """Like a `Call`, with one adapter (or the base model) per row of the batch.

    Rows are grouped once, when the call begins. A layer whose variant has a bank for these adapters runs them together;
    else each group goes through its adapter's own program. A layer may be called with k entries per row, row by row
    (beams, or tokens flattened into the batch); its first dimension then is k times the number of rows.
    """

    def __init__(
        self,
        state: AdapterState,
        rows: tuple[str, ...],
        banks: dict[int, Bank | None],
        plan: Callable[[str], Programs],
        outer: Call | None,
    ) -> None:
        super().__init__(state, (), {}, outer)
        self.count = len(rows)
        self.banks = banks
        self.plan = plan
        self.groups, self.places, self.runs, perm = grouping(rows)
        self.group = torch.tensor(self.places)
        self.perm = None if perm is None else torch.tensor(perm)
        self.orders: dict[tuple[int, torch.device], Order] = {}
        self.planned: dict[str, Programs] = {}
        if len(self.groups) == 1 or any(bank is None for bank in banks.values()):
            self.planned = {name: plan(name) for name in self.groups}

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(name for name in self.groups if name != BASE)

    def rows_of(self, name: str) -> Tensor | None:
        if len(self.groups) == 1:
            return None
        wanted = self.groups.index(name)
        return torch.tensor([row for row, group in enumerate(self.places) if group == wanted])

    def run(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer's output, every row with its own adapter.

        Raises: StateError if the layer's input is not one entry (or k entries) per row.
        """
        if self.version is not self.state.version:
            self.renew()
        if len(self.groups) == 1:
            return self.program(layer, self.groups[0])(*args, **kwargs)
        x = self._by_row(layer, args)
        order = self.order(x.shape[0] // self.count, x.device)
        bank = self.bank(layer)
        y = bank(x, order) if bank is not None and len(args) == 1 and not kwargs else None
        return self._group_by_group(layer, order, args, kwargs) if y is None else y

    def _by_row(self, layer: Any, args: tuple[Any, ...]) -> Tensor:
        x = args[0] if args else None
        if isinstance(x, Tensor) and x.dim() and x.shape[0] % self.count == 0 and not layer.host.weight_only:
            return x
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise StateError(
            f"`adapter_names` has {self.count} rows, and a {type(layer.get_base_layer()).__name__} with adapters was "
            f"called with `{shape}`, which cannot be told apart by row: use one adapter per call. Nothing was changed."
        )

    def order(self, each: int, device: torch.device) -> Order:
        """The order of a batch with `each` entries per row."""
        if torch.compiler.is_compiling():
            return self._order(each, device)
        known = self.orders.get((each, device))
        if known is None:
            known = self.orders[each, device] = self._order(each, device)
        return known

    def _order(self, each: int, device: torch.device) -> Order:
        return Order(self.group.to(device), None if self.perm is None else self.perm.to(device), self.runs, each)

    def _group_by_group(self, layer: Any, order: Order, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        outputs = []
        for group, part in order.parts(order.sorted(args[0])):
            outputs.append(self.program(layer, self.groups[group])(part, *args[1:], **kwargs))
        return order.restored(torch.cat(outputs))

    def renew(self) -> None:
        self.banks, self.planned = {}, {name: {} for name in self.groups}
        super().renew()

    def bank(self, layer: Any) -> Bank | None:
        """What runs the rows of a layer's input together, if anything does."""
        if layer.place not in self.banks:
            self.banks[layer.place] = layer.bank_in_call(self.groups)
        return self.banks[layer.place]

    def program(self, layer: Any, name: str) -> Program:
        """What a layer runs for rows of one adapter."""
        if name not in self.planned:
            self.planned[name] = self.plan(name)
        return program_of(layer, () if name == BASE else (name,), self.planned[name])


class Grouping(NamedTuple):
    """Which rows of a batch are whose."""

    groups: tuple[str, ...]
    """The adapters, each once and sorted, so that batches of the same adapters are planned once."""
    places: tuple[int, ...]
    """Of each row."""
    runs: Runs
    perm: tuple[int, ...] | None
    """As in an `Order`."""


@lru_cache(maxsize=32)
def grouping(rows: tuple[str, ...]) -> Grouping:
    """Worked out once for all calls with the same rows, such as those of one generation."""
    groups = tuple(sorted(set(rows)))
    place = {name: number for number, name in enumerate(groups)}
    places = tuple([place[name] for name in rows])
    runs = tuple([(group, len(list(run))) for group, run in groupby(places)])
    if len(runs) <= len(groups):
        return Grouping(groups, places, runs, None)
    perm = tuple(sorted(range(len(rows)), key=places.__getitem__))
    return Grouping(groups, places, tuple(sorted(Counter(places).items())), perm)


def split(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Parts of the first dimension."""
    return x.split_with_sizes(sizes)  # `split`, without what that does in Python


def spread(order: Tensor, each: int) -> Tensor:
    """The order of entries, where every row of `order` (rows,) stands for `each` entries: (rows * each,)."""
    return order if each == 1 else (order[:, None] * each + torch.arange(each, device=order.device)).flatten()


def check_rows(state: AdapterState, rows: Sequence[str | None] | Tensor) -> tuple[str, ...]:
    """The adapter of every row, each known, or `__base__` for the base model. rows: names, or ids (rows,).

    Raises: AdapterNameError, StateError if there is no row.
    """
    if isinstance(rows, Tensor):
        return by_id(state, rows)
    if isinstance(rows, str) or not len(rows):
        raise StateError(f"`adapter_names` is `{rows}`; it must be a list with one name per row. Nothing was changed.")
    names = tuple(BASE if name is None else name for name in rows)
    if set(map(type, names)) != {str} or not set(names) - {BASE} <= state.configs.keys():
        state.checked(name for name in names if name != BASE)
    return names


def check_batch(rows: Sequence[object] | Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse a call of a whole model none of whose tensors has one entry per row.

    Inside of the model, k entries per row may be its own doing (beams); in the call they are a mistake.

    Raises: StateError.
    """
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()]
    if given and all(value.shape[0] != len(rows) for value in given):
        raise StateError(
            f"`adapter_names` has {len(rows)} rows, and the batch has {given[0].shape[0]}: there must be one name per "
            "row. Nothing was changed."
        )


def by_id(state: AdapterState, rows: Tensor) -> tuple[str, ...]:
    """The adapters with these ids (rows,), of which 0 is the base model.

    Raises: AdapterNameError for an id that no adapter has, StateError for what are no ids.
    """
    if rows.dim() != 1 or not len(rows) or rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
        raise StateError(
            f"`adapter_names` is a tensor {tuple(rows.shape)} of {rows.dtype}; it must have one integer per row, an id "
            "that `adapter_ids` gives. Nothing was changed."
        )
    names = {0: BASE, **{number: name for name, number in state.ids.items()}}
    ids = rows.tolist()
    for number in ids:
        if number not in names:
            there = ", ".join(f"`{known}` (`{name}`)" for known, name in names.items())
            raise AdapterNameError(f"No adapter has the id `{number}`; there are {there}. Nothing was changed.")
    return tuple(names[number] for number in ids)
