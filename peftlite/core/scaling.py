"""How strongly adapters act on one layer, for code that sets it layer by layer."""

from __future__ import annotations

from peftlite.core.lean import Lean
from peftlite.core.slots import Numbers
from peftlite.core.transaction import atomic, put
from peftlite.core.variant import TunerSpec
from peftlite.errors import StateError


class ScalingLayer(Lean):
    """The side of an adapter layer that scales adapters, each relative to the scaling that its config gave it."""

    tuner: TunerSpec

    @atomic
    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the layer's active adapters by `scale`.

        Raises: StateError if an adapter is merged, or its method has no scaling.
        """
        for name in self._scaled_names():
            self._scale(name, self._scaling()[name] * scale)

    @atomic
    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the layer's active adapters by `scale`; None: what it was before anything scaled it.

        Raises: StateError if an adapter is merged, or its method has no scaling.
        """
        for name in self._scaled_names():
            self._scale(name, self._unscaled(name) if scale is None else self._scaling()[name] / scale)

    @atomic
    def set_scale(self, adapter: str, scale: float) -> None:
        """Make an adapter act `scale` times as strongly as its config says; nothing if it is not on this layer.

        Raises: StateError if the adapter is merged, or its method has no scaling.
        """
        if adapter in self._scaling():
            self._scale(adapter, self._unscaled(adapter) * scale)

    def _scaling(self) -> Numbers:
        found: Numbers | None = self.__dict__.get("scaling")
        if found is None:
            raise StateError(f"Adapters of the kind `{self.tuner.peft_type}` have no scaling. Nothing was changed.")
        return found

    def _scaled_names(self) -> list[str]:
        active: list[str] = self.__getattribute__("active_adapters")
        return [name for name in active if name in self._scaling()]

    def _unscaled(self, name: str) -> float:
        """The scaling before this layer was scaled; the one that it has, if something else wrote that."""
        now: float = self._scaling()[name]
        before, after = self.__dict__.get("_scaled", {}).get(name, (now, now))
        return float(before) if after == now else now

    def _scale(self, name: str, value: float) -> None:
        if value == self._scaling()[name]:
            return
        before = self._unscaled(name)
        self._scaling()[name] = value
        put(self.__dict__, "_scaled", {**self.__dict__.get("_scaled", {}), name: (before, value)})
