"""Weights that several modules share: which adapters are theirs together, and what a merge does to them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from peftlite.config import PeftConfig
from peftlite.core.hosts import EmbeddingHost, Host, is_borrowed
from peftlite.core.layer import AdapterLayer
from peftlite.core.plan import Site
from peftlite.core.transaction import put
from peftlite.core.tree import base_model_of, find_state, layers, named_layers, places
from peftlite.core.variant import TunerSpec
from peftlite.errors import ConfigError, warn

Make = Callable[[TunerSpec, list[str]], list[Site]]


# ---- in the plan
def tied_sites(
    sites: Sequence[Site], config: PeftConfig, sharers: Callable[[Host], list[str]], make: Make
) -> list[Site]:
    """`sites`, and one for every other module that shares a weight with one of them; all of a weight are one adapter.

    Without `ensure_weight_tying`, that holds for rows of tables alone (`few_rows`).

    sharers: the paths of all modules that have a host's weight; make: the sites for paths.

    Raises: ConfigError where one adapter cannot be on all of them.
    """
    result = {site.path: site for site in sites}
    found, everything = False, bool(vars(config).get("ensure_weight_tying"))
    for site in sites:
        if not everything and not (site.tuner.few_rows and isinstance(site.host, EmbeddingHost)):
            continue
        paths = [] if site.param is not None else sharers(site.host)
        if len(paths) < 2 or result[site.path].leader is not None:
            continue
        found = True
        new = [path for path in paths if path not in result]
        result.update((made.path, made) for made in make(site.tuner, new) if new)
        group = [result[path] for path in paths]
        leader = next((member for member in group if isinstance(member.host, EmbeddingHost)), group[0])
        for member in group:
            if member is not leader:
                check_follows(member, leader, config)
                result[member.path] = member._replace(leader=leader.path, parameters=0)
    if everything and not found:
        warn(
            "`ensure_weight_tying` is `True`, and no module that the config names shares its weight with another: it "
            "has no effect."
        )
    return list(result.values())


def check_follows(site: Site, leader: Site, config: PeftConfig) -> None:
    """Refuse what cannot be one adapter.

    Raises: ConfigError.
    """
    reason: str | None = f"one gets a {leader.tuner.peft_type} adapter and the other a {site.tuner.peft_type} one"
    if site.tuner is leader.tuner:
        reason = site.variant.why_not_follow(site.host, leader.host, config, (site.path, leader.path))
    if reason is not None:
        raise ConfigError(
            f"`{leader.path}` and `{site.path}` share their weight and cannot have one adapter, which "
            f"`{'trainable_token_indices' if leader.tuner.few_rows else 'ensure_weight_tying'}` asks for: {reason}. "
            "Nothing was changed."
        )


# ---- when merging
class Use(NamedTuple):
    """A module that has a parameter, or that will have it back when adapters are unmerged."""

    path: str
    """The module's, or its adapter layer's."""
    module: nn.Module
    name: str
    parameter: nn.Parameter
    """Held, so that no other is taken for it."""

    @property
    def present(self) -> nn.Parameter | None:
        """The parameter that is there now."""
        return self.module._parameters.get(self.name)


def uses_of(model: nn.Module) -> dict[int, list[Use]]:
    """The uses of every parameter, by its id; a module in several places counts once."""
    found: dict[int, list[Use]] = {}
    seen: set[int] = set()
    for place in places(base_model_of(model), inside_layers=True):
        module = place.module
        if id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, AdapterLayer):
            if module._saved is not None and module._saved.shared:
                own = module._saved.weight
                found.setdefault(id(own), []).append(Use(place.path, module.get_base_layer(), module.host.param, own))
            continue
        inside = isinstance(place.parent, AdapterLayer)
        path = place.path.rpartition(".")[0] if inside else place.path
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append(Use(path, module, name, parameter))
    return found


def note_shared(model: nn.Module) -> dict[int, list[Use]]:
    """Tell every layer that keeps no other bytes whether its weight is shared now; gives who has which."""
    uses = uses_of(model)
    for layer in layers(model):
        if layer._saved is None:
            own = [tensor for tensor in (layer.host.parameter, layer.host.bias) if tensor is not None]
            shared = any(len(uses.get(id(one), ())) > 1 or is_borrowed(one) for one in own)
            put(layer.__dict__, "shared_weight", shared)
    return uses


def untied(
    model: nn.Module, changed: Collection[AdapterLayer], before: Mapping[int, list[Use]]
) -> dict[str, list[str]]:
    """Which of these layers, now that they are merged, share their weight no more, and with whom they did.

    before: who had which parameter.
    """
    state = find_state(model)
    replicas = None if state is None else state.replicas
    sharers = {(use.path, use.name): uses for uses in before.values() if len(uses) > 1 for use in uses}
    apart: dict[str, list[str]] = {}
    for path, layer in named_layers(model):
        if layer in changed:
            others = [use for use in sharers.get((path, layer.host.param), ()) if use.path != path]
            others = [use for use in others if replicas is None or not replicas.apart(path, use.path)]
            unlike = [use.path for use in others if use.present is not layer.host.parameter]
            apart.update({path: unlike} if unlike else {})
    return apart


def warn_of_untying(apart: Mapping[str, Sequence[str]], for_good: bool) -> None:
    """Say so."""
    if not apart:
        return
    pairs = [f"`{path}` with {', '.join(f'`{one}`' for one in others)}" for path, others in apart.items()]
    until = "" if for_good else " until it is unmerged"
    warn(
        f"A weight was shared ({'; '.join(pairs)}); each layer that adapters were merged into has one of its own now"
        f"{until}. A config with `ensure_weight_tying=True` puts one adapter on all of them."
    )
