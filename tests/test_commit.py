"""Saves that are killed, fail or are watched at any moment: the old adapter or the new one is there, whole."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from peftlite.checkpoint import commit, files
from peftlite.checkpoint.files import read_adapter, write_adapter
from peftlite.checkpoint.keys import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peftlite.errors import CheckpointError

CONFIG = {"peft_type": "LORA", "r": 2}
TEXT = json.dumps(CONFIG)


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {"q.lora_B.weight": torch.randn(3, 2), "q.lora_A.weight": torch.randn(2, 4)}


def read(directory: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with read_adapter(directory) as found:
        return found.config, {key: found.tensors.read(key) for key in found.tensors.infos}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.skipif(os.name == "nt", reason="needs flock")
def test_a_save_that_is_stopped_where_it_unlocks_leaves_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def stopped_save() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(commit._Handle, "__exit__", stop)
            write_adapter(tmp_path, TEXT, tensors())

    def stop(*exception: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped_save()
    handle = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(handle)


def test_a_directory_that_cannot_be_opened_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        commit._Handle(tmp_path / "gone")  # and nothing more when it is collected, of which pytest would warn


# ---- at every step of a save


FAULTS = Path(__file__).with_name("save_faults.py")
needs_fork = pytest.mark.skipif(os.name == "nt", reason="needs fork and kill")


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What a directory holds after a save with a fault at step 0, 1, ... by kind of fault, and what was there first."""
    command = [sys.executable, str(FAULTS), str(tmp_path_factory.mktemp("faults"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_fork
@pytest.mark.parametrize("before", ["nothing", "old", "interrupted 2", "interrupted 3"])
def test_killed_at_any_step_the_directory_holds_the_old_adapter_or_the_new_one(
    faults: dict[str, list[str]], before: str
) -> None:
    found = faults[f"kill {before}"]
    assert len(found) > 20
    assert set(found) == {"none" if before == "nothing" else "old", "new"}
    assert found == sorted(found, key=["none", "old", "new"].index)  # once new, it stays new


@needs_fork
@pytest.mark.parametrize("fault", ["disk-full", "interrupt"])
def test_a_fault_at_any_step_leaves_the_old_adapter_or_the_new_one(faults: dict[str, list[str]], fault: str) -> None:
    found = faults[f"{fault} old"]
    assert len(found) > 20
    assert set(found) == {"old", "new"}


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
def test_a_directory_that_may_not_be_written_to_is_named_and_left_alone(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused by the calls themselves, as a read-only file system does: permissions are nothing to root."""
    place = tmp_path / "a"
    write_adapter(place, TEXT, tensors())
    before = {path.name: path.read_bytes() for path in place.iterdir()}

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        for name in ("mkdir", "rename", "replace", "unlink", "rmdir"):
            patched.setattr(os, name, refuse)
        with pytest.raises(CheckpointError, match=rf"could not be saved to .*{os.strerror(code)}.*is intact"):
            write_adapter(place, "{}", {})
        with pytest.raises(CheckpointError, match=rf"could not be saved to .*new.*{os.strerror(code)}"):
            write_adapter(tmp_path / "new", TEXT, tensors())
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    assert read(place)[0] == CONFIG
    assert not (tmp_path / "new").exists()


def test_a_place_where_no_directory_can_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be saved to"):
        write_adapter(tmp_path / "file" / "a", TEXT, tensors())
    with pytest.raises(CheckpointError, match="could not be saved to"):
        write_adapter(tmp_path / "file", TEXT, tensors())
    (tmp_path / "a" / CONFIG_NAME).mkdir(parents=True)
    with pytest.raises(CheckpointError, match="is a directory"):
        write_adapter(tmp_path / "a", TEXT, tensors())
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [CONFIG_NAME]


def _interrupt_after_commit(
    directory: Path, config: dict[str, Any], weights: dict[str, torch.Tensor], moved: int
) -> None:
    """Leave `directory` as a save killed after its commit does, with `moved` of its two files in their place."""
    write_adapter(directory.with_name("stage"), json.dumps(config), weights)
    manifest = {}
    names = (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME)
    for name in names:
        new, old = commit._stamp(directory.with_name("stage") / name), commit._stamp(directory / name)
        manifest[name] = {"new": new, "old": old}
    (directory.with_name("stage") / commit.MANIFEST).write_text(json.dumps(manifest))
    directory.with_name("stage").rename(directory / commit.PENDING)
    for name in names[:moved]:
        (directory / commit.PENDING / name).replace(directory / name)


def test_a_save_reads_no_file_that_is_there(tmp_path: Path) -> None:
    """Nor its own again: a checksum of every byte would cost as much as the save."""
    opened: list[str] = []

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if active and event == "open" and isinstance(args[1], str) and "r" in args[1]:
            opened.append(str(args[0]))

    active = False
    sys.addaudithook(watch)
    write_adapter(tmp_path, TEXT, tensors())
    active = True
    (tmp_path / CONFIG_NAME).open().close()
    write_adapter(tmp_path, TEXT, tensors(1))
    active = False
    assert opened == [str(tmp_path / CONFIG_NAME)]


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_an_interrupted_save_is_read_and_ended_by_the_next(tmp_path: Path, moved: int) -> None:
    write_adapter(tmp_path / "a", TEXT, tensors())
    _interrupt_after_commit(tmp_path / "a", {"r": 5}, tensors(5), moved)
    config, weights = read(tmp_path / "a")
    assert config == {"r": 5}
    assert files.read_config(tmp_path / "a") == {"r": 5}
    assert same(weights, tensors(5))
    write_adapter(tmp_path / "a", '{"r": 6}', tensors(6))
    assert read(tmp_path / "a")[0] == {"r": 6}
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME]


@pytest.mark.parametrize("name", [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME])
def test_a_save_that_moves_on_while_it_is_looked_at_is_no_disturbance(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(tmp_path / "a", TEXT, tensors())
    _interrupt_after_commit(tmp_path / "a", {"r": 5}, tensors(5), 0)
    stamp = commit._stamp

    def moving(path: Path) -> commit.Stamp | None:
        pending = tmp_path / "a" / commit.PENDING / name
        if path.name == name and pending.exists():
            pending.replace(tmp_path / "a" / name)
        return stamp(path)

    monkeypatch.setattr(commit, "_stamp", moving)
    config, weights = read(tmp_path / "a")
    assert config == {"r": 5}
    assert same(weights, tensors(5))


@pytest.mark.parametrize("moved", [0, 1, 2])
@pytest.mark.parametrize("name", [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME])
def test_an_interrupted_save_that_somebody_saved_over_is_not_guessed_at(tmp_path: Path, moved: int, name: str) -> None:
    write_adapter(tmp_path / "a", TEXT, tensors())
    _interrupt_after_commit(tmp_path / "a", {"r": 5}, tensors(5), moved)
    write_adapter(tmp_path / "other", '{"r": 7}', tensors(7))
    (tmp_path / "a" / name).write_bytes((tmp_path / "other" / name).read_bytes())  # of the same size
    later = (tmp_path / "a" / name).stat().st_mtime_ns + 10_000_000  # clocks of older systems are as coarse as that
    os.utime(tmp_path / "a" / name, ns=(later, later))
    with pytest.raises(CheckpointError, match="interrupted, and the files were changed since"):
        read_adapter(tmp_path / "a")
    write_adapter(tmp_path / "a", '{"r": 8}', tensors(8))
    assert read(tmp_path / "a")[0] == {"r": 8}


def test_leftovers_that_no_save_left_are_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path, TEXT, tensors())
    pending = tmp_path / commit.PENDING
    pending.mkdir()
    assert read(tmp_path)[0] == CONFIG  # without a manifest there is nothing to end
    for manifest in (b"{", b"[]", b'{"a": 1}', b'{"../x": {"new": [1, 2], "old": null}}', b"[" * 100_000):
        (pending / commit.MANIFEST).write_bytes(manifest)
        with pytest.raises(CheckpointError, match="not what an interrupted save leaves"):
            read_adapter(tmp_path)


@needs_fork
def test_a_reader_sees_one_save_while_another_process_saves(tmp_path: Path) -> None:
    """A writer in another process replaces the adapter over and over; config and weights are always of one save."""
    write_adapter(tmp_path, '{"r": 0}', {"r": torch.tensor(0)})
    command = [sys.executable, str(FAULTS), str(tmp_path), "loop"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdin is not None
        writer.stdout.readline()  # it has begun
        seen = set()
        for _ in range(300):
            config, weights = read(tmp_path)
            assert config["r"] == int(weights["r"])
            seen.add(config["r"])
        writer.stdin.close()
    assert writer.returncode == 0
    assert len(seen) > 3
