"""Tensors that stand in files otherwise than on their layers, because their method says so (see `FileForm`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peftlite.checkpoint.keys import without_prefix
from peftlite.checkpoint.targets import LayerTarget, Targets
from peftlite.checkpoint.tensorfile import TensorInfo, TensorSource


def as_in_files(tensors: Mapping[str, Tensor], targets: Targets, memory: Any) -> dict[str, Tensor]:
    """An adapter's tensors by file key, as files have them."""
    result = dict(tensors)
    for key, target in targets.places.items():
        if key in result and isinstance(target, LayerTarget) and target.layer.tuner.file_form is not None:
            result[key] = target.layer.tuner.file_form.write(memory, path_of(key, target), target.suffix, result[key])
    return result


def path_of(key: str, target: LayerTarget) -> str:
    """The path of a tensor's layer."""
    return without_prefix(key).removesuffix(target.suffix).removesuffix(".")


class AsOnLayers:
    """A `TensorSource` that gives a file's tensors the form that they have on the layers where they will go."""

    def __init__(self, source: TensorSource, targets: Targets, config: Any) -> None:
        self._source = source
        self._forms: dict[str, Callable[[Tensor], Tensor]] = {}
        infos = dict(source.infos)
        for key, target in targets.places.items():
            if not isinstance(target, LayerTarget) or target.layer.tuner.file_form is None or key not in infos:
                continue
            shape = infos[key].shape
            if shape == target.wanted.shape or len(shape) != len(target.wanted.shape):
                continue
            form = partial(target.layer.tuner.file_form.read, config, path_of(key, target), target.suffix)
            self._forms[key] = form
            infos[key] = infos[key]._replace(shape=tuple(form(torch.empty(shape, device="meta")).shape))
        self.infos: Mapping[str, TensorInfo] = infos

    def read(self, key: str) -> Tensor:
        tensor = self._source.read(key)
        return self._forms[key](tensor) if key in self._forms else tensor

    def close(self) -> None:
        self._source.close()
