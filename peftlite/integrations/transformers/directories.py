"""`from_pretrained` and pipelines of directories that hold an adapter, without `peft`.

transformers looks for an adapter only where `is_peft_available()`: the modules that look are told that it is, since
what they find goes to `model.load_adapter`, which is ours. Whoever else asks is told the truth.
"""

from __future__ import annotations

from types import ModuleType

from transformers import utils

GATE = "is_peft_available"
FIND = "find_adapter_config_file"


def patch(module: ModuleType) -> None:
    """Let a module of transformers look for adapters."""
    if GATE in vars(module):
        setattr(module, GATE, adapters_can_be_loaded)
        vars(module).setdefault(FIND, getattr(utils, FIND))  # older versions import it only where there is `peft`


def adapters_can_be_loaded() -> bool:
    """Whether an adapter that is found can be loaded: by peftlite at least."""
    return True
