"""What importing costs, on top of what a user has imported already; each measured in processes of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

from benchmarks.harness import Goal, Row, Settings, Spread

_PROGRAM = """
import sys, time
{before}
known, start = len(sys.modules), time.thread_time()
{what}
print(time.thread_time() - start, len(sys.modules) - known)
"""
_WHAT = {"peft": "import peft", "peftlite": "import peftlite\nfrom peftlite import LoraConfig, get_peft_model"}


def rows(quick: bool) -> Iterator[Row]:
    bare = "import torch, transformers"
    model = "import torch\nfrom transformers import LlamaForCausalLM"
    if quick:
        yield row("nothing", "", ("peftlite",), None)
        return
    for title, before, goal in (("torch + transformers", bare, 0.02), ("torch + LlamaForCausalLM", model, 0.10)):
        yield row(title, before, Settings.timed, goal)


def row(title: str, before: str, names: tuple[str, ...], goal: float | None) -> Row:
    found, notes = {}, []
    for name in names:
        found[name], modules = cost(before, _WHAT[name])
        notes.append(f"{modules} modules with {name}")
    return Row(f"import on top of {title}", "ms", found, () if goal is None else (Goal(goal),), note=", ".join(notes))


def cost(before: str, what: str) -> tuple[Spread, int]:
    """(seconds of thread-CPU time, modules imported)."""
    program = _PROGRAM.format(before=before, what=what)
    found = [
        subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, capture_output=True, text=True)
        for _ in range(1 if Settings.quick else 3)
    ]
    times, modules = zip(*(run.stdout.split()[-2:] for run in found), strict=True)
    return Spread.of(list(map(float, times))), int(modules[0])
