"""An adapter's files, `adapter_config.json` and `adapter_model.safetensors`: read with suspicion, written as one.

A third, `peftlite.json`, says what the adapter was made on; only peftlite writes it, and nobody has to have it.

Reading checks everything that can be checked before memory is spent: the sizes of both files, the config's depth, the
header's account of every byte. It runs no code, imports nothing that a file names, opens regular files only, and none
outside the directory. Links within the directory are followed, and those of a Hugging Face cache, whose snapshots
consist of links into the `blobs` beside them; any other link is refused, since in a downloaded directory it could point
to anything of yours. How files are written is told in `checkpoint/commit.py`.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from peftlite.checkpoint import commit
from peftlite.checkpoint.hub import missing
from peftlite.checkpoint.keys import CONFIG_NAME, RECORD_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peftlite.checkpoint.tensorfile import MemoryTensors, SafetensorsFile
from peftlite.checkpoint.tensorwriting import write_tensors
from peftlite.config import register_reader
from peftlite.errors import CheckpointError, warn
from peftlite.reading import read_object


@dataclass
class AdapterFiles:
    """An adapter on disk: its config as JSON has it, and its tensors, read when asked for. Close it after use."""

    directory: Path
    config: dict[str, Any]
    tensors: SafetensorsFile | MemoryTensors
    metadata: dict[str, str]
    record: dict[str, Any]
    """What the adapter was made on, as JSON has it; empty if the file is not there."""

    def __enter__(self) -> AdapterFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.tensors.close()


def read_adapter(
    directory: str | os.PathLike[str], *, config: bool = True, allow_pickle: bool = True, mmap: bool = False
) -> AdapterFiles:
    """Open the adapter in `directory`: its config and weights are of one save, even while another process saves there.

    Args:
        directory: where the files are.
        config: whether there has to be a config file; without one, `.config` is empty.
        allow_pickle: whether `adapter_model.bin` may be read where there is no safetensors file. Nothing but tensors is
            taken from it (`torch.load(weights_only=True)`).
        mmap: whether tensors are to lie in a private map of the file; `adapter_model.bin` is copied, with a warning.

    Raises:
        AdapterFilesNotFoundError: a file is not there.
        CheckpointError: a file cannot be read, or not be trusted.
    """
    place = Path(directory)
    files = _open(place, (CONFIG_NAME, RECORD_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))
    try:
        if config and CONFIG_NAME not in files:
            raise missing(place, CONFIG_NAME)
        found = read_object(files[CONFIG_NAME], str(place / CONFIG_NAME)) if CONFIG_NAME in files else {}
        record = read_object(files[RECORD_NAME], str(place / RECORD_NAME)) if RECORD_NAME in files else {}
        if SAFETENSORS_WEIGHTS_NAME in files:
            tensors = SafetensorsFile(files[SAFETENSORS_WEIGHTS_NAME], str(place / SAFETENSORS_WEIGHTS_NAME))
            if mmap:
                tensors.map()
            del files[SAFETENSORS_WEIGHTS_NAME]  # the source closes it
            return AdapterFiles(place, found, tensors, tensors.metadata, record)
        if WEIGHTS_NAME not in files:
            raise missing(place, SAFETENSORS_WEIGHTS_NAME)
        if not allow_pickle:
            raise CheckpointError(
                f"`{place}` has `{WEIGHTS_NAME}` only, and `allow_pickle` is False. Nothing was changed."
            )
        if mmap:
            warn(f"`{place / WEIGHTS_NAME}` is no safetensors file: it cannot be mapped, and is copied.")
        return AdapterFiles(place, found, _read_pickle(files[WEIGHTS_NAME], str(place / WEIGHTS_NAME)), {}, record)
    finally:
        for file in files.values():
            file.close()


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The config of the adapter in `directory`, as JSON has it.

    Raises: AdapterFilesNotFoundError, CheckpointError as `read_adapter`.
    """
    place = Path(directory)
    files = _open(place, (CONFIG_NAME,))
    if not files:
        raise missing(place, CONFIG_NAME)
    with files[CONFIG_NAME] as file:
        return read_object(file, str(place / CONFIG_NAME))


