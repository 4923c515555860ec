"""Where both shapes meet: `plan` says what adding an adapter would do; `inject` does exactly that."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from peftlite.config import PeftConfig
from peftlite.core.binding import activate, rebind, sync
from peftlite.core.facts import ModelFacts, facts_of
from peftlite.core.found import Found, Wanted, innermost
from peftlite.core.fused import have_called
from peftlite.core.hosts import Host, LinearHost, ModuleHost, host_for, known_kinds
from peftlite.core.inputs import observe
from peftlite.core.layer import AdapterLayer
from peftlite.core.outputs import attach
from peftlite.core.plan import InjectionPlan, Site
from peftlite.core.replicas import Replicas, replicas_for
from peftlite.core.slots import NEW_WEIGHT
from peftlite.core.state import AdapterState, check_adapter_name, check_bias_owner, freeze
from peftlite.core.targets import (
    Selection,
    TargetSpec,
    Unmatched,
    UnmatchedPolicy,
    complain,
    is_all_linear,
    match_pattern,
    report,
    select,
    ways_to_name,
)
from peftlite.core.ties import tied_sites
from peftlite.core.transaction import atomic, put, unnoted
from peftlite.core.tree import base_model_of, check_one_state, find_state, layers
from peftlite.core.variant import COMPANIONS, INPUTS, Companion, TunerSpec, tuner_for
from peftlite.errors import ConfigError, StateError, TargetNotFoundError, UnsupportedLayerError, clipped


# ---- plan
def plan(
    model: nn.Module,
    config: PeftConfig,
    adapter_name: str = "default",
    *,
    unmatched: UnmatchedPolicy = "error",
    autocast_adapter_dtype: bool = True,
) -> InjectionPlan:
    """What adding an adapter would do, printable as a table; changes nothing and works on the meta device.

    Raises: AdapterNameError, ConfigError, StateError, TargetNotFoundError, UnsupportedLayerError.
    """
    check_config(config)
    base = base_model_of(model)
    check_one_state(base)
    state = find_state(base)
    check_adapter_name(adapter_name, state.configs if state is not None else ())
    tuner = tuner_for(config)
    config = config.copy()
    if state is not None:
        check_bias_owner(state, config)
    facts = facts_of(base)
    config.base_model_name_or_path = config.base_model_name_or_path or facts.name_or_path
    replicas = replicas_to_make(base, config, state, facts)
    found = Found.of(base, replicas or (None if state is None else state.replicas))
    selection = choose(base, config, found, facts)
    parameters = choose_parameters(config, found)
    companions = [(one, choose_companion(one, config, found, facts, selection)) for one in COMPANIONS.values()]
    missing = joint_unmatched(selection, parameters, heads_of(config))
    missing += tuple(entry for _, chosen in companions for entry in chosen.unmatched)
    complain(selection._replace(unmatched=missing), unmatched, type(base).__name__, stacklevel=3)
    if not selection.targets and not parameters.targets:
        raise TargetNotFoundError(
            f"`target_modules={clipped(repr(config.to_dict().get('target_modules')))}` matches no module of "
            f"{type(base).__name__}.\n"
            f"{report(missing, type(base).__name__)}\nNothing was changed."
        )
    wanted = [(path, None) for path in selection.targets] + [found.split(path) for path in parameters.targets]
    sites = make_sites(found, with_inner(found, wanted), tuner, config)
    for companion, chosen in companions:
        sites += make_sites(found, [(path, None) for path in chosen.targets], companion.tuner, config)
    check_once(sites)
    sites = tied_sites(sites, config, found.sharers, partial(make_module_sites, found, config))
    complete(config, tuner, sites, selection, list(found.places))
    return InjectionPlan(base, config, adapter_name, tuple(sites), autocast_adapter_dtype, replicas)


def replicas_to_make(
    base: nn.Module, config: PeftConfig, state: AdapterState | None, facts: ModelFacts
) -> Replicas | None:
    """The longer stack of layers that a config asks for, if the model does not have it yet; attaches nothing.

    Raises: ConfigError, StateError.
    """
    present = None if state is None else state.replicas
    asked = state is None and vars(config).get("layer_replication")
    stack = facts.stack() if asked and facts.stack is not None else None
    return replicas_for(config, present, state is None, stack, type(base).__name__)


def check_config(config: object) -> None:
    """Refuse what is no config of ours: another library's, or the arguments in another order.

    Raises: ConfigError.
    """
    if not isinstance(config, PeftConfig):
        kind = f"{type(config).__module__}.{type(config).__qualname__}"
        raise ConfigError(
            f"The config is a `{kind}`; it must be one of peftlite, such as `peftlite.LoraConfig`. Nothing was changed."
        )


def choose(base: nn.Module, config: PeftConfig, found: Found, facts: ModelFacts) -> Selection:
    """Which modules the config means, task heads included."""
    values: Any = config
    if vars(config).get("target_modules") is None and vars(config).get("target_parameters"):
        values.target_modules = []
    if facts.default_targets is not None:
        facts.default_targets(config)
    present = sorted(
        {head for head in heads_of(config) if any(path.rpartition(".")[2] == head for path in found.places)}
    )
    if present:
        values.modules_to_save = sorted({*(values.modules_to_save or ()), *present})
    linear: list[str] = []
    if is_all_linear(values.target_modules):
        linear = [p.path for p in found.places.values() if is_linear(p.module) and p.module is not facts.output_head]
    return select(found.places, TargetSpec.from_config(config), linear=linear)


def heads_of(config: PeftConfig) -> set[str]:
    """The names of the modules that a config's task trains whole, where the model has them."""
    return {name for companion in COMPANIONS.values() for name in companion.optional(config)}


