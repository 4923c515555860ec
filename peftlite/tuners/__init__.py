"""The methods. Importing this package makes every one of them known."""

from peftlite.tuners import modules_to_save
from peftlite.tuners.lora import variant

__all__ = ["modules_to_save", "variant"]
