"""The safetensors format, written with the same bytes every time.

The safetensors library orders metadata at random; a file without metadata is equal to that library's, byte for byte.
"""

from __future__ import annotations

import json
import math
import sys
import zlib
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from peftlite.checkpoint.keys import shown
from peftlite.checkpoint.pieces import CHUNK, write_pieces
from peftlite.checkpoint.tensorfile import CODES, METADATA, RANK, TensorInfo, bytes_of, swap_bytes
from peftlite.errors import CheckpointError


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> int:
    """Write `tensors` as a safetensors file. Equal tensors give equal bytes, whatever their order, strides or device.

    Gives back the checksum of the table of tensors.

    Raises: CheckpointError for a tensor that has no values (on the meta device), or no place in the format.
    """
    plain = {key: _plain(key, tensor) for key, tensor in tensors.items()}
    infos = laid_out({key: TensorInfo(tensor.dtype, tuple(tensor.shape)) for key, tensor in plain.items()})
    header = header_of(infos, {"format": "pt", **dict(sorted((metadata or {}).items()))})
    values = (chunk for key in infos for chunk in chunks(plain.pop(key)))
    write_pieces(file, chain([memoryview(header)], values))
    return zlib.crc32(header[8:])


def laid_out(infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors in the order in which files have them, and where there."""
    placed: dict[str, TensorInfo] = {}
    at = 0
    for key in sorted(infos, key=lambda key: (RANK[CODES[infos[key].dtype]], key)):
        info = infos[key]
        end = at + math.prod(info.shape) * info.dtype.itemsize
        placed[key] = TensorInfo(info.dtype, info.shape, at, end)
        at = end
    return placed


def header_of(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """What a file begins with.

    Raises: CheckpointError for names that are not UTF-8.
    """
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    for key, info in infos.items():
        offsets = [info.begin, info.end]
        header[key] = {"dtype": CODES[info.dtype], "shape": list(info.shape), "data_offsets": offsets}
    try:
        raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError as error:
        name = shown(error.object[error.start - 20 : error.end])
        raise CheckpointError(f"A tensor's name, near {name}, is not UTF-8. Nothing was changed.") from None
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _plain(key: str, tensor: Tensor) -> Tensor:
    """The tensor without subclass, gradient or lazy conjugation; its values stay where they are."""
    plain = tensor.detach()
    if type(plain) is not Tensor:
        plain = _without_subclass(key, plain)
    if plain.is_meta or plain.layout is not torch.strided or plain.dtype not in CODES:
        why = "is on the meta device, and so has no values" if plain.is_meta else f"is {plain.layout}, {plain.dtype}"
        raise CheckpointError(f"{shown(key)} {why}: it cannot be written. Nothing was changed.")
    return plain.resolve_conj().resolve_neg()


def _without_subclass(key: str, tensor: Tensor) -> Tensor:
    if not bool(is_traceable_wrapper_subclass(tensor)):
        return tensor.as_subclass(Tensor)
    raise CheckpointError(
        f"{shown(key)} is a {type(tensor).__name__}, whose values are not one dense tensor: gather or dequantise it "
        "first. Nothing was changed."
    )


def chunks(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a plain tensor as files have them, in pieces."""
    flat = tensor.contiguous().cpu().reshape(-1)
    if sys.byteorder == "big":
        flat = flat.clone()
        swap_bytes(flat)
    view = bytes_of(flat.view(torch.uint8))
    for start in range(0, len(view), CHUNK):
        yield view[start : start + CHUNK]
