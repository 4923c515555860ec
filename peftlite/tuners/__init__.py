"""The methods: which modules have their configs and their mathematics, imported when a method is first asked for."""

from peftlite.registry import registry

_PLACES = {
    "LORA": ("lora.config", "lora.variant"),
    "ADALORA": ("adalora.config", "adalora.variant"),
    "IA3": ("ia3", "ia3"),
    "LN_TUNING": ("ln_tuning", "ln_tuning"),
    "LOHA": ("loha", "loha"),
    "LOKR": ("lokr", "lokr"),
    "TRAINABLE_TOKENS": ("trainable_tokens", "trainable_tokens"),
    "VERA": ("vera", "vera"),
}
"""Kind of adapter -> where its config is, and its tuner."""
_COMPANIONS = {"MODULES_TO_SAVE": "modules_to_save", "TOKEN_ADAPTER": "trainable_tokens"}

registry("configs").homes.update({kind: f"{__name__}.{config}" for kind, (config, _) in _PLACES.items()})
registry("tuners").homes.update({kind: f"{__name__}.{tuner}" for kind, (_, tuner) in _PLACES.items()})
registry("tuners").homes.update({kind: f"{__name__}.{tuner}" for kind, tuner in _COMPANIONS.items()})
registry("companions").homes.update({kind: f"{__name__}.{tuner}" for kind, tuner in _COMPANIONS.items()})
