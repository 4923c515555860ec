"""DoRA: LoRA decides on the direction of each row of the weight, a trained vector on its length."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import singledispatch
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from peftlite.core.hosts import ALL_ROWS, ConvHost, Dense, EmbeddingHost, Host, LinearHost, widened
from peftlite.core.slots import View
from peftlite.core.variant import Placement, Program
from peftlite.tuners.lora.factors import along_output, drops, entering, groups_of
from peftlite.tuners.lora.small import SMALL, bound_if_small, directed
from peftlite.tuners.lora.start import Shifted, net_pair, start_of

_BLOCK = 1 << 22  # elements of a weight in half precision that are widened at a time


class Magnitude(nn.Module):
    """The lengths m of the weight's rows, `weight` (out,), or (1, out, 1, ...) for convolutions as PEFT has it."""

    def __init__(self, label: str, weight: Tensor) -> None:
        super().__init__()
        self.label = label
        self.weight = nn.Parameter(weight, requires_grad=False)

    def _get_name(self) -> str:
        return f"lora.dora.{self.label}"

    def forward(self, norms: Tensor, rows: slice = ALL_ROWS) -> Tensor:
        """What the rows, whose lengths are `norms`, are multiplied with: m / norms."""
        return self.weight.flatten()[rows] / norms.to(self.weight.dtype)


@singledispatch
def described(host: Host) -> tuple[str, tuple[int, ...]] | None:
    """What PEFT calls the module of the magnitudes on a kind of layer, and their shape; None where DoRA has no form."""
    return None


@described.register
def _(host: LinearHost) -> tuple[str, tuple[int, ...]]:
    return "DoraLinearLayer", (host.shape[0],)


@described.register
def _(host: EmbeddingHost) -> tuple[str, tuple[int, ...]]:
    return "lora.dora.DoraEmbeddingLayer", (host.shape[0],)


@described.register
def _(host: ConvHost) -> tuple[str, tuple[int, ...]] | None:
    if groups_of(host) > 1:
        return None
    return f"lora.dora.Dora{host.name}Layer", (1, host.shape[0], *[1] * (len(host.shape) - 2))


class Dora(Shifted):
    """DoRA (https://arxiv.org/abs/2402.09353): W' = g (W + D) row by row, with D = scaling B A and g = m / |W + D|.

    No gradient flows through the norm. W is the base layer's own weight whatever else is active: several adapters are
    applied in their order, each multiplying what the ones before it made, as in PEFT. Slots: LoRA's, and
    lora_magnitude_vector (out,), which starts as the norm, so that a fresh adapter is the identity.
    """

    def check(self, host: Host, config: Any, path: str) -> str | None:
        reason = super().check(host, config, path)
        if reason is None and described(host) is None:
            return f"DoRA (`use_dora`) has no form for {'groups in a ' * isinstance(host, ConvHost)}{host.name}"
        return reason

    def init(self, host: Host, at: Placement) -> dict[str, Any]:
        values = super().init(host, at)
        known = described(host)
        if known is None:
            raise NotImplementedError(host.label)
        label, shape = known
        if at.own is None or at.device.type == "meta":
            lengths = torch.empty(shape, dtype=at.dtype, device=at.device)
        else:
            a: Any = SimpleNamespace(**values)
            A, B = net_pair(host, a)
            lengths = row_norms(at.own().weight, A, B, values["scaling"], changed=bool(A.any() and B.any()))
            lengths = lengths.to(at.device, at.dtype)
        return {**values, "lora_magnitude_vector": Magnitude(label, lengths.view(shape))}

    def size(self, host: Host, config: Any, path: str) -> tuple[int | None, int]:
        r, parameters = super().size(host, config, path)
        return r, parameters + host.shape[0]

    def gain(self, a: View, own: Dense, rows: slice = ALL_ROWS) -> Tensor:
        """The factors g of some rows, of which `own` is the base layer's weight."""
        A, B = net_pair(a.layer.host, a)
        gain: Tensor = a.lora_magnitude_vector(row_norms(own.weight, A, B[rows], a.scaling), rows)
        return gain

    def forward(self, a: View, call: Program, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        host: Host = a.layer.host
        y = call(x, *args, **kwargs)
        own = a.layer.own()
        g = along_output(host, self.gain(a, own))
        entered = entering(host, a, x)
        added = self.low_rank(a, x, entered) * a.scaling
        if drops(host, a):
            linear = host.apply(entered.to(own.weight.dtype), own.weight)
            return torch.addcmul(torch.addcmul(y, g - 1, linear), g, added).to(y.dtype)
        return directed(y, None if own.bias is None else along_output(host, own.bias), g, added)

    def merge(self, a: View, dense: Dense, rows: slice = ALL_ROWS) -> Dense:
        own = a.layer.own(rows)
        g = self.gain(a, own, rows)
        weight = g.view(-1, *[1] * (dense.weight.dim() - 1)) * (dense.weight + self.delta(a, rows))
        if dense.bias is None or own.bias is None:
            return Dense(weight, dense.bias)
        return Dense(weight, own.bias + g * (dense.bias - own.bias))  # what adapters before this one added

    def bind(self, a: View, slow: Program) -> Program | None:
        return bound_if_small(a, slow) if start_of(a.layer.host, a) is None else None


@torch.no_grad()
def row_norms(weight: Tensor, A: Tensor, B: Tensor, scaling: float, changed: bool = True) -> Tensor:
    """|W + s B A| of each row (out,), in at least fp32 and, but for small ones, without the product (out, in).

    |w + s b A|^2 = |w|^2 + s <2 w A^T + s b A A^T, b> with rows w of W (out, in, *kernel) and b of B (out, r). With
    `changed=False`, for B A = 0, it is the same number without any product.
    """
    with without_autocast(weight.device.type):
        flat = weight.flatten(1)
        step = flat.shape[0] if flat.dtype.itemsize >= 4 else max(1, _BLOCK // max(1, flat.shape[1]))
        blocks = [slice(first, first + step) for first in range(0, flat.shape[0], step)]
        norms = [_norms(widened(flat[rows]), A, B[rows], scaling, changed) for rows in blocks]
        return norms[0] if len(norms) == 1 else torch.cat(norms)


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """A block without autocast, which takes its time to be switched off where it is not on."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _norms(w: Tensor, A: Tensor, B: Tensor, scaling: float, changed: bool) -> Tensor:
    if changed:
        A, B = A.to(w.dtype), B.to(w.dtype)
    if w.numel() <= SMALL:  # in one layout, in which sums are of one order
        w, changed = torch.addmm(w, B * scaling, A) if changed else w.contiguous(), False
    norms: Tensor = torch.linalg.vector_norm(w, dim=1)
    if not changed:
        return norms
    inner = (torch.addmm(w @ A.T, B, scaling * (A @ A.T), beta=2) * B).sum(1)
    return (norms.square() + scaling * inner).clamp_min(0).sqrt()


DORA = Dora()
