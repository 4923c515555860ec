"""The promises about files: saved whole or not at all, and read as if an enemy had written them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import peftlite
from peftlite.checkpoint.keys import CONFIG_NAME, RECORD_NAME, SAFETENSORS_WEIGHTS_NAME
from peftlite.errors import CheckpointError, ConfigError, PeftliteError
from tests import fuzz
from tests.adapters import rewrite, snapshot, with_adapter
from tests.models import tiny

ROOT = Path(__file__).parents[2]
needs_fork = pytest.mark.skipif(os.name == "nt", reason="needs fork and kill")


def run(*command: str) -> Any:
    """What a program of the tests prints, as JSON."""
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# ---- saving is all or nothing (killed and failing at each step: tests/test_commit.py)


@needs_fork
def test_killed_at_a_random_moment_a_save_leaves_an_adapter_that_is_whole(tmp_path: Path) -> None:
    """100 processes that save again and again; many die in the middle of it."""
    assert run("tests/save_faults.py", str(tmp_path / "a"), "random") > 10


@needs_fork
def test_a_save_that_the_system_stops_says_why_and_leaves_the_old_adapter() -> None:
    large, read_only = run("tests/save_faults.py", "-", "limits")
    assert "could not be saved to" in large
    assert "File too large. What was there before is intact." in large
    assert "Permission denied. What was there before is intact." in read_only


# ---- what a file asks for costs nothing before it is checked


HUGE: dict[str, dict[str, Any]] = {
    "rank": {"r": 10**9},
    "rank beyond all tensors": {"r": 10**18},
    "rank beyond all floats": {"r": 10**400, "use_rslora": True},
    "alpha beyond all floats": {"lora_alpha": 10**400},
    "pattern of ranks": {"rank_pattern": {"q_proj": 10**9}},
    "iterations": {"init_lora_weights": "pissa_niter_999999999"},
    "names": {"target_modules": [f"m{i}" for i in range(300_000)]},
    "layers": {"layers_to_transform": list(range(300_000))},
    "tokens": {"alora_invocation_tokens": [-1] * 100_000},
    "pattern": {"target_modules": "(a+)+" * 300},
    "text": {"base_model_name_or_path": "x" * (5 << 20)},
}


ASKED = [pytest.param(fields, True, id=name) for name, fields in HUGE.items()]
ASKED += [pytest.param(HUGE[name], False, id=f"{name}, not strict") for name in ("rank", "pattern of ranks")]


@pytest.mark.filterwarnings("ignore:.*does not fit, and was loaded as far as it does")
@pytest.mark.parametrize(("fields", "strict"), ASKED)
def test_a_config_that_asks_for_too_much_is_refused_and_costs_little(
    tmp_path: Path, fields: dict[str, Any], strict: bool
) -> None:
    peftlite.save_adapter(with_adapter(), tmp_path)
    rewrite(tmp_path, **fields)
    model = tiny("llama")
    before = snapshot(model)
    tracemalloc.start()
    try:
        with pytest.raises(PeftliteError) as caught:
            peftlite.load_adapter(model, tmp_path, strict=strict)
        assert tracemalloc.get_traced_memory()[1] < 300 << 20
    finally:
        tracemalloc.stop()
    assert "Nothing was changed." in str(caught.value)
    assert len(str(caught.value)) < 3000
    assert snapshot(model) == before


@pytest.mark.parametrize("read", [peftlite.PeftConfig.from_pretrained, peftlite.PeftConfig.from_json_file])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": "' + "x" * (5 << 20) + '"}', "larger than"),
        ("[" * 100_000, "deep"),
        ('{"a":' * 50 + "1" + "}" * 50, "deep"),
        ('{"r": 1, "r": 2}', "twice"),
        ('{"r": NaN}', "NaN"),
        ('{"r": 1e999}', "1e999"),
        ("[]", "holds a list"),
    ],
)
def test_every_reader_of_configs_has_the_same_bounds(
    tmp_path: Path, read: Callable[[Any], Any], text: str, words: str
) -> None:
    path = tmp_path / CONFIG_NAME
    path.write_text(text)
    with pytest.raises(CheckpointError, match=words):
        read(path if read is peftlite.PeftConfig.from_json_file else tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="no named pipes")
@pytest.mark.parametrize("name", [CONFIG_NAME, RECORD_NAME, SAFETENSORS_WEIGHTS_NAME])
def test_what_is_no_file_does_not_block(tmp_path: Path, name: str) -> None:
    peftlite.save_adapter(with_adapter(), tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match="not a regular file"):
        peftlite.load_adapter(tiny("llama"), tmp_path)
    if name == CONFIG_NAME:
        for read in (peftlite.PeftConfig.from_pretrained, lambda at: peftlite.PeftConfig.from_json_file(at / name)):
            with pytest.raises(CheckpointError, match="not a regular file"):
                read(tmp_path)


# ---- no code is run, no path leaves the directory


@pytest.mark.parametrize("library", ["antigravity", "transformers.antigravity", "os", "transformers"])
def test_no_import_is_driven_by_a_config(tmp_path: Path, library: str) -> None:
    peftlite.save_adapter(with_adapter(), tmp_path)
    rewrite(
        tmp_path,
        auto_mapping={"base_model_class": "system", "parent_library": library},
        base_model_name_or_path=str(tmp_path),
    )
    before = set(sys.modules)
    peftlite.load_adapter(tiny("llama"), tmp_path)
    with pytest.raises(ConfigError, match="names no class of `transformers`"):
        peftlite.AutoPeftModel.from_pretrained(tmp_path)
    assert not any("antigravity" in name for name in set(sys.modules) - before)


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
@pytest.mark.parametrize("name", [CONFIG_NAME, RECORD_NAME, SAFETENSORS_WEIGHTS_NAME])
def test_links_that_leave_the_directory_are_refused_by_every_reader(tmp_path: Path, name: str) -> None:
    for place in ("mine", "theirs"):
        peftlite.save_adapter(with_adapter(), tmp_path / place)
    (tmp_path / "theirs" / name).unlink()
    (tmp_path / "theirs" / name).symlink_to(tmp_path / "mine" / name)
    model = peftlite.wrap(with_adapter(name="mine"))
    readers: list[Callable[[Path], object]] = [
        lambda at: peftlite.load_adapter(tiny("llama"), at),
        lambda at: peftlite.PeftModel.from_pretrained(tiny("llama"), at),
        lambda at: model.load_adapter(at, "new"),
        lambda at: tiny("llama").load_adapter(str(at)),
    ]
    if name == CONFIG_NAME:
        readers.append(peftlite.PeftConfig.from_pretrained)
    for read in readers:
        with pytest.raises(CheckpointError, match="link that leaves"):
            read(tmp_path / "theirs")


@pytest.mark.parametrize("field", ["revision", "base_model_name_or_path"])
@pytest.mark.parametrize("value", ["../../../etc", "/etc", "..", "a/../../b"])
def test_no_name_in_a_config_is_a_way_out(tmp_path: Path, field: str, value: str) -> None:
    """They are looked up when the adapter is saved again: is the vocabulary another than the base model's files say?"""
    peftlite.save_adapter(with_adapter(), tmp_path)
    rewrite(tmp_path, **{field: value})
    model = tiny("llama")
    model.name_or_path = "some/base"
    peftlite.load_adapter(model, tmp_path)
    opened: list[str] = []

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if active and event == "open":
            opened.append(str(args[0]))

    active = True
    sys.addaudithook(watch)
    peftlite.save_adapter(model, tmp_path / "again")
    active = False
    assert not [path for path in opened if ".." in path or path.startswith("/etc")]


