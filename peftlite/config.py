"""What describes an adapter: `PeftConfig`, its kinds, the `adapter_config.json` that it is read from and written to.

A config is checked when it is made, so one that exists can be used. The file format is that of PEFT `FORMAT_VERSION`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

from peftlite.checks import check_bool, check_choice, check_text, show, wrong
from peftlite.errors import (
    AdapterFilesNotFoundError,
    CheckpointError,
    ConfigError,
    PeftliteWarning,
    UnsupportedFeatureError,
    clipped,
    nearest,
)
from peftlite.reading import open_regular, read_object
from peftlite.registry import Registry, registry

CONFIG_NAME = "adapter_config.json"
FORMAT_VERSION = "0.21.2"  # the PEFT release whose keys and values our files have

C = TypeVar("C", bound="PeftConfig")


class PeftType(str, Enum):
    """The kinds of adapter that files can name; `config_from_dict` says which of them this version has."""

    PROMPT_TUNING = "PROMPT_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    LORA = "LORA"
    ADALORA = "ADALORA"
    ADAMSS = "ADAMSS"
    BOFT = "BOFT"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    IA3 = "IA3"
    BEFT = "BEFT"
    LILY = "LILY"
    LOHA = "LOHA"
    LOKR = "LOKR"
    OFT = "OFT"
    POLY = "POLY"
    LN_TUNING = "LN_TUNING"
    VERA = "VERA"
    FROD = "FROD"
    PVERA = "PVERA"
    FOURIERFT = "FOURIERFT"
    GLORA = "GLORA"
    XLORA = "XLORA"
    HRA = "HRA"
    VBLORA = "VBLORA"
    UNILORA = "UNILORA"
    CPT = "CPT"
    MISS = "MISS"
    RANDLORA = "RANDLORA"
    ROAD = "ROAD"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    HIRA = "HIRA"
    SHIRA = "SHIRA"
    C3A = "C3A"
    WAVEFT = "WAVEFT"
    OSF = "OSF"
    DELORA = "DELORA"
    GRALORA = "GRALORA"
    CARTRIDGE = "CARTRIDGE"
    TINYLORA = "TINYLORA"
    PSOFT = "PSOFT"
    PEANUT = "PEANUT"
    SHADOW = "SHADOW"
    SUPERTUNING = "SUPERTUNING"
    DEFT = "DEFT"


class TaskType(str, Enum):
    """What the model is for; picks the wrapper class."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


@dataclasses.dataclass
class PeftConfig:
    """What every kind of adapter has in its config; the kinds add their own fields.

    Raises:
        ConfigError: a field has a value that cannot be used.
        UnsupportedFeatureError: a field asks for what this version does not have.
    """

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    kind: ClassVar[PeftType | None] = None
    """What `peft_type` must be; None in the base class only."""
    runtime_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields that say how to run here and now: never written, ignored when read."""
    ordered_fields: ClassVar[frozenset[str]] = frozenset()
    """Mappings in which the first match wins, so that a file keeps their order."""
    is_prompt_learning: ClassVar[bool] = False
    is_adaption_prompt: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.task_type is not None:
            self.task_type = TaskType(check_choice("task_type", self.task_type, [t.value for t in TaskType]))
        kinds = [self.kind.value] if self.kind else [t.value for t in PeftType]
        if self.peft_type is not None:
            self.peft_type = PeftType(check_choice("peft_type", self.peft_type, kinds))
        else:
            self.peft_type = self.kind
        if self.auto_mapping is not None and not isinstance(self.auto_mapping, dict):
            raise wrong("auto_mapping", self.auto_mapping, "a dict or None")
        self.peft_version = check_text("peft_version", self.peft_version) or FORMAT_VERSION
        base: object = self.base_model_name_or_path
        base = os.fspath(base) if isinstance(base, os.PathLike) else base
        self.base_model_name_or_path = check_text("base_model_name_or_path", base)
        self.revision = check_text("revision", self.revision)
        self.inference_mode = check_bool("inference_mode", self.inference_mode)

    def copy(self: C) -> C:
        """A deep copy: what is done to it never shows in this one."""
        return copy.deepcopy(self)

    def to_dict(self) -> dict[str, Any]:
        """The fields and copies of their values, without those that only concern this run."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in self.runtime_fields]
        return {name: copy.deepcopy(getattr(self, name)) for name in names}

    def to_json(self) -> str:
        """The text of `adapter_config.json`: keys are sorted, but where order has a meaning."""
        values = {**self.to_dict(), "peft_version": FORMAT_VERSION}
        return json.dumps({key: _plain(values[key], key in self.ordered_fields) for key in sorted(values)}, indent=2)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, auto_mapping_dict: dict[str, Any] | None = None
    ) -> None:
        """Writes `adapter_config.json` into the directory, which is made if needed; all of the file or none of it.

        `auto_mapping_dict` goes into the file in place of `auto_mapping`.
        """
        config = self if auto_mapping_dict is None else dataclasses.replace(self, auto_mapping=auto_mapping_dict)
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / CONFIG_NAME) as path:
            path.write_text(config.to_json(), encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls: type[C],
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        trust_remote_code: bool = False,
    ) -> C:
        """The config in a local directory or a hub repository, as an object of its own class.

        There is no code beside a config, so `trust_remote_code`, which libraries pass on, has no effect.

        Raises:
            AdapterFilesNotFoundError: there is no `adapter_config.json`.
            CheckpointError: the file is not a JSON object.
            ConfigError: it describes what this version cannot use, or another kind of adapter than this class.
        """
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir():
            folder = folder / subfolder if subfolder else folder
        else:
            options = HubOptions(subfolder, revision, cache_dir, token, local_files_only, force_download)
            folder = _fetch(os.fspath(pretrained_model_name_or_path), options)
        values = _read(folder)
        config = config_from_dict({"peft_type": cls.kind, **values})
        if not isinstance(config, cls):
            wanted, found = f"{cls.__name__}.from_pretrained", f"{type(config).__name__}.from_pretrained"
            raise ConfigError(
                f"`{wanted}` was asked for {folder}, which holds a `{values['peft_type']}` adapter; "
                f"call `{found}` or `PeftConfig.from_pretrained`. Nothing was changed."
            )
        return config

    @staticmethod
    def from_json_file(path_json_file: str | os.PathLike[str]) -> dict[str, Any]:
        """The values in a config file, unchecked but for their size and depth.

        Raises: AdapterFilesNotFoundError, CheckpointError.
        """
        path = Path(path_json_file)
        try:
            with open_regular(path) as file:
                return read_object(file, str(path))
        except (FileNotFoundError, NotADirectoryError) as error:
            text = f"There is no `{path.name}` in `{path.parent}`. Nothing was changed."
            raise AdapterFilesNotFoundError(text) from error
        except OSError as error:
            text = f"`{path}` cannot be read: {error.strerror or error}. Nothing was changed."
            raise CheckpointError(text) from error

    @classmethod
    def from_peft_type(cls, peft_type: PeftType | str | None = None, **fields: Any) -> PeftConfig:
        """A config of the class that belongs to `peft_type`, with these fields."""
        return config_class(cls.kind if peft_type is None else peft_type)(**fields)


