"""AdaLoRA: low-rank adaptation in the form of a singular value decomposition, and the tuner."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor, nn

from peftlite.config import PeftType
from peftlite.core.hosts import ALL_ROWS, ConvHost, Host, LinearHost, widened
from peftlite.core.lean import dropout
from peftlite.core.slots import ModuleSlot, Slot, View
from peftlite.core.state import AdapterState
from peftlite.core.transaction import put
from peftlite.core.variant import Additive, FileForm, Placement, TunerSpec, register
from peftlite.tuners.adalora.allocation import Allocation, after_forward
from peftlite.tuners.adalora.config import AdaLoraConfig, pattern_key
from peftlite.tuners.fields import note_storage

EPSILON: Final = 1e-5


class AdaLora(Additive):
    """W' = W + scaling / (ranknum + 1e-5) * B (E * A): triplets of a row of A, a number of E and a column of B.

    Slots: lora_A (r, in * kernel), lora_B (out, r), lora_E (r, 1), which starts at zero; ranknum (1,) stays what r was
    at first, so that taking triplets away does not change what the others do.
    """

    by_rows = True

    def check(self, host: Host, config: Any, path: str) -> str | None:
        return None if isinstance(host, (LinearHost, ConvHost)) else f"ADALORA has no form for {host.label}"

    def init(self, host: Host, at: Placement) -> dict[str, Any]:
        config: AdaLoraConfig = at.config
        out, into, r = host.shape[0], math.prod(host.shape[1:]), config.rank_for(at.path)
        shapes = {"lora_A": (r, into), "lora_B": (out, r), "lora_E": (r, 1)}
        std = 1.0 if config.init_lora_weights is False else 0.02
        factors = {s: torch.empty(n, device=at.device, dtype=at.dtype).normal_(0.0, std) for s, n in shapes.items()}
        if config.init_lora_weights is not False:
            factors["lora_E"].zero_()
        place = host.device if at.device.type == "meta" else at.device  # no file brings it
        return {
            "lora_dropout": dropout(config.lora_dropout),
            **{slot: nn.Parameter(factor, requires_grad=False) for slot, factor in factors.items()},
            "ranknum": nn.Parameter(torch.full((1,), float(config.init_r), device=place, dtype=at.dtype), False),
            "r": config.init_r,
            "lora_alpha": config.lora_alpha,
            "scaling": config.lora_alpha if config.lora_alpha > 0 else float(config.init_r),
        }

    def size(self, host: Host, config: Any, path: str) -> tuple[int | None, int]:
        r: int = config.rank_for(path)
        return r, r * (host.shape[0] + math.prod(host.shape[1:]) + 1)

    def delta(self, a: View, rows: slice = ALL_ROWS) -> Tensor:
        A, B, E = map(widened, (a.lora_A, a.lora_B, a.lora_E))
        product = (B[rows] @ (A * E)).view(-1, *a.layer.host.shape[1:])
        return product * float(a.scaling) / (widened(a.ranknum) + EPSILON)

    def delta_forward(self, a: View, x: Tensor) -> Tensor:
        x = a.lora_dropout(x.to(a.lora_A.dtype))
        if not isinstance(a.layer.host, LinearHost):
            return super().delta_forward(a, x)
        y: Tensor = (x @ (a.lora_A * a.lora_E).T @ a.lora_B.T) * a.scaling / (a.ranknum + EPSILON)
        return y


def cut(memory: Allocation | None, path: str, suffix: str, tensor: Tensor) -> Tensor:
    """What a file has of a layer's tensor: the triplets that the last allocation left."""
    mask, dim = None if memory is None else memory.kept.get(pattern_key(path)), int(suffix == "lora_B")
    if mask is None or not suffix.startswith("lora_") or len(mask) != tensor.shape[dim]:
        return tensor
    return tensor.index_select(dim, torch.tensor(mask).nonzero().flatten().to(tensor.device))


def uncut(config: AdaLoraConfig, path: str, suffix: str, tensor: Tensor) -> Tensor:
    """The inverse of `cut` for a layer that has all triplets: zeros for those that are gone."""
    mask, dim = (config.rank_pattern or {}).get(pattern_key(path)), int(suffix == "lora_B")
    if mask is None or not suffix.startswith("lora_") or sum(mask) != tensor.shape[dim]:
        return tensor
    full = tensor.new_zeros([len(mask) if side == dim else size for side, size in enumerate(tensor.shape)])
    return full.index_copy(dim, torch.tensor(mask).nonzero().flatten().to(tensor.device), tensor)


def adopt(state: AdapterState, name: str, config: AdaLoraConfig) -> None:
    """An adapter that is given a file's tensors has its triplets chosen where those were."""
    own: Any = state.configs[name]
    own.rank_pattern = config.rank_pattern
    if config.rank_pattern is not None:
        put(state.memory, name, Allocation(kept=config.rank_pattern))


_ADALORA = AdaLora()

register(
    TunerSpec(
        peft_type=PeftType.ADALORA.value,
        slots=(
            Slot("lora_dropout", ModuleSlot, trainable=False),
            *map(Slot, ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")),
            Slot("lora_magnitude_vector", ModuleSlot),
            Slot("lora_E"),
            Slot("ranknum", trainable=False, derived=True),
        ),
        variant_for=lambda config: _ADALORA,
        label=lambda host: f"adalora.SVD{host.name}",
        numbers=("r", "lora_alpha", "scaling"),
        resolve=note_storage,
        file_form=FileForm(cut, uncut, adopt),
        after_forward=after_forward,
    )
)
