"""Run by test_commit.py in a process of its own: saves that are killed, or fail, at each of their steps.

usage: save_faults.py DIRECTORY         a save with a fault at its step k, for k = 0, 1, ... until it has no more steps;
                                        prints what is there after each
       save_faults.py DIRECTORY loop    saves again and again until stdin is closed
       save_faults.py DIRECTORY random  kills 100 processes that save again and again, each at a random moment; prints
                                        how many of them had left a save unfinished
       save_faults.py - limits          saves that the system stops: a file too large for it, a directory that is
                                        read-only; prints the errors
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from peftlite.checkpoint import commit
from peftlite.checkpoint.files import read_adapter, write_adapter
from peftlite.errors import AdapterFilesNotFoundError, CheckpointError

torch.set_num_threads(1)
os.fsync = lambda handle: None  # the machine stays up: only the order of steps matters, and disks are slow
FAILED, STRUCK = 3, 4
OLD, NEW = '{"r": 1}', '{"r": 2}'
WEIGHTS = {"old": {"w": torch.zeros(3, 3)}, "new": {"w": torch.ones(3, 3)}}


class Fault:
    """Counts the steps of a save, and strikes at one of them."""

    def __init__(self, strike: Callable[[], None], at: int) -> None:
        self.strike, self.at, self.steps = strike, at, 0

    def step(self) -> None:
        self.steps += 1
        if self.steps - 1 == self.at:
            self.strike()

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*args: Any, **kwargs: Any) -> Any:
            self.step()
            return function(*args, **kwargs)

        return stepped

    def in_halves(self, writev: Callable[..., int]) -> Callable[[int, Sequence[memoryview]], int]:
        """Like a system that writes half of the first piece, again and again."""

        def stepped(handle: int, pieces: Sequence[memoryview]) -> int:
            self.step()
            first = next((piece for piece in pieces if piece), pieces[0])
            return writev(handle, [first[: -(-len(first) // 2)]])

        return stepped

    def install(self) -> None:
        for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "open"):
            setattr(os, name, self.around(getattr(os, name)))
        os.writev = self.in_halves(os.writev)
        commit.open = lambda *args: Halves(open(*args), self)  # type: ignore[attr-defined]  # noqa: SIM115


class Halves:
    """A file that is written in steps, two for each call of `write`."""

    def __init__(self, file: Any, fault: Fault) -> None:
        self.file, self.fault = file, fault

    def __enter__(self) -> Halves:
        return self

    def __exit__(self, *args: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: Any) -> int:
        half = len(data) // 2
        for part in (data[:half], data[half:]):  # after the first, half of it is on the disk
            self.fault.step()
            self.file.write(part)
            self.file.flush()
        return len(data)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def disk_full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupt() -> None:
    raise KeyboardInterrupt


def write_old(directory: Path) -> None:
    write_adapter(directory, OLD, WEIGHTS["old"], record={"of": "old"})


def write_new(directory: Path) -> None:
    write_adapter(directory, NEW, WEIGHTS["new"], record={"of": "new"})


def holds(directory: Path) -> str:
    """What a reader finds: "none", "old" or "new", each of them whole."""
    try:
        with read_adapter(directory) as files:
            config, weight, record = files.config, files.tensors.read("w"), files.record
    except AdapterFilesNotFoundError:
        return "none"
    name = {1: "old", 2: "new"}[config["r"]]
    assert torch.equal(weight, WEIGHTS[name]["w"]), f"config of {name}, weights of another"
    assert record["of"] == name, f"config of {name}, record of another"
    return name


def in_child(action: Callable[[], int]) -> int:
    """Run `action` in a fork; what it returns, FAILED if it raises, or the signal that ends it, negative."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = action()
        except (CheckpointError, KeyboardInterrupt):
            code = FAILED
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def prepare(directory: Path, before: str) -> None:
    if before == "old":
        write_old(directory)
    if before.startswith("interrupted"):  # the old adapter is one whose save was killed between its files
        at = int(before[-1])
        write_new(directory)

        def half_published() -> int:
            replaces = 0
            plain = os.replace

            def replace(*args: Any) -> None:
                nonlocal replaces
                replaces += 1
                kill() if replaces == at else plain(*args)

            os.replace = replace  # type: ignore[assignment]
            write_old(directory)
            return 0

        assert in_child(half_published) == -signal.SIGKILL