def config_from_dict(values: Mapping[str, Any]) -> PeftConfig:
    """The config that the values of a file describe.

    Keys that this version does not know are ignored with a warning when they are off (None, False or empty).

    Raises:
        ConfigError: `peft_type` is missing or unknown, a key is unknown and set, or a value cannot be used.
    """
    cls = config_class(values.get("peft_type"))
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = [key for key in values if key not in known]
    asked = [key for key in unknown if not _is_off(values[key])]
    if asked:
        version = values.get("peft_version")
        writer = (
            f"PEFT `{clipped(str(version))}`" if version else "an unknown version of PEFT (it has no `peft_version`)"
        )
        first = [f"`{clipped(key)}` to {show(values[key])} (nearest: {nearest(key, known)})" for key in asked[:5]]
        listed = ", ".join([*first, *(["..."] if len(asked) > 5 else [])])
        raise ConfigError(
            f"The adapter config sets {listed}, which {cls.__name__} does not have. The file was written by {writer}; "
            f"this version reads the keys of PEFT {FORMAT_VERSION}. Nothing was changed."
        )
    ignored = sorted({*unknown, *(key for key in cls.runtime_fields if values.get(key))})
    if ignored:
        listed = ", ".join(f"`{clipped(key)}`" for key in ignored[:20])
        text = f"The adapter config has {listed}, without effect here: ignored."
        warnings.warn(text, PeftliteWarning, stacklevel=2)
    return cls(**{key: copy.deepcopy(values[key]) for key in values if key in known - cls.runtime_fields})


# -- which class belongs to which kind, and what the rooms above tell this one -----------------------------------------


class HubOptions(NamedTuple):
    """Where in a hub repository to look, and how to get there."""

    subfolder: str | None = None
    revision: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    token: str | bool | None = None
    local_files_only: bool = False
    force_download: bool = False


Fetch = Callable[[str, HubOptions], "str | os.PathLike[str]"]

_classes: Registry[type[PeftConfig]] = registry("configs")
_files: Registry[Callable[..., Any]] = registry("files")


def register_config(peft_type: PeftType, cls: type[C]) -> type[C]:
    """Makes `cls` the config class of `peft_type`."""
    _classes.register(peft_type.value, cls)
    return cls


def register_fetch(fetch: Fetch) -> None:
    """Says how a hub id becomes a local directory with `adapter_config.json`, its subfolder already entered."""
    _files.register("fetch", fetch)


def register_reader(read: Callable[[Path], dict[str, Any]]) -> None:
    """Says how the config in an adapter's directory is read, whatever state a save has left that in."""
    _files.register("read", read)


def config_class(peft_type: PeftType | str | None) -> type[PeftConfig]:
    """The config class of a kind of adapter.

    Raises:
        ConfigError: there is no such kind.
        UnsupportedFeatureError: the kind exists, but this version does not have it.
    """
    if peft_type is None:
        raise ConfigError("`peft_type` is missing: which kind of adapter is this? Nothing was changed.")
    name = peft_type.value if isinstance(peft_type, Enum) else peft_type
    kind = next((kind for kind in PeftType if kind.value == name), None)
    have = ", ".join(f"`{known}`" for known in _classes)
    if kind is None:
        near = nearest(str(peft_type), [known.value for known in PeftType])
        text = f"`peft_type` is {show(peft_type)}; nearest: {near}. This version has {have}. Nothing was changed."
        raise ConfigError(text)
    if kind.value not in _classes:
        text = (
            f"`peft_type` is `{kind.value}`, which this version does not have yet; it has {have}. Nothing was changed."
        )
        raise UnsupportedFeatureError(text)
    return _classes[kind.value]


def _read(folder: Path) -> dict[str, Any]:
    read: Callable[[Path], dict[str, Any]] = _files["read"]
    return read(folder)


def _fetch(name: str, options: HubOptions) -> Path:
    return Path(_files["fetch"](name, options))


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place when the block ends well and vanishes when it does not."""
    final = Path(path)
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # else a crash can leave the new name with an empty file
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)


def _is_off(value: object) -> bool:
    return value is None or value is False or value in ("", [], {})


def _plain(value: Any, keep_order: bool = False) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: _plain(value[key]) for key in (value if keep_order else sorted(value))}
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
