"""The tuner of LoRA's family: what is stored where, and which variant a config asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from peftlite.config import PeftType
from peftlite.core.hosts import Host
from peftlite.core.slots import ModuleSlot, Slot
from peftlite.core.variant import TunerSpec, Variant, register
from peftlite.registry import later
from peftlite.tuners.lora.config import LoraConfig
from peftlite.tuners.lora.inits.table import beginning
from peftlite.tuners.lora.plain import Lora
from peftlite.tuners.lora.start import Mica, Shifted

if TYPE_CHECKING:
    from peftlite.tuners.lora import alora, arrow, dora, frugal
else:
    alora = later("peftlite.tuners.lora.alora")
    arrow = later("peftlite.tuners.lora.arrow")
    dora = later("peftlite.tuners.lora.dora")
    frugal = later("peftlite.tuners.lora.frugal")

SLOTS = (
    Slot("lora_dropout", ModuleSlot, trainable=False),
    Slot("lora_A", ModuleSlot),
    Slot("lora_B", ModuleSlot),
    Slot("lora_embedding_A"),
    Slot("lora_embedding_B"),
    Slot("lora_magnitude_vector", ModuleSlot, bare=True),
)

_LORA = Lora()
_SHIFTED = Shifted()
_MICA = Mica()


def variant_for(config: LoraConfig) -> Variant:
    """The variant that a config asks for."""
    if config.use_dora:
        return dora.DORA
    if config.use_bdlora is not None:
        return frugal.BLOCKS
    if config.use_qalora:
        return frugal.POOLED
    if config.alora_invocation_tokens:
        return alora.INVOKED
    if config.arrow_config is not None:
        return arrow.ROUTED
    if config.init_lora_weights == "mica":
        return _MICA
    begin = beginning(config.init_lora_weights)
    return _SHIFTED if begin is not None and begin.subtracted else _LORA


def resolve(config: LoraConfig, hosts: Sequence[tuple[str, Host]]) -> None:
    """Note in the model's own config how the adapted weights are stored, as readers of the file expect it."""
    config.fan_in_fan_out = any(host.transposed for _, host in hosts)


LORA = register(
    TunerSpec(
        peft_type=PeftType.LORA.value,
        slots=SLOTS,
        variant_for=variant_for,
        label=lambda host: f"lora.{host.name}",
        numbers=("r", "lora_alpha", "scaling"),
        shown=frozenset(("r", "lora_alpha")),
        resolve=resolve,
    )
)
