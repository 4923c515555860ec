"""A model's checkpoint of one or several safetensors files, read and written a tensor at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from peftlite.checkpoint.files import read_json
from peftlite.checkpoint.keys import nearest_keys, shown
from peftlite.checkpoint.tensorfile import SafetensorsFile, TensorInfo
from peftlite.checkpoint.tensorwriting import chunks, header_of, laid_out
from peftlite.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Shards:
    """The tensors of a checkpoint, read when asked for. Close it after use.

    Raises: CheckpointError if there are no safetensors files, or they are not what their index says.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.index: dict[str, Any] | None = None
        self.files: dict[str, SafetensorsFile] = {}
        names: Iterable[str] = (SINGLE,)
        if (directory / INDEX).is_file():
            self.index = read_json(directory / INDEX)
            names = dict.fromkeys(self._weight_map().values())
        elif not (directory / SINGLE).is_file():
            raise CheckpointError(
                f"`{directory}` has neither `{SINGLE}` nor `{INDEX}`: only safetensors files are merged. Save the "
                "model with `save_pretrained` first. Nothing was changed."
            )
        try:
            for name in names:
                self.files[name] = SafetensorsFile(self._opened(name), str(directory / name))
            self.home = {key: name for name, file in self.files.items() for key in file.infos}
            self._check_index()
        except BaseException:
            self.close()
            raise

    def _weight_map(self) -> dict[str, str]:
        found = None if self.index is None else self.index.get("weight_map")
        plain = isinstance(found, dict) and all(
            isinstance(name, str) and name == os.path.basename(name) and name.endswith(".safetensors")
            for name in found.values()
        )
        if not plain or not found:
            raise CheckpointError(f"`{self.directory / INDEX}` has no table of shards. Nothing was changed.")
        return dict(found)

    def _opened(self, name: str) -> BinaryIO:
        try:
            return open(self.directory / name, "rb", buffering=0)
        except OSError as error:
            raise CheckpointError(
                f"`{self.directory / name}` cannot be read: {error.strerror or error}. Nothing was changed."
            ) from error

    def _check_index(self) -> None:
        if self.index is None:
            return
        wrong = [key for key, name in self._weight_map().items() if self.home.get(key) != name]
        wrong += [key for key in self.home if key not in self._weight_map()]
        if wrong:
            raise CheckpointError(
                f"`{self.directory / INDEX}` and the shards disagree on {len(wrong)} tensors, such as "
                f"{shown(wrong[0])}. Nothing was changed."
            )

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Dtype and shape of every tensor."""
        return {key: self.files[name].infos[key] for key, name in self.home.items()}

    def read(self, key: str) -> Tensor:
        """One tensor, in memory of its own."""
        return self.files[self.home[key]].read(key)

    def pieces(self, key: str) -> Iterator[bytes]:
        """The bytes of one tensor, in pieces."""
        return self.files[self.home[key]].pieces(key)

    def differ(self, key: str, other: str) -> bool:
        """Whether two tensors have other bytes."""
        return any(a != b for a, b in zip_longest(self.pieces(key), self.pieces(other)))

    def close(self) -> None:
        """Close the files."""
        for file in self.files.values():
            file.close()

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ShardWriter:
    """Files as those of a checkpoint, whose tensors are written in any order.

    changed: dtype and shape of tensors that have others than there, or are not there; those go to the last file.
    """

    def __init__(self, directory: Path, source: Shards, changed: Mapping[str, TensorInfo]) -> None:
        self._directory, self._source = directory, source
        self._places: dict[str, tuple[str, int]] = {}
        self.home = dict(source.home)
        last = list(source.files)[-1]
        self.home.update({key: last for key in changed if key not in self.home})
        self.infos = {**source.infos, **changed}
        for name, file in source.files.items():
            keys = [key for key, home in self.home.items() if home == name]
            infos, header = dict(file.infos), file.header()
            if any(key in changed for key in keys):
                infos = laid_out({key: self.infos[key] for key in keys})
                header = header_of(infos, file.metadata)
            self._places.update((key, (name, len(header) + info.begin)) for key, info in infos.items())
            with open(directory / name, "xb") as out:
                out.write(header)
                out.truncate(len(header) + max((info.end for info in infos.values()), default=0))

    def put(self, key: str, tensor: Tensor) -> None:
        """Write a tensor's values.

        Raises: CheckpointError if they are not what was said.
        """
        info = self.infos[key]
        if (tensor.dtype, tuple(tensor.shape)) != (info.dtype, info.shape):
            raise CheckpointError(f"{shown(key)} is {tensor.dtype}, {tuple(tensor.shape)}: expected {info}.")
        self._write(key, chunks(tensor.detach()))

    def copy(self, key: str, old: str | None = None) -> None:
        """Write the bytes that a tensor has in the source, there under this name or another."""
        self._write(key, self._source.pieces(old or key))

    def _write(self, key: str, pieces: Iterable[Any]) -> None:
        name, at = self._places[key]
        with open(self._directory / name, "r+b") as out:
            out.seek(at)
            for piece in pieces:
                out.write(piece)

    def finish(self) -> None:
        """Write the index, if there is one, and see that all files are on the disk."""
        if self._source.index is not None:
            (self._directory / INDEX).write_text(json.dumps(self._index(), indent=2, sort_keys=True) + "\n")
        for name in (*self._source.files, INDEX):
            path = self._directory / name
            if path.exists():
                with open(path, "r+b") as file:
                    os.fsync(file.fileno())

    def _index(self) -> dict[str, Any]:
        index = dict(self._source.index or {})
        metadata = dict(index.get("metadata") or {})
        before, after = self._source.infos, self.infos
        for field, measure in (("total_size", in_bytes), ("total_parameters", in_numbers)):
            if isinstance(metadata.get(field), int):
                metadata[field] += sum(map(measure, after.values())) - sum(map(measure, before.values()))
        return {**index, "metadata": metadata, "weight_map": self.home}


def in_numbers(info: TensorInfo) -> int:
    """How many numbers a tensor has."""
    return math.prod(info.shape)


def in_bytes(info: TensorInfo) -> int:
    """How many bytes a tensor has."""
    return in_numbers(info) * info.dtype.itemsize


def not_there(what: str, keys: Iterable[str], known: Iterable[str], directory: Path) -> CheckpointError:
    """The error for tensors that a checkpoint lacks."""
    missing, there = sorted(keys), list(known)
    near = ", ".join(shown(key) for key in nearest_keys(missing[0], there))
    return CheckpointError(
        f"`{directory}` lacks {len(missing)} tensors of {what}: {', '.join(map(shown, missing[:3]))}"
        f"{' ...' if len(missing) > 3 else ''}{f'; nearest: {near}' if near else ''}. Nothing was changed."
    )
