"""Variants of LoRA on linear layers that store less: BD-LoRA's blocks, and QALoRA's groups of inputs."""

from __future__ import annotations

import math
from typing import Any

from peftlite.core.hosts import Host, LinearHost
from peftlite.core.targets import contains_any
from peftlite.core.variant import Placement
from peftlite.tuners import draws
from peftlite.tuners.lora.config import LoraConfig
from peftlite.tuners.lora.factors import first_factor, uniform, zeros
from peftlite.tuners.lora.options import BdLoraConfig
from peftlite.tuners.lora.plain import Lora
from peftlite.tuners.lora.structured import BlockDiagonalLinear, PooledLinear


class Blocks(Lora):
    """BD-LoRA: one of the factors is block-diagonal, so that tensor parallelism needs no communication for it.

    With n blocks, lora_A is (r, in / n) or lora_B is (out, r / n), as `use_bdlora` says by the names of modules.
    """

    def check(self, host: Host, config: Any, path: str) -> str | None:
        if not isinstance(host, LinearHost):
            return f"`use_bdlora` has no form for {host.label}"
        asked: BdLoraConfig = config.use_bdlora
        sides, n, r = self.sides(asked, path), asked.nblocks, config.rank_for(path)
        if len(sides) == 2:
            return "`use_bdlora` names it in `target_modules_bd_a` and `target_modules_bd_b`"
        if not sides and asked.match_strict and (asked.target_modules_bd_a or asked.target_modules_bd_b):
            return "`use_bdlora` names it neither for A nor for B; `match_strict=False` leaves such modules plain"
        out, into = host.shape
        for side, size in (("A", into), ("B", out)):
            if side in sides and (size % n or r % n):
                return f"`nblocks={n}` of `use_bdlora` does not divide its size {size} and rank {r}"
        return super().check(host, config, path)

    @staticmethod
    def sides(asked: BdLoraConfig, path: str) -> list[str]:
        """Which factors are block-diagonal at a path: none, A, B, or (which is refused) both."""
        named = {"A": asked.target_modules_bd_a, "B": asked.target_modules_bd_b}
        return [side for side, names in named.items() if contains_any(path, names or ())]

    def init(self, host: Host, at: Placement) -> dict[str, Any]:
        values = super().init(host, at)
        config: LoraConfig = at.config
        asked: Any = config.use_bdlora
        r, n, (out, into) = values["r"], asked.nblocks, host.shape
        for side in self.sides(asked, at.path):
            if side == "A":
                A = draws.uniform((r, into // n), math.sqrt(6 * n / into), at)
                values["lora_A"] = BlockDiagonalLinear(A, n)
            else:
                random_B = config.init_lora_weights is False
                B = uniform((out, r // n), r // n, at) if random_B else zeros((out, r // n), at)
                values["lora_B"] = BlockDiagonalLinear(B, n)
        return values

    def size(self, host: Host, config: Any, path: str) -> tuple[int | None, int]:
        r: int = config.rank_for(path)
        out, into = host.shape
        n, sides = config.use_bdlora.nblocks, self.sides(config.use_bdlora, path)
        return r, r * (into // (n if "A" in sides else 1) + out // (n if "B" in sides else 1))


class Pooled(Lora):
    """QALoRA (https://arxiv.org/abs/2309.14717): lora_A (r, in / g) sees sums over groups of g inputs.

    So B A is constant on the groups on which a quantised base has one scale and zero point. The factor in / g^2 on the
    sums is PEFT's.
    """

    def check(self, host: Host, config: Any, path: str) -> str | None:
        g = config.qalora_group_size
        if not isinstance(host, LinearHost):
            return f"`use_qalora` has no form for {host.label}"
        if host.shape[1] % g:
            return f"`qalora_group_size={g}` does not divide its input size {host.shape[1]}"
        return super().check(host, config, path)

    def init(self, host: Host, at: Placement) -> dict[str, Any]:
        values = super().init(host, at)
        config: LoraConfig = at.config
        r, groups = values["r"], host.shape[1] // config.qalora_group_size
        A = first_factor((r, groups), groups, r, at)
        return {**values, "lora_A": PooledLinear(A, config.qalora_group_size)}

    def size(self, host: Host, config: Any, path: str) -> tuple[int | None, int]:
        r: int = config.rank_for(path)
        out, into = host.shape
        bias = out if config.lora_bias else 0
        return r, r * (into // config.qalora_group_size + out) + bias


BLOCKS = Blocks()
POOLED = Pooled()
