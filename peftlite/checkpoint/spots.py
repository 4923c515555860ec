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
    stack: list[tuple[str, nn.Module, AdapterLayer | None, bool]] = [("", base, None, False)]
    while stack:
        path, module, around, adapted = stack.pop()
        at = id(module)
        if at in seen:
            continue
        seen.add(at)
        for site in coming.get(at, ()):
            yield Spot(path, module, site, around, adapted)
            path, adapted = joined_path(path, base_in_files(site.tuner)), adapts(site.tuner)
        if isinstance(module, AdapterLayer):
            joining = joined.get(at)
            if joining is not None or name in module.variants:
                yield Spot(path, module, joining, around, adapted)
                path, adapted = joined_path(path, base_in_files(module.tuner)), adapts(module.tuner) or adapted
            stack.append((path, module.wrapped, module, adapted))
            continue
        yield Spot(path, module, None, around, adapted)
        if module._modules:
            for child, inner in reversed(children(module, instead)):
                stack.append((joined_path(path, child), inner, None, False))


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
