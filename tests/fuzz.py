"""Hostile adapter files, and what may come of them: an adapter or an error of ours, in bounded time and memory.

Run by tests/laws/test_files.py for a short while; by hand for longer:

    python -m tests.fuzz SECONDS [SEED [INPUTS]]

A good adapter's two files are spoilt: bytes, or the JSON of the config and of the tensors' header, at random places,
with values that have given trouble before. Each input is loaded into a tiny model in both shapes. Inputs that break a
promise are printed, so that they can be added to `BROKE` there.
"""

from __future__ import annotations

import json
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import peftlite
from peftlite.checkpoint.keys import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peftlite.errors import PeftliteError

SECONDS = 5
"""Of computing, for one input: a busy machine makes none of them slow."""
MEMORY = 1 << 30
"""Bytes of address space beyond what the process has when it begins."""

NUMBERS = [0, 1, -1, 2, 2**31, 2**63, 2**64, 10**9, 10**18, 10**400, 0.0, -0.0, 0.5, 1.5, 1e308, -1e308, 1e-320]
PATTERNS = ["q", "v", "all-linear", ".*", "(a+)+b", "(.*)*(.*)*x", "[", "(?P<a>", "(" * 300 + ")" * 300, "a{1,99999}"]
PATTERNS += ["((ab?){99}){99}", "a{99999999999}", r"(\w+)+\1", "(?<=a)*", "(?i)q"]
TEXTS = ["", ".", "..", "../..", "/etc/passwd", "a" * 5000, "\x00", "\ud7ff", "é", "os.system", "__import__('os')"]
KINDS = ["LORA", "IA3", "LOHA", "LOKR", "VERA", "ADALORA", "OFT", "CAUSAL_LM", "F64", "BF16", "U8", "F8_E5M2"]
FORMS = ["pissa", "olora", "orthogonal", "pissa_niter_999999999", "pissa_niter_16", "gaussian", "eva", "corda"]
FORMS += ["lora_ga", "loftq", "mica", "all", "lora_only"]
LISTS = [[], {}, [[]], [None], ["q"], ["q", "v"], ["q", "q"], [0], [10**9], list(range(3000)), ["q"] * 3000]
TABLES = [{"q": 1}, {"q": 10**9}, {"(a+)+b": 2}, {"": 1}, {"q": -1}, {"a" * 3000: 1}, {"r": {"r": {"r": 1}}}]
TABLES += [{"loftq_bits": 4}, {"base_model_class": "os", "parent_library": "os"}]
HOSTILE: list[Any] = [None, True, False, *NUMBERS, *PATTERNS, *TEXTS, *KINDS, *FORMS, *LISTS, *TABLES]


class Tiny(nn.Module):
    """Two layers that an adapter goes on, and one that it may."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(6, 4)
        self.v = nn.Linear(4, 4, bias=False)
        self.emb = nn.Embedding(5, 6)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.v(self.q(self.emb(tokens)))  # type: ignore[no-any-return]


CONFIGS: list[Callable[[], Any]] = [
    lambda: peftlite.LoraConfig(r=2, target_modules=["q"], rank_pattern={"q": 3}, modules_to_save=["v"]),
    lambda: peftlite.LoraConfig(r=2, target_modules=["q", "emb"], use_dora=True),
    lambda: peftlite.IA3Config(target_modules=["q", "v"], feedforward_modules=["v"]),
    lambda: peftlite.LoHaConfig(r=2, target_modules=["q"]),
    lambda: peftlite.LoKrConfig(r=2, target_modules=["q", "v"]),
    lambda: peftlite.VeraConfig(r=2, target_modules=["v"]),
    lambda: peftlite.AdaLoraConfig(init_r=12, target_modules=["q"], total_step=10),
]


def good(config: Any, place: Path) -> tuple[dict[str, Any], bytes]:
    """The config and the weights file of an adapter that is in order."""
    model = Tiny()
    peftlite.inject(model, config)
    peftlite.save_adapter(model, place)
    return json.loads((place / CONFIG_NAME).read_text()), (place / SAFETENSORS_WEIGHTS_NAME).read_bytes()


# ---- spoiling


def spoil(value: Any, rng: random.Random, deep: int = 0) -> Any:
    """A value of JSON with a few parts exchanged, lost, doubled or renamed."""
    if deep > 6 or rng.random() < 0.2 or not isinstance(value, dict | list) or not value:
        return rng.choice(HOSTILE)
    if isinstance(value, list):
        made = list(value)
        at = rng.randrange(len(made))
        made[at] = spoil(made[at], rng, deep + 1)
        return made + made if rng.random() < 0.1 else made
    made = dict(value)
    key = rng.choice(list(made))
    kind = rng.random()
    if kind < 0.7:
        made[key] = spoil(made[key], rng, deep + 1) if rng.random() < 0.5 else rng.choice(HOSTILE)
    elif kind < 0.8:
        del made[key]
    elif kind < 0.9:
        made[str(rng.choice(HOSTILE))] = made[key]
    else:
        made[key + rng.choice(["_", ".", "é", ".default", "0"])] = made.pop(key)
    return made


def spoil_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes with a few of them exchanged, lost or added."""
    made = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(made) + 1)
        made[at : at + rng.randint(0, 4)] = rng.randbytes(rng.randint(0, 4))
    return bytes(made[: rng.randrange(len(made) + 1)] if rng.random() < 0.1 else made)


