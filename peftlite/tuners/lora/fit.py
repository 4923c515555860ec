"""The config that says what an adapter is: from layers, ranks and scalings back to targets and patterns."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from peftlite.config import PeftConfig
from peftlite.core.found import Found
from peftlite.core.inject import choose_parameters
from peftlite.core.layer import AdapterLayer
from peftlite.core.targets import TargetSpec, match_pattern, select
from peftlite.core.tree import base_model_of, places
from peftlite.tuners.lora.config import LoraConfig

N = TypeVar("N", int, float)


def adapted(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
    """(path, or path of the parameter; adapter layer), each layer once, by the paths that plans and configs use."""
    seen: set[int] = set()
    for place in places(base_model_of(model), inside_layers=True):
        module: nn.Module = place.module
        while isinstance(module, AdapterLayer) and id(module) not in seen:
            seen.add(id(module))
            yield place.path if module.param is None else f"{place.path}.{module.param}", module
            module = module.wrapped


KEPT = (
    "task_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "target_parameters",
    "modules_to_save",
    "trainable_token_indices",
    "ensure_weight_tying",
    "layer_replication",
    "fan_in_fan_out",
    "lora_dropout",
    "runtime_config",
)
"""What plain LoRA takes over from the config of a variant, or of another method."""


def plain_of(config: PeftConfig, **changes: Any) -> LoraConfig:
    """A config of plain LoRA for the same layers, with these changes; its rank and scaling are yet to be `fitted`."""
    values = config.to_dict()
    kept = {name: values[name] for name in KEPT if name in values}
    return LoraConfig(**{**kept, **changes})


# ---- which layers
def addressed(config: LoraConfig, model: nn.Module, paths: Sequence[str]) -> LoraConfig:
    """A copy of `config` that targets exactly these modules and parameters of the model's base.

    What the config says already is kept where it means the same; else names, else whole paths.
    """
    found = Found.of(base_model_of(model))
    modules = [path for path in paths if path in found.places]
    parameters = sorted(path for path in paths if path not in found.places and path not in found.inside)
    wanted = {id(found.at(path).module) for path in modules}
    for candidate in _candidates(config, modules, parameters):
        chosen = select(found.places, TargetSpec.from_config(candidate)).targets
        same = {id(found.at(path).module) for path in chosen} == wanted
        if same and sorted(choose_parameters(candidate, found).targets) == parameters:
            break
    return candidate


def _candidates(config: LoraConfig, modules: Sequence[str], parameters: Sequence[str]) -> Iterator[LoraConfig]:
    if config.target_modules is not None:
        yield config.copy()
    plain = replace(
        config.copy(),
        target_modules=sorted({path.rpartition(".")[2] for path in modules}),
        target_parameters=list(parameters) or None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )
    yield plain
    yield replace(plain, target_modules=sorted(modules))
    yield replace(plain, target_modules="|".join(map(re.escape, sorted(modules))))


# ---- how they are adapted
def fitted(config: LoraConfig, numbers: Mapping[str, tuple[int, float]]) -> LoraConfig:
    """A copy of `config` that says of each path this rank and this scaling; unchanged if it does already."""
    if all((config.rank_for(path), config.scaling_for(path)) == number for path, number in numbers.items()):
        return config.copy()
    ranks = {path: r for path, (r, _) in numbers.items()}
    for rslora in (True, False) if config.use_rslora else (False,):
        alphas = {path: _alpha(r, scaling, rslora) for path, (r, scaling) in numbers.items()}
        exact = {path: alpha for path, alpha in alphas.items() if alpha is not None}
        if len(exact) == len(alphas):
            break
    nearest = {path: exact.get(path, scaling * r) for path, (r, scaling) in numbers.items()}
    plain = replace(config.copy(), use_rslora=rslora)
    r, rank_pattern = _pattern(ranks)
    alpha, alpha_pattern = _pattern(nearest)
    return replace(plain, r=r, rank_pattern=rank_pattern, lora_alpha=alpha, alpha_pattern=alpha_pattern)


def _alpha(r: int, scaling: float, rslora: bool) -> float | None:
    """The alpha that gives exactly this scaling, if there is one; an int where it can be."""
    by = math.sqrt(r) if rslora else r
    near = scaling * by
    choices = (round(near), near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    return next((alpha for alpha in choices if alpha / by == scaling), None)


def _pattern(values: Mapping[str, N]) -> tuple[N, dict[str, N]]:
    """The commonest value, and the others by the last names of their paths, or by whole paths."""
    common = Counter(values.values()).most_common(1)[0][0]
    others = {path: value for path, value in values.items() if value != common}
    for name_of in (lambda path: path.rpartition(".")[2], str):
        pattern = {name_of(path): value for path, value in others.items()}
        if all(_said(pattern, common, path) == value for path, value in values.items()):
            return common, pattern
    return common, {f"^{re.escape(path)}": value for path, value in others.items()}


def _said(pattern: Mapping[str, N], common: N, path: str) -> N:
    key = match_pattern(pattern, path)
    return common if key is None else pattern[key]
