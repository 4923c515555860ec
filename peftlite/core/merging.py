"""Adapters in the base layer's weight: always merged from the layer's own bytes, so that nothing drifts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from peftlite.core.hosts import ALL_ROWS, Dense, Host, ModuleHost, ParamHost, Saved, host_for, widened
from peftlite.core.packed import rounding_error, warn_of_rounding
from peftlite.core.residency import is_away, near
from peftlite.core.scaling import ScalingLayer
from peftlite.core.slots import View
from peftlite.core.state import AdapterState
from peftlite.core.variant import Variant
from peftlite.errors import MergeError

_BLOCK = 1 << 18  # elements merged at a time: temporaries stay in cache, and small beside the weight


class MergingLayer(ScalingLayer):
    """The side of an adapter layer that faces its base layer: what that is, what is in use, what is in its weight.

    `_saved` has the base layer's own bytes while anything is merged.
    """

    state: AdapterState
    param: str | None
    variants: dict[str, Variant]
    merged_adapters: list[str]
    merge_error: float | None
    shared_weight: bool
    _saved: Any
    _own_active: tuple[str, ...] | None
    _own_enabled: bool | None

    # ---- what it is
    @property
    def host(self) -> Host:
        """The host of the base layer, made anew when the base layer was replaced."""
        base = self.get_base_layer()
        host: Host | None = self.__dict__.get("_host")
        if host is None or host.layer is not base:
            host = ParamHost(base, self.param) if self.param is not None else host_for(base) or ModuleHost(base)
            self.__dict__["_host"] = host
        return host

    @property
    def wrapped(self) -> nn.Module:
        """The module inside: the base layer, or the adapter layer of another of its parameters."""
        module: Any = self._modules[self.tuner.base_slot]
        return module  # type: ignore[no-any-return]

    def get_base_layer(self) -> nn.Module:
        """The layer that the adapters are on."""
        module = self.wrapped
        while isinstance(module, MergingLayer):
            module = module.wrapped
        return module

    @property
    def active_adapters(self) -> list[str]:
        """The adapters in use on this layer: the model's, unless `set_adapter` was called on the layer itself."""
        names = self.state.active if self._own_active is None else self._own_active
        return [name for name in names if name in self.state.configs]

    @property
    def active_adapter(self) -> list[str]:
        """The same as `active_adapters`."""
        return self.active_adapters

    @property
    def enabled(self) -> bool:
        """Whether adapters have any effect on this layer."""
        return self.state.enabled if self._own_enabled is None else bool(self._own_enabled)

    @property
    def disable_adapters(self) -> bool:
        """Whether adapters are switched off on this layer."""
        return not self.enabled

    def unbind(self) -> None:
        """Forget everything derived from the adapters on this layer; it is made again on use."""
        self.__dict__["_program"] = None
        self.state.plans.clear()

    def here(self) -> AbstractContextManager[None]:
        """Inside the block, the weights of the base layer and the adapters are not elsewhere."""
        return near(self)

    # ---- what is in the weight
    @property
    def merged(self) -> bool:
        """Whether any adapter is merged into the base layer's weight."""
        return bool(self.merged_adapters)

    def own(self, rows: slice = ALL_ROWS) -> Dense:
        """The base layer's own weight and bias (of some rows), whatever is merged."""
        if not is_away(self.get_base_layer()):
            return self.host.read(self._saved, rows)
        with self.here():
            return self.host.read(self._saved, rows)

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Merge adapters (default: the active ones) into the base layer's weight.

        Raises: MergeError if `safe_merge` and the result is not finite.
        """
        names = self.mergeable(self.active_adapters if adapter_names is None else self.state.checked(adapter_names))
        if safe_merge:
            self.check_merge(names)
        self.set_merged([*self.merged_adapters, *(n for n in names if n not in self.merged_adapters)])
        if self.merge_error is not None:
            warn_of_rounding({type(self.get_base_layer()).__name__: self.merge_error})

    def unmerge(self, adapter_names: Sequence[str] | None = None) -> None:
        """Take adapters (default: all) out of the base layer's weight again, bit for bit."""
        self.set_merged([n for n in self.merged_adapters if adapter_names is not None and n not in adapter_names])

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from this layer alone; the model still lists it, for its other layers."""
        self.remove(adapter_name)

    def remove(self, name: str) -> None:
        """Detach an adapter."""
        raise NotImplementedError(type(self).__name__)

    def mergeable(self, names: Sequence[str]) -> list[str]:
        """Those of `names` that this layer has and can merge."""
        return [n for n in names if n in self.variants and self.variants[n].mergeable]

    @torch.no_grad()
    def check_merge(self, names: Sequence[str]) -> None:
        """Compute what merging `names` too would write, and write nothing.

        Raises: MergeError if it is not finite.
        """
        wanted = [*self.merged_adapters, *(n for n in names if n not in self.merged_adapters)]
        with self.here():
            finite = all(is_finite(dense) for _, dense in self._merged_blocks(wanted, self._saved))
        if not finite:
            raise MergeError(
                f"Merging {', '.join(f'`{n}`' for n in names)} would write values that are not finite into "
                f"{type(self.get_base_layer()).__name__}. Nothing was changed."
            )

    @torch.no_grad()
    def set_merged(self, names: Sequence[str]) -> None:
        """Make the base layer's weight hold exactly these adapters. If that fails, it holds what it held before."""
        before, names = list(self.merged_adapters), list(names)
        if names == before:
            return
        away = is_away(self.get_base_layer())
        with self.here():
            self._check_here()
            if self._saved is None:
                self.__dict__["_saved"] = self.host.save(self.shared_weight or away)
            try:
                self._write_merged(names)
            except BaseException:
                self._write_merged(before)
                raise
            finally:
                self.unbind()
        if away and self._saved is not None:
            self.__dict__["_saved"] = self._saved.on_cpu()

    def _check_here(self) -> None:
        parameter = self.host.parameter
        if parameter is not None and parameter.is_meta:
            raise MergeError(
                f"The weight of {type(self.get_base_layer()).__name__} is on the meta device, where there is nothing "
                "to merge into. Nothing was changed."
            )

    def _write_merged(self, names: list[str]) -> None:
        saved: Saved = self._saved
        error: float | None = None
        if names:
            for rows, dense in self._merged_blocks(names, saved):
                self.host.write(dense, rows)
                error = rounding_error(self.host.read().weight, dense.weight) if self.host.packed else None
        else:
            self.host.restore(saved)
            self.__dict__["_saved"] = None
        self.__dict__.update(merged_adapters=names, merge_error=error)

    def _merged_blocks(self, names: Sequence[str], saved: Saved | None) -> Iterator[tuple[slice, Dense]]:
        """(rows, their weight and bias with `names` merged), over the whole weight."""
        for rows in self._blocks(all(self.variants[name].by_rows for name in names)):
            yield rows, self.merged_dense(self.host.read(saved, rows), names, rows)

    def _blocks(self, by_rows: bool) -> Iterator[slice]:
        shape = self.host.shape
        if not by_rows or self.host.batch or self.host.packed:
            yield ALL_ROWS
            return
        step = max(1, _BLOCK // max(1, torch.Size(shape[1:]).numel()))
        yield from (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))

    def rewrite(self, weight: Tensor) -> None:
        """Give the base layer another weight (canonical) for good. A weight that others share becomes its own first."""
        merged = list(self.merged_adapters)
        self.set_merged(())
        away = is_away(self.get_base_layer())
        with self.here():
            if self.shared_weight or away:
                self.host.save(shared=True)
                self.__dict__["shared_weight"] = False
            self.host.write(Dense(weight, None))
        self.set_merged(merged)

    def keep_merged(self) -> nn.Module:
        """Forget the base layer's own bytes and give back the module inside, with what is merged into it."""
        self.__dict__.update(_saved=None, merged_adapters=[])
        return self.wrapped

    def merged_dense(self, base: Dense, names: Sequence[str], rows: slice = ALL_ROWS) -> Dense:
        """`base` (some rows of the weight, and the bias) with these adapters merged, in at least fp32."""
        dense = Dense(widened(base.weight), base.bias if base.bias is None else widened(base.bias))
        for name in names:
            dense = self.variants[name].merge(View(self, name), dense, rows)
        return dense


def is_finite(dense: Dense) -> bool:
    """Whether all numbers of a weight and bias are numbers."""
    return all(bool(torch.isfinite(one).all()) for one in (dense.weight, dense.bias) if one is not None)
