"""`adapter_names=[...]`, one name per row of the batch, in the calls of transformers models with adapters in place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import nn

from peftlite.registry import later

if TYPE_CHECKING:
    from peftlite.core import lifecycle, rows, tree
else:
    lifecycle = later("peftlite.core.lifecycle")
    rows = later("peftlite.core.rows")
    tree = later("peftlite.core.tree")

_KEY = "adapter_names"
_MARK = "_peftlite_routes"
_CALLS = {"PreTrainedModel": "__call__", "GenerationMixin": "generate"}


def patch(foreign: ModuleType) -> None:
    """Let calls and `generate` of every transformers model take `adapter_names`; once per class."""
    for kind_name, method in _CALLS.items():
        kind: Any = vars(foreign).get(kind_name)
        if kind is not None and kind.__module__ == foreign.__name__ and _MARK not in vars(kind):
            setattr(kind, _MARK, True)
            setattr(kind, method, by_row(getattr(kind, method)))


def by_row(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same call, under `use_adapter_per_row` when it has `adapter_names` and the model has our adapters."""

    @functools.wraps(call)
    def routed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if _KEY not in kwargs or tree.find_state(self) is None:
            return call(self, *args, **kwargs)
        names = kwargs.pop(_KEY)
        if names is None:
            return call(self, *args, **kwargs)
        routing = lifecycle.use_adapter_per_row(self, names)
        rows.check_batch(names, args, kwargs)
        with routing:
            return call(self, *args, **kwargs)

    return routed
