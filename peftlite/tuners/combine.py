"""`add_weighted_adapter`: a new adapter out of several that a model has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from peftlite.checks import check_choice, check_int, check_number, show, wrong
from peftlite.config import PeftType
from peftlite.core.inject import commit, plan
from peftlite.core.lifecycle import state_of
from peftlite.core.state import bias_of, check_adapter_name
from peftlite.core.transaction import atomic
from peftlite.core.tree import layers
from peftlite.errors import ConfigError, UnsupportedFeatureError, warn
from peftlite.tuners.lora.combine import SUMS, TYPES, Recipe
from peftlite.tuners.lora.lowrank import Approximation
from peftlite.tuners.lora.weighted import combine

MAJORITIES = ("total", "frequency")


@atomic
def add_weighted_adapter(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    *,
    seed: int | torch.Generator | None = None,
) -> Approximation:
    """Add a combination of LoRA or (IA)^3 adapters, which is exact unless `svd_rank` is given.

    For LoRA the result is about the updates of the weights, D_i = scaling_i B_i A_i, whatever the adapters' ranks and
    scalings: their weighted sum, or what TIES, DARE or pruning make of their entries. One adapter with weight 1 is
    copied bit for bit. The scales of (IA)^3 are summed. The new adapter is not active.

    Args:
        model: any model with adapters, wrapped or not.
        adapters: which to combine.
        weights: one for each; negative ones subtract.
        adapter_name: what to call the new one.
        combination_type: "linear", "cat", "svd": the weighted sum ("svd" with no more rows than the weight has);
            "magnitude_prune", "dare_linear", "ties", "dare_ties": with entries left out, for which `density` is needed.
            These have no low rank, so that without `svd_rank` the new adapter is as large as the weights themselves.
            The forms with `_svd` mean the same.
        svd_rank: the largest rank that the new adapter may have.
        svd_clamp: limit the entries of the new factors to this quantile of them.
        svd_full_matrices: the result does not depend on it.
        svd_driver: which algorithm CUDA is to use.
        density: the share of entries that are kept, above 0 and not above 1.
        majority_sign_method: "total" or "frequency": what decides on the sign in TIES.
        seed: for DARE's random numbers; those of torch's global generator without it.

    Returns: the new adapter's ranks, and its error relative to the exact combination (see `Approximation`).

    Raises:
        AdapterNameError: an adapter is unknown, or the new name is taken or not allowed.
        ConfigError: an argument cannot be used, or the adapters cannot be combined.
        NoAdapterError, StateError: as for every call.

    Example:
        >>> import peftlite
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> for name, r in (("a", 2), ("b", 3)):
        ...     plan = peftlite.inject(model, peftlite.LoraConfig(r=r, target_modules=["0"]), name)
        >>> peftlite.add_weighted_adapter(model, ["a", "b"], [1.0, -0.5], "sum", "linear").ranks
        {'0': 5}
    """
    state = state_of(model)
    names = tuple(adapters)
    state.checked(names)
    check_adapter_name(adapter_name, state.configs)
    factors = checked_weights(names, weights)
    kind = check_choice("combination_type", combination_type, TYPES).removesuffix("_svd")
    method = checked_method([state.configs[name] for name in names], names)
    if method == PeftType.IA3.value:
        return combine_ia3(model, names, factors, adapter_name)
    if method != PeftType.LORA.value:
        raise UnsupportedFeatureError(
            f"Adapters of the kind `{method}` cannot be combined; those of `LORA` and `IA3` can, and `convert_to_lora` "
            "makes LoRA adapters of others. Nothing was changed."
        )
    recipe = Recipe(
        kind,
        factors,
        None if svd_rank is None else check_int("svd_rank", svd_rank, 1),
        None if svd_clamp is None else checked_share("svd_clamp", svd_clamp),
        svd_driver,
        1.0 if kind in SUMS else checked_share("density", density),
        check_choice("majority_sign_method", majority_sign_method, MAJORITIES),
        generator_of(seed),
    )
    approximation, full = combine(model, names, adapter_name, recipe)
    if full:
        warn(
            f"`combination_type={combination_type!r}` has no exact result of low rank: on {full} layers the rank of "
            f"the new adapter is that of the weights, up to {max(approximation.ranks.values())}. `svd_rank` limits it."
        )
    return approximation


def checked_weights(names: Sequence[str], weights: Sequence[float]) -> tuple[float, ...]:
    """One finite number for each name, of at least one.

    Raises: ConfigError.
    """
    found = tuple(weights)
    if not names or len(names) != len(found):
        raise ConfigError(
            f"`adapters` has {len(names)} entries and `weights` {len(found)}: there must be one weight for each "
            "adapter, and at least one adapter. Nothing was changed."
        )
    return tuple(float(check_number(f"weights[{at}]", weight)) for at, weight in enumerate(found))


def checked_method(configs: Sequence[Any], names: Sequence[str]) -> str:
    """The kind of all of these adapters.

    Raises: ConfigError if they are of several kinds, or train biases of the base model.
    """
    kinds = {name: str(getattr(c.peft_type, "value", c.peft_type)) for name, c in zip(names, configs, strict=True)}
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"`{name}` is `{kind}`" for name, kind in kinds.items())
        raise ConfigError(f"Adapters of several kinds cannot be combined: {listed}. Nothing was changed.")
    for name, config in zip(names, configs, strict=True):
        if bias_of(config) != "none":
            raise ConfigError(
                f"Adapter `{name}` has `bias={bias_of(config)!r}`: it trains biases of the base model, of which there "
                "is one set only, so that it cannot be combined. Nothing was changed."
            )
    return kinds[names[0]]


def checked_share(field: str, value: object) -> float:
    """A number above 0 and not above 1.

    Raises: ConfigError.
    """
    if value is None or not 0 < (share := check_number(field, value)) <= 1:
        raise wrong(field, value, "a number above 0 and not above 1")
    return float(share)


def generator_of(seed: int | torch.Generator | None) -> torch.Generator | None:
    """A generator on the CPU that begins with this seed; None for torch's global one."""
    if seed is None or isinstance(seed, torch.Generator):
        return seed
    return torch.Generator().manual_seed(seed)


