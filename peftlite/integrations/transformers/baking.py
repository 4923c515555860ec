"""Merging an adapter into a checkpoint on disk, one tensor at a time: the model is never in memory."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from peftlite.checkpoint.adapters import load_adapter
from peftlite.checkpoint.files import read_adapter, read_config
from peftlite.checkpoint.hub import resolve
from peftlite.checkpoint.keys import CONFIG_NAME, RECORD_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, shown
from peftlite.checkpoint.shards import INDEX, SINGLE, Shards, ShardWriter, not_there
from peftlite.checkpoint.targets import BaseTarget, live_targets
from peftlite.checkpoint.tensorfile import TensorInfo
from peftlite.config import PeftConfig, config_from_dict
from peftlite.core.facts import facts_of
from peftlite.core.hosts import Saved
from peftlite.core.layer import AdapterLayer
from peftlite.core.leaving import outcome
from peftlite.core.lifecycle import check_mergeable, state_of
from peftlite.core.tree import layer_places, layers
from peftlite.errors import CheckpointError, MergeError, StateError
from peftlite.integrations.transformers.empty import (
    CONFIG,
    empty_model,
    names_in,
    own_tensors,
    take_dtypes,
    tie_flags,
    write_config,
)

ADAPTER = "default"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot", INDEX)
_REWRITTEN = {CONFIG, SINGLE, INDEX}
_ADAPTERS = {CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, RECORD_NAME}


def merge_checkpoint(
    base_dir: str | os.PathLike[str],
    adapter_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    safe_merge: bool = False,
) -> None:
    """Write what `merge_and_unload` and `save_pretrained` would, without the model in memory.

    The checkpoint is read and written tensor by tensor: in memory are the adapter and the largest adapted tensor. The
    new one has the same shards, the same index and metadata, and the other files of the directory, but for weights in
    other formats. A weight that was tied to one that is merged is written as a tensor of its own, and `config.json`
    says so. `out_dir` appears whole, or not at all.

    Args:
        base_dir: a directory with a transformers model: `config.json`, and one or several safetensors files.
        adapter_dir: a directory or a hub repository with an adapter.
        out_dir: where to; not there yet, or empty.
        safe_merge: write nothing if a merged number is not finite.

    Raises:
        CheckpointError: a directory cannot be used, files do not fit the model, or tensors are missing.
        MergeError: the adapter has no form in the weights, needs the base's weights to be loaded, or is on tensors that
            the checkpoint has in another layout (experts one by one); the base is quantised.
        ConfigError, AdapterFilesNotFoundError, ...: as `load_adapter`.
    """
    base, out = Path(base_dir).expanduser(), Path(out_dir).expanduser()
    adapter = resolve(adapter_dir)
    check_places(base, adapter, out)
    with Shards(base) as shards, staging(out) as place:
        merge = Merge(shards, adapter, safe_merge)
        merge.write(place)
        copy_rest(base, place, shards.files)
        write_config(base, place, merge.model, merge.tied)


def check_places(base: Path, adapter: Path, out: Path) -> None:
    """Refuse to write over anything.

    Raises: CheckpointError.
    """
    if not base.is_dir():
        raise CheckpointError(f"`base_dir` is `{base}`, which is no directory. Nothing was changed.")
    target = out.resolve()
    for name, other in (("base_dir", base.resolve()), ("adapter_dir", adapter.resolve())):
        if target == other or target.is_relative_to(other) or other.is_relative_to(target):
            raise CheckpointError(
                f"`out_dir` is `{out}`, in (or around) `{name}`: choose another. Nothing was changed."
            )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(
            f"`out_dir` is `{out}`, which is there already and not an empty directory. Nothing was changed."
        )


class staging:  # noqa: N801 - used as a function
    """A directory beside `out` that takes its place at the end of the block, or is removed if that fails.

    Raises: CheckpointError if the file system refuses.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._place = out.parent / f".{out.name}-merging-{secrets.token_hex(8)}"

    def __enter__(self) -> Path:
        try:
            self._place.mkdir(parents=True)
        except OSError as error:
            raise self._refused(error) from error
        return self._place

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            if error is None:
                os.rename(self._place, self._out)
        except OSError as refusal:
            raise self._refused(refusal) from refusal
        finally:
            shutil.rmtree(self._place, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, CheckpointError):
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"The checkpoint could not be written to `{self._out}`: {error.strerror or error}. Nothing was changed."
        )


