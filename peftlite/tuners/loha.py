"""LoHa: the Hadamard product of two low-rank products."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from peftlite.checks import check_bool
from peftlite.config import PeftType
from peftlite.core.hosts import ALL_ROWS, Host, LinearHost, widened
from peftlite.core.slots import View
from peftlite.tuners.lycoris import Lycoris, LycorisConfig, effective, register_kind, through


@dataclass
class LoHaConfig(LycorisConfig):
    """LoHa (https://arxiv.org/abs/2108.06098): W' = W + (alpha / r) (A1 B1) * (A2 B2), of rank up to r^2.

    Raises: ConfigError.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    kind: ClassVar[PeftType | None] = PeftType.LOHA

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bool("init_weights", self.init_weights)


class LoHa(Lycoris):
    """W' = W + scaling * (A1 B1) * (A2 B2), elementwise; with a core T in convolutions, each product is A T B.

    Slots: hada_w1_a (out, r), hada_w1_b (r, in * kernel), and hada_w2_*; with a core (r, out), (r, in) and
    hada_t1 (r, r, *kernel). B2 starts at zero.
    """

    def shapes(self, host: Host, config: Any, path: str) -> dict[str, tuple[int, ...]]:
        r, (out, into, *kernel) = config.rank_for(path), host.shape
        core = effective(kernel, config)
        a, b = ((r, out), (r, into)) if core else ((out, r), (r, into * math.prod(kernel)))
        cores = {"hada_t1": (r, r, *core), "hada_t2": (r, r, *core)} if core else {}
        return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b, **cores}

    def zero(self, config: Any) -> tuple[str, ...]:
        return ("hada_w2_b",) if config.init_weights else ()

    def delta(self, a: View, rows: slice = ALL_ROWS) -> Tensor:
        shape, scaling = a.layer.host.shape, float(a.scaling)
        A1, B1, A2, B2 = map(widened, (a.hada_w1_a, a.hada_w1_b, a.hada_w2_a, a.hada_w2_b))
        if "hada_t1" in a.bound:
            T1, T2 = widened(a.hada_t1), widened(a.hada_t2)
            product = through(A1[:, rows], T1, B1) * through(A2[:, rows], T2, B2)
        else:
            product = (A1[rows] @ B1) * (A2[rows] @ B2)  # (rows, in * kernel)
        return product.reshape(-1, *shape[1:]) * scaling

    def delta_forward(self, a: View, x: Tensor) -> Tensor:
        """Of a linear layer by r^2 inner features, where those are fewer numbers than the whole update has.

        (A1 B1 * A2 B2)[o, i] = sum over p, q of (A1[o, p] A2[o, q]) (B1[p, i] B2[q, i])
        """
        r, (out, into, *_) = a.r, a.layer.host.shape
        if not isinstance(a.layer.host, LinearHost) or r * r * (out + into) >= out * into:
            return super().delta_forward(a, x)
        A = (a.hada_w1_a[:, :, None] * a.hada_w2_a[:, None, :]).flatten(1)  # (out, r^2)
        B = (a.hada_w1_b[:, None, :] * a.hada_w2_b[None, :, :]).flatten(0, 1)  # (r^2, in)
        y: Tensor = F.linear(F.linear(x.to(B.dtype), B), A) * a.scaling
        return y


register_kind(
    PeftType.LOHA, LoHaConfig, LoHa(), ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
)