def strike_at(directory: Path, before: str, strike: Callable[[], None], at: int) -> tuple[bool, str]:
    """One save with a fault at step `at`: whether it has so many steps, and what the directory holds."""
    prepare(directory, before)

    def save() -> int:
        fault = Fault(strike, at)
        fault.install()
        write_new(directory)
        return STRUCK if fault.steps > at else 0

    code = in_child(save)
    assert code in {0, STRUCK, FAILED, -signal.SIGKILL}, code
    found = holds(directory)
    assert code not in {0, STRUCK} or found == "new"
    write_new(directory)  # whatever was left behind, the next save works and cleans up
    assert holds(directory) == "new"
    assert len(list(directory.iterdir())) == 3, list(directory.iterdir())
    return code != 0, found


def strike_everywhere(root: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    kills = [("kill", kill, before) for before in ("nothing", "old", "interrupted 2", "interrupted 3")]
    for name, strike, before in [*kills, ("disk-full", disk_full, "old"), ("interrupt", interrupt, "old")]:
        seen = found[f"{name} {before}"] = []
        struck = True
        while struck:
            struck, held = strike_at(root / name / before / str(len(seen)), before, strike, len(seen))
            seen.append(held)
    return found


def loop(directory: Path) -> None:
    """Save until stdin is closed."""
    print("begun", flush=True)
    os.set_blocking(0, False)
    for count in range(1, 1_000_000):
        write_adapter(directory, f'{{"r": {count}}}', {"r": torch.tensor(count)})
        with contextlib.suppress(BlockingIOError):
            if os.read(0, 1) == b"":
                return


def kill_at_random(directory: Path) -> int:
    """Kill savers, and read what they leave; how many saves were unfinished."""
    rng, unfinished = random.Random(0), 0
    write_old(directory)
    for _ in range(100):
        saver = os.fork()
        if saver == 0:
            while True:
                write_new(directory)
                write_old(directory)
        for _ in range(rng.randrange(400)):  # time passes, and the saver saves
            os.listdir(directory)
        os.kill(saver, signal.SIGKILL)
        os.waitpid(saver, 0)
        unfinished += len(os.listdir(directory)) != 3
        assert holds(directory) in {"old", "new"}
    write_new(directory)
    assert holds(directory) == "new"
    assert len(os.listdir(directory)) == 3
    return unfinished


def too_large(directory: Path) -> None:
    """Files may have 4096 bytes from now on."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def read_only(directory: Path) -> None:
    """Nobody can write into the directory from now on; root becomes somebody else for it."""
    directory.chmod(0o555)
    directory.parent.chmod(0o755)
    if os.geteuid() == 0:
        os.seteuid(65534)


def stopped_by(directory: Path, limit: Callable[[Path], None]) -> str:
    """The error of a save under a limit, in a fork; the old adapter is there afterwards."""
    write_old(directory)
    large = {"w": torch.ones(100, 100)}
    told, tell = os.pipe()

    def save() -> int:
        limit(directory)
        try:
            write_adapter(directory, NEW, large, record={"of": "new"})
        except CheckpointError as error:
            os.write(tell, str(error).encode())
        return 0

    assert in_child(save) == 0
    os.close(tell)
    assert holds(directory) == "old"
    assert len(os.listdir(directory)) == 3
    return os.read(told, 5000).decode()


if __name__ == "__main__":
    if sys.argv[2:] == ["loop"]:
        loop(Path(sys.argv[1]))
    elif sys.argv[2:] == ["random"]:
        print(kill_at_random(Path(sys.argv[1])))
    elif sys.argv[2:] == ["limits"]:
        with tempfile.TemporaryDirectory() as root:  # where others than root can go
            print(json.dumps([stopped_by(Path(root) / f.__name__, f) for f in (too_large, read_only)]))
    else:
        print(json.dumps(strike_everywhere(Path(sys.argv[1]))))
