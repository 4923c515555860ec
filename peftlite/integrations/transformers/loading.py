"""`model.load_adapter`, with transformers' arguments and our checks: all of an adapter is loaded, or nothing."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

from peftlite.checkpoint import adapters
from peftlite.checkpoint.hub import HubOptions
from peftlite.checkpoint.keys import with_prefix
from peftlite.checkpoint.report import LoadReport, Strict
from peftlite.checkpoint.tensorfile import MemoryTensors
from peftlite.config import PeftConfig, config_from_dict
from peftlite.core import lifecycle
from peftlite.core.modes import evaluate
from peftlite.core.transaction import atomic
from peftlite.core.tree import find_state
from peftlite.errors import AdapterNameError, ConfigError, UnsupportedFeatureError, nearest, warn
from peftlite.integrations.transformers.owners import check_not_ours, is_foreign, is_foreign_config

NOT_OURS = ("tqdm_class", "key_mapping")
"""What transformers' own calls pass along that says nothing about an adapter."""


@dataclass(frozen=True)
class Request:
    """What a call of `load_adapter` asks for."""

    source: str | os.PathLike[str] | None
    name: str
    config: PeftConfig | None
    tensors: Mapping[str, Tensor] | None
    trainable: bool
    hotswap: bool | str
    strict: Strict
    mmap: bool
    options: HubOptions

    @classmethod
    def of(cls, given: Mapping[str, Any], *, strict: Strict = True) -> Request:
        """The request of a call with these arguments, by name; `strict`, unless they say that shapes may differ.

        Raises: ConfigError for arguments that do not go together or that nobody knows.
        """
        extra: Mapping[str, Any] = given.get("kwargs", {})
        base = given.get("load_config")  # of the base model, when this is part of a `from_pretrained`
        config = given.get("peft_config")
        any_shape = extra.get("ignore_mismatched_sizes") or getattr(base, "ignore_mismatched_sizes", False)
        request = cls(
            source=given.get("peft_model_id")
            or extra.get("pretrained_model_name_or_path")
            or getattr(base, "pretrained_model_name_or_path", None),
            name=given.get("adapter_name") or "default",
            config=config_from_dict(config) if isinstance(config, Mapping) else config,
            tensors=given.get("adapter_state_dict"),
            trainable=bool(given.get("is_trainable", False)),
            hotswap=given.get("hotswap", "auto"),
            strict=False if any_shape else strict,
            mmap=bool(extra.get("mmap", False)),
            options=hub_options(given, extra, base),
        )
        if request.source is None and (request.config is None or request.tensors is None):
            raise ConfigError(
                "`load_adapter` needs `peft_model_id`, or both `peft_config` and `adapter_state_dict`. "
                "Nothing was changed."
            )
        return request


def hub_options(given: Mapping[str, Any], extra: Mapping[str, Any], base: Any) -> HubOptions:
    """Where to look on the hub. What says where a base model's tensors go has no effect: adapters follow their layers.

    Raises: ConfigError for an argument that nobody knows.
    """
    known = set(HubOptions._fields)
    check_known(extra, known | {"mmap"})
    named: dict[str, Any] = {**(getattr(base, "download_kwargs", None) or {}), **(extra.get("download_kwargs") or {})}
    if named.get("revision") is not None:
        named["revision"] = str(named["revision"])  # may know a commit too, and that is one of the base model's
    named.update(given.get("adapter_kwargs") or {})
    named.update((key, value) for key, value in extra.items() if key in known)
    named.update((key, given[key]) for key in known if given.get(key))
    own = {key: value for key, value in named.items() if not key.startswith("_") and key not in NOT_OURS}
    return HubOptions.from_kwargs(own)


def check_known(extra: Mapping[str, Any], known: set[str]) -> None:
    """Refuse an argument that neither we nor transformers has.

    Raises: ConfigError.
    """
    try:
        from transformers.modeling_utils import LoadStateDictConfig
    except ImportError:
        return  # a transformers without it names all its arguments
    theirs = {field.name for field in fields(LoadStateDictConfig)}
    for key in extra:
        if key not in known | theirs:
            raise ConfigError(
                f"`{key}` is not an argument of `load_adapter`; nearest: {nearest(key, known | theirs)}. "
                "Nothing was changed."
            )


