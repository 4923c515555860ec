"""A batch whose rows use different adapters: which row is whose, and how a layer runs such a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peftlite.core.call import Call
from peftlite.core.state import BASE, AdapterState
from peftlite.core.variant import Program
from peftlite.errors import StateError


class RowsCall(Call):
    """Like a `Call`, with one adapter (or the base model) per row of the batch.

    A layer may be called with k entries per row, row by row (beams, or tokens flattened into the batch); its first
    dimension then is k times the number of rows.
    """

    def __init__(
        self, state: AdapterState, rows: Sequence[str], programs: Mapping[str, Sequence[Program]], outer: Call | None
    ) -> None:
        super().__init__(state, (), (), outer)
        self.rows = tuple(rows)
        self.by_name = {name: tuple(of_name) for name, of_name in programs.items()}
        order = sorted(range(len(rows)), key=lambda row: rows[row])
        self.perm = torch.tensor(order)
        self.inverse = torch.argsort(self.perm)
        self.groups: list[tuple[str, int, int]] = []
        for place, row in enumerate(order):
            if self.groups and self.groups[-1][0] == rows[row]:
                name, first, _ = self.groups[-1]
                self.groups[-1] = (name, first, place + 1)
            else:
                self.groups.append((rows[row], place, place + 1))

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(name for name in self.by_name if name != BASE)

    def rows_of(self, name: str) -> Tensor | None:
        return None if len(self.groups) == 1 else next(self.perm[i:j] for other, i, j in self.groups if other == name)

    def run(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run each group of rows through its adapter's program and put the rows back in their order.

        Raises: StateError if the layer's input is not one entry (or k entries) per row.
        """
        if len(self.groups) == 1:
            return self.by_name[self.groups[0][0]][layer.place](*args, **kwargs)
        x = args[0] if args else None
        by_row = isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] % len(self.rows) == 0
        if layer.host.weight_only or not isinstance(x, Tensor) or not by_row:
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            kind = type(layer.get_base_layer()).__name__
            raise StateError(
                f"`adapter_names` has {len(self.rows)} rows, and a {kind} with adapters was called with `{shape}`, "
                "which cannot be told apart by row: use one adapter per call. Nothing was changed."
            )
        each = x.shape[0] // len(self.rows)
        sorted_rows = x.index_select(0, spread(self.perm, each, x.device))
        outputs = [
            self.by_name[name][layer.place](sorted_rows[first * each : last * each], *args[1:], **kwargs)
            for name, first, last in self.groups
        ]
        return torch.cat(outputs).index_select(0, spread(self.inverse, each, x.device))


def spread(order: Tensor, each: int, device: torch.device) -> Tensor:
    """The order of entries, where every row of `order` (rows,) stands for `each` entries: (rows * each,)."""
    order = order.to(device)
    if each == 1:
        return order
    return (order[:, None] * each + torch.arange(each, device=device)).flatten()


def check_rows(state: AdapterState, rows: Sequence[str]) -> tuple[str, ...]:
    """The adapter of every row, each known, or `__base__` for the base model.

    Raises: AdapterNameError, StateError if there is no row.
    """
    if isinstance(rows, str) or not len(rows):
        raise StateError(f"`adapter_names` is `{rows}`; it must be a list with one name per row. Nothing was changed.")
    names = tuple(BASE if name is None else name for name in rows)
    state.checked(name for name in names if name != BASE)
    return names
