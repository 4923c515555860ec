"""What importing costs, on top of what a user has imported already; each measured in processes of its own.

Both libraries have their bytecode, as pip leaves it when it installs one: peftlite is measured in a compiled copy, as a
working tree may have none. What is imported only when it is first used is in the row that goes on to a first call.
"""

from __future__ import annotations

import compileall
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import peftlite
from benchmarks.harness import Goal, Row, Settings, Spread

_PROGRAM = """
import sys, time
{before}
known, start = len(sys.modules), time.thread_time()
{what}
imported = time.thread_time() - start
{after}
print(imported, time.thread_time() - start, len(sys.modules) - known)
"""
_WHAT = {"peft": "import peft", "peftlite": "import peftlite\nfrom peftlite import LoraConfig, get_peft_model"}
_TINY = """
from transformers import LlamaConfig
sizes = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=16)
model, ids = LlamaForCausalLM(LlamaConfig(**sizes)), torch.tensor([[1, 2]])
model(ids)
"""
_USE = """
from {name} import LoraConfig, get_peft_model
get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))(ids)
"""


def rows(quick: bool) -> Iterator[Row]:
    bare = "import torch, transformers"
    model = "import torch\nfrom transformers import LlamaForCausalLM"
    with installed() as place:
        if quick:
            yield row(place, "import on top of nothing", "", ("peftlite",), None)
            return
        for title, before, goal in (("torch + transformers", bare, 0.02), ("torch + LlamaForCausalLM", model, 0.10)):
            yield row(place, f"import on top of {title}", before, Settings.timed, goal)
        title = "import, first get_peft_model and first call on top of a LlamaForCausalLM"
        yield row(place, title, model + _TINY, Settings.timed, None, used=True)


@contextmanager
def installed() -> Iterator[Path]:
    """A directory with peftlite in it, compiled."""
    with tempfile.TemporaryDirectory() as directory:
        source = Path(peftlite.__file__).parent
        shutil.copytree(source, Path(directory, "peftlite"), ignore=shutil.ignore_patterns("__pycache__"))
        compileall.compile_dir(directory, quiet=1)
        yield Path(directory)


def row(place: Path, title: str, before: str, names: tuple[str, ...], goal: float | None, used: bool = False) -> Row:
    found, notes = {}, []
    for name in names:
        found[name], modules = cost(place, before, _WHAT[name], _USE.format(name=name) if used else "")
        notes.append(f"{modules} modules with {name}")
    return Row(title, "ms", found, () if goal is None else (Goal(goal),), note=", ".join(notes))


def cost(place: Path, before: str, what: str, after: str) -> tuple[Spread, int]:
    """(seconds of thread-CPU time, modules imported), of `what` and, if there is any, `after`."""
    program = _PROGRAM.format(before=before, what=what, after=after)
    command = [sys.executable, "-W", "ignore", "-c", program]  # which finds modules in `place` first
    found = [
        subprocess.run(command, check=True, capture_output=True, text=True, cwd=place)
        for _ in range(1 if Settings.quick else 3)
    ]
    imported, all_of_it, modules = zip(*(run.stdout.split()[-3:] for run in found), strict=True)
    return Spread.of(list(map(float, all_of_it if after else imported))), int(modules[0])
