"""The safetensors format, read with suspicion.

    8 bytes: length n of the header | n bytes: JSON, name -> dtype, shape, [begin, end) | the tensors' bytes, no gaps

The header is checked as a whole before any tensor is read, and a tensor is read only when it is asked for, into memory
of its own: a map of the file, which is there for those who ask for it, changes, or ends the process, when somebody else
writes into that file later.
"""

from __future__ import annotations

import cmath
import json
import math
import mmap
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from peftlite.checkpoint.keys import shown
from peftlite.checkpoint.pieces import CHUNK, PIECES
from peftlite.core.room import in_bytes, is_plain
from peftlite.core.transaction import write
from peftlite.errors import CheckpointError, warn
from peftlite.reading import without_repeats

MAX_HEADER = 32 << 20
"""Bytes; 200,000 tensors with long names fit."""
METADATA = "__metadata__"
_LOOK = 1 << 20  # what fits into a processor's cache
_preadv: Callable[[int, Sequence[Any], int], int] | None = getattr(os, "preadv", None)  # not on Windows
_DTYPES = {
    # in the order in which files are laid out
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
    "F32": "float32",
    "U32": "uint32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "U16": "uint16",
    "I16": "int16",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
DTYPES: dict[str, torch.dtype] = {
    k: getattr(torch, v) for k, v in _DTYPES.items() if getattr(torch, v, None) is not None
}
CODES: dict[torch.dtype, str] = {dtype: code for code, dtype in DTYPES.items()}
_KNOWN_TO_NUMPY = (torch.float32, torch.float16, torch.float64)
RANK = {code: rank for rank, code in enumerate(_DTYPES)}


class TensorInfo(NamedTuple):
    """What a file says about one of its tensors; `begin` and `end` count bytes from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int = 0
    end: int = 0


class TensorSource(Protocol):
    """Tensors by name, whose shapes are known before any of them is read."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]: ...

    def read(self, key: str) -> Tensor: ...

    def close(self) -> None: ...


class MemoryTensors:
    """A `TensorSource` over tensors that are in memory already."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.infos = {key: TensorInfo(t.dtype, tuple(t.shape)) for key, t in tensors.items()}
        self.table: int | None = None

    def read(self, key: str) -> Tensor:
        """One tensor, in memory of its own."""
        return self._tensors[key].detach().clone(memory_format=torch.contiguous_format)

    def look(self, key: str) -> Tensor:
        """One tensor as it is, to be looked at."""
        return self._tensors[key].detach()

    def read_into(self, places: Iterable[tuple[str, Tensor]]) -> None:
        """Write tensors' numbers into others of their shapes."""
        for key, tensor in places:
            write(tensor, self.look(key))

    def not_finite(self) -> str | None:
        """The name of a tensor with numbers that are not finite, if there is one."""
        return next((key for key, tensor in self._tensors.items() if not is_finite(tensor)), None)

    def close(self) -> None:
        pass


class SafetensorsFile:
    """A `TensorSource` over an open safetensors file.

    Raises: CheckpointError if the header is not in order, or does not account for every byte of the file.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self._opened = self._stamp()
        self._size = size = file.seek(0, 2)
        self._map: mmap.mmap | None = None
        file.seek(0)
        length = int.from_bytes(file.read(8), "little") if size >= 8 else 0
        if length > MAX_HEADER:
            raise self._error(f"its header claims {length} bytes, more than the {MAX_HEADER} that are accepted")
        if length > size - 8:
            raise self._error(f"its header claims {length} bytes, and the file has {size}")
        self._start = 8 + length
        raw = file.read(length)
        self.table = zlib.crc32(raw)
        """The checksum of the table of tensors."""
        entries = self._parse(raw)
        self.metadata = self._checked_metadata(entries.pop(METADATA, {}))
        self.infos = {key: self._info(key, entry) for key, entry in entries.items()}
        self._check_layout(size - self._start)
        self._seen = torch.empty(0, dtype=torch.uint8)

    def _error(self, why: str) -> CheckpointError:
        return CheckpointError(f"`{self._name}` is damaged or not a safetensors file: {why}. Nothing was changed.")

    def _parse(self, raw: bytes) -> dict[str, Any]:
        # an honest entry has three brackets in more than 50 bytes; masses of them would only be there to fill memory
        if raw.count(b"[") + raw.count(b"{") > len(raw) // 12 + 16:
            raise self._error("its header is not a list of tensors")
        try:
            entries = json.loads(raw.decode("utf-8"), object_pairs_hook=without_repeats)
            "".join(entries if isinstance(entries, dict) else "").encode("utf-8")  # half a character cannot be shown
        except RecursionError:
            raise self._error("its header is nested too deeply") from None
        except ValueError as error:
            raise self._error(f"its header cannot be read ({error})") from None
        if not isinstance(entries, dict):
            raise self._error("its header is not a JSON object")
        return entries

    def _checked_metadata(self, found: Any) -> dict[str, str]:
        if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
            raise self._error("its metadata is not a table of strings")
        return found

    def _info(self, key: str, entry: Any) -> TensorInfo:
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._error(f"the entry of {shown(key)} is not one of a tensor")
        code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(code, str) or code not in DTYPES:
            raise self._error(f"the dtype {shown(str(code))} of {shown(key)} is not known")
        if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
            raise self._error(f"shape or place of {shown(key)} are not non-negative integers")
        size = DTYPES[code].itemsize
        for extent in shape:
            size *= extent
        if offsets[1] - offsets[0] != size:
            raise self._error(f"{shown(key)} has {offsets[1] - offsets[0]} bytes, where its shape needs {size}")
        return TensorInfo(DTYPES[code], tuple(shape), offsets[0], offsets[1])

    def _check_layout(self, size: int) -> None:
        at = 0
        for begin, end, key in sorted((info.begin, info.end, key) for key, info in self.infos.items()):
            if begin != at:
                raise self._error(f"{shown(key)} begins at byte {begin} of the data, where {at} was due")
            at = end
        if at != size:
            raise self._error(f"its header accounts for {at} bytes of tensors, and {size} are there")

    def map(self) -> None:
        """Have `read` give tensors that lie in a private (copy-on-write) map of the file; it lives as long as they do.

        What cannot be mapped, for its place in the file or for the file system, is read as ever, with a warning.

        Raises: CheckpointError if the file was cut off since its header was read.
        """
        aligned = [self._is_aligned(info) for info in self.infos.values()]
        if not all(aligned):
            warn(
                f"`{self._name}` is not mapped as a whole: {aligned.count(False)} of its {len(aligned)} tensors do not "
                "lie there as they would in memory, and are copied."
            )
        untracked = sys.platform != "win32" and sys.version_info >= (3, 13)  # else a map keeps the file open
        options: dict[str, Any] = {"trackfd": False} if untracked else {}
        try:
            self._map = mmap.mmap(self._file.fileno(), self._size, access=mmap.ACCESS_COPY, **options)
        except OSError as error:
            warn(f"`{self._name}` cannot be mapped ({error.strerror or error}), and is copied.")
        except ValueError:
            raise self._error("it was cut off while it was read") from None

    def _is_aligned(self, info: TensorInfo) -> bool:
        return sys.byteorder == "little" and (self._start + info.begin) % info.dtype.itemsize == 0

    def read(self, key: str) -> Tensor:
        """One tensor, in memory of its own; after `map`, in that.

        Raises: CheckpointError if the file was cut off since its header was read.
        """
        info = self.infos[key]
        if self._map is not None and info.end > info.begin and self._is_aligned(info):
            at, count = self._start + info.begin, math.prod(info.shape)
            return torch.frombuffer(self._map, dtype=info.dtype, count=count, offset=at).resize_(info.shape)
        tensor = torch.empty(info.shape, dtype=info.dtype)
        self._fill(tensor.view(-1).view(torch.uint8), info.begin, key)
        if sys.byteorder == "big":
            swap_bytes(tensor)
        return tensor

    def look(self, key: str) -> Tensor:
        """One tensor, to be looked at: in memory that the next look will overwrite.

        Raises: as `read`.
        """
        info = self.infos[key]
        size = info.end - info.begin
        if self._seen.numel() < size:
            self._seen = torch.empty(size, dtype=torch.uint8)
        flat = self._seen[:size]
        self._fill(flat, info.begin, key)
        tensor = flat.view(info.dtype).view(info.shape)
        if sys.byteorder == "big":
            tensor = tensor.clone()
            swap_bytes(tensor)
        return tensor

    def read_each(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors as `read` gives them, in turn; a few calls of the system read all that lie side by side in the file.

        Raises: as `read`.
        """
        if self._map is not None or sys.byteorder == "big":
            yield from ((key, self.read(key)) for key in keys)
            return
        for group in self._groups(keys, _LOOK):  # which whoever looks at them at once finds in the cache
            made = [(key, torch.empty(self.infos[key].shape, dtype=self.infos[key].dtype)) for key in group]
            self._fill_all(made)
            yield from made

    def read_into(self, places: Iterable[tuple[str, Tensor]]) -> None:
        """Write tensors' numbers into others of their shapes, with no copy in between where that is possible.

        Raises: as `read`, and if the file was written to; some of the numbers may then have been written.
        """
        plain: list[tuple[str, Tensor]] = []
        for key, tensor in sorted(places, key=lambda place: self.infos[place[0]].begin):
            if not is_plain(tensor) or tensor.dtype != self.infos[key].dtype or sys.byteorder == "big":
                write(tensor, self.look(key))
            else:
                plain.append((key, tensor))
        torch.autograd.graph.increment_version([tensor for _, tensor in plain])  # which says: they were written into
        for group in self._groups([key for key, _ in plain], CHUNK):
            self._fill_all(plain[: len(group)])
            del plain[: len(group)]
        if self._stamp() != self._opened:  # what was found to be in order may not be what was read
            raise self._error("it was written to while it was read")

    def _stamp(self) -> tuple[int, int]:
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns

    def not_finite(self) -> str | None:
        """The name of a tensor with numbers that are not finite, if there is one; takes next to no memory.

        Raises: as `read`.
        """
        room = torch.empty(_LOOK, dtype=torch.uint8)
        for keys in self._groups(sorted(self.infos, key=lambda key: self.infos[key].begin), _LOOK):
            end = self.infos[keys[-1]].end
            for at in range(self.infos[keys[0]].begin, end, _LOOK):
                seen = room[: min(_LOOK, end - at)]
                self._fill(seen, at, keys[0])
                numbers = seen.view(self.infos[keys[0]].dtype)
                if sys.byteorder == "big":
                    swap_bytes(numbers)
                if not is_finite(numbers):
                    return next((key for key in keys if not is_finite(self.look(key))), None)
        return None

    def _groups(self, keys: Iterable[str], most: int) -> Iterator[list[str]]:
        """These in their order, those together that are of one dtype and lie side by side, up to `most` bytes."""
        group: list[str] = []
        begin = end = 0
        dtype: torch.dtype | None = None
        for key in keys:
            info = self.infos[key]
            if info.begin != end or info.dtype != dtype or info.end - begin > most or len(group) == PIECES:
                if group:
                    yield group
                group, begin, dtype = [], info.begin, info.dtype
            group.append(key)
            end = info.end
        if group:
            yield group

    def _fill_all(self, places: Sequence[tuple[str, Tensor]]) -> None:
        """Read into plain tensors what lies side by side in the file."""
        begin, end = self.infos[places[0][0]].begin, self.infos[places[-1][0]].end
        if _preadv is not None and end - begin <= CHUNK:
            arrays = [in_numpy(tensor) for _, tensor in places]
            if _preadv(self._file.fileno(), arrays, self._start + begin) == end - begin:
                return
        for key, tensor in places:  # what is large, or the file ends early, or something came between
            self._fill(in_bytes(tensor), self.infos[key].begin, key)

    def _fill(self, flat: Tensor, begin: int, key: str) -> None:
        self._file.seek(self._start + begin)
        view = bytes_of(flat)
        while view:
            count = self._file.readinto(view[:CHUNK])  # type: ignore[attr-defined]
            if not count:
                raise self._error(f"{shown(key)} was cut off while it was read")
            view = view[count:]

    def pieces(self, key: str) -> Iterator[bytes]:
        """The bytes of one tensor as they are in the file, in pieces.

        Raises: CheckpointError if the file was cut off since its header was read.
        """
        info = self.infos[key]
        for at in range(info.begin, info.end, CHUNK):
            self._file.seek(self._start + at)
            wanted = min(CHUNK, info.end - at)
            piece = self._file.read(wanted)
            if len(piece) != wanted:
                raise self._error(f"{shown(key)} was cut off while it was read")
            yield piece

    def header(self) -> bytes:
        """What the file begins with, as it is."""
        self._file.seek(0)
        return self._file.read(self._start)

    def close(self) -> None:
        self._file.close()


def read_each(source: TensorSource, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """These of the tensors, in turn."""
    if isinstance(source, SafetensorsFile):
        return source.read_each(keys)
    return ((key, source.read(key)) for key in keys)


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers in a tensor are numbers."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()
    if tensor.requires_grad:
        tensor = tensor.detach()
    # one pass; a sum of finite numbers may overflow, though
    return cmath.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def _is_sizes(value: Any) -> bool:
    if not isinstance(value, list) or len(value) > 16 or not {int}.issuperset(map(type, value)):
        return False
    return not value or (min(value) >= 0 and max(value) < 1 << 63)


def bytes_of(flat: Tensor) -> memoryview:
    """The memory of a flat tensor of bytes."""
    return memoryview(cast(Any, flat.numpy()))


def in_numpy(tensor: Tensor) -> Any:
    """The memory of a plain tensor as an array: of its numbers, where numpy knows their dtype."""
    return tensor.detach().numpy() if tensor.dtype in _KNOWN_TO_NUMPY else in_bytes(tensor).numpy()


def swap_bytes(tensor: Tensor) -> None:
    """Turn the order of the bytes of each number."""
    cast(Any, tensor.untyped_storage()).byteswap(tensor.dtype)
