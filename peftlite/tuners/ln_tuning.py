"""LayerNorm tuning: the layer norms train whole, each adapter with its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from peftlite.config import PeftConfig, PeftType, register_config
from peftlite.core.hosts import Host
from peftlite.core.slots import ModuleSlot, Slot, View
from peftlite.core.variant import Placement, TunerSpec, register
from peftlite.tuners.fields import check_targets
from peftlite.tuners.modules_to_save import ModulesToSave


@dataclass
class LNTuningConfig(PeftConfig):
    """LayerNorm tuning (https://arxiv.org/abs/2312.11420): a copy of each target in its place, which trains.

    Meant for layer norms, whatever their class; other modules are copied too. The copy keeps the module's dtype.

    Raises: ConfigError.

    Example:
        >>> LNTuningConfig(target_modules=["norm", "input_layernorm"]).target_modules
        ['input_layernorm', 'norm']
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    kind: ClassVar[PeftType | None] = PeftType.LN_TUNING

    def __post_init__(self) -> None:
        super().__post_init__()
        check_targets(self)


class LNTuning(ModulesToSave):
    """The adapter's copy of the module in its place. Slot: ln_tuning_layers, the copy."""

    def init(self, host: Host, at: Placement) -> dict[str, Any]:
        return {"ln_tuning_layers": super().init(host, at)["modules_to_save"]}

    def why_not_follow(self, host: Host, leader: Host, config: Any, paths: tuple[str, str]) -> str | None:
        return "LayerNorm tuning has no such form"

    def replacement(self, a: View) -> nn.Module:
        module: nn.Module = a.ln_tuning_layers
        return module


_VARIANT = LNTuning()

register_config(PeftType.LN_TUNING, LNTuningConfig)
register(
    TunerSpec(
        peft_type=PeftType.LN_TUNING.value,
        slots=(Slot("ln_tuning_layers", ModuleSlot),),
        variant_for=lambda config: _VARIANT,
        label=lambda host: "ln_tuning.LNTuningLayer",
        any_module=True,
    )
)
