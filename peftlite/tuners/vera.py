"""VeRA: one frozen random projection for all layers, two trained vectors for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlite.checks import check_bool, check_choice, check_int, check_number
from peftlite.config import PeftConfig, PeftType, register_config
from peftlite.core.hosts import ALL_ROWS, Host, LinearHost, widened
from peftlite.core.lean import dropout
from peftlite.core.slots import BufferSlot, ModuleSlot, Slot, View
from peftlite.core.variant import Additive, Placement, Shared, TunerSpec, register
from peftlite.tuners.fields import check_probability, check_targets, note_storage


@dataclass
class VeraConfig(PeftConfig):
    """VeRA (https://arxiv.org/abs/2310.11454): W' = W + diag(b) B diag(d) A, with trained vectors b and d only.

    A and B are drawn from `projection_prng_key`; without `save_projection` a file relies on drawing them again.

    Raises: ConfigError.
    """

    r: int = 256
    target_modules: list[str] | str | None = None
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    kind: ClassVar[PeftType | None] = PeftType.VERA

    def __post_init__(self) -> None:
        super().__post_init__()
        check_targets(self)
        self.r = check_int("r", self.r, 1)
        self.projection_prng_key = check_int("projection_prng_key", self.projection_prng_key, -(2**63))
        self.vera_dropout = check_probability("vera_dropout", self.vera_dropout)
        self.d_initial = check_number("d_initial", self.d_initial)
        self.bias = check_choice("bias", self.bias, ("none", "all", "vera_only", "lora_only"))
        for name in ("save_projection", "fan_in_fan_out", "init_weights"):
            check_bool(name, getattr(self, name))


class Vera(Additive):
    """W' = W + diag(b) B diag(d) A, where a layer uses the first rows of B (out, r) and columns of A (r, in).

    Slots: vera_lambda_b (out,), zeros, and vera_lambda_d (r,); vera_A and vera_B are as large as the largest layer
    needs, frozen, and the same tensors in all layers.
    """

    by_rows = True

    def check(self, host: Host, config: Any, path: str) -> str | None:
        return None if isinstance(host, LinearHost) else f"VERA has no form for {host.label}"

    def init(self, host: Host, at: Placement) -> dict[str, Any]:
        config: VeraConfig = at.config
        b = torch.full((host.shape[0],), 0.0 if config.init_weights else 1.0, device=at.device, dtype=at.dtype)
        d = torch.full((config.r,), config.d_initial, device=at.device, dtype=at.dtype)
        if not config.init_weights:
            d.normal_()
        return {
            "vera_dropout": dropout(config.vera_dropout),
            "vera_lambda_b": nn.Parameter(b, requires_grad=False),
            "vera_lambda_d": nn.Parameter(d, requires_grad=False),
            "r": config.r,
        }

    def size(self, host: Host, config: Any, path: str) -> tuple[int | None, int]:
        return config.r, config.r + host.shape[0]

    def delta(self, a: View, rows: slice = ALL_ROWS) -> Tensor:
        A, B, b, d = parts(a)
        left = widened(b)[rows, None] * widened(B[rows]) * widened(d)  # (rows, r)
        if A.dtype == left.dtype:
            return left @ A  # (rows, r) @ (r, in) -> (rows, in)
        total = left.new_zeros(len(left), A.shape[1])
        step = max(1, len(b) // 64)
        for some in (slice(start, start + step) for start in range(0, len(A), step)):  # all of A is not small
            total = torch.addmm(total, left[:, some], widened(A[some]))
        return total

    def delta_forward(self, a: View, x: Tensor) -> Tensor:
        A, B, b, d = parts(a)
        y: Tensor = b * F.linear(d * F.linear(a.vera_dropout(x.to(A.dtype)), A), B)
        return y


def parts(a: View) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A (r, in), B (out, r), b (out,) and d (r,) of one layer, on its device and in one dtype."""
    b, d = a.vera_lambda_b, a.vera_lambda_d
    out, into = a.layer.host.shape
    A, B = a.vera_A.to(d), a.vera_B.to(d)
    return A[:, :into], B[:out], b, d


def projection(config: VeraConfig, hosts: Sequence[Host], at: Placement) -> dict[str, Tensor]:
    """A (r, largest in) and B (largest out, r), as PEFT draws them: on the CPU, A first."""
    out, into = (max(host.shape[side] for host in hosts) for side in (0, 1))
    generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
    return {"vera_A": drawn((config.r, into), generator, at), "vera_B": drawn((out, config.r), generator, at)}


def drawn(shape: tuple[int, int], generator: torch.Generator, at: Placement) -> Tensor:
    """U(-s, s) with s = sqrt(6 / columns)."""
    if at.device.type == "meta":
        return torch.empty(shape, device=at.device, dtype=at.dtype)
    bound = math.sqrt(2.0) / math.sqrt(shape[1]) * math.sqrt(3.0)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator).to(device=at.device, dtype=at.dtype)


_VERA = Vera()

register_config(PeftType.VERA, VeraConfig)
register(
    TunerSpec(
        peft_type=PeftType.VERA.value,
        slots=(
            Slot("vera_dropout", ModuleSlot, trainable=False),
            Slot("vera_lambda_b"),
            Slot("vera_lambda_d"),
            Slot("vera_A", BufferSlot, trainable=False, shared=True),
            Slot("vera_B", BufferSlot, trainable=False, shared=True),
        ),
        variant_for=lambda config: _VERA,
        label=lambda host: f"vera.{host.name}",
        numbers=("r",),
        resolve=note_storage,
        shared=Shared(projection, lambda config: bool(config.save_projection)),
    )
)
