"""What importing costs, on top of what a user has imported already; each measured in processes of its own."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.harness import Row

_PROGRAM = """
import sys, time
{before}
known, start = len(sys.modules), time.thread_time()
{what}
print((time.thread_time() - start) * 1e3, len(sys.modules) - known)
"""


def rows(quick: bool) -> Iterator[Row]:
    bare = "import torch, transformers"
    model = "import torch\nfrom transformers import LlamaForCausalLM"
    for title, before, goal in (("torch + transformers", bare, 0.02), ("torch + LlamaForCausalLM", model, 0.10)):
        theirs, their_modules = cost(before, "import peft", quick)
        ours, our_modules = cost(before, "import peftlite\nfrom peftlite import LoraConfig, get_peft_model", quick)
        note = f"{our_modules} modules against {their_modules}"
        yield Row(f"import on top of {title}", "ms", ours, theirs, goal=goal, note=note)
        if quick:
            return


def cost(before: str, what: str, quick: bool) -> tuple[float, int]:
    """(median milliseconds of thread-CPU time, modules imported)."""
    program = _PROGRAM.format(before=before, what=what)
    found = [
        subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, capture_output=True, text=True)
        for _ in range(1 if quick else 5)
    ]
    times, modules = zip(*(run.stdout.split() for run in found), strict=True)
    return statistics.median(map(float, times)), int(modules[0])