def copy_rest(base: Path, place: Path, shards: Collection[str]) -> None:
    """Copy what is no weight: tokenizer, generation config, code, ..."""
    for found in base.iterdir():
        name = found.name
        if name in _REWRITTEN or name in _ADAPTERS or name in shards or name.startswith("."):
            continue
        if found.is_dir():
            shutil.copytree(found, place / name, ignore=lambda _, names: [n for n in names if n.endswith(_WEIGHTS)])
        elif not name.endswith((*_WEIGHTS, ".index.json")):
            shutil.copyfile(found, place / name)


# ---- what the merged checkpoint consists of
@dataclass(frozen=True)
class Kept:
    """A tensor of the base, or of the adapter's file in its place, as it is."""

    original: Tensor


@dataclass(frozen=True)
class Given:
    """A tensor that is in memory."""

    tensor: Tensor


@dataclass(frozen=True)
class Made:
    """What a layer makes of its weight (or bias) when the adapter is merged into it."""

    layer: AdapterLayer
    original: Tensor


Content = Kept | Given | Made


class Merge:
    """One merge: the empty model, where its tensors are in the base checkpoint, and what becomes of each.

    The model's structure after the merge (what is tied, what was replaced) is made on the meta device, by the functions
    that do so for a model in memory.
    """

    def __init__(self, shards: Shards, adapter: Path, safe_merge: bool) -> None:
        self.shards, self.safe_merge = shards, safe_merge
        self.model = empty_model(shards.directory, config_in(adapter))
        self.tied = tie_flags(self.model.config)
        self.names, self.converted = names_in(self.model, shards.home)
        take_dtypes(self.model, self.names, shards.infos)
        before = own_tensors(self.model)
        self.key_of = {id(before[name]): key for key, name in reversed(self.names.items())}
        self.check_ties(before)
        self.load(adapter)
        self.given = self.in_adapter(adapter)
        self.contents = self.structure(before)

    # ---- the plan
    def check_ties(self, before: dict[str, Tensor]) -> None:
        """Refuse a checkpoint that has several tensors, with other numbers, for one of the model.

        Raises: CheckpointError.
        """
        for key, name in self.names.items():
            first = self.key_of[id(before[name])]
            if first != key and self.shards.differ(first, key):
                raise CheckpointError(
                    f"{shown(first)} and {shown(key)} are tied by `{CONFIG}`, and differ in `{self.shards.directory}`: "
                    "correct `tie_word_embeddings` there. Nothing was changed."
                )

    def load(self, adapter: Path) -> None:
        """Load the adapter into the empty model.

        Raises: what `load_adapter` raises, and MergeError for one that is made from the base's weights when it is.
        """
        try:
            load_adapter(self.model, adapter, ADAPTER)
        except StateError as error:
            raise MergeError(
                f"The adapter in `{adapter}` needs the base model's weights when it is loaded: load it into the model, "
                f"save it as plain LoRA with `save_as_lora`, and merge that. {error}"
            ) from error
        check_mergeable(self.model, (ADAPTER,))

    def in_adapter(self, adapter: Path) -> dict[int, Tensor]:
        """The base's tensors that the adapter's file has other values for, by the id of the model's."""
        config = state_of(self.model).configs[ADAPTER]
        found: dict[int, Tensor] = {}
        with read_adapter(adapter) as files:
            for key, target in live_targets(self.model, ADAPTER, config).places.items():
                if isinstance(target, BaseTarget) and key in files.tensors.infos:
                    found[id(target.live)] = files.tensors.read(key).to(target.live.dtype)
        return found

    def structure(self, before: dict[str, Tensor]) -> dict[str, Content]:
        """What the tensors of the merged model consist of, by name; ties are made and broken on the way."""
        original = {id(tensor): tensor for tensor in before.values()}
        made = self.merge_empty()
        for place in reversed(layer_places(self.model)):
            if isinstance(place.module, AdapterLayer):
                place.parent._modules[place.child] = outcome(place.module, (ADAPTER,))
        merged = own_tensors(self.model)
        unloaded = facts_of(self.model).unloaded
        if unloaded is not None:
            unloaded(False)
        after = own_tensors(self.model)
        known = {*original, *made}
        self.after = after
        contents: dict[str, Content] = {}
        for name, tensor in after.items():
            source = tensor if id(tensor) in known or not tensor.is_meta else merged[name]  # apart: a copy of that
            if not source.is_meta:
                contents[name] = Given(source.detach())
            elif id(source) in made:
                contents[name] = made[id(source)]
            else:
                contents[name] = Kept(source)
        return contents

    def merge_empty(self) -> dict[int, Made]:
        """Give layers the weights of their own that merging gives them, still empty; by their ids."""
        made: dict[int, Made] = {}
        self.own: dict[AdapterLayer, Saved] = {}
        for layer in sorted(layers(self.model), key=lambda layer: bool(layer.leaders)):
            host = layer.host
            if not layer.mergeable((ADAPTER,)):
                continue
            if layer.leaders:
                setattr(host.layer, host.param, layer.leaders[ADAPTER].host.parameter)
                continue
            old = self.own[layer] = Saved(host.parameter, host.bias)
            host.put_copies(old)
            made[id(host.parameter)] = Made(layer, old.weight)
            if old.bias is not None:
                made[id(host.bias)] = Made(layer, old.bias)
        return made

    def additions(self) -> list[str]:
        """The names of tensors that have no place in the base checkpoint: of one that several share, the first.

        Raises: CheckpointError for tensors that are nowhere.
        """
        there = {id(self.after[name]) for name in self.names.values()}
        added: dict[int, str] = {}
        for name, tensor in self.after.items():
            if id(tensor) not in there and name not in self.converted:
                added.setdefault(id(tensor), name)
        lost = [name for name in added.values() if not self.found(self.contents[name]) and not self.may_lack(name)]
        if lost:
            raise not_there(type(self.model).__name__, lost, self.shards.home, self.shards.directory)
        new = [name for name in added.values() if self.found(self.contents[name])]
        unnamed = [name for name in new if names_in(self.model, [name])[0].get(name) != name]
        if unnamed:
            raise MergeError(
                f"`{unnamed[0]}` has no name in a checkpoint of {type(self.model).__name__}: merge in memory, with "
                "`merge_and_unload`. Nothing was changed."
            )
        return new

    def found(self, content: Content) -> bool:
        """Whether a tensor's values are in the checkpoint, or here."""
        return isinstance(content, Given) or id(content.original) in {*self.key_of, *self.given}

    def may_lack(self, name: str) -> bool:
        """Whether transformers makes this tensor where a checkpoint has none."""
        patterns = getattr(self.model, "_keys_to_ignore_on_load_missing", None) or ()
        return any(re.search(pattern, name) for pattern in patterns)

    def check_converted(self) -> None:
        """Refuse to merge into what the checkpoint has in pieces.

        Raises: MergeError.
        """
        for name in sorted(self.converted):
            content = self.contents.get(name)
            if content is not None and not isinstance(content, Kept):
                raise MergeError(
                    f"`{name}` has an adapter, and the checkpoint has it in another layout, as several tensors: merge "
                    "in memory, with `merge_and_unload`. Nothing was changed."
                )

    # ---- the files
    def write(self, place: Path) -> None:
        """Write the shards and their index."""
        self.check_converted()
        wanted = {key: self.contents[name] for key, name in self.names.items()}
        wanted.update((name, self.contents[name]) for name in self.additions())
        infos = {key: self.info(content) for key, content in wanted.items()}
        old = self.shards.infos
        changed = {k: i for k, i in infos.items() if k not in old or (i.dtype, i.shape) != (old[k].dtype, old[k].shape)}
        writer = ShardWriter(place, self.shards, changed)
        for key in self.shards.home:
            if key not in wanted:
                writer.copy(key)
        baked: dict[AdapterLayer, dict[str, Made]] = {}
        for key, content in wanted.items():
            if isinstance(content, Made):
                baked.setdefault(content.layer, {})[key] = content
            elif isinstance(content, Kept) and id(content.original) not in self.given:
                writer.copy(key, self.key_of[id(content.original)])
            else:
                writer.put(key, content.tensor if isinstance(content, Given) else self.given[id(content.original)])
        for layer, keys in baked.items():
            self.bake(layer, keys, writer)
        writer.finish()

    def info(self, content: Content) -> TensorInfo:
        """Dtype and shape of what is written."""
        tensor = content.tensor if isinstance(content, Given) else content.original
        return TensorInfo(tensor.dtype, tuple(tensor.shape))

    def bake(self, layer: AdapterLayer, keys: dict[str, Made], writer: ShardWriter) -> None:
        """Bring one layer's tensors in, merge, and write them."""
        host, own = layer.host, self.own[layer]
        empty = dict(host.layer._parameters)
        try:
            for name, original in ((host.param, own.weight), (host.bias_param, own.bias)):
                if original is not None:
                    setattr(host.layer, name, nn.Parameter(self.read(original), requires_grad=False))
            layer.bake((ADAPTER,), self.safe_merge)
            for key, made in keys.items():
                writer.put(key, getattr(host.layer, host.param if made.original is own.weight else host.bias_param))
        finally:
            host.layer._parameters.update(empty)

    def read(self, original: Tensor) -> Tensor:
        """The values of a tensor of the base."""
        given = self.given.get(id(original))
        return self.shards.read(self.key_of[id(original)]) if given is None else given.clone()


def config_in(adapter: Path) -> PeftConfig:
    """The config of an adapter on disk."""
    return config_from_dict(read_config(adapter))