def is_linear(module: nn.Module) -> bool:
    """Whether "all-linear" means this module."""
    return isinstance(module.host if isinstance(module, AdapterLayer) else host_for(module), LinearHost)


def choose_companion(
    companion: Companion, config: PeftConfig, found: Found, facts: ModelFacts, selection: Selection
) -> Selection:
    """Which modules a companion's field means.

    Raises: ConfigError if it means the table of inputs, and the model has none that is known.
    """
    if companion.whole:
        return Selection(selection.saved, (), ())
    names = tuple(companion.targets(config))
    if not names:
        return Selection((), (), ())
    chosen = select(found.places, TargetSpec(target_modules=tuple(name for name in names if name != INPUTS)))
    tables = [path for path in found.places if innermost(found.at(path).module) is facts.input_table]
    if INPUTS in names and not tables:
        raise ConfigError(
            f"`{companion.field}` does not name an embedding, and the one for the inputs of a model like this is not "
            f'known: name it, as in `{companion.field}={{"embed_tokens": [...]}}`. Nothing was changed.'
        )
    unmatched = tuple(entry._replace(field=companion.field) for entry in chosen.unmatched)
    return Selection((*(tables[:1] if INPUTS in names else ()), *chosen.targets), (), unmatched)


def check_once(sites: Sequence[Site]) -> None:
    """Refuse a module that several fields of a config name.

    Raises: ConfigError.
    """
    owners: dict[str, Site] = {}
    for site in sites:
        other = owners.setdefault(site.path, site)
        if other.tuner is not site.tuner:
            raise ConfigError(
                f"`{site.path}` would get a {other.tuner.peft_type} and a {site.tuner.peft_type} adapter; a module can "
                "have one: name it in one field of the config only. Nothing was changed."
            )


def choose_parameters(config: Any, found: Found) -> Selection:
    """Which parameters `target_parameters` means, by the rules for names of modules."""
    names = tuple(getattr(config, "target_parameters", None) or ())
    if not names:
        return Selection((), (), ())
    selection = select(found.parameter_paths(), TargetSpec(target_modules=names))
    unmatched = tuple(entry._replace(field="target_parameters") for entry in selection.unmatched)
    return selection._replace(unmatched=unmatched)


def joint_unmatched(selection: Selection, parameters: Selection, heads: Collection[str]) -> tuple[Unmatched, ...]:
    """The entries that match nothing among modules and parameters together; heads may, whoever named them."""
    kept = [
        entry
        for entry in selection.unmatched
        if not (entry.field == "modules_to_save" and entry.entry in heads)
        and not (
            entry.field in ("rank_pattern", "alpha_pattern")
            and any(match_pattern([str(entry.entry)], path) for path in parameters.targets)
        )
    ]
    return (*kept, *parameters.unmatched)


def with_inner(found: Found, wanted: Iterable[Wanted]) -> list[Wanted]:
    """`wanted`, and the children that a wanted module reads without calling them, right after it."""
    result: dict[Wanted, None] = {}
    for path, param in wanted:
        result[path, param] = None
        module = found.at(path).module
        host = found.host(path, None) if param is None else None
        if host is not None:
            slot = f"{module.tuner.base_slot}." if isinstance(module, AdapterLayer) else ""
            result.update({(f"{path}.{slot}{child}", None): None for child in host.inner})
    return list(result)


def make_sites(found: Found, wanted: Iterable[Wanted], tuner: TunerSpec, config: PeftConfig) -> list[Site]:
    """One site per module or parameter.

    Raises: UnsupportedLayerError.
    """
    variant = tuner.variant_for(config)
    grouped = {(id(found.at(path).module), param): found.everywhere(path) for path, param in wanted}
    sites, refused = [], []
    for (_, param), group in grouped.items():
        path = group[0].path if param is None else f"{group[0].path}.{param}"
        module = group[0].module
        host = found.host(group[0].path, param) or (ModuleHost(innermost(module)) if tuner.any_module else None)
        reason = why_not(module, host, tuner) or (variant.check(host, config, path) if host else None)
        if host is None or reason is not None:
            refused.append(f"`{path}` ({reason})")
            continue
        rank, parameters = variant.size(host, config, path)
        sites.append(Site(group, tuner, variant, host, rank, parameters, param, found.shares_weight(host)))
    if refused:
        field = next((one.field for one in COMPANIONS.values() if one.tuner is tuner), "target_modules")
        instead = ", or these in `exclude_modules`" if field == "target_modules" else ""
        raise UnsupportedLayerError(
            f"{tuner.peft_type} cannot adapt {', '.join(refused[:5])}{' ...' if len(refused) > 5 else ''}. "
            f"Name other modules in `{field}`{instead}. Nothing was changed."
        )
    return sites


