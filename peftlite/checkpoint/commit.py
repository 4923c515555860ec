"""Several files of a directory replaced as one: whoever reads with `opened` sees all the old ones or all the new ones.

    1. the new files are written into a hidden directory beside the old ones, and flushed to the disk;
    2. that directory is renamed to `.adapter-pending`: from this moment the new files are the ones that count;
    3. each file is renamed to its place, and the empty directory removed.

Killed before 2, a save leaves what it found. Killed after 2, `opened` takes from `.adapter-pending` what is still
there, and the next save ends the job. Programs that know nothing of this see whole files at all times, and matching
ones before 2 and after 3. If they save in between, sizes and times of writing tell, which renaming keeps: reading every
byte for a checksum would cost as much as the save.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from peftlite.errors import CheckpointError
from peftlite.reading import open_regular, without_repeats

try:
    import fcntl
except (
    ImportError
):  # Windows has no flock; there two saves into one directory at the same time are the caller's concern
    _flock: Callable[[int], None] | None = None
else:

    def _flock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX)


PENDING = ".adapter-pending"
STAGING = ".adapter-staging-"
MANIFEST = "manifest.json"
Writer = Callable[[BinaryIO], object]
Stamp = list[int]  # size, time of the last write in ns

_MAX_MANIFEST = 1 << 16
_ATTEMPTS = 100


# ---- writing


def replace_files(directory: Path, writers: Mapping[str, Writer]) -> None:
    """Give `directory` new files, all at once: `writers` maps each file's name to what writes it.

    A failure, or a kill, at any moment leaves the old files or the new ones, whole.

    Raises: OSError as the file system does, and what a writer raises.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name in writers:
        if (directory / name).is_dir():
            raise IsADirectoryError(f"`{directory / name}` is a directory")
    with _lock(directory) as alone:
        stale = not _finish(directory)
        if alone:
            _remove(*directory.glob(f"{STAGING}*"))
        staging = directory / (STAGING + secrets.token_hex(8))
        staging.mkdir()
        try:
            _stage(directory, staging, writers)
            if stale:
                _remove(directory / PENDING)
            os.rename(staging, directory / PENDING)
        except BaseException:
            _remove(staging)
            raise
        try:
            _flush_directory(directory)
            _publish(directory, list(writers))
        except OSError:
            if all((directory / PENDING / name).exists() for name in writers):
                _remove(directory / PENDING)  # nothing has moved yet, so the old files can stay
            raise


def _stage(directory: Path, staging: Path, writers: Mapping[str, Writer]) -> None:
    manifest: dict[str, dict[str, Stamp | None]] = {}
    for name, write in writers.items():
        _write(staging / name, write)
        manifest[name] = {"new": _stamp(staging / name), "old": _stamp(directory / name)}
    text = json.dumps(manifest, sort_keys=True).encode()
    _write(staging / MANIFEST, lambda file: file.write(text))
    _flush_directory(staging)


def _publish(directory: Path, names: Sequence[str]) -> None:
    pending = directory / PENDING
    for name in names:
        with contextlib.suppress(FileNotFoundError):  # moved already, before the save was interrupted
            os.replace(pending / name, directory / name)
    _flush_directory(directory)
    os.unlink(pending / MANIFEST)
    os.rmdir(pending)


def _finish(directory: Path) -> bool:
    """End a save that was interrupted after its commit. False: its files were changed since, so it is void."""
    pending = directory / PENDING
    if not pending.is_dir():
        return True
    manifest = _manifest(directory)
    if manifest is None:  # all was published but for the removal of the directory
        _remove(pending)
        return True
    if _disturbed(directory, manifest):
        return False
    _publish(directory, list(manifest))
    return True


def _remove(*paths: Path) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[bool]:
    """One save at a time into a directory; ends with the process. False where the file system cannot lock."""
    if _flock is None:
        yield False
        return
    with _Handle(directory) as handle:
        alone = True
        try:
            _flock(handle)
        except OSError:
            alone = False
        yield alone