def header_of(weights: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", weights[:8])[0]
    return json.loads(weights[8 : 8 + size]), weights[8 + size :]


def with_header(header: Any, data: bytes) -> bytes:
    raw = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw + data


def inputs(seed: int) -> Iterator[tuple[bytes, bytes]]:
    """Config files and weights files without end."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        sources = [good(make(), Path(place) / str(i)) for i, make in enumerate(CONFIGS)]
    while True:
        config, weights = rng.choice(sources)
        kind = rng.random()
        made: Any = config
        if kind < 0.6:
            for _ in range(rng.randint(1, 3)):
                made = spoil(made, rng)
        text = json.dumps(made).encode("utf-8", "surrogatepass")
        if 0.6 <= kind < 0.8:
            header, data = header_of(weights)
            weights = with_header(spoil(header, rng), data)
        if kind >= 0.8:
            if rng.random() < 0.5:
                text = spoil_bytes(text, rng)
            else:
                weights = spoil_bytes(weights, rng)
        yield text, weights


# ---- trying


class TookTooLongError(BaseException):
    """An input was not done with in `SECONDS`."""


def _late(*_: Any) -> None:
    raise TookTooLongError


def attempt(place: Path, config: bytes, weights: bytes) -> str:
    """Load the two files into a model in place, wrapped, and beside another adapter: what came of it.

    Raises: whatever breaks the promise.
    """
    (place / CONFIG_NAME).write_bytes(config)
    (place / SAFETENSORS_WEIGHTS_NAME).write_bytes(weights)
    beside = Tiny()
    peftlite.inject(beside, peftlite.LoraConfig(r=1, target_modules=["v"]), "mine")
    ways: list[Callable[[], object]] = [
        lambda: peftlite.load_adapter(Tiny(), place),
        lambda: peftlite.PeftModel.from_pretrained(Tiny(), place, strict=False),
        lambda: peftlite.load_adapter(beside, place),
    ]
    outcomes, longest = [], 0
    before = {key: tensor.clone() for key, tensor in beside.state_dict().items()}
    for way in ways:
        try:
            way()
            outcomes.append("loaded")
        except PeftliteError as error:
            outcomes.append(type(error).__name__)
            longest = max(longest, len(str(error)))
    assert longest < 5000, "an error is not a page"
    if outcomes[-1] != "loaded":
        after = beside.state_dict()
        assert after.keys() == before.keys(), "a load that fails changes nothing"
        assert all(torch.equal(after[key], before[key]) for key in before), "a load that fails changes nothing"
    return outcomes[0]


def fuzz(seconds: float, seed: int = 0, most: int = sys.maxsize) -> tuple[Counter[str], list[tuple[bytes, bytes, str]]]:
    """Try inputs for a while: how often each outcome was, and what broke a promise."""
    outcomes: Counter[str] = Counter()
    broken: list[tuple[bytes, bytes, str]] = []
    end = time.monotonic() + seconds
    signal.signal(signal.SIGPROF, _late)
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for config, weights in inputs(seed):
            if time.monotonic() > end or outcomes.total() >= most:
                break
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                outcomes[attempt(Path(place), config, weights)] += 1
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                outcomes["broken"] += 1
                broken.append((config, weights, f"{type(error).__name__}: {error}"))
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
    return outcomes, broken


def limit_memory() -> None:
    """From now on, the process can have `MEMORY` more and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    have = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (have + MEMORY, have + MEMORY))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for make in CONFIGS:
        peftlite.inject(Tiny(), make())  # whatever is imported late
    limit_memory()
    outcomes, broken = fuzz(float(sys.argv[1]), *map(int, sys.argv[2:4]))
    for config, weights, error in broken[:50]:
        print("BROKEN", error[:300], config[:3000], weights[:600] if b"header" in error.encode() else "", sep="\n  ")
    print(json.dumps({"inputs": outcomes.total(), "outcomes": outcomes}))
    sys.exit(bool(broken))
