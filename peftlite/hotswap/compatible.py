"""Which adapters can take each other's place."""

from __future__ import annotations

from peftlite.checks import show
from peftlite.config import PeftConfig, PeftType
from peftlite.core.state import bias_of
from peftlite.errors import ConfigError
from peftlite.tuners.lora.config import LoraConfig
from peftlite.tuners.lora.variant import variant_for

SAME = (
    "lora_dropout",
    "lora_bias",
    "use_dora",
    "use_qalora",
    "qalora_group_size",
    "use_bdlora",
    "alora_invocation_tokens",
)
"""Fields on which two configs must agree, since they decide on more than numbers."""


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Refuse to put adapters with these configs into each other's place.

    Ranks, alphas, patterns and `use_rslora` may differ, since every layer's scaling is swapped too.

    Raises: ConfigError.
    """
    kinds = [str(getattr(c.peft_type, "value", c.peft_type)) for c in (config0, config1)]
    if kinds != [PeftType.LORA.value] * 2:
        raise ConfigError(f"`{kinds[0]}` and `{kinds[1]}`: only LoRA adapters can be hotswapped. Nothing was changed.")
    first, second = lora_config(config0), lora_config(config1)
    for name in SAME:
        if getattr(first, name) != getattr(second, name):
            raise ConfigError(
                f"`{name}` is {show(getattr(first, name))} and {show(getattr(second, name))}: adapters that differ in "
                "it cannot be hotswapped; load the other one under a name of its own. Nothing was changed."
            )
    variants = [type(variant_for(config)).__name__ for config in (first, second)]
    if variants[0] != variants[1]:
        raise ConfigError(
            f"One of the adapters is {variants[0]} and the other {variants[1]}: they cannot be hotswapped; load the "
            "other one under a name of its own. Nothing was changed."
        )
    for config in (first, second):
        if bias_of(config) != "none":
            raise ConfigError(
                f"`bias` is {show(bias_of(config))}: biases of the base model cannot be hotswapped. Nothing was "
                "changed."
            )


def lora_config(config: PeftConfig) -> LoraConfig:
    """The config, which is LoRA's.

    Raises: ConfigError.
    """
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        raise ConfigError(f"Only LoRA adapters can be hotswapped, and this is `{kind}`. Nothing was changed.")
    return config
