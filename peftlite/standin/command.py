"""The command `python -m peftlite.as_peft`: it runs a program under the stand-in, or installs the hook for workers."""

from __future__ import annotations

import os
import runpy
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from peftlite.config import atomic_path
from peftlite.standin.finder import install

ENVIRONMENT = "PEFTLITE_AS_PEFT"
HOOK = f"import os; os.environ.get({ENVIRONMENT!r}) == '1' and __import__('peftlite.as_peft')\n"
USAGE = """usage: python -m peftlite.as_peft script.py [args...]     run a program whose `import peft` gives peftlite
       python -m peftlite.as_peft -m module [args...]    the same for a module
       python -m peftlite.as_peft --install-hook         have PEFTLITE_AS_PEFT=1 do so for every process of this Python
       python -m peftlite.as_peft --remove-hook          undo that"""


def main(arguments: Sequence[str]) -> int:
    """Do what the command line says; the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    first, *rest = arguments
    if first in ("--install-hook", "--remove-hook"):
        print(install_hook() if first == "--install-hook" else remove_hook())
        return 0
    install()
    os.environ[ENVIRONMENT] = "1"  # for the processes that the program starts, where the hook is installed
    if first == "-m":
        sys.argv[:] = rest
        sys.path[0] = os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = arguments
        sys.path[0] = str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")
    return 0


def hook_path() -> Path:
    """Where the hook goes: a `.pth` file, whose line Python runs at every start."""
    return Path(sysconfig.get_path("purelib")) / "peftlite_as_peft.pth"


def install_hook() -> str:
    """Write the hook; what was done."""
    with atomic_path(hook_path()) as path:
        path.write_text(HOOK, encoding="utf-8")
    return f"Wrote {hook_path()}: with {ENVIRONMENT}=1, `import peft` gives peftlite."


def remove_hook() -> str:
    """Remove the hook; what was done."""
    hook_path().unlink(missing_ok=True)
    return f"Removed {hook_path()}."