def make_module_sites(found: Found, config: PeftConfig, tuner: TunerSpec, paths: Iterable[str]) -> list[Site]:
    """One site per module."""
    return make_sites(found, [(path, None) for path in paths], tuner, config)


def why_not(module: nn.Module, host: Host | None, tuner: TunerSpec) -> str | None:
    """Why a module cannot take an adapter of this tuner at all."""
    if isinstance(module, AdapterLayer) and module.tuner is not tuner:
        return f"it has {module.tuner.peft_type} adapters already"
    if host is None:
        return f"{type(module).__name__}, where the kinds of layer with adapters are {', '.join(known_kinds())}"
    return None


def complete(config: Any, tuner: TunerSpec, sites: Sequence[Site], selection: Selection, paths: Sequence[str]) -> None:
    """Write into the model's own copy of the config what "all-linear" came to, and what the layers say."""
    if is_all_linear(config.target_modules):
        for entries in ways_to_name(selection.targets):
            config.target_modules = entries
            if select(paths, TargetSpec.from_config(config)).targets == selection.targets:
                break
    if tuner.resolve is not None:
        tuner.resolve(config, [(site.path, site.host) for site in sites if site.tuner is tuner])


# ---- commit
@atomic
def inject(
    model: nn.Module,
    config: PeftConfig,
    adapter_name: str = "default",
    *,
    low_cpu_mem_usage: bool = False,
    autocast_adapter_dtype: bool = True,
    unmatched: UnmatchedPolicy = "error",
    trainable: bool | None = None,
) -> InjectionPlan:
    """Add an adapter to `model`, in place. The first one becomes active, and the base model stops training.

    Adapters' tensors are fp32 on a base in half precision, unless `autocast_adapter_dtype=False`; with
    `low_cpu_mem_usage` they are on the meta device, to be loaded. `trainable` defaults to the opposite of the config's
    `inference_mode`.

    Raises: what `plan` raises; the model is then as it was.
    """
    planned = plan(model, config, adapter_name, unmatched=unmatched, autocast_adapter_dtype=autocast_adapter_dtype)
    commit(planned, planned.build(low_cpu_mem_usage), not config.inference_mode if trainable is None else trainable)
    return planned


@atomic
def commit(planned: InjectionPlan, built: Sequence[Mapping[str, Any]], trainable: bool) -> None:
    """Attach what was made for each site of a plan; all of it, or nothing."""
    base, name = planned.model, planned.adapter_name
    state = find_state(base)
    first = state is None
    if state is None:
        state = AdapterState(facts_of(base).vocab_size)
        freeze(base)
    if planned.replicas is not None:
        planned.replicas.attach()
        state.change(replicas=planned.replicas)
    attached: dict[str, AdapterLayer] = {}
    for site, values in zip(planned.sites, built, strict=True):
        attached[site.path] = attach_at(site, state, name, values)
    for site in planned.sites:
        if site.leader is not None:
            attached[site.path].follow(name, site.variant, attached[site.leader])
    for container in state.shared.values():
        if name in container and not planned.saves_shared:
            container.leave_out(name)
    state.add(name, planned.config, trainable)
    if first:
        activate(base, state, (name,))
    else:
        present = list(layers(base))
        sync(base, state, (name,), present)
        rebind(base, state, present)
    attach(base, tuner_for(planned.config))
    observe(base, planned.config)


def attach_at(site: Site, state: AdapterState, name: str, values: Mapping[str, Any]) -> AdapterLayer:
    """The adapter layer of a site, with the adapter on it, if it does not follow another's."""
    layer, new = layer_at(site, state)
    if site.shared and not layer.shared_weight:
        put(layer.__dict__, "shared_weight", True)
    if site.leader is not None:
        return layer
    if not new or site.variant.mixes or NEW_WEIGHT in values or any([slot.shared for slot in site.tuner.slots]):
        layer.add(name, site.variant, values)
    else:  # all of it goes if the layer does
        unnoted(layer.add, name, site.variant, values)
    return layer


def layer_at(site: Site, state: AdapterState) -> tuple[AdapterLayer, bool]:
    """The adapter layer of a site, put around what is in its places if it is not there yet; whether it was not."""
    module = current = site.places[0].parent._modules[site.places[0].child]
    while isinstance(current, AdapterLayer):
        if current.param == site.param:
            return current, False
        current = current.wrapped
    if module is None:  # the plan found it there
        raise StateError(f"`{site.path}` is gone. The model was changed between plan and commit.")
    layer = AdapterLayer(module, site.tuner, state, site.param)
    for place in site.places:
        have_called(layer, place.parent)
        put(place.parent._modules, place.child, layer)
    return layer, True
