"""Stands in for the package `peft`: after `import peftlite.as_peft`, `import peft` gives peftlite's own objects.

Three ways to ask for it, and nothing else does:

    import peftlite.as_peft                           the first line of a program
    python -m peftlite.as_peft script.py args...      a program as it is
    PEFTLITE_AS_PEFT=1                                any process, after `python -m peftlite.as_peft --install-hook`
"""

from __future__ import annotations

from peftlite.as_peft.finder import install
from peftlite.as_peft.repair import StandInError
from peftlite.as_peft.table import PEFT_VERSION

__all__ = ["PEFT_VERSION", "StandInError", "install"]

install()
