"""Base layers whose weight is quantised: read by dequantising it, written by quantising anew, which rounds.

merge     dequantise, add, quantise: the layer holds what quantising made of the sum, and the error is measured
unmerge   the layer's own packed tensors were kept, not copied: they are put back
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftlite.core.hosts import ALL_ROWS, Dense, Host, Saved, widened
from peftlite.errors import MergeError, warn


class PackedHost(Host):
    """A quantised layer: back ends say what it holds (`held`, `hold`), how to expand that and how to make it.

    What is held is always replaced and never written into, so that keeping the old is the undo, and ties, overlays and
    other holders of the packed tensors see nothing of a merge.
    """

    packed = True
    takes_any_dtype: ClassVar[bool] = False
    """Whether the layer converts inputs to the dtype that it computes in."""

    # ---- what a back end says
    def held(self) -> Any:
        """The packed weight that the layer has now, by reference."""
        return self.parameter

    def hold(self, packed: Any) -> None:
        """Make the layer have this packed weight."""
        setattr(self.layer, self.param, packed)

    def expand(self, packed: Any) -> Tensor:
        """The canonical weight that a packed one stands for, in at least the precision that the layer computes in."""
        raise NotImplementedError(type(self).__name__)

    def pack(self, weight: Tensor, like: Any) -> Any:
        """A canonical weight, quantised in the way that `like` was.

        Raises: MergeError if that way is not known.
        """
        raise NotImplementedError(type(self).__name__)

    def let_gradients_through(self) -> None:
        """Undo what the layer did to itself for the sake of inference, if its input gets no gradients because of it."""

    def moved(self, packed: Any) -> Any:
        """A packed weight where the layer is now, if it was kept while the layer moved."""
        return packed if packed.device == self.device else packed.to(self.device)

    # ---- what every host can do
    def read(self, saved: Saved | None = None, rows: slice = ALL_ROWS) -> Dense:
        weight = self.expand(self.held() if saved is None else self.moved(saved.weight))
        bias = self.bias if saved is None else saved.bias
        return Dense(
            self.take(weight, rows), None if bias is None else self.take_bias(bias.detach(), rows).to(weight.device)
        )

    @torch.no_grad()
    def write(self, new: Dense, rows: slice = ALL_ROWS) -> None:
        self.hold(self.pack(new.weight.contiguous(), self.held()))
        old = self.bias
        if new.bias is not None and old is not None:
            bias = new.bias.to(old.dtype, copy=True)
            self.hold_bias(nn.Parameter(bias, old.requires_grad) if isinstance(old, nn.Parameter) else bias)

    def save(self, shared: bool = False) -> Saved:
        return Saved(self.held(), self.bias)

    def parked(self, saved: Saved, device: torch.device) -> Saved:
        return saved  # held by others too, maybe, and small

    @torch.no_grad()
    def restore(self, saved: Saved) -> None:
        self.hold(self.moved(saved.weight))
        if saved.bias is not None and self.bias is not None:
            if saved.bias.device != self.bias.device:
                saved.bias.data = saved.bias.data.to(self.bias.device)
            self.hold_bias(saved.bias)

    def hold_bias(self, bias: Tensor) -> None:
        """Make the layer have this bias, a Parameter or not, as it was."""
        setattr(self.layer, self.bias_param, bias)

    def dense_layer(self, dtype: torch.dtype) -> nn.Module:
        """The same layer, not quantised. weight: (out, in)."""
        dense = self.read()
        bias = None if dense.bias is None else dense.bias.detach().to(dtype, copy=True)
        out, into = self.shape
        layer = nn.Linear(into, out, bias is not None, device="meta")
        layer.weight = nn.Parameter(dense.weight.to(dtype), requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=False)
        layer.training = self.layer.training
        return layer


def cannot_quantise(weight: object) -> MergeError:
    """The error for packed weights that are known how to read but not how to make."""
    return MergeError(
        f"It is not known how to quantise a weight to a `{type(weight).__name__}` again: merge with "
        "`merge_and_unload(dequantize=True)`. Nothing was changed."
    )


# ---- the error of quantising anew
@torch.no_grad()
def rounding_error(written: Tensor, wanted: Tensor) -> float:
    """|written - wanted| / |wanted|, Frobenius norms."""
    wanted = widened(wanted)
    return float((widened(written) - wanted).norm() / wanted.norm().clamp_min(torch.finfo(wanted.dtype).tiny))


def warn_of_rounding(errors: Mapping[str, float]) -> None:
    """Say how far merged weights are from what they should be. errors: of quantised layers, by path."""
    if not errors:
        return
    worst = max(errors, key=lambda path: errors[path])
    mean = sum(errors.values()) / len(errors)
    warn(
        f"Merged into {len(errors)} quantised layers, whose weights were quantised anew: they are off by {mean:.2g} of "
        f"their norm on average, and by {errors[worst]:.2g} in `{worst}`. Unmerging gives the old ones back exactly; "
        "`merge_and_unload(dequantize=True)` merges into dense layers without this error."
    )