# ---- any files at all


BROKE: list[tuple[int, dict[str, Any]]] = [
    (0, {"init_lora_weights": "pissa_niter_999999999"}),  # never came back
    (0, {"init_lora_weights": "pissa_niter_" + "9" * 5000}),
    (0, {"rank_pattern": {"q": 10**9}}),  # with strict=False, made up tensors of 16 GB
    (3, {"r": 10**9}),
    (5, {"r": 10**9}),
    (5, {"r": 10**9, "save_projection": False}),
    (5, {"r": 10**18}),  # an error of torch
    (5, {"projection_prng_key": 2**64}),
    (4, {"exclude_modules": "((ab?){99}){99}"}),
    (0, {"modules_to_save": "a" * 5000}),  # an error of several pages
    (3, {"a" * 5000: 1}),
    (0, {"target_modules": "(a+)+b"}),  # never came back
]
"""What was found by fuzzing: of the adapters of `fuzz.CONFIGS`, with these fields."""


@needs_fork
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("which", "fields"), BROKE)
def test_what_once_broke_is_refused(tmp_path: Path, which: int, fields: dict[str, Any]) -> None:
    config, weights = fuzz.good(fuzz.CONFIGS[which](), tmp_path)
    assert fuzz.attempt(tmp_path, json.dumps(config | fields).encode(), weights) != "loaded"


@needs_fork
def test_spoilt_files_are_loaded_or_refused_in_bounded_time_and_memory() -> None:
    """400 inputs, each loaded in three ways, by a process that can have 1 GiB more than it begins with."""
    found = run("-m", "tests.fuzz", "300", "5", "400")
    assert found["inputs"] == 400
    assert found["outcomes"]["loaded"] > 10
    assert set(found["outcomes"]) <= {"loaded", *(cls.__name__ for cls in _errors(PeftliteError))}


def _errors(cls: type) -> set[type]:
    return {cls}.union(*map(_errors, cls.__subclasses__()))


def test_good_files_are_what_the_fuzz_begins_with(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for index, make in enumerate(fuzz.CONFIGS):
        config, weights = fuzz.good(make(), tmp_path / str(index))
        assert fuzz.attempt(tmp_path / str(index), json.dumps(config).encode(), weights) == "loaded"
