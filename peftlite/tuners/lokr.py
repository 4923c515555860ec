"""LoKr: a Kronecker product."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from peftlite.checks import check_bool, check_choice, check_int, wrong
from peftlite.config import PeftType
from peftlite.core.hosts import ALL_ROWS, Host, LinearHost, widened
from peftlite.core.slots import View
from peftlite.core.variant import Placement
from peftlite.tuners.lycoris import Lycoris, LycorisConfig, effective, register_kind, through


@dataclass
class LoKrConfig(LycorisConfig):
    """LoKr (https://arxiv.org/abs/2212.10650): W' = W + (alpha / r) W1 (x) W2, factors that are large being low-rank.

    W2 is low-rank where r is less than half its larger side, and W1 too with `decompose_both`. `decompose_factor` says
    how large W1 may be at most; -1 makes it as large as W2 or nearly so.

    Raises: ConfigError.
    """

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    init_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    kind: ClassVar[PeftType | None] = PeftType.LOKR

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("decompose_both", "rank_dropout_scale"):
            check_bool(name, getattr(self, name))
        self.decompose_factor = check_int("decompose_factor", self.decompose_factor, -1)
        if self.decompose_factor == 0:
            raise wrong("decompose_factor", self.decompose_factor, "an int of at least 1, or -1")
        if not isinstance(self.init_weights, bool):
            self.init_weights = check_choice("init_weights", self.init_weights, ("lycoris",))


class LoKr(Lycoris):
    """W' = W + scaling * W1 (x) W2: W1 (l, m) = A B, W2 (k, n, *kernel) = A B or A T B, with out = l k, in = m n.

    Slots: lokr_w1, or lokr_w1_a (l, r) and lokr_w1_b (r, m); lokr_w2, or lokr_w2_a (k, r) and lokr_w2_b
    (r, n * kernel), with a core (r, k), (r, n) and lokr_t2 (r, r, *kernel). W1 starts at zero ("lycoris": W2).
    """

    def shapes(self, host: Host, config: Any, path: str) -> dict[str, tuple[int, ...]]:
        r, (out, into, *kernel) = config.rank_for(path), host.shape
        l, k = factorized(out, config.decompose_factor)  # noqa: E741
        m, n = factorized(into, config.decompose_factor)
        core = effective(kernel, config)
        low_rank_w1 = config.decompose_both and 2 * r < max(l, m)
        first = {"lokr_w1_a": (l, r), "lokr_w1_b": (r, m)} if low_rank_w1 else {"lokr_w1": (l, m)}
        if 2 * r >= max(k, n):
            return {**first, "lokr_w2": (k, n, *kernel)}
        if core:
            return {**first, "lokr_w2_a": (r, k), "lokr_w2_b": (r, n), "lokr_t2": (r, r, *core)}
        return {**first, "lokr_w2_a": (k, r), "lokr_w2_b": (r, n * math.prod(kernel))}

    def zero(self, config: Any) -> tuple[str, ...]:
        if config.init_weights == "lycoris":
            return ("lokr_w2", "lokr_w2_b")
        return ("lokr_w1", "lokr_w1_a") if config.init_weights else ()

    def init(self, host: Host, at: Placement) -> dict[str, Any]:
        return {**super().init(host, at), "rank_dropout_scale": at.config.rank_dropout_scale}

    def delta(self, a: View, rows: slice = ALL_ROWS) -> Tensor:
        shape, scaling = a.layer.host.shape, float(a.scaling)
        if (chosen := narrow(a, rows)) is not None:
            W1, W2 = factors(a, chosen % height(a))
            product = W1[chosen // height(a), :, None] * W2.flatten(1)[:, None, :]  # (rows, m, n * kernel)
            return product.reshape(-1, *shape[1:]) * scaling
        W1, W2 = factors(a)
        row = torch.arange(shape[0], device=W1.device)[rows]
        if W2.dim() == 3:  # how PEFT multiplies an undivided W2 of a Conv1d, and so what its files mean
            outer, inner = row // len(W1), row % len(W1)
            product = W1[inner, None, :, None] * W2[outer, :, None, :]  # (rows, n, m, kernel)
        elif rows == ALL_ROWS:
            product = torch.kron(W1, W2.flatten(1))
        else:
            outer, inner = row // len(W2), row % len(W2)
            product = W1[outer, :, None] * W2.flatten(1)[inner, None, :]  # (rows, m, n * kernel)
        return product.reshape(-1, *shape[1:]) * scaling

    def delta_forward(self, a: View, x: Tensor) -> Tensor:
        """Of a linear layer without the product: x as (m, n) is multiplied with one factor from each side."""
        if not isinstance(a.layer.host, LinearHost):
            return super().delta_forward(a, x)
        W1, W2 = factors(a)
        X = x.to(W1.dtype).reshape(*x.shape[:-1], W1.shape[1], W2.shape[1])
        Y = F.linear(X, W2)  # (..., m, k)
        y: Tensor = torch.einsum("lm,...mk->...lk", W1, Y)  # the bits of `@` depend on which of both requires gradients
        return y.flatten(-2) * float(a.scaling)

    def rescaled(self, a: View, kept: Tensor) -> Tensor:
        return super().rescaled(a, kept) if a.rank_dropout_scale else kept


def height(a: View) -> int:
    """k, the number of rows of W2."""
    if "lokr_w2" in a.bound:
        return len(a.lokr_w2)
    return int(a.lokr_w2_a.shape[1 if "lokr_t2" in a.bound else 0])


def narrow(a: View, rows: slice) -> Tensor | None:
    """The numbers of these rows of W, if they need fewer rows of a W2 that is a product than it has."""
    if rows == ALL_ROWS or "lokr_w2" in a.bound:
        return None
    chosen = torch.arange(a.layer.host.shape[0], device=a.lokr_w2_a.device)[rows]
    return chosen if len(chosen) < height(a) else None


def factors(a: View, rows: Tensor | slice = ALL_ROWS) -> tuple[Tensor, Tensor]:
    """W1 (l, m) and W2 (k, n, *kernel), or some rows of it; a W2 that is a product without core is (k, n * kernel)."""
    W1 = widened(a.lokr_w1) if "lokr_w1" in a.bound else widened(a.lokr_w1_a) @ widened(a.lokr_w1_b)
    if "lokr_w2" in a.bound:
        return W1, widened(a.lokr_w2)[rows]
    A, B = widened(a.lokr_w2_a), widened(a.lokr_w2_b)
    return W1, through(A[:, rows], widened(a.lokr_t2), B) if "lokr_t2" in a.bound else A[rows] @ B


def factorized(size: int, limit: int) -> tuple[int, int]:
    """`size` as a product (first, second): the first is `limit` if that divides it, else the largest divisor below.

    The first is then not larger than the second; -1 sets no other limit.

    Example:
        >>> factorized(4096, -1), factorized(768, 16), factorized(10, 4)
        ((64, 64), (16, 48), (2, 5))
    """
    if limit > 0 and size % limit == 0:
        return limit, size // limit
    most = math.isqrt(size) if limit == -1 else min(limit, math.isqrt(size))
    first = next(d for d in range(most, 0, -1) if size % d == 0)
    return first, size // first


_SLOTS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")

register_kind(PeftType.LOKR, LoKrConfig, LoKr(), _SLOTS, ("rank_dropout_scale",))
