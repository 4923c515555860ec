"""Resident memory, as Linux counts it, of processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_START = """
import gc, tempfile, torch, warnings
warnings.simplefilter("ignore")
import {library} as library

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
"""
_LOADING = """
from benchmarks.models import llama_1b
with tempfile.TemporaryDirectory() as small:  # imports what loading needs
    library.get_peft_model(llama_1b(1), library.LoraConfig(r=1, target_modules=["q_proj"])).save_pretrained(small)
    library.PeftModel.from_pretrained(llama_1b(1), small)
model = llama_1b({layers})
gc.collect()
"""
_PEAK = """
before = status("VmRSS")
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")
library.PeftModel.from_pretrained(model, {saved!r})
print(status("VmHWM") - before)
"""
_OWN = """
before = status("RssAnon")
kept = library.PeftModel.from_pretrained(model, {saved!r}{options})
gc.collect()
print(status("RssAnon") - before)
"""
_ADAPTERS = """
from torch import nn
first, more = {first}, {more}
fields = {{"r": 4, "target_modules": "[0-9]+"}}
config = lambda: library.LoraConfig(**fields)
model = library.get_peft_model(nn.Sequential(*(nn.Linear(64, 64) for _ in range(28))), config(), "n0")
for k in range(1, first):
    model.add_adapter(f"n{{k}}", config())
gc.collect()
before = status("VmRSS")
for k in range(first, first + more):
    model.add_adapter(f"n{{k}}", config())
gc.collect()
print((status("VmRSS") - before) / more)
"""
BYTES_PER_ADAPTER = 28 * 4 * (64 + 64) * 4


def of_loading(library: str, saved: Path, layers: int) -> float:
    """Bytes at the most, while an adapter is loaded, beyond those before."""
    return printed(_START + _LOADING + _PEAK, library, saved=str(saved), layers=layers)


def of_its_own(library: str, saved: Path, layers: int, options: str) -> float:
    """Bytes that an adapter, once loaded, takes beyond the model's and that no other process can share."""
    return printed(_START + _LOADING + _OWN, library, saved=str(saved), layers=layers, options=options)


def of_an_adapter(library: str, first: int, more: int) -> float:
    """Bytes that each of `more` adapters adds to a model that has `first`."""
    return printed(_START + _ADAPTERS, library, first=first, more=more)


def printed(program: str, library: str, **values: object) -> float:
    text = program.format(library=library, **values)
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", text], check=True, capture_output=True, text=True)
    return float(run.stdout.split()[-1])
