"""accelerate's offloading: weights are in CPU memory or on a disk, and on the meta device here, but for forward.

Every offloaded module has a hook (`_hf_hook`) around its forward. A weight that was replaced goes to the map that the
hook takes it from; one of a map of files goes to the part of it that is in memory, which counts first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from peftlite.core.residency import register_residency


class Offloading:
    """See `Residency`."""

    def is_away(self, module: nn.Module) -> bool:
        return any(True for _ in offloading(module))

    @contextmanager
    def near(self, module: nn.Module) -> Iterator[None]:
        found = [(below, hook) for below in module.modules() for hook in offloading(below)]
        for below, hook in found:
            hook.pre_forward(below)
            hook.offload = False  # calls inside the block leave the weights here
        before = [dict(below._parameters) for below, _ in found]
        try:
            yield
        finally:
            for (below, hook), old in zip(found, before, strict=True):
                for name, parameter in below._parameters.items():
                    if parameter is not None and parameter is not old.get(name):
                        store(hook.weights_map, name, parameter.detach().to("cpu"))
                hook.offload = True
                hook.post_forward(below, None)

    def shared(self, module: nn.Module) -> Iterator[object]:
        return (below.__dict__["_hf_hook"] for below in module.modules() if "_hf_hook" in below.__dict__)

    def release(self, twin: nn.Module) -> None:
        for below in twin.modules():
            below.__dict__.pop("_hf_hook", None)  # the module's own, which is not to be told of this
        import_module("accelerate.hooks").remove_hook_from_module(twin, recurse=True)


def offloading(module: nn.Module) -> Iterator[Any]:
    """The hooks of a module that keep its weights elsewhere."""
    hook = module.__dict__.get("_hf_hook")
    if hook is None:
        return
    for one in getattr(hook, "hooks", (hook,)):  # several in one
        if getattr(one, "offload", False) and one.weights_map is not None:
            yield one


def store(weights: Any, name: str, value: Tensor) -> None:
    """Put a tensor into a map of weights: a dict, a part of a map by shorter keys, or files with a dict before them."""
    data, key = getattr(weights, "dataset", weights), getattr(weights, "prefix", "") + name
    (data if isinstance(data, dict) else data.state_dict)[key] = value


def patch(hooks: ModuleType) -> None:
    """Make accelerate's offloading known."""
    register_residency(Offloading())
