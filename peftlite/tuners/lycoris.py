"""What LoHa and LoKr, methods of the LyCORIS family, have in common: fields of their configs, and dropout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftlite.checks import check_bool, check_int, check_number, check_pattern
from peftlite.config import PeftConfig, PeftType, register_config
from peftlite.core.hosts import ConvHost, Host, LinearHost
from peftlite.core.slots import Slot, View
from peftlite.core.targets import match_pattern
from peftlite.core.variant import Additive, Placement, Program, TunerSpec, register
from peftlite.tuners import draws
from peftlite.tuners.fields import check_probability, check_targets

NUMBERS = ("r", "alpha", "scaling", "rank_dropout", "module_dropout")


@dataclass
class LycorisConfig(PeftConfig):
    """The fields that every method of the family has; the patterns are as those of `LoraConfig`."""

    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False

    ordered_fields: ClassVar[frozenset[str]] = frozenset({"rank_pattern", "alpha_pattern"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_targets(self)
        self.r = check_int("r", self.r, 1)
        self.alpha = check_number("alpha", self.alpha)
        self.rank_pattern = check_pattern("rank_pattern", self.rank_pattern, lambda name, r: check_int(name, r, 1))
        self.alpha_pattern = check_pattern("alpha_pattern", self.alpha_pattern, check_number)
        self.rank_dropout = check_probability("rank_dropout", self.rank_dropout)
        self.module_dropout = check_probability("module_dropout", self.module_dropout)
        check_bool("use_effective_conv2d", self.use_effective_conv2d)

    def rank_for(self, path: str) -> int:
        """The rank at this path: of the first `rank_pattern` that matches, else `r`."""
        key = match_pattern(self.rank_pattern, path)
        return self.r if key is None else self.rank_pattern[key]

    def alpha_for(self, path: str) -> float:
        """The alpha at this path: of the first `alpha_pattern` that matches, else `alpha`."""
        key = match_pattern(self.alpha_pattern, path)
        return self.alpha if key is None else self.alpha_pattern[key]


class Lycoris(Additive):
    """An update of W made of factors, of which `shapes` says what they are and `zero` which one starts at zero.

    In training, `rank_dropout` drops features of the update's output, `module_dropout` the whole update of a call.
    """

    by_rows = True

    def shapes(self, host: Host, config: Any, path: str) -> dict[str, tuple[int, ...]]:
        """Slot name -> shape of every factor."""
        raise NotImplementedError(type(self).__name__)

    def zero(self, config: Any) -> tuple[str, ...]:
        """The slots, whichever there are, that start at zero so that a fresh adapter is the identity."""
        raise NotImplementedError(type(self).__name__)

    def check(self, host: Host, config: Any, path: str) -> str | None:
        if isinstance(host, (LinearHost, ConvHost)):
            return None
        return f"{config.kind.value} has no form for {host.label}"

    def init(self, host: Host, at: Placement) -> dict[str, Any]:
        config: LycorisConfig = at.config
        r, alpha, zero = config.rank_for(at.path), config.alpha_for(at.path), self.zero(config)
        factors = {
            name: nn.Parameter(torch.zeros_like(drawn) if name in zero else drawn, requires_grad=False)
            for name, shape in self.shapes(host, config, at.path).items()
            for drawn in (uniform(shape, at),)
        }
        dropout = {"rank_dropout": config.rank_dropout, "module_dropout": config.module_dropout}
        return {**factors, **dropout, "r": r, "alpha": alpha, "scaling": alpha / r}

    def size(self, host: Host, config: Any, path: str) -> tuple[int | None, int]:
        return config.rank_for(path), sum(math.prod(shape) for shape in self.shapes(host, config, path).values())

    def forward(self, a: View, call: Program, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        y: Tensor = call(x, *args, **kwargs)
        update = self.delta_forward(a, x)
        if a.layer.training:
            update = self.dropped(a, update)
        return (y + update).to(y.dtype)

    def dropped(self, a: View, update: Tensor) -> Tensor:
        """The update's output, after dropout: always computed, so that gradients exist and graphs do not break."""
        keep: Tensor | None = None
        if a.module_dropout:
            keep = torch.rand(1, device=update.device) > a.module_dropout
        if a.rank_dropout:
            out, *kernel = a.layer.host.shape[0], *(1 for _ in a.layer.host.shape[2:])
            kept = (torch.rand(out, device=update.device) > a.rank_dropout).to(update.dtype)
            update = update * self.rescaled(a, kept).view(-1, *kernel)
        return update if keep is None else update * keep

    def rescaled(self, a: View, kept: Tensor) -> Tensor:
        """The mask of kept features, scaled so that the update keeps its expected size."""
        return kept / kept.mean().clamp_min(torch.finfo(kept.dtype).tiny)


def effective(kernel: list[int], config: LycorisConfig) -> tuple[int, ...] | None:
    """The kernel that the core tensor of a convolution's factors has; None where factors have no core."""
    if not config.use_effective_conv2d or math.prod(kernel) == 1:
        return None
    return (*kernel, 1) if len(kernel) == 1 else tuple(kernel)


def uniform(shape: tuple[int, ...], at: Placement) -> Tensor:
    """U(-1/sqrt(n), 1/sqrt(n)), where n is the size of one row."""
    return draws.uniform(shape, 1 / math.sqrt(math.prod(shape[1:])), at)


def through(A: Tensor, T: Tensor, B: Tensor) -> Tensor:
    """(r, out), (r, r, *kernel), (r, in) -> (out, in, *kernel)."""
    return torch.einsum("ao,ab...,bi->oi...", A, T, B)


def register_kind(
    kind: PeftType, config: type[LycorisConfig], variant: Lycoris, slots: Sequence[str], numbers: Sequence[str] = ()
) -> None:
    """Make one of these methods known."""
    register_config(kind, config)
    register(
        TunerSpec(
            peft_type=kind.value,
            slots=tuple(map(Slot, slots)),
            variant_for=lambda _: variant,
            label=lambda host: f"{kind.value.lower()}.{host.name}",
            numbers=(*NUMBERS, *numbers),
        )
    )
