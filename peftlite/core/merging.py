"""Adapters in the base layer's weight: always merged from the layer's own bytes, so that nothing drifts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftlite.checks import wrong
from peftlite.core.hosts import ALL_ROWS, Dense, Host, ModuleHost, ParamHost, Saved, host_for, widened
from peftlite.core.packed import rounding_error, warn_of_rounding
from peftlite.core.residency import is_away, near
from peftlite.core.scaling import ScalingLayer
from peftlite.core.slots import View
from peftlite.core.state import AdapterState
from peftlite.core.transaction import atomic, keep, on_failure, put
from peftlite.core.variant import Variant
from peftlite.core.written import Stamp, holds, stamp, written_since
from peftlite.errors import MergeError, StateError

Undo = Literal["device", "cpu"] | None
"""Where a base layer's own bytes are while adapters are merged into it; None: nowhere."""
SAME: Literal["same"] = "same"
"""Where they were, or would have been, last."""

_BLOCK = 1 << 18  # elements merged at a time: temporaries stay in cache, and small beside the weight
_SMALL_BLOCK = 1 << 13  # below which the calls would cost more than the numbers
_BLOCKS = 128  # into which a weight is divided, within these bounds


class MergingLayer(ScalingLayer):
    """The side of an adapter layer that faces its base layer: what that is, what is in use, what is in its weight.

    `_saved` has the base layer's own bytes while anything is merged. Of adapters that were merged with `undo=None`
    (`_fixed`, the first of those merged) there are none: what is called the base layer's bytes then has them in it.
    """

    state: AdapterState
    param: str | None
    variants: dict[str, Variant]
    merged_adapters: list[str]
    merge_error: float | None
    shared_weight: bool
    _saved: Any
    _fixed: tuple[str, ...]
    _undo: Undo
    _stamp: Stamp | None
    """What the base layer's parameters were when adapters were last merged into them; copies have none."""
    _own_active: tuple[str, ...] | None
    _own_enabled: bool | None
    _owner: MergingLayer | None
    """The layer whose program has this one's adapters bound, where that is another."""

    # ---- what it is
    @property
    def host(self) -> Host:
        """The host of the base layer, made anew when the base layer was replaced."""
        own = self.__dict__
        base: Any = own["_modules"][own["tuner"].base_slot]
        if isinstance(base, MergingLayer):
            base = base.get_base_layer()
        host: Host | None = own.get("_host")
        if host is None or host.layer is not base:
            host = ParamHost(base, self.param) if self.param is not None else host_for(base)
            if host is None or (host.weight_only and own["tuner"].any_module):
                host = ModuleHost(base)
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

    def live(self, names: Sequence[str]) -> list[str]:
        """Those of `names` that this layer has and that are not in the weight already."""
        return [name for name in names if name in self.variants and name not in self.merged_adapters]

    def unbind(self, name: str | None = None) -> None:
        """Forget everything derived from the adapters on this layer, or from one of them; it is made again on use."""
        active = self.state.active if self._own_active is None else self._own_active
        if name is None or name in active or not self.state.mixing.isdisjoint(active):
            self.__dict__["_program"] = None
        self.state.forget_plans(name)
        if self._owner is not None:
            self._owner.unbind(name)

    def here(self) -> AbstractContextManager[None]:
        """Inside the block, the weights of the base layer and the adapters are not elsewhere."""
        return near(self)

    # ---- what is in the weight
    @property
    def merged(self) -> bool:
        """Whether any adapter is merged into the base layer's weight."""
        return bool(self.merged_adapters)

    def own(self, rows: slice = ALL_ROWS) -> Dense:
        """The base layer's own weight and bias (of some rows), whatever is merged.

        Raises: StateError if adapters were merged with `undo=None`, so that nobody has it.
        """
        self.check_kept(())
        if not is_away(self.get_base_layer()):
            return self.host.read(self._saved, rows)
        with self.here():
            return self.host.read(self._saved, rows)

    @atomic
    def merge(
        self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None, *, undo: Undo = "device"
    ) -> None:
        """Merge adapters (default: the active ones) into the base layer's weight; see `peftlite.merge_adapter`.

        Raises: MergeError if `safe_merge` and the result is not finite.
        """
        check_undo(undo)
        names = self.mergeable(self.active_adapters if adapter_names is None else self.state.checked(adapter_names))
        if safe_merge:
            self.check_merge(names)
        self.set_merged([*self.merged_adapters, *(n for n in names if n not in self.merged_adapters)], undo)
        if self.merge_error is not None:
            warn_of_rounding({type(self.get_base_layer()).__name__: self.merge_error})

    def unmerge(self, adapter_names: Sequence[str] | None = None) -> None:
        """Take adapters (default: all) out of the base layer's weight again, bit for bit.

        Raises: StateError if one was merged with `undo=None`.
        """
        self.set_merged([n for n in self.merged_adapters if adapter_names is not None and n not in adapter_names])

    @atomic
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
            finite = all(is_finite(dense) for _, dense in self._merged_blocks(self._more(wanted), self._saved))
        if not finite:
            raise self._not_finite(names)

    def _not_finite(self, names: Sequence[str]) -> MergeError:
        return MergeError(
            f"Merging {', '.join(f'`{n}`' for n in names)} would write values that are not finite into "
            f"{type(self.get_base_layer()).__name__}. Nothing was changed."
        )

    @atomic
    @torch.no_grad()
    def set_merged(self, names: Sequence[str], undo: Undo | Literal["same"] = SAME) -> None:
        """Make the base layer's weight hold exactly these adapters. If that fails, it holds what it held before.

        Raises: StateError if one that is not among them was merged with `undo=None`.
        """
        names = list(names)
        self.check_kept(names)
        self.check_unwritten(names)
        if names != self.merged_adapters:
            on_failure(self.back())
            self._hold(names)
        self._keep(undo)

    def back(self) -> Callable[[], None]:
        """What makes the weight hold what it holds now, whatever happened to it; not if that was for good."""
        return partial(self._go_back, list(self.merged_adapters), self._fixed)

    @torch.no_grad()
    def _go_back(self, names: list[str], fixed: tuple[str, ...]) -> None:
        if self._fixed == fixed and (self._saved is not None or names != list(fixed)):
            self._hold(names)
            self._keep(SAME)

    def _hold(self, names: list[str]) -> None:
        away = is_away(self.get_base_layer())
        try:
            with self.here():
                self._check_here()
                if self._saved is None:
                    self.__dict__["_saved"] = self._save(names, away)
                self._write_merged(names)
                self.__dict__["_stamp"] = stamp(self.host)
        finally:
            self.unbind()

    def check_unwritten(self, names: Sequence[str]) -> None:
        """Refuse to make a weight that holds exactly `names`, if that would take what was written over the present one.

        Counters say whether anything was; it may have been what was there, so that the numbers decide.

        Raises: StateError.
        """
        saved: Saved | None = self._saved
        if saved is None or self._stamp is None or list(names) == self.merged_adapters:
            return
        if written_since(self._stamp, stamp(self.host)) and not self._holds(self.merged_adapters, saved):
            raise StateError(
                f"The weight of {type(self.get_base_layer()).__name__} was written to while "
                f"{', '.join(f'`{name}`' for name in self.merged_adapters)} was merged into it, or that adapter was: "
                "to unmerge would put the base layer's own bytes back and lose that. Write what was there before, or "
                "take the weights as they are with `merge_and_unload()`. Nothing was changed."
            )

    def check_kept(self, names: Sequence[str]) -> None:
        """Refuse to make a weight that holds exactly `names`, if that would take the base layer's own bytes.

        Raises: StateError.
        """
        if list(self._fixed) != list(names[: len(self._fixed)]):
            raise StateError(
                f"{', '.join(f'`{name}`' for name in self._fixed)} was merged with `undo=None`, so that the weights "
                "from before are gone: it stays merged and active until `merge_and_unload`. Nothing was changed."
            )

    def _more(self, names: Sequence[str]) -> Sequence[str]:
        """Those of `names` that what is called the base layer's own bytes does not hold."""
        return names[len(self._fixed) :]

    def _save(self, names: Sequence[str], away: bool) -> Saved:
        """The base layer's own bytes, before these adapters are merged."""
        return self.host.save(self.shared_weight or away)

    def _keep(self, undo: Undo | Literal["same"]) -> None:
        """Have the base layer's own bytes where `undo` says."""
        if undo is None:
            self.__dict__.update(_saved=None, _fixed=tuple(self.merged_adapters))
            return
        if undo != SAME:
            put(self.__dict__, "_undo", undo)
        saved: Saved | None = self._saved
        if saved is not None and is_away(self.get_base_layer()):
            self.__dict__["_saved"] = saved.on_cpu()
        elif saved is not None:
            device = torch.device("cpu") if self._undo == "cpu" else self.host.device
            self.__dict__["_saved"] = self.host.parked(saved, device)

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
        if more := self._more(names):
            if saved.shared and self.host.parameter is saved.weight:
                self.host.put_copies(saved)
            for rows, dense in self._merged_blocks(more, saved):
                self.host.write(dense, rows)
                error = rounding_error(self.host.read().weight, dense.weight) if self.host.packed else None
        else:
            self.host.restore(saved)
            self.__dict__["_saved"] = None
        self.__dict__.update(merged_adapters=names, merge_error=error)

    @torch.no_grad()
    def _holds(self, names: Sequence[str], saved: Saved) -> bool:
        """Whether the weight is what merging `names` gives."""
        blocks = self._merged_blocks(self._more(names), saved)
        return all(holds(self.host.read(None, rows), dense) for rows, dense in blocks)

    def _merged_blocks(self, names: Sequence[str], saved: Saved | None) -> Iterator[tuple[slice, Dense]]:
        """(rows, their weight and bias with `names` merged), over the whole weight."""
        for rows in self._blocks(all(self.variants[name].by_rows for name in names)):
            yield rows, self.merged_dense(self.host.read(saved, rows), names, rows)

    def _blocks(self, by_rows: bool) -> Iterator[slice]:
        if not by_rows or self.host.packed:
            yield ALL_ROWS
            return
        size, rows = torch.Size(self.host.shape).numel(), self.host.shape[self.host.batch]
        block = min(max(size // _BLOCKS, _SMALL_BLOCK), _BLOCK)
        step = max(1, block * rows // max(1, size))
        yield from (slice(start, min(start + step, rows)) for start in range(0, rows, step))

    @torch.no_grad()
    def bake(self, names: Sequence[str], safe_merge: bool = False) -> None:
        """Merge adapters into the weight as it is, in place: nothing is kept, noted or taken back.

        Raises: MergeError if `safe_merge` and the result is not finite.
        """
        for rows, dense in self._merged_blocks(names, None):
            if safe_merge and not is_finite(dense):
                raise self._not_finite(names)
            self.host.write(dense, rows)

    def rewrite(self, weight: Tensor) -> None:
        """Give the base layer another weight (canonical) for good. A weight that others share becomes its own first."""
        merged = list(self.merged_adapters)
        self.set_merged(())
        away = is_away(self.get_base_layer())
        with self.here():
            saved = self.host.save(self.shared_weight or away)
            on_failure(partial(self._restore, saved))
            if saved.shared:
                self.host.put_copies(saved)
            put(self.__dict__, "shared_weight", self.shared_weight and not saved.shared)
            self.host.write(Dense(weight, None))
        self.set_merged(merged)

    def _restore(self, saved: Saved) -> None:
        with self.here():
            self.host.restore(saved)

    def keep_merged(self) -> nn.Module:
        """Forget the base layer's own bytes and give back the module inside, with what is merged into it."""
        self.forget_merged()
        return self.wrapped

    def forget_merged(self) -> None:
        """Take the base layer's weight, as it is, for its own."""
        keep(self.__dict__, "_saved", "_fixed", "merged_adapters", "merge_error")
        self.__dict__.update(_saved=None, _fixed=(), merged_adapters=[], merge_error=None)
        self.unbind()

    def merged_dense(self, base: Dense, names: Sequence[str], rows: slice = ALL_ROWS) -> Dense:
        """`base` (some rows of the weight, and the bias) with these adapters merged, in at least fp32."""
        return self.merged_by(self.parts(names), base, rows)

    def parts(self, names: Sequence[str]) -> list[tuple[Variant, View]]:
        """The maths and the tensors of these adapters."""
        return [(self.variants[name], View(self, name)) for name in names]

    def merged_by(self, parts: Sequence[tuple[Variant, View]], base: Dense, rows: slice = ALL_ROWS) -> Dense:
        """`merged_dense` for adapters that were looked up before."""
        dense = Dense(widened(base.weight), base.bias if base.bias is None else widened(base.bias))
        for variant, view in parts:
            dense = variant.merge(view, dense, rows)
        return dense


def check_undo(undo: object) -> None:
    """Refuse what is no place for the base layers' own bytes.

    Raises: ConfigError.
    """
    if undo is not None and not (isinstance(undo, str) and undo in ("device", "cpu")):
        raise wrong("undo", undo, "`device`, `cpu` or None")


def is_finite(dense: Dense) -> bool:
    """Whether all numbers of a weight and bias are numbers."""
    return all(bool(torch.isfinite(one).all()) for one in (dense.weight, dense.bias) if one is not None)