class _Handle:
    """A directory held open; a lock on it ends with the last reference, should Ctrl-C strike where a block ends."""

    def __init__(self, directory: Path) -> None:
        self._open: list[int] = []  # also if the next line fails
        self._open.append(os.open(directory, os.O_RDONLY))

    def __enter__(self) -> int:
        return self._open[0]

    def __exit__(self, *exception: object) -> None:
        while self._open:
            os.close(self._open.pop())

    def __del__(self) -> None:
        self.__exit__()


def _write(path: Path, write: Writer) -> None:
    with open(path, "xb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _flush_directory(directory: Path) -> None:
    if os.name == "nt":
        return
    with _Handle(directory) as handle:
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # network file systems that cannot flush a directory
                raise


# ---- reading


def opened(directory: Path, names: Sequence[str], guard: Callable[[Path], Path]) -> dict[str, BinaryIO]:
    """The files of `directory` that exist among `names`, open for reading, and all of one save.

    `guard` turns each path into the one to open, or refuses it.

    Raises: CheckpointError if an interrupted save was disturbed, so that which files belong together is not known.
    """
    for _ in range(_ATTEMPTS):
        manifest = _manifest(directory)
        files: dict[str, BinaryIO] = {}
        kept = False
        try:
            paths = {name: path for name in names if (path := _current(directory, name, manifest))}
            for name, path in paths.items():
                files[name] = open_regular(guard(path))
            # in this order: a save that ended before the second look shows in the files, others in the manifest
            kept = manifest == _manifest(directory) and all(_same(files[name], path) for name, path in paths.items())
            waiting = _waiting(directory, manifest)
            if kept and manifest is not None and _disturbed(directory, manifest):
                kept = False
                if manifest == _manifest(directory) and waiting == _waiting(directory, manifest):  # else it goes on
                    raise CheckpointError(
                        f"A save into `{directory}` was interrupted, and the files were changed since: which config "
                        f"and which weights belong together is not known. Save again, or remove `{PENDING}` there to "
                        "use the files as they are. Nothing was changed."
                    )
        except FileNotFoundError:
            pass  # a save moved it between two looks
        finally:
            if not kept:
                for file in files.values():
                    file.close()
        if kept:
            return files
    raise CheckpointError(f"The files of `{directory}` keep changing while they are read. Nothing was changed.")


def _current(directory: Path, name: str, manifest: Mapping[str, Any] | None) -> Path | None:
    """Where a file's current contents are; None if it does not exist."""
    pending = directory / PENDING / name
    if manifest is not None and name in manifest and os.path.lexists(pending):
        return pending
    path = directory / name
    return path if os.path.lexists(path) else None


def _manifest(directory: Path) -> dict[str, Any] | None:
    """What an interrupted (or running) save says of its files; None if there is none."""
    path = directory / PENDING / MANIFEST
    try:
        with open_regular(path) as file:
            raw = file.read(_MAX_MANIFEST)
        found = json.loads(raw, object_pairs_hook=without_repeats)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(_is_entry(name, entry) for name, entry in found.items()):
        raise CheckpointError(
            f"`{path}` is not what an interrupted save leaves behind. Remove `{PENDING}` to use the files beside it. "
            "Nothing was changed."
        )
    return found


def _is_entry(name: str, entry: Any) -> bool:
    plain = os.path.basename(name) == name and name not in {"", ".", "..", MANIFEST}
    stamps = [entry.get("new"), entry.get("old") or [0, 0]] if isinstance(entry, dict) else [None]
    return plain and all(isinstance(s, list) and len(s) == 2 for s in stamps)


def _waiting(directory: Path, manifest: Mapping[str, Any] | None) -> set[str]:
    """The files of a save that it has yet to move."""
    return {name for name in manifest or () if os.path.lexists(directory / PENDING / name)}


def _disturbed(directory: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether the files beside an interrupted save are others than it put there, or found there."""
    waiting = _waiting(directory, manifest)
    for name, entry in manifest.items():
        if _stamp(directory / name) != entry["old" if name in waiting else "new"]:
            return True
        if name in waiting and _stamp(directory / PENDING / name) != entry["new"]:
            return True
    return False


def _stamp(path: Path) -> Stamp | None:
    """Size and time of a file; None if there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return [found.st_size, found.st_mtime_ns]


def _same(file: BinaryIO, path: Path) -> bool:
    return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
