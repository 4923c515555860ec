"""Adding the combination of LoRA adapters to their model: everything is made first, and then attached."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftlite.checks import show
from peftlite.core.hosts import ParamHost
from peftlite.core.inject import commit, plan
from peftlite.core.layer import AdapterLayer
from peftlite.core.lifecycle import state_of
from peftlite.core.slots import fill_in
from peftlite.core.variant import COMPANIONS
from peftlite.errors import ConfigError
from peftlite.tuners.lora.combine import Made, Recipe, Update, combined
from peftlite.tuners.lora.config import LoraConfig
from peftlite.tuners.lora.fit import adapted, addressed, fitted, plain_of
from peftlite.tuners.lora.frugal import Blocks, Pooled
from peftlite.tuners.lora.lowrank import Approximation, Part, norm
from peftlite.tuners.lora.plain import Lora
from peftlite.tuners.lora.stacks import stored, times
from peftlite.tuners.lora.start import Mica, Shifted
from peftlite.tuners.lora.variant import LORA

PRODUCTS = (Lora, Shifted, Mica, Blocks, Pooled)
"""Variants whose effect is scaling * B A, and nothing else."""


@dataclass(frozen=True)
class Sources:
    """The adapters to combine, and the layers that any of them is on."""

    names: tuple[str, ...]
    configs: tuple[LoraConfig, ...]
    low_rank: Mapping[str, AdapterLayer]
    """Layers with LoRA's factors, by path."""
    whole: Mapping[str, AdapterLayer]
    """Layers of companions: modules that are trained whole."""

    @classmethod
    def of(cls, model: nn.Module, names: Sequence[str]) -> Sources:
        """Of a model that has these adapters."""
        configs: Any = state_of(model).configs
        found = {path: layer for path, layer in adapted(model) if any(name in layer.variants for name in names)}
        return cls(
            tuple(names),
            tuple(configs[name] for name in names),
            {path: layer for path, layer in found.items() if layer.tuner is LORA},
            {path: layer for path, layer in found.items() if layer.tuner is not LORA},
        )

    def on(self, layer: AdapterLayer) -> list[str]:
        """Those of the adapters that a layer has, each once."""
        return [name for name in dict.fromkeys(self.names) if name in layer.variants]

    def check(self) -> None:
        """Refuse what has no sum: two modules for one place, and effects that are no product.

        Raises: ConfigError.
        """
        for path, layer in self.whole.items():
            if len(owners := self.on(layer)) > 1:
                raise ConfigError(
                    f"Adapters {' and '.join(f'`{name}`' for name in owners)} have a module of their own for `{path}`: "
                    "of those (`modules_to_save`, `trainable_token_indices`) a combination can take one. Nothing was "
                    "changed."
                )
        for path, layer in self.low_rank.items():
            for name in self.on(layer):
                kind = type(layer.variants[name])
                if kind not in PRODUCTS:
                    raise ConfigError(
                        f"Adapter `{name}` is {kind.__name__} on `{path}`, whose effect is no sum of products: it can "
                        "only be combined alone, with weight 1 and without a lower `svd_rank`. Nothing was changed."
                    )


def combine(model: nn.Module, names: Sequence[str], adapter_name: str, recipe: Recipe) -> tuple[Approximation, int]:
    """Add the combination; gives how exact it is, and on how many layers it is as large as a full weight.

    Raises: ConfigError, and what `plan` raises; nothing is changed then.
    """
    sources = Sources.of(model, names)
    ranks = [layer.r[name] for layer in sources.low_rank.values() for name in sources.on(layer)]
    if recipe.copies(len(names), max(ranks)):
        [name], [config] = names, sources.configs
        same = fitted(config, {p: (layer.r[name], float(layer.scaling[name])) for p, layer in sources.low_rank.items()})
        add(model, same, adapter_name, sources, {})
        updates = {path: Update.of(layer, name) for path, layer in sources.low_rank.items()}
        parts = {
            path: Part(layer.r[name], 0.0, abs(updates[path].scaling) * norm(updates[path].product))
            for path, layer in sources.low_rank.items()
        }
        return Approximation.of(parts), 0
    sources.check()
    made = {path: combination(layer, sources, recipe) for path, layer in sources.low_rank.items()}
    add(model, config_of(model, sources, made), adapter_name, sources, made)
    return Approximation.of({path: m.part for path, m in made.items()}), sum(m.full for m in made.values())


