"""One walk over a model, for those who plan: which modules are where, and which share a parameter."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from peftlite.core.hosts import Host, ParamHost, host_for, is_borrowed
from peftlite.core.layer import AdapterLayer
from peftlite.core.replicas import Replicas
from peftlite.core.tree import NOTHING, Place, places

Wanted = tuple[str, "str | None"]  # the path of a module, and the name of its parameter where it is about one


@dataclass(frozen=True)
class Found:
    """One walk over a model: its modules by path, and who uses each parameter."""

    places: dict[str, Place]
    """Where modules are; of adapter layers, not what is inside."""
    inside: dict[str, Place]
    """Where modules inside adapter layers are."""
    modules: dict[int, list[Place]] = field(default_factory=dict)
    """id of a module -> its places; one that is in several gets one adapter, in all of them."""
    uses: dict[int, set[int]] = field(default_factory=dict)
    """id of a parameter -> ids of the modules that have it."""
    replicas: Replicas | None = None
    hosts: dict[tuple[int, str | None], Host | None] = field(default_factory=dict)
    """What is known of modules and parameters (see `host_at`) that somebody asked for."""

    @classmethod
    def of(cls, base: nn.Module, replicas: Replicas | None = None) -> Found:
        """Of a model; with replicas, as it is with these."""
        instead = NOTHING if replicas is None else replicas.instead
        found, inside = cls({}, {}, replicas=replicas), "" if isinstance(base, AdapterLayer) else None
        for place in places(base, True, instead):
            if inside is not None and place.path.startswith(inside):
                found.inside[place.path] = place
            else:
                inside = f"{place.path}." if isinstance(place.module, AdapterLayer) else None
                found.places[place.path] = place
                found.modules.setdefault(id(place.module), []).append(place)
            for parameter in place.module._parameters.values():
                if parameter is not None:
                    found.uses.setdefault(id(parameter), set()).add(id(place.module))
        return found

    def everywhere(self, path: str) -> tuple[Place, ...]:
        """All places of the module at this path, the first of the model's first."""
        module = self.at(path).module
        return tuple(self.modules.get(id(module), (self.at(path),)))

    def at(self, path: str) -> Place:
        """The place of this path."""
        return self.places[path] if path in self.places else self.inside[path]

    def host(self, path: str, param: str | None) -> Host | None:
        """The host of the module at this path, or of one of its parameters."""
        module = self.at(path).module
        key = id(module), param
        if key not in self.hosts:
            self.hosts[key] = host_at(module, param)
        return self.hosts[key]

    def parameter_paths(self) -> list[str]:
        """The paths of the parameters that modules own themselves, in the modules' order."""
        return [
            f"{path}.{name}"
            for path, place in self.places.items()
            for name, parameter in innermost(place.module)._parameters.items()
            if parameter is not None
        ]

    def split(self, path: str) -> Wanted:
        """(module, parameter) of a parameter's path."""
        module, _, name = path.rpartition(".")
        return module, name

    def shares_weight(self, host: Host) -> bool:
        """Whether the host's parameter or bias is another module's too, or lies on another model's storage."""
        own = [host.parameter, *([] if host.bias is None else [host.bias])]
        return any(len(self.uses.get(id(one), ())) > 1 or is_borrowed(one) for one in own)

    def sharers(self, host: Host) -> list[str]:
        """The paths of all modules that have the host's parameter, but for those in replicas of its layer."""
        users = self.uses.get(id(host.parameter), ())
        paths = {id(innermost(place.module)): path for path, place in reversed(self.places.items())}
        own = paths.get(id(host.layer), "")
        shared = [path for path in self.places if any(paths.get(user) == path for user in users)]
        return [path for path in shared if self.replicas is None or not self.replicas.apart(own, path)]


def innermost(module: nn.Module) -> nn.Module:
    """The base layer of an adapter layer, or the module itself."""
    return module.get_base_layer() if isinstance(module, AdapterLayer) else module


def host_at(module: nn.Module, param: str | None) -> Host | None:
    """The host of a module (of the base layer, if it has adapters), or of one of its parameters."""
    return host_for(innermost(module)) if param is None else ParamHost(innermost(module), param)