register_reader(read_config)


def read_json(path: Path | None) -> dict[str, Any]:
    """What a config file of a base model says; empty if there is none that can be read."""
    try:
        return {} if path is None else read_object(cast(BinaryIO, io.BytesIO(path.read_bytes())), str(path))
    except (OSError, CheckpointError):
        return {}


def write_adapter(
    directory: str | os.PathLike[str],
    config: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter's files: all of it or, if anything fails or the process is killed, nothing.

    `config` is the text of the config file (`PeftConfig.to_json()`), `record` what the adapter was made on. Equal
    tensors and metadata give equal bytes.
    Tensors that share memory are written each for itself; ones that are not contiguous, on another device, or of a
    plain subclass are written by their values.

    Raises: CheckpointError if a tensor cannot be written, or the file system refuses.
    """
    place, tables = Path(directory), [0]

    def write_weights(file: BinaryIO) -> None:
        tables.append(write_tensors(file, tensors, metadata))

    def write_record(file: BinaryIO) -> None:  # after the weights
        file.write(json.dumps({**(record or {}), "tensors": tables[-1]}, indent=2, sort_keys=True).encode())

    writers: dict[str, commit.Writer] = {SAFETENSORS_WEIGHTS_NAME: write_weights}
    if record is not None:
        writers[RECORD_NAME] = write_record
    writers[CONFIG_NAME] = lambda file: _write(file, config.encode())
    try:
        commit.replace_files(place, writers)
    except OSError as error:
        raise CheckpointError(
            f"The adapter could not be saved to `{place}`: {error.strerror or error}. What was there before is intact."
        ) from error


def _write(file: BinaryIO, data: bytes) -> None:
    file.write(data)


# ---- reading


def _open(place: Path, names: tuple[str, ...]) -> dict[str, BinaryIO]:
    try:
        home = place.resolve()
        return commit.opened(place, names, lambda path: _inside(path, home))
    except OSError as error:
        raise CheckpointError(f"`{place}` cannot be read: {error.strerror or error}. Nothing was changed.") from error


def _inside(path: Path, home: Path) -> Path:
    """The file that `path` stands for: one inside `home`, or in the cache that `home` is a snapshot of."""
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):
        if not path.is_symlink():
            raise
        raise CheckpointError(f"`{path}` is a link to nothing. Nothing was changed.") from None
    blobs = [above.parent / "blobs" for above in (home, *home.parents) if above.name == "snapshots"]
    if real.is_relative_to(home) or real.parent in blobs:
        return real
    raise CheckpointError(
        f"`{path}` is a link that leaves its directory, and is not followed: an adapter from elsewhere could name any "
        "of your files. If it is your own link, pass the directory that it points into. Nothing was changed."
    )


def _read_pickle(file: BinaryIO, name: str) -> MemoryTensors:
    """Tensors of a file that `torch.save` wrote; nothing but tensors is taken from it."""
    try:
        with zipfile.ZipFile(file) as archive:
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
            claimed = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, UnicodeError) as error:
        raise CheckpointError(
            f"`{name}` is damaged or not a file of torch.save: {error}. Nothing was changed."
        ) from None
    if packed or claimed > file.seek(0, 2):
        raise CheckpointError(f"`{name}` unpacks to more than its size: it is not read. Nothing was changed.")
    file.seek(0)
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a hostile pickle makes of the reader
        raise CheckpointError(
            f"`{name}` cannot be read as tensors alone ({type(error).__name__}): it is damaged, or holds Python "
            "objects, which are not loaded. Nothing was changed."
        ) from None
    if not isinstance(found, Mapping) or not all(_is_entry(key, value) for key, value in found.items()):
        raise CheckpointError(f"`{name}` is not a table of tensors by name. Nothing was changed.")
    return MemoryTensors({key: value.detach() for key, value in found.items()})


def _is_entry(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