@atomic
def load(model: nn.Module, request: Request) -> LoadReport:
    """Load an adapter and make it the active one, as transformers does; a frozen one leaves the model in eval mode.

    Raises: what `peftlite.load_adapter` raises, and AdapterNameError for a name that is taken.
    """
    new = check_name(model, request)
    if request.tensors is None and request.source is not None:
        report = adapters.load_adapter(
            model,
            request.source,
            request.name,
            is_trainable=request.trainable,
            config=request.config,
            strict=request.strict,
            mmap=request.mmap,
            hub=request.options,
        )
    else:
        report = load_tensors(model, request)
    if new:
        lifecycle.set_adapter(model, request.name)
        if not request.trainable:
            evaluate(model)
    return report


def check_name(model: nn.Module, request: Request) -> bool:
    """Whether the adapter is a new one, after checking that it must not be or has to be.

    Raises: AdapterNameError.
    """
    state = find_state(model)
    names = tuple(state.configs) if state is not None else ()
    enabled = getattr(model, "_hotswap_enabled", False)
    swap = (enabled and request.name in names) if request.hotswap == "auto" else bool(request.hotswap)
    if swap and request.name not in names:
        raise AdapterNameError(
            f"`hotswap=True` replaces the tensors of an adapter, and there is none called `{request.name}`; nearest: "
            f"{nearest(request.name, names)}. Nothing was changed."
        )
    if request.name in names and not swap:
        raise AdapterNameError(
            f"There already is an adapter `{request.name}`: give this one another `adapter_name`, or replace the "
            "tensors of that one with `hotswap=True`. Nothing was changed."
        )
    return not swap


def load_tensors(model: nn.Module, request: Request) -> LoadReport:
    """Add an adapter with a config and tensors that are in memory already."""
    if request.config is None or request.tensors is None:
        raise ConfigError("`adapter_state_dict` needs `peft_config`. Nothing was changed.")
    if request.mmap:
        raise ConfigError("`mmap` is about files, and `adapter_state_dict` is in memory. Nothing was changed.")
    config = request.config.copy()
    config.inference_mode = not request.trainable
    tensors = MemoryTensors({with_prefix(key): tensor for key, tensor in request.tensors.items()})
    what = f"The state dict for {type(model).__name__}"
    loader = adapters.Loader(model, request.name, config, tensors, what, request.strict)
    state = find_state(model)
    if state is not None and request.name in state.configs:
        return loader.overwrite(request.trainable)
    return loader.add(request.trainable, True, None)


def loading_info(report: LoadReport) -> Any:
    """A report as transformers gives it back; ours where it has none."""
    try:
        from transformers.utils.loading_report import LoadStateDictInfo
    except ImportError:
        return report
    values: dict[str, Any] = {
        "missing_keys": set(report.missing_keys),
        "unexpected_keys": set(report.unexpected_keys),
        "mismatched_keys": {(misfit.key, misfit.found, misfit.wanted) for misfit in report.mismatched_keys},
        "error_msgs": [],
        "conversion_errors": {},
    }
    return LoadStateDictInfo(**{field.name: values.get(field.name, set()) for field in fields(LoadStateDictInfo)})


def loading(original: Callable[..., Any]) -> Callable[..., Any]:
    """`PreTrainedModel.load_adapter` that loads peftlite's adapters."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load_adapter(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        config = given.get("peft_config")
        if is_foreign(self):
            return original(self, *args, **kwargs)
        if is_foreign_config(config):
            check_not_ours(self)
            return original(self, *args, **kwargs)
        try:
            return loading_info(load(self, Request.of(given)))
        except UnsupportedFeatureError as error:
            if find_state(self) is not None or config is not None or not has_peft():
                raise
            warn(f"{error} transformers loads it with `peft` instead.")
            return original(self, *args, **kwargs)

    return load_adapter


def has_peft() -> bool:
    """Whether transformers can use real `peft`, which peftlite may be standing in for."""
    from transformers.utils.import_utils import is_peft_available

    stands_in = getattr(sys.modules.get("peft"), "__peftlite__", False)
    return not stands_in and bool(is_peft_available())