@torch.no_grad()
def combination(layer: AdapterLayer, sources: Sources, recipe: Recipe) -> Made:
    """What the recipe makes of the adapters that a layer has."""
    present = [
        (name, weight) for name, weight in zip(sources.names, recipe.weights, strict=True) if name in layer.variants
    ]
    updates = [Update.of(layer, name) for name, _ in present]
    return combined(updates, [weight for _, weight in present], recipe, times(layer.host))


# ---- the config
def config_of(model: nn.Module, sources: Sources, made: Mapping[str, Made]) -> LoraConfig:
    """The config of the combination: the first adapter's, with the targets of all and the ranks that came out."""
    first = sources.configs[0]
    on_parameters = any(isinstance(layer.host, ParamHost) for layer in sources.low_rank.values())
    plain = plain_of(
        first,
        **union_of_companions(sources),
        lora_bias=any(m.update.bias is not None for m in made.values()),
        lora_dropout=0.0 if on_parameters else first.lora_dropout,
        use_rslora=first.use_rslora and len(sources.names) == 1,
    )
    numbers = {path: (m.part.rank, m.update.scaling) for path, m in made.items()}
    return fitted(addressed(plain, model, list(sources.low_rank)), numbers)


def union_of_companions(sources: Sources) -> dict[str, Any]:
    """The config fields that name modules trained whole, with what any adapter has there.

    Raises: ConfigError for values that cannot be joined.
    """
    joined: dict[str, Any] = {}
    for field in dict.fromkeys(companion.field for companion in COMPANIONS.values()):
        values = [value for config in sources.configs if (value := getattr(config, field)) is not None]
        if all(value == values[0] for value in values):
            joined[field] = copy.deepcopy(values[0]) if values else None
        elif all(isinstance(value, list) for value in values):
            joined[field] = list(dict.fromkeys(entry for value in values for entry in value))
        else:
            raise ConfigError(
                f"`{field}` is {' and '.join(map(show, values))}: these cannot be joined. Nothing was changed."
            )
    return joined


# ---- the adapter
def add(model: nn.Module, config: LoraConfig, name: str, sources: Sources, made: Mapping[str, Made]) -> None:
    """Attach what was made, and copies of the adapters' own tensors where nothing was."""
    planned = plan(model, config, name, unmatched="ignore")
    paths = {id(layer): path for path, layer in (*sources.low_rank.items(), *sources.whole.items())}
    built = planned.build(on_meta=True)
    for at, site in enumerate(planned.sites):
        layer: Any = site.layer
        path = paths[id(layer)]
        if path in made:
            fill(built[at], layer, made[path].update)
        else:
            built[at] = copied(layer, sources.on(layer)[0])
    commit(planned, built, trainable=not config.inference_mode)


def fill(values: dict[str, Any], layer: AdapterLayer, update: Update) -> None:
    """Give the new slots' tensors the numbers of an update."""
    tensors: dict[str, Tensor] = stored(layer.host, update.product)
    bias = update.bias
    if "lora_B" in values and bias is None:
        B = tensors["lora_B.weight"]
        bias = B.new_zeros(len(B))
    if bias is not None:
        tensors["lora_B.bias"] = bias
    fill_in(layer.tuner.slots, values, {suffix: tensor.contiguous() for suffix, tensor in tensors.items()})


def copied(layer: AdapterLayer, name: str) -> dict[str, Any]:
    """Everything that an adapter has on a layer, as copies."""
    values: dict[str, Any] = {}
    for slot in layer.tuner.slots:
        container = layer.container(slot.name)
        if name in container:
            values[slot.name] = copy.deepcopy(container[name])
    return values | {number: copy.deepcopy(layer.__dict__[number][name]) for number in layer.tuner.numbers}
