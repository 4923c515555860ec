"""Programs in a fresh process: the stand-in, and what libraries make of it, cannot be undone in a running one."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FLOWS = Path(__file__).parent / "flows"
Done = subprocess.CompletedProcess[str]
needs_libraries = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("datasets", "diffusers", "sentence_transformers", "trl")),
    reason="the tested versions of these libraries need Python 3.11 and transformers 5",
)
QUIET = ["-W", "ignore:The real `peft`"]


def run(command: list[str], *, cwd: Path = ROOT, ok: bool = True, **environment: str) -> Done:
    """Run Python with these arguments; the process must end well, or badly if not `ok`."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode == 0) is ok, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def flow(name: str, *arguments: str, **environment: str) -> str:
    """Run a file of `flows` under the stand-in; its output."""
    file = str(FLOWS / f"{name}.py")
    done = run([*QUIET, "-m", "peftlite.as_peft", file, *arguments], **environment)
    assert done.stdout.rstrip().endswith("done"), done.stdout[-2000:]
    return done.stdout


def program(*parts: str, ok: bool = True, **environment: str) -> Done:
    """Run the parts as one program."""
    code = "\n".join(textwrap.dedent(part) for part in parts)
    return run([*QUIET, "-W", "error::UserWarning:peftlite", "-c", code], ok=ok, **environment)
