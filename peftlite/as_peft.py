"""Stands in for the package `peft`: after `import peftlite.as_peft`, `import peft` gives peftlite's own objects.

Three ways to ask for it, and nothing else does:

    import peftlite.as_peft                           the first line of a program
    python -m peftlite.as_peft script.py args...      a program as it is
    PEFTLITE_AS_PEFT=1                                any process, after `python -m peftlite.as_peft --install-hook`
"""

from __future__ import annotations

import sys

from peftlite.standin.command import main
from peftlite.standin.finder import install
from peftlite.standin.repair import StandInError

__all__ = ["StandInError", "install"]

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
install()
