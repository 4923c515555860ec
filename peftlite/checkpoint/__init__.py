"""Adapters as files; `PeftConfig.from_pretrained` asks for two of the functions here."""

from peftlite.registry import registry

registry("files").homes.update({"fetch": f"{__name__}.hub", "read": f"{__name__}.files"})
