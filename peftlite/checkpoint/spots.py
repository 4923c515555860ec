"""Walking a model as the file of one adapter sees it: as if no other adapter were there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import NamedTuple

from torch import nn

from peftlite.checkpoint.keys import WRAPPER_PARTS
from peftlite.core.layer import AdapterLayer
from peftlite.core.plan import InjectionPlan, Site
from peftlite.core.tree import NOTHING, children
from peftlite.core.variant import COMPANIONS, TunerSpec


class Spot(NamedTuple):
    """A module, by the path that it has in files of one adapter."""

    path: str
    module: nn.Module
    site: Site | None = None
    """The site of a plan that puts a new adapter layer here, or an adapter on this one."""
    around: AdapterLayer | None = None
    """The adapter layer whose base layer this is, whosever adapters it has."""
    adapted: bool = False
    """Whether the adapter in question is, or will be, on it."""


def spots(
    base: nn.Module, name: str, planned: InjectionPlan | None = None, instead: Mapping[int, nn.Module] = NOTHING
) -> Iterator[Spot]:
    """Every module, each once and parents first: adapter layers with this adapter, layers to come, and base modules."""
    coming: dict[int, list[Site]] = {}
    joined: dict[int, Site] = {}
    for site in planned.sites if planned is not None else ():
        layer = site.layer
        if layer is None:
            coming.setdefault(id(site.module), []).insert(0, site)  # a later one goes around an earlier one
        else:
            joined[id(layer)] = site
    instead = instead if planned is None else planned.instead
    seen: set[int] = set()
    stack = [Spot("", base)]
    while stack:
        spot = stack.pop()
        if id(spot.module) in seen:
            continue
        seen.add(id(spot.module))
        for site in coming.get(id(spot.module), ()):
            yield spot._replace(site=site)
            path = joined_path(spot.path, base_in_files(site.tuner))
            spot = spot._replace(path=path, adapted=adapts(site.tuner))
        module = spot.module
        if isinstance(module, AdapterLayer):
            holds = name in module.variants or id(module) in joined
            if holds:
                yield spot._replace(site=joined[id(module)]) if id(module) in joined else spot
            path = joined_path(spot.path, base_in_files(module.tuner)) if holds else spot.path
            adapted = holds and adapts(module.tuner)
            stack.append(Spot(path, module.wrapped, None, module, adapted or spot.adapted))
            continue
        yield spot
        for child, inner in reversed(children(module, instead)):
            stack.append(Spot(joined_path(spot.path, child), inner))


def joined_path(path: str, name: str) -> str:
    """The path of a child; what torch.compile and FSDP put between leaves no trace in files."""
    if name in WRAPPER_PARTS:
        return path
    return f"{path}.{name}" if path else name


@cache
def is_companion(tuner: TunerSpec) -> bool:
    """Whether a tuner comes along with others."""
    return any(companion.tuner is tuner for companion in COMPANIONS.values())


@cache
def is_whole(tuner: TunerSpec) -> bool:
    """Whether a tuner's layers hold whole modules rather than adapters."""
    return any(companion.tuner is tuner and companion.whole for companion in COMPANIONS.values())


def adapts(tuner: TunerSpec) -> bool:
    """Whether a tuner's adapters change what their layers compute as a whole."""
    return not is_whole(tuner) and not tuner.few_rows


def base_in_files(tuner: TunerSpec) -> str:
    """What files call the place of the base layer."""
    return tuner.base_file or tuner.base_slot
