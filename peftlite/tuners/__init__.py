"""The methods. Importing this package makes every one of them known."""

from peftlite.tuners import ia3, ln_tuning, loha, lokr, modules_to_save, trainable_tokens, vera
from peftlite.tuners.adalora import variant as adalora
from peftlite.tuners.lora import variant

__all__ = ["adalora", "ia3", "ln_tuning", "loha", "lokr", "modules_to_save", "trainable_tokens", "variant", "vera"]
