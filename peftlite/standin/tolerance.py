"""What PEFT accepts and peftlite refuses unless asked: in the stand-in it is accepted, and said in a warning.

What changes are defaults of keyword-only arguments, so functions and classes stay the same objects, and a call that
names the argument gets what it asks for.
"""

from __future__ import annotations

import importlib
import inspect
from functools import cache, reduce
from typing import Any, Final

DEFAULTS: Final[dict[str, tuple[str, object]]] = {
    "peftlite.core.inject:inject": ("unmatched", "warn"),
    "peftlite.entry:get_peft_model": ("unmatched", "warn"),
    "peftlite.model.wrapper:PeftModel.__init__": ("unmatched", "warn"),
    "peftlite.model.wrapper:PeftModel.add_adapter": ("unmatched", "warn"),
    "peftlite.model.wrapper:PeftModel.from_pretrained": ("strict", "shapes"),
    "peftlite.model.wrapper:PeftModel.load_adapter": ("strict", "shapes"),
    "peftlite.checkpoint.state_dict:set_peft_model_state_dict": ("strict", "shapes"),
    "peftlite.integrations.transformers.loading:Request.of": ("strict", "shapes"),
}
"""Function -> (argument, its default in the stand-in)."""


@cache
def settle() -> None:
    """Set the defaults, once: when the first name of `peft` is used, since it imports torch."""
    for place, (argument, value) in DEFAULTS.items():
        module, _, path = place.partition(":")
        found: Any = reduce(getattr, path.split("."), importlib.import_module(module))
        function: Any = inspect.unwrap(getattr(found, "__func__", found))  # of a class method, and of `atomic`
        function.__kwdefaults__ = {**function.__kwdefaults__, argument: value}