def combine_ia3(model: nn.Module, names: Sequence[str], weights: Sequence[float], adapter_name: str) -> Approximation:
    """Add an (IA)^3 adapter whose scales are the weighted sum of those of others.

    Raises: ConfigError if they are not on the same layers, or have modules trained whole.
    """
    configs: Any = [state_of(model).configs[name] for name in names]
    for name, config in zip(names, configs, strict=True):
        if config.modules_to_save:
            raise ConfigError(
                f"Adapter `{name}` has `modules_to_save={show(config.modules_to_save)}`, and (IA)^3 adapters with such "
                "modules cannot be combined. Nothing was changed."
            )
    for layer in layers(model):
        present = [name for name in names if name in layer.variants]
        forms = {bool(layer.is_feedforward[name]) for name in present}
        if (present and len(present) < len(names)) or len(forms) > 1:
            raise ConfigError(
                f"{' and '.join(f'`{name}`' for name in names)} do not scale the same inputs and outputs: their scales "
                "have no sum. Nothing was changed."
            )
    planned = plan(model, configs[0], adapter_name, unmatched="ignore")
    built = planned.build(on_meta=True)
    for site, values in zip(planned.sites, built, strict=True):
        held: Any = site.layer
        scales = [weight * held.ia3_l[name].detach() for name, weight in zip(names, weights, strict=True)]
        values["ia3_l"] = nn.Parameter(torch.stack(scales).sum(0), requires_grad=False)
    commit(planned, built, trainable=not planned.config.inference_mode)
    return Approximation({site.path: 0 for site in planned.sites}, {site.path: 0.0 for site in planned.sites}, 0.0)
